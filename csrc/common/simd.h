// SIMD for the CPU kernels: the compiler's vector extensions at the width of the instruction set that this
// translation unit is compiled for. Vec<T> has the operators of T, lane by lane; comparisons select with ?:.
//
// Why no SIMD library: the operators cover all that the kernels do but loads of a part of a vector, sums
// across lanes and four elementary functions, which are below.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/math.h"

namespace metafast::METAFAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Integers of the width of T, one per lane: what comparing two Vec<T> gives (-1 true, 0 false).
template <typename T>
struct MaskOf;
template <>
struct MaskOf<float> {
  using type = int32_t;
};
template <>
struct MaskOf<double> {
  using type = int64_t;
};
template <typename T>
using Mask = Vec<typename MaskOf<T>::type>;

template <typename T>
METAFAST_HD Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // x - 0 is x, also for x = -0, so no subtraction is left; 0 + x would be one
}

template <typename T>
METAFAST_HD Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
METAFAST_HD void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The first n < kLanes elements; the other lanes are 0 and their memory is not touched.
template <typename T>
METAFAST_HD Vec<T> load_partial(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_ps((1u << n) - 1, p);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_loadu_pd((1u << n) - 1, p);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (Vec<T>)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  }
  if constexpr (sizeof(T) == 8) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return (Vec<T>)_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane));
  }
#else
  Vec<T> v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

template <typename T>
METAFAST_HD void store_partial(T* p, Vec<T> v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, (1u << n) - 1, v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), v);
  }
  if constexpr (sizeof(T) == 8) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    _mm256_maskstore_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane), v);
  }
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// Whether a comparison holds in any lane.
template <typename T>
METAFAST_HD bool any(Mask<T> mask) {
#if defined(__AVX512F__)
  return sizeof(T) == 4 ? _mm512_movepi32_mask((__m512i)mask) != 0 : _mm512_movepi64_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  bool result = false;
  for (int i = 0; i < kLanes<T>; ++i) result |= mask[i] != 0;
  return result;
#endif
}

// Calls f(offset, access) over `count` elements, a vector at a time; access.load(p) and access.store(p, v)
// read and write at p + offset, the last time perhaps only a part of a vector. The two calls are compiled
// apart, so that no vector of the main loop asks whether it is whole.
template <typename T>
struct WholeVector {
  int64_t offset;
  METAFAST_HD Vec<T> load(const T* p) const { return METAFAST_ISA::load(p + offset); }
  METAFAST_HD void store(T* p, Vec<T> v) const { METAFAST_ISA::store(p + offset, v); }
};

template <typename T>
struct PartOfVector {
  int64_t offset;
  int count;
  METAFAST_HD Vec<T> load(const T* p) const { return load_partial(p + offset, count); }
  METAFAST_HD void store(T* p, Vec<T> v) const { store_partial(p + offset, v, count); }
};

template <typename T, class F>
METAFAST_HD void for_vectors(int64_t count, F&& f) {
  int64_t offset = 0;
  for (; offset + kLanes<T> <= count; offset += kLanes<T>) f(WholeVector<T>{offset});
  if (offset < count) f(PartOfVector<T>{offset, static_cast<int>(count - offset)});
}

// ---- lanes of two vectors ----

// Lane i of the result is lane from[i] of a, then b, counted on.
template <int... from, class V>
METAFAST_HD V pick_lanes(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, from...);
#else
  using Order = decltype(a < b);
  return __builtin_shuffle(a, b, Order{from...});
#endif
}

// ---- sums across lanes ----

// Lanes l of a with bit kHalf of l clear, of b elsewhere, each plus its partner lane l ^ kHalf.
template <int kHalf, typename T, int... l>
METAFAST_HD Vec<T> merge_halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, l...>) {
  constexpr int n = kLanes<T>;
  return pick_lanes<(l & kHalf ? n + l : l)...>(a, b) +
         pick_lanes<(l & kHalf ? n + (l ^ kHalf) : (l ^ kHalf))...>(a, b);
}

// Lane l of the result is the sum of the lanes of sums[l], kLanes of them: a tree of blends and shuffles, two
// for each pair of vectors, where summing the vectors one by one would take a tree for each.
template <typename T, int kCount = kLanes<T>>
METAFAST_HD Vec<T> sum_lanes(Vec<T>* sums) {
  if constexpr (kCount == 1) {
    return sums[0];
  } else {
    constexpr int half = kCount / 2;
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      sums[i] = merge_halves<half, T>(sums[i], sums[i + half], std::make_integer_sequence<int, kLanes<T>>{});
    }
    return sum_lanes<T, half>(sums);
  }
}

}  // namespace metafast::METAFAST_ISA

