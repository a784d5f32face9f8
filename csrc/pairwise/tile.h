// The arithmetic of the CPU kernels: a tile of kLanes queries, one per lane, against all rows of their task.
//
// Per-pair quantities (distances, their gradients) live in tiles: one vector for each row j, lane i for query
// i. Four loops touch features, and everything else is per pair:
//
//   sum_terms       sum_d w_d value(x_id, y_jd) for every pair                (forward)
//   sum_tangents    its change when x moves along u, y along v, w along z     (double backward)
//   spread, spread_second                                                     (backward, double backward)
//                   per-pair factors times the derivatives of the terms, onto the gradients of x, y and w
//
// The sums read the queries by column, one query per lane, so that no sum ever crosses lanes; spreading
// writes rows, so its lanes are features.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>

#include "common/simd.h"
#include "pairwise/math.h"

namespace metafast::METAFAST_ISA {

// The n <= kLanes queries of a tile. Lanes past the last repeat it, so that no lane reads outside.
template <typename T>
struct Queries {
  const T* first;
  int64_t stride;
  int count;

  const T* operator[](int i) const { return first + (i < count ? i : count - 1) * stride; }
};

// Uninitialised, aligned scratch memory of one work item.
template <typename V>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<V*>(std::aligned_alloc(64, (count * sizeof(V) + 63) / 64 * 64))) {
    if (data_ == nullptr && count > 0) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  V* get() const { return data_; }
  V& operator[](int64_t i) const { return data_[i]; }

 private:
  V* data_;
};

template <typename T>
METAFAST_HD T& lane(Vec<T>* tile, int64_t row, int i) {
  return reinterpret_cast<T*>(tile + row)[i];
}

template <typename T>
METAFAST_HD T sum_of_lanes(Vec<T> v) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

// The features of a tile by column: out[d] holds feature d of the queries, one per lane, 0 in lanes past the
// last.
template <typename T>
void load_columns(const Queries<T>& x, int64_t features, Vec<T>* out) {
  for_vectors<T>(features, [&](auto at) {
    Vec<T> block[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) block[i] = i < x.count ? at.load(x.first + i * x.stride) : Vec<T>{};
    transpose<T>(block);
    for (int l = 0; l < kLanes<T> && at.offset + l < features; ++l) out[at.offset + l] = block[l];
  });
}

// --- forward
// -------------------------------------------------------------------------------------------------

// The sums for kRows rows from y on; x by column. Few rows are summed in two halves, since kRows chains of
// additions alone would wait for each other.
template <class Term, bool kWeighted, int kRows, typename T>
METAFAST_HD void sum_block(const Vec<T>* x, const T* y, int64_t features, const T* weight, Vec<T>* out) {
  constexpr int kChains = kRows < 4 ? 2 : 1;
  Vec<T> sums[kChains][kRows] = {};
  const auto add = [&](int chain, int64_t d) __attribute__((always_inline)) {
    const Vec<T> w = kWeighted ? broadcast<T>(weight[d]) : Vec<T>{};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> value = Term::value(x[d], broadcast<T>(y[r * features + d]));
      sums[chain][r] += kWeighted ? w * value : value;
    }
  };
  int64_t d = 0;
  for (; d + kChains <= features; d += kChains) {
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) add(chain, d + chain);
  }
  for (; d < features; ++d) add(0, d);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) out[r] = kChains == 2 ? sums[0][r] + sums[kChains - 1][r] : sums[0][r];
}

// out_ij = sum_d w_d value(x_id, y_jd)
template <class Term, bool kWeighted, typename T>
void sum_terms(const Vec<T>* x, const T* y, int64_t rows, int64_t features, const T* weight, Vec<T>* out) {
  constexpr int kRows = 8;
  const auto block = [&](auto count, int64_t j) {
    sum_block<Term, kWeighted, decltype(count)::value>(x, y + j * features, features, weight, out + j);
  };
  int64_t j = 0;
  for (; j + kRows <= rows; j += kRows) block(std::integral_constant<int, kRows>{}, j);
  switch (rows - j) {
    case 1:
      return block(std::integral_constant<int, 1>{}, j);
    case 2:
      return block(std::integral_constant<int, 2>{}, j);
    case 3:
      return block(std::integral_constant<int, 3>{}, j);
    case 4:
      return block(std::integral_constant<int, 4>{}, j);
    case 5:
      return block(std::integral_constant<int, 5>{}, j);
    case 6:
      return block(std::integral_constant<int, 6>{}, j);
    case 7:
      return block(std::integral_constant<int, 7>{}, j);
  }
}

