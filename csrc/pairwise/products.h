// CPU: what is left of a large comparison when a matrix product of the library does the arithmetic (large.h),
// row by row of the products. It also has the rule by which squared distances are trusted to products at all.
#pragma once

#include <type_traits>

#include "pairwise/params.h"
#include "pairwise/tile.h"

namespace metafast::METAFAST_ISA {

// ---- rows around a centre ----

// Distances do not change when everything moves: with the mean of the rows at the origin, norms are as small
// as the spread of the rows allows, and little cancels in |x|^2 - 2 x.y + |y|^2. A feature whose mean is not
// finite stays where it is, so that one row's NaN is not everybody's.
template <typename T>
void mean_row(const T* rows, int64_t count, int64_t features, T* mean) {
  for_vectors<T>(features, [&](auto at) {
    Vec<T> sum{};
    for (int64_t j = 0; j < count; ++j) sum += at.load(rows + j * features);
    const Vec<T> centre = sum * (T(1) / count);
    at.store(mean, centre - centre == Vec<T>{} ? centre : Vec<T>{});
  });
}

template <typename T>
void centre_row(const T* row, const T* centre, int64_t features, T* centred) {
  for_vectors<T>(features, [&](auto at) { at.store(centred, at.load(row) - at.load(centre)); });
}

// Where much cancels all the same, in pairs much closer to each other than to the centre, the differences of
// the rows themselves are squared and summed. That keeps the relative error below kCancelled^-1 roundings of
// the sum of the norms, however far away a single row draws the centre. False for NaN, from infinite features
// for example.
template <typename T>
METAFAST_HD Mask<T> keeps_digits(Vec<T> distance, Vec<T> sum_of_squares) {
  return distance >= T(kCancelled) * sum_of_squares;
}

template <typename T>
T squared_distance(const T* x, const T* y, int64_t features) {
  Vec<T> sum{};
  for_vectors<T>(features, [&](auto at) {
    const Vec<T> difference = at.load(x) - at.load(y);
    sum += difference * difference;
  });
  return sum_of_lanes<T>(sum);
}

// ---- kernels ----

template <typename T>
void run(const MeanRow<T>& p, int64_t, int64_t) {
  mean_row(p.rows, p.count, p.features, p.mean);
}

template <typename T>
void run(const CentreRows<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* row = p.rows + i * p.features;
    if (p.centre != nullptr) {
      T* centred = p.centred + i * p.features;
      centre_row(row, p.centre, p.features, centred);
      row = centred;
    }
    p.squares[i] = inner_product(row, row, p.features);
  }
}

template <class M>
constexpr bool kFromDifferences = std::is_same_v<typename M::Term, SquaredDifference>;

template <class M, typename T>
void walk(const FinishProducts<T>& p, int64_t begin, int64_t end) {
  using V = Vec<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* x = p.given_x + i * p.features;
    T* out = p.out + i * p.rows;
    const V x_square = broadcast(p.x_squares[i]);
    const V x_inverse = inverse_norm(x_square).inverse;
    for_vectors<T>(p.rows, [&](auto at) {
      V result = -at.load(out);
      if constexpr (M::kCosine) {
        result = 1 + x_inverse * inverse_norm(at.load(p.y_squares)).inverse * result;
      } else if constexpr (kFromDifferences<M>) {
        const V scale = x_square + at.load(p.y_squares);
        result = scale + 2 * result;
        const Mask<T> kept = keeps_digits<T>(result, scale);
        if (any<T>(~kept)) {
          for (int l = 0; l < kLanes<T> && at.offset + l < p.rows; ++l) {
            if (kept[l]) continue;
            result[l] = squared_distance(x, p.given_y + (at.offset + l) * p.features, p.features);
          }
        }
        result = M::Link::forward(result);
      }
      at.store(out, result);
    });
  }
}

// The share of one pair of rows in the gradients of both.
template <typename T>
void add_difference(T factor, int64_t i, int64_t j, const ProductFactors<T>& p) {
  const T *x = p.given_x + i * p.features, *y = p.given_y + j * p.features;
  T* grad_x = p.grad_x + i * p.features;
  T* grad_y = p.grad_y + j * p.features;
  for_vectors<T>(p.features, [&](auto at) {
    const Vec<T> share = factor * (at.load(x) - at.load(y));
    at.store(grad_x, at.load(grad_x) + share);
    at.store(grad_y, at.load(grad_y) - share);
  });
}

template <class M, typename T>
void walk(const ProductFactors<T>& p, int64_t begin, int64_t end) {
  using V = Vec<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T *x = p.x + i * p.features, *out = p.out + i * p.rows, *grad = p.grad + i * p.rows;
    T *factors = p.factors + i * p.rows, *grad_x = p.grad_x + i * p.features;
    const V x_square = broadcast(p.x_squares[i]);
    const InverseNorm<V> x_norm = inverse_norm(x_square);
    clear(grad_x, p.features);
    V x_factor{};
    for_vectors<T>(p.rows, [&](auto at) {
      const V distance = at.load(out);
      V factor = at.load(grad);
      if constexpr (M::kCosine) {
        const InverseNorm<V> y_norm = inverse_norm(at.load(p.y_squares));
        const V cosine = factor * (1 - distance);
        x_factor += cosine * x_norm.slope;
        at.store(p.y_factors, at.load(p.y_factors) + cosine * y_norm.slope);
        factor *= x_norm.inverse * y_norm.inverse;
      } else if constexpr (kFromDifferences<M>) {
        factor *= T(M::Term::kDerivative) * M::Link::first(distance);
        constexpr bool kRoot = !std::is_same_v<typename M::Link, IdentityLink>;
        const Mask<T> kept =
            keeps_digits<T>(kRoot ? distance * distance : distance, x_square + at.load(p.y_squares));
        if (any<T>(~kept)) {
          for (int l = 0; l < kLanes<T> && at.offset + l < p.rows; ++l) {
            if (!kept[l]) add_difference(factor[l], i, at.offset + l, p);
          }
          factor = kept ? factor : V{};
        }
        x_factor += factor;
        at.store(p.y_factors, at.load(p.y_factors) + factor);
      }
      at.store(factors, factor);
    });
    if constexpr (M::kCosine || kFromDifferences<M>) {
      add_scaled(sum_of_lanes<T>(x_factor), x, p.features, grad_x);
    }
  }
}

template <typename T>
void run(const AddScaledRows<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    add_scaled(p.factors[i], p.rows + i * p.features, p.features, p.out + i * p.features);
  }
}

}  // namespace metafast::METAFAST_ISA
