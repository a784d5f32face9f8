// The nonlinearities of an LSTM, five for each unit: nearly half the time of a step goes here, so float has
// its own.
#pragma once

#include "common/simd.h"
#include "learned_optimizer/math.h"

namespace metafast::METAFAST_ISA {

// Within [-end, end]; NaN stays.
METAFAST_HD Vec<float> clamp(Vec<float> x, float end) {
  const Vec<float> high = broadcast(end);
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, -high,
                             _mm512_maskz_min_ps(0xffff, high, x));  // g++ 12 warns about the plain ones
#elif defined(__AVX2__)
  return _mm256_max_ps(-high, _mm256_min_ps(high, x));
#elif defined(__SSE2__)
  return _mm_max_ps(-high, _mm_min_ps(high, x));
#else
  x = x > high ? high : x;
  return x < -high ? -high : x;
#endif
}

template <typename T>
struct Nonlinear {
  static METAFAST_HD Vec<T> tanh(Vec<T> x) { return Math<Vec<T>>::tanh(x); }
  static METAFAST_HD Vec<T> sigmoid(Vec<T> x) { return 1 / (1 + Math<Vec<T>>::exp(-x)); }
};

// tanh(x) is x P(x^2) / Q(x^2), a minimax quotient of this form on [-8.875, 8.875], with the end at exactly
// 1: where a unit is saturated, 1 - tanh^2 must be 0. tanh is within 4e-7, sigmoid within 2e-7, absolute
// (tests/test_simd.py measures it).
template <>
struct Nonlinear<float> {
  static METAFAST_HD Vec<float> tanh(Vec<float> x) {
    x = clamp(x, 8.875f);
    const Vec<float> z = x * x;
    Vec<float> p = broadcast(1.46632546105252e-08f), q = broadcast(8.32563500807737e-07f);
    p = p * z + 2.1598991224891506e-05f;
    p = p * z + 0.0035576648078858852f;
    p = p * z + 0.13433890044689178f;
    p = p * z + 1;
    q = q * z + 0.00033858208917081356f;
    q = q * z + 0.02611503377556801f;
    q = q * z + 0.46767228841781616f;
    q = q * z + 1;
    return x * p / q;
  }
  static METAFAST_HD Vec<float> sigmoid(Vec<float> x) { return 0.5f + 0.5f * tanh(0.5f * x); }
};

// One unit of an LSTM layer. `sums` are its gates before their nonlinearities.
template <typename T>
struct Unit {
  LstmGates<Vec<T>> gates;
  Vec<T> c, h;
};

template <typename T>
METAFAST_HD Unit<T> lstm_unit(const LstmGates<Vec<T>>& sums, Vec<T> c_before) {
  using N = Nonlinear<T>;
  Unit<T> unit;
  unit.gates = {N::sigmoid(sums.i), N::sigmoid(sums.f), N::tanh(sums.g), N::sigmoid(sums.o)};
  unit.c = unit.gates.f * c_before + unit.gates.i * unit.gates.g;
  unit.h = unit.gates.o * N::tanh(unit.c);
  return unit;
}

}  // namespace metafast::METAFAST_ISA