// Inner products of each query with the same row of another array, both by column.
template <typename T>
Vec<T> inner_products(const Vec<T>* x, const Vec<T>* u, int64_t features) {
  Vec<T> sum{};
  for (int64_t d = 0; d < features; ++d) sum += x[d] * u[d];
  return sum;
}

template <typename T>
T inner_product(const T* x, const T* y, int64_t features) {
  T sum = 0;
  for (int64_t d = 0; d < features; ++d) sum += x[d] * y[d];
  return sum;
}

// --- backward
// ------------------------------------------------------------------------------------------------

// grad_x_i = sum_j factor_ij w dx and grad_y_j += sum_i factor_ij w dy for kRows rows from y on, and
// grad_weight += sum_ij factor_ij value / kDerivative. The rows and their gradients stay in registers while
// the queries pass.
template <class Term, bool kWeighted, int kRows, typename T>
METAFAST_HD void spread_block(const Queries<T>& x, const T* y, int64_t features, const T* weight,
                              const Vec<T>* factor, bool first, T* grad_x, T* grad_y, T* grad_weight) {
  for_vectors<T>(features, [&](auto at) __attribute__((always_inline)) {
    Vec<T> rows[kRows], grads[kRows], w{}, grad_w{};
    if constexpr (kWeighted) w = at.load(weight);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      rows[r] = at.load(y + r * features);
      grads[r] = Vec<T>{};
    }
    const T* query_row = x.first;
    T* grad_row = grad_x;
    const T* factors = reinterpret_cast<const T*>(factor);
    for (int i = 0; i < x.count; ++i, query_row += x.stride, grad_row += features, ++factors) {
      const Vec<T> query = at.load(query_row);
      Vec<T> grad{};
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> f = broadcast<T>(factors[r * kLanes<T>]);
        grad += f * Term::dx(query, rows[r]);
        grads[r] += f * Term::dy(query, rows[r]);
        if constexpr (kWeighted) grad_w += f * Term::value(query, rows[r]);
      }
      if constexpr (kWeighted) grad *= w;
      at.store(grad_row, first ? grad : grad + at.load(grad_row));
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      T* out = grad_y + r * features;
      at.store(out, at.load(out) + (kWeighted ? w * grads[r] : grads[r]));
    }
    if constexpr (kWeighted) {
      constexpr T scale = T(1) / Term::kDerivative;
      at.store(grad_weight, at.load(grad_weight) + scale * grad_w);
    }
  });
}

template <class Term, bool kWeighted, typename T>
void spread(const Queries<T>& x, const T* y, int64_t rows, int64_t features, const T* weight,
            const Vec<T>* factor, T* grad_x, T* grad_y, T* grad_weight) {
  constexpr int kRows = 5;  // the common way; 2 * 5 vectors and the query fit the 16 registers of AVX2
  const auto block = [&](auto count, int64_t j) {
    spread_block<Term, kWeighted, decltype(count)::value>(x, y + j * features, features, weight, factor + j,
                                                          j == 0, grad_x, grad_y + j * features, grad_weight);
  };
  int64_t j = 0;
  for (; j + kRows <= rows; j += kRows) block(std::integral_constant<int, kRows>{}, j);
  for (; j < rows; ++j) block(std::integral_constant<int, 1>{}, j);
  if (rows == 0) {
    for (int i = 0; i < x.count; ++i) __builtin_memset(grad_x + i * features, 0, features * sizeof(T));
  }
}

// --- double backward
// -----------------------------------------------------------------------------------------