namespace metafast {

// ---- elementary functions ----

// float: minimax polynomials on reduced arguments, within 2 units in the last place, log1p from 0 up 2.5
// (tests/test_simd.py measures it); exp flushes results below FLT_MIN to zero. double: the C library, lane by
// lane.

template <>
struct Math<METAFAST_ISA::Vec<float>> {
  using V = METAFAST_ISA::Vec<float>;
  using I = METAFAST_ISA::Vec<int32_t>;

  static METAFAST_HD V constant(double c) { return static_cast<float>(c) - V{}; }

  static METAFAST_HD V exp(V x) {
    const V low = constant(-87.33654), high = constant(88.72283);
    V clamped = x < low ? low : x;
    clamped = clamped > high ? high : clamped;
    // x = n log 2 + r; adding and taking away 1.5 * 2^23 rounds to the nearest integer n.
    const V magic = constant(12582912.0);
    V n = (clamped * constant(1.44269504088896341) + magic) - magic;
    V r = clamped -
          n * constant(0.693359375);  // log 2 in two parts: the first has few bits, so n * it is exact
    r = r - n * constant(-2.12194440054690583e-4);
    V p = constant(0.001381459878757596);
    p = p * r + constant(0.008368716575205326);
    p = p * r + constant(0.04166838899254799);
    p = p * r + constant(0.1666652113199234);
    p = p * r + constant(0.4999999403953552);
    V y = p * (r * r) + r + 1;
    // 2^n in two factors, since 2^128 is no float.
    I k = __builtin_convertvector(n, I);
    I k_half = k >> 1;
    y = y * (V)((k_half + 127) << 23) * (V)((k - k_half + 127) << 23);
    y = x < low ? V{} : y;
    return x > high ? constant(__builtin_inf()) : (x == x ? y : x);
  }

  static METAFAST_HD V log(V x) {
    // Subnormals are scaled into the normal range first.
    const V tiny = constant(1.17549435e-38);
    V scaled = x < tiny ? x * constant(8388608.0) : x;
    I bits = (I)scaled;
    // x = m 2^e with m in [sqrt(1/2), sqrt(2))
    I e = ((bits - 0x3f3504f3) >> 23);
    V m = (V)(bits - (e << 23));
    V exponent = __builtin_convertvector(e, V) - (x < tiny ? constant(23) : V{});
    V s = (m - 1) / (m + 1), z = s * s;
    V p = constant(0.298730731010437);
    p = p * z + constant(0.399774968624115);
    p = p * z + constant(0.6666677594184875);
    V y = exponent * constant(-2.12194440054690583e-4) + p * z * s;
    y = y + 2 * s + exponent * constant(0.693359375);
    y = x == V{} ? constant(-__builtin_inf()) : y;
    y = x == constant(__builtin_inf()) ? x : y;
    return x >= V{} ? y : constant(__builtin_nan(""));
  }

  static METAFAST_HD V log1p(V x) {
    const V sum = 1 + x;
    const V y = log(sum) + (x - (sum - 1)) / sum;  // with what of x was rounded away
    return x == constant(__builtin_inf()) ? x : y;
  }

  static METAFAST_HD V sqrt(V x) {
#if defined(__AVX512F__)
    return _mm512_maskz_sqrt_ps(0xffff, x);  // g++ 12 warns about the plain one
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
    return _mm_sqrt_ps(x);
#else
    for (int i = 0; i < METAFAST_ISA::kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }

  static METAFAST_HD V tanh(V x) {
    V z = x * x;
    V p = constant(-0.005704986862838268);
    p = p * z + constant(0.02063908614218235);
    p = p * z + constant(-0.05373971536755562);
    p = p * z + constant(0.13331441581249237);
    p = p * z + constant(-0.3333328068256378);
    V small = p * (z * x) + x;
    V magnitude = x < V{} ? -x : x;
    V large = 1 - 2 / (exp(2 * magnitude) + 1);
    large = x < V{} ? -large : large;
    return magnitude < constant(0.625) ? small : large;
  }
};

template <>
struct Math<METAFAST_ISA::Vec<double>> {
  using V = METAFAST_ISA::Vec<double>;

  static METAFAST_HD V constant(double c) { return c - V{}; }
  template <typename F>
  static METAFAST_HD V each(V x, F f) {
    for (int i = 0; i < METAFAST_ISA::kLanes<double>; ++i) x[i] = f(x[i]);
    return x;
  }
  static METAFAST_HD V exp(V x) {
    return each(x, [](double v) { return ::exp(v); });
  }
  static METAFAST_HD V log(V x) {
    return each(x, [](double v) { return ::log(v); });
  }
  static METAFAST_HD V log1p(V x) {
    return each(x, [](double v) { return ::log1p(v); });
  }
  static METAFAST_HD V sqrt(V x) {
    return each(x, [](double v) { return __builtin_sqrt(v); });
  }
  static METAFAST_HD V tanh(V x) {
    return each(x, [](double v) { return ::tanh(v); });
  }
};

}  // namespace metafast
