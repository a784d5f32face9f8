// From gradients per pair to gradients per feature, first and second. Part of cuda.cu.
#pragma once

#include "pairwise/cuda_tile.h"

namespace metafast::cuda {
namespace {

// ---- from gradients per pair to gradients per feature ----

// How many factors a pair has: that of the term's first derivative, before it that of the second derivative,
// and behind them what cosine adds as multiples of the row itself and of its tangent.
template <class M, bool kSecond>
constexpr int kFactors = (kSecond ? 2 : 1) * (M::kCosine ? 2 : 1);

// Of a pair with gradient g of its value `out`.
template <class M, typename T>
__device__ __forceinline__ void first_factors(Metric metric, T g, T out, const RowNorms<T>& x, int i,
                                              const RowNorms<T>& y, int j, T (&factors)[kFactors<M, false>]) {
  if constexpr (M::kCosine) {
    factors[0] = g * x.inverse[i] * y.inverse[j];
    factors[1] = g * (1 - out);
  } else {
    factors[0] = g * link_first<M>(metric, out) * M::Term::kDerivative;
  }
}

// Of a pair in g * tangent + first * out, with g and first held fixed.
template <class M, typename T>
__device__ __forceinline__ void second_factors(Metric metric, T g, T first, T out, T tangent,
                                               const RowNorms<T>& x, int i, const RowNorms<T>& y, int j,
                                               T (&factors)[kFactors<M, true>]) {
  if constexpr (M::kCosine) {  // math.h, CosineSecond, with sigma split into factors[3] - 2 inner factors[2]
    const T inverse = x.inverse[i] * y.inverse[j], cosine = 1 - out;
    factors[0] = g * inverse;
    factors[1] = inverse * (first - g * (x.inner[i] + y.inner[j]));
    factors[2] = g * cosine;
    factors[3] = first * cosine - g * tangent;
  } else {
    const T slope = link_first<M>(metric, out);
    T grad = first * slope;
    if constexpr (!kIsLinear<M>) {
      if (slope != 0) grad += g * link_second<M>(metric, out) * (tangent / slope);
    }
    factors[0] = g * slope * M::Term::kDerivative;
    factors[1] = grad * M::Term::kDerivative;
  }
}

// The weight and its tangent at one feature.
template <typename T>
struct FeatureWeight {
  T weight, tangent;

  __device__ FeatureWeight(const T* weight, const T* tangent, int64_t d)
      : weight(weight != nullptr ? weight[d] : T(1)), tangent(tangent != nullptr ? tangent[d] : T(0)) {}
};

// The gradient of one feature of one row, `self`, of x or (kOfY) of y, while the other side's rows pass.
template <class M, bool kSecond, bool kOfY, typename T>
struct FeatureGradient {
  using Term = typename M::Term;

  T self, tangent;
  T sum = 0, own = 0, own_tangent = 0;

  __device__ void add(T other, T other_tangent, const T (&factors)[kFactors<M, kSecond>],
                      const FeatureWeight<T>& w) {
    const T slope = kOfY ? Term::dy(other, self) : Term::dx(self, other);
    if constexpr (!kSecond) {
      sum += factors[0] * slope;
      if constexpr (M::kCosine) own += factors[1];
    } else {
      sum += (factors[0] * w.tangent + factors[1] * w.weight) * slope;
      if constexpr (Term::kCurved) {
        sum += factors[0] * w.weight *
               (kOfY ? Term::ddy(other, self, other_tangent, tangent)
                     : Term::ddx(self, other, tangent, other_tangent));
      }
      if constexpr (M::kCosine) {
        own_tangent += factors[2];
        own += factors[3];
      }
    }
  }

  __device__ T total(const FeatureWeight<T>& w, const RowNorms<T>& norms, int row) const {
    T result = kSecond ? sum : w.weight * sum;
    if constexpr (M::kCosine && !kSecond) result += norms.slope[row] * own * self;
    if constexpr (M::kCosine && kSecond) {
      result +=
          norms.slope[row] * (own_tangent * tangent + (own - 2 * norms.inner[row] * own_tangent) * self);
    }
    return result;
  }
};

// Factors per pair in shared memory: `kFactors` planes. By default a plane is [other][pitch] with the rows
// whose gradients are wanted along the pitch; self_major planes are [self][pitch].
template <typename T>
struct FactorPlanes {
  T* first;   // aligned to 16 bytes
  int plane;  // elements from plane to plane
  int pitch;  // a multiple of kMaxSelves
};

// Rows whose gradients a thread sums at once, as its registers allow.
template <bool kSecond>
constexpr int kSelves = kSecond ? 4 : 8;
constexpr int kMaxSelves = kSelves<false>;

// Adds to the gradients of feature d of rows self.. what all of `other` gives them.
template <bool kSelfMajor, class M, bool kSecond, bool kOfY, typename T>
__device__ __forceinline__ void add_others(FeatureGradient<M, kSecond, kOfY, T> (&grads)[kSelves<kSecond>],
                                           const FactorPlanes<T>& factors, int self, const Rows<T>& other,
                                           const Rows<T>& other_tangent, int64_t d,
                                           const FeatureWeight<T>& w) {
  constexpr int kPlanes = kFactors<M, kSecond>;
  // Each turn takes as many of the others as one vector of factors along the pitch holds.
  constexpr int kLength = kVectorLength<T>;
  constexpr int kOthers = kSelfMajor ? kLength : 1;
  for (int o = 0; o < other.count; o += kOthers) {
    T others[kOthers], tangents[kOthers] = {};
#pragma unroll
    for (int k = 0; k < kOthers; ++k) {
      others[k] = other[o + k][d];
      if constexpr (kSecond) tangents[k] = other_tangent[o + k][d];
    }
    if constexpr (kSelfMajor) {
#pragma unroll
      for (int i = 0; i < kSelves<kSecond>; ++i) {
        Vector<T, kLength> loaded[kPlanes];
#pragma unroll
        for (int f = 0; f < kPlanes; ++f) {
          loaded[f] =
              load_vector<kLength>(factors.first + f * factors.plane + (self + i) * factors.pitch + o);
        }
#pragma unroll
        for (int k = 0; k < kOthers; ++k) {
          T pair[kPlanes];
#pragma unroll
          for (int f = 0; f < kPlanes; ++f) pair[f] = loaded[f].values[k];
          if (o + k < other.count) grads[i].add(others[k], tangents[k], pair, w);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSelves<kSecond>; i += kLength) {
        Vector<T, kLength> loaded[kPlanes];
#pragma unroll
        for (int f = 0; f < kPlanes; ++f) {
          loaded[f] = load_vector<kLength>(factors.first + f * factors.plane + o * factors.pitch + self + i);
        }
#pragma unroll
        for (int k = 0; k < kLength; ++k) {
          T pair[kPlanes];
#pragma unroll
          for (int f = 0; f < kPlanes; ++f) pair[f] = loaded[f].values[k];
          grads[i + k].add(others[0], tangents[0], pair, w);
        }
      }
    }
  }
}

}  // namespace

}  // namespace metafast::cuda
