// Four coordinates at once, and the nonlinearities. Part of cuda.cu.
#pragma once

#include "common/cuda.h"
#include "common/math.h"
#include "common/ptx.h"

namespace metafast::cuda {
namespace {

constexpr int kGates = 4;
constexpr int kQuad = 4;  // coordinates that a thread takes at once

template <typename T>
struct Quad {
  T values[kQuad];
};

template <typename T, typename S>
__device__ __forceinline__ T converted(S value) {
  return static_cast<T>(to_accumulate(value));
}

template <typename T, typename S>
__device__ __forceinline__ void convert(T value, S& out) {
  from_accumulate(static_cast<accumulate_t<S>>(value), out);
}

template <typename T>
constexpr int kQuadLength = kVectorLength<T> < kQuad ? kVectorLength<T> : kQuad;  // of one load

// `aligned`: to 16 bytes, or less for numbers of less than 4 bytes.
template <typename T, typename S>
__device__ __forceinline__ Quad<T> load_quad(const S* address, bool aligned = true) {
  constexpr int kLength = kQuadLength<S>;
  Quad<T> quad;
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) quad.values[i] = converted<T>(address[i]);
    return quad;
  }
#pragma unroll
  for (int i = 0; i < kQuad; i += kLength) {
    const Vector<S, kLength> vector = load_vector<kLength>(address + i);
#pragma unroll
    for (int v = 0; v < kLength; ++v) quad.values[i + v] = converted<T>(vector.values[v]);
  }
  return quad;
}

template <typename T, typename S>
__device__ __forceinline__ void store_quad(S* address, const Quad<T>& quad, bool aligned = true) {
  constexpr int kLength = kQuadLength<S>;
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) convert(quad.values[i], address[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; i += kLength) {
    Vector<S, kLength> vector;
#pragma unroll
    for (int v = 0; v < kLength; ++v) convert(quad.values[i + v], vector.values[v]);
    store_vector(address + i, vector);
  }
}

// ---- nonlinearities ----

// In float the argument of the exponential is rounded once, a relative error of |x| 2^-24 that the sum before
// has already; the two further operations are good to two units in the last place.
__device__ __forceinline__ float sigmoid(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return reciprocal_approx(1.0f + exp2_approx(-kLog2E * x));
}
__device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }

}  // namespace

}  // namespace metafast::cuda
