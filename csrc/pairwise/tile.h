// The arithmetic of the CPU kernels: a tile of kLanes queries, one per lane, against all rows of their task.
//
// Per-pair quantities (distances, their gradients) live in tiles: one vector for each row j, lane i for query
// i. Four loops touch features, and everything else is per pair:
//
//   sum_terms       sum_d w_d value(x_id, y_jd) for every pair                (forward)
//   sum_tangents    its change when x moves along u, y along v, w along z     (double backward)
//   spread, spread_second                                                     (backward, double backward)
//                   per-pair factors times the derivatives of the terms, onto the gradients of x, y and w
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

// Fetches the next tile from memory while this one is computed: a little at every call, since the processor
// waits for many fetches at once as it waits for loads, and a tile is too short for it to see the pattern by
// itself.
class Fetch {
 public:
  Fetch(const void* from, int64_t bytes, int64_t calls)
      : next_(static_cast<const char*>(from)), step_(bytes / std::max<int64_t>(1, calls)) {}

  METAFAST_HD void operator()() {
    constexpr int kLine = 64;
    __builtin_prefetch(next_);  // any address may be named
    if (step_ > kLine) __builtin_prefetch(next_ + kLine);
    next_ += step_;
  }

 private:
  const char* next_ = nullptr;
  int64_t step_ = 0;
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

// ---- forward ----

// Adds to sums[r * kQueries + i], still spread over lanes, the terms of query x[i] and row y + r * features.
template <class Term, bool kWeighted, int kQueries, int kRows, typename T>
METAFAST_HD void add_terms(const T* const* x, const T* y, int64_t features, const T* weight, Fetch& fetch,
                           Vec<T>* sums) {
  // Every term is 0 at (0, 0), so the padding of a last part of a vector adds nothing.
  for_vectors<T>(features, [&](auto at) __attribute__((always_inline)) {
    fetch();
    Vec<T> rows[kRows], w{};
    if constexpr (kWeighted) w = at.load(weight);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) rows[r] = at.load(y + r * features);
#pragma GCC unroll 16
    for (int i = 0; i < kQueries; ++i) {
      const Vec<T> query = at.load(x[i]);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> value = Term::value(query, rows[r]);
        sums[r * kQueries + i] += kWeighted ? w * value : value;
      }
    }
  });
}

// out_ij = sum_d w_d value(x_id, y_jd). Four queries against several rows at a time: their kLanes sums stay
// in registers, each vector loaded serves four operations or more, and the sums cross lanes together. Memory
// at `next`, as large as the tile, is fetched meanwhile.
template <class Term, bool kWeighted, typename T>
void sum_terms(const Queries<T>& x, const T* y, int64_t rows, int64_t features, const T* weight,
               const T* next, Vec<T>* out) {
  constexpr int kQueries = kLanes<T> < 4 ? kLanes<T> : 4, kRows = kLanes<T> / kQueries;
  const int64_t blocks = kRows > 1 ? rows / kRows + rows % kRows : rows;
  const int64_t calls = blocks * (kLanes<T> / kQueries) * (features / kLanes<T>);
  Fetch fetch(next, kLanes<T> * features * sizeof(T), calls);
  const auto add = [&](auto count, int64_t j, int i, Vec<T>* sums) __attribute__((always_inline)) {
    const T* queries[kQueries];
    for (int k = 0; k < kQueries; ++k) queries[k] = x[i + k];
    add_terms<Term, kWeighted, kQueries, decltype(count)::value>(queries, y + j * features, features, weight,
                                                                 fetch, sums);
  };
  int64_t j = 0;
  for (; kRows > 1 && j + kRows <= rows; j += kRows) {
    for (int r = 0; r < kRows; ++r) out[j + r] = Vec<T>{};  // also the lanes of no query
    for (int i = 0; i < x.count; i += kQueries) {
      Vec<T> sums[kLanes<T>] = {};
      add(std::integral_constant<int, kRows>{}, j, i, sums);
      const Vec<T> sum = sum_lanes<T>(sums);
      for (int r = 0; r < kRows; ++r) {
        __builtin_memcpy(&lane<T>(out, j + r, i), reinterpret_cast<const T*>(&sum) + r * kQueries,
                         kQueries * sizeof(T));
      }
    }
  }
  for (; j < rows; ++j) {
    Vec<T> sums[kLanes<T>] = {};
    for (int i = 0; i < x.count; i += kQueries) add(std::integral_constant<int, 1>{}, j, i, sums + i);
    out[j] = sum_lanes<T>(sums);
  }
}

// Inner products of each query with the same row of another array.
template <typename T>
Vec<T> inner_products(const Queries<T>& x, const Queries<T>& u, int64_t features) {
  Vec<T> sums[kLanes<T>] = {};
  for_vectors<T>(features, [&](auto at) {
    for (int i = 0; i < x.count; ++i) {
      sums[i] += at.load(x.first + i * x.stride) * at.load(u.first + i * u.stride);
    }
  });
  return sum_lanes<T>(sums);
}

template <typename T>
T inner_product(const T* x, const T* y, int64_t features) {
  Vec<T> sum{};
  for_vectors<T>(features, [&](auto at) { sum += at.load(x) * at.load(y); });
  return sum_of_lanes<T>(sum);
}

// ---- backward ----

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

// ---- double backward ----

// out_ij = sum_d kDerivative w (u dx + v dy) + z value, the tangent of sum_terms.
template <class Term, bool kWeighted, typename T>
void sum_tangents(const Queries<T>& x, const Queries<T>& u, const T* y, const T* v, int64_t rows,
                  int64_t features, const T* weight, const T* z, Vec<T>* out) {
  for (int64_t j = 0; j < rows; ++j) {
    Vec<T> sums[kLanes<T>] = {};
    for_vectors<T>(features, [&](auto at) {
      const Vec<T> row = at.load(y + j * features), row_tangent = at.load(v + j * features);
      Vec<T> w = broadcast<T>(Term::kDerivative), weight_tangent{};
      if constexpr (kWeighted) {
        w *= at.load(weight);
        weight_tangent = at.load(z);
      }
      for (int i = 0; i < x.count; ++i) {
        const Vec<T> query = at.load(x[i]), tangent = at.load(u[i]);
        sums[i] += w * (tangent * Term::dx(query, row) + row_tangent * Term::dy(query, row));
        if constexpr (kWeighted) sums[i] += weight_tangent * Term::value(query, row);
      }
    });
    out[j] = sum_lanes<T>(sums);
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

// ---- tiles in memory ----

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
  for (int64_t first = 0; first < columns;
       first += kLanes<T>) {  // as much of the tile as the cache holds for sure
    const int64_t last = std::min<int64_t>(columns, first + kLanes<T>);
    for (int i = 0; i < count; ++i) {
      for (int64_t j = first; j < last; ++j) rows[i * columns + j] = lane<T>(tile, j, i);
    }
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
