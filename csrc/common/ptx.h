// Instructions that CUDA C++ has no name for: no other file holds inline PTX. The emulator has a header of
// this name, tests/cuda_emulator/common/ptx.h, which says the same in plain C++.
#pragma once

#include <cuda_runtime.h>

namespace metafast::cuda {

// ---- the special function unit: 2^x and 1 / x, within two units in the last place; denormal is 0 ----

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// threadIdx.x, read anew at every call. What follows from threadIdx.x itself the compiler finds once and
// keeps in registers through all loops; a kernel that needs those for its numbers begins with this one.
__device__ __forceinline__ int fresh_thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// ---- copies into shared memory through the multiprocessor's own cache: what neighbours will copy as well
// ----

// As copy_async() in cuda.h, which goes past that cache.
template <int N, typename T>
__device__ __forceinline__ void copy_async_cached(T* shared, const T* global, bool inside) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? static_cast<int>(N * sizeof(T)) : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(N * sizeof(T)),
               "r"(bytes)
               : "memory");
}

// ---- tensor cores: float32's accuracy from three products of TF32, whose numbers have 11 bits ----

// A number as the nearest of 11 bits and what is left of it: to 2^-22 of it, for tensor cores take no more
// than 11 bits of that either. Of numbers beyond 3.4e38 the first part may be infinite.
struct Tf32Pair {
  float high, low;
};

__device__ __forceinline__ Tf32Pair split_tf32(float x) {
  const float high = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
  return {high, x - high};
}

// sums [16, 8] += a [16, 8] b [8, 8], by a warp. Lane 4 g + t has a at rows g, g + 8, g, g + 8 and columns t,
// t, t + 4, t + 4; b at rows t, t + 4 of column g; sums at rows g, g, g + 8, g + 8 and columns 2t, 2t + 1,
// 2t, 2t + 1.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

__device__ __forceinline__ void multiply_add(float (&sums)[4], const Tf32Pair (&a)[4],
                                             const Tf32Pair (&b)[2]) {
  const float a_high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  const float a_low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
  const float b_high[2] = {b[0].high, b[1].high}, b_low[2] = {b[0].low, b[1].low};
  multiply_add(sums, a_low, b_high);
  multiply_add(sums, a_high, b_low);
  multiply_add(sums, a_high, b_high);
}

// For one product of TF32 alone: tensor cores cut off the bits that TF32 has not, so that results would be
// too small by 2^-11. Made larger by what is lost on average, numbers are too small as often as too large;
// those with 11 bits stay as they are, infinity and NaN too.
__device__ __forceinline__ float before_tf32(float x) { return x * (1 + 0.7f / (1 << 11)); }

// ---- tensor cores: products of bfloat16 ----

// Two numbers rounded to the nearest, ties to even; the first is the lower half.
__device__ __forceinline__ unsigned bfloat16_pair(float first, float second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// sums [16, 8] += a [16, 16] b [16, 8], by a warp, of pairs of neighbours along the 16. Lane 4 g + t has a at
// rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8, 2t + 8; b at rows 2t, 2t + 8 of column g; sums as
// above.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace metafast::cuda
