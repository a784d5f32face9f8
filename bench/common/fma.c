/* As many FMAs as registers feed: the most arithmetic a core does. Compiled and called by machine.py. */

#if defined(__AVX512F__)
enum { kBytes = 64, kSums = 24 };
#elif defined(__AVX__)
enum { kBytes = 32, kSums = 12 };
#else
enum { kBytes = 16, kSums = 12 };
#endif
typedef float vector __attribute__((vector_size(kBytes)));

/* Returns how many floating-point operations it did. */
double multiply_and_add(long rounds) {
  vector sums[kSums], factor, term;
  for (int i = 0; i < kSums; ++i) sums[i] = (vector){} + (float)i;
  factor = (vector){} + 0.999f;
  term = (vector){} + 0.001f;
  for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + term;
  }
  vector all = sums[0];
  for (int i = 1; i < kSums; ++i) all += sums[i];
  volatile float used = all[0];
  (void)used;
  return 2.0 * (kBytes / sizeof(float)) * kSums * (double)rounds;
}
