// Scalar/vector neutral arithmetic for the formulas that CPU and CUDA kernels share.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define METAFAST_HD __host__ __device__ __forceinline__
#else
// Always inlined: the same formula is compiled for several instruction sets, and an out-of-line copy of the
// widest one must never be what the linker keeps for all of them.
#define METAFAST_HD inline __attribute__((always_inline))
#endif

namespace metafast {

// Elementary functions on V, a float or double, or (simd.h specialises it) a vector of them.
template <typename V>
struct Math {
  static METAFAST_HD V constant(double c) { return static_cast<V>(c); }
  static METAFAST_HD V exp(V x) { return ::exp(x); }
  static METAFAST_HD V log(V x) { return ::log(x); }
  static METAFAST_HD V log1p(V x) { return ::log1p(x); }
  static METAFAST_HD V sqrt(V x) { return ::sqrt(x); }
  static METAFAST_HD V tanh(V x) { return ::tanh(x); }
};

template <>
struct Math<float> {
  static METAFAST_HD float constant(double c) { return static_cast<float>(c); }
  static METAFAST_HD float exp(float x) { return ::expf(x); }
  static METAFAST_HD float log(float x) { return ::logf(x); }
  static METAFAST_HD float log1p(float x) { return ::log1pf(x); }
  static METAFAST_HD float sqrt(float x) { return ::sqrtf(x); }
  static METAFAST_HD float tanh(float x) { return ::tanhf(x); }
};

}  // namespace metafast