// out_ij = sum_d kDerivative w (u dx + v dy) + z value, the tangent of sum_terms; x and u by column.
template <class Term, bool kWeighted, typename T>
void sum_tangents(const Vec<T>* x, const Vec<T>* u, const T* y, const T* v, int64_t rows, int64_t features,
                  const T* weight, const T* z, Vec<T>* out) {
  for (int64_t j = 0; j < rows; ++j) {
    Vec<T> sum{};
    for (int64_t d = 0; d < features; ++d) {
      const Vec<T> row = broadcast<T>(y[j * features + d]), row_tangent = broadcast<T>(v[j * features + d]);
      const T w = Term::kDerivative * (kWeighted ? weight[d] : T(1));
      sum += w * (u[d] * Term::dx(x[d], row) + row_tangent * Term::dy(x[d], row));
      if constexpr (kWeighted) sum += z[d] * Term::value(x[d], row);
    }
    out[j] = sum;
  }
}

// The gradients of sum_ij factor_ij / kDerivative * tangent_ij, the factors held fixed, plus those of
// spread() for the factors `first`:
//   grad_x_i  = sum_j factor_ij (w ddx + z dx) + first_ij w dx      grad_y_j += likewise
//   grad_weight += sum_ij factor_ij (u dx + v dy) + first_ij value / kDerivative
template <class Term, bool kWeighted, typename T>
void spread_second(const Queries<T>& x, const Queries<T>& u, const T* y, const T* v, int64_t rows,
                   int64_t features, const T* weight, const T* z, const Vec<T>* factor, const Vec<T>* first,
                   T* grad_x, T* grad_y, T* grad_weight) {
  for_vectors<T>(features, [&](auto at) {
    Vec<T> w = broadcast<T>(1), weight_tangent{}, grad_w{};
    if constexpr (kWeighted) {
      w = at.load(weight);
      weight_tangent = at.load(z);
    }
    for (int i = 0; i < x.count; ++i) {
      Vec<T> query = at.load(x[i]), tangent = at.load(u[i]), grad{};
      for (int64_t j = 0; j < rows; ++j) {
        Vec<T> row = at.load(y + j * features), row_tangent = at.load(v + j * features);
        Vec<T> f = broadcast<T>(reinterpret_cast<const T*>(factor + j)[i]);
        Vec<T> e = broadcast<T>(reinterpret_cast<const T*>(first + j)[i]);
        Vec<T> dx = Term::dx(query, row), dy = Term::dy(query, row);
        Vec<T> slope = kWeighted ? f * weight_tangent + e * w : e;
        T* out = grad_y + j * features;
        grad += slope * dx;
        Vec<T> grad_row = slope * dy;
        if constexpr (Term::kCurved) {
          grad += f * w * Term::ddx(query, row, tangent, row_tangent);
          grad_row += f * w * Term::ddy(query, row, tangent, row_tangent);
        }
        at.store(out, at.load(out) + grad_row);
        if constexpr (kWeighted) {
          constexpr T scale = T(1) / Term::kDerivative;
          grad_w += f * (tangent * dx + row_tangent * dy) + scale * e * Term::value(query, row);
        }
      }
      at.store(grad_x + i * features, grad);
    }
    if constexpr (kWeighted) at.store(grad_weight, at.load(grad_weight) + grad_w);
  });
}

// out += factor * row
template <typename T>
void add_scaled(T factor, const T* row, int64_t features, T* out) {
  for (int64_t d = 0; d < features; ++d) out[d] += factor * row[d];
}

// --- tiles in memory
// -----------------------------------------------------------------------------------------

// [count, J] rows of an array with lanes as columns, and back.
template <typename T>
void load_tile(const T* rows, int64_t columns, int count, Vec<T>* tile) {
  for (int64_t j = 0; j < columns; ++j) {
    tile[j] = Vec<T>{};
    for (int i = 0; i < count; ++i) lane<T>(tile, j, i) = rows[i * columns + j];
  }
}

template <typename T>
void store_tile(Vec<T>* tile, int64_t columns, int count, T* rows) {
  for (int i = 0; i < count; ++i) {
    for (int64_t j = 0; j < columns; ++j) rows[i * columns + j] = lane<T>(tile, j, i);
  }
}

template <typename T>
void clear(T* p, int64_t count) {
  if (p != nullptr) std::fill_n(p, count, T(0));
}

template <typename T>
void scale_tile(Vec<T>* tile, int64_t rows, T factor, const Vec<T>* from) {
  for (int64_t j = 0; j < rows; ++j) tile[j] = factor * from[j];
}

}  // namespace metafast::METAFAST_ISA
