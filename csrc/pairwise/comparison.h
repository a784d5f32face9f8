// CPU: one chunk of a task's queries against the task's rows under one metric, tile by tile: distances, their
// gradients and second derivatives. What a metric is stands in math.h, the loops over features in tile.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/threads.h"
#include "pairwise/params.h"
#include "pairwise/products.h"
#include "pairwise/tile.h"

namespace metafast::METAFAST_ISA {

// One chunk of one task.
template <typename T>
struct Chunk {
  int64_t index;  // of the partial sums: task * chunks + chunk
  int64_t task;
  int64_t begin, end;  // queries
  const T* x;          // [Q, D] of the task
  const T* y;          // [J, D] of the task
};

template <typename T>
Chunk<T> chunk_of(const Pairs<T>& p, int64_t item) {
  const int64_t task = item / p.chunks, chunk = item % p.chunks, size = p.chunk_size();
  return {item,
          task,
          std::min(p.queries, chunk * size),
          std::min(p.queries, (chunk + 1) * size),
          p.x + task * p.x_task_stride,
          p.y + task * p.y_task_stride};
}

// f(q, queries) for every tile of the chunk; q is the task's index of its first query.
template <typename T, class F>
void for_each_tile(const Pairs<T>& p, const Chunk<T>& chunk, F&& f) {
  const bool takes_long = p.item_cost() > kLong;
  for (int64_t q = chunk.begin; q < chunk.end; q += kLanes<T>) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes<T>, chunk.end - q));
    if (takes_long) heed_interrupts();
    f(q, Queries<T>{chunk.x + q * p.features, p.features, count});
  }
}

// Comparisons of a task's queries with its rows under metric M, tile by tile.
template <class M, bool kWeighted, typename T>
class Comparison {
  using V = Vec<T>;
  using Term = typename M::Term;
  using Link = typename M::Link;

  // Squared distances to many rows: |x|^2 - 2 x.y + |y|^2 takes one operation per feature where (x - y)^2
  // takes two.
  static constexpr bool kCanCentre = std::is_same_v<Term, SquaredDifference> && !kWeighted;
  static constexpr int64_t kManyRows = 8;

 public:
  // leaves_out: whether rows of a task may take no part.
  explicit Comparison(const Pairs<T>& p, bool leaves_out = false)
      : p_(p),
        leaves_out_(leaves_out),
        rows_in_use_(leaves_out ? p.rows * p.features : 0),
        norms_(M::kCosine ? p.rows : 0),
        sums_(M::kCosine ? 2 * p.rows : 0),
        centred_(kCanCentre && p.rows >= kManyRows),
        centre_(centred_ ? p.features : 0),
        centred_rows_(centred_ ? p.rows * p.features : 0),
        centred_queries_(centred_ ? kLanes<T> * p.features : 0),
        squares_(centred_ ? p.rows : 0) {}

  // Prepares the rows of the chunk's task. Those for which takes_part(j) is false count as zeros, whatever
  // they hold: 0 times NaN would be NaN.
  void start(const Chunk<T>& chunk) {
    start(chunk, [](int64_t) { return true; });
  }
  template <class F>
  void start(const Chunk<T>& chunk, const F& takes_part) {
    y_ = chunk.y;
    if (leaves_out_) leave_out(takes_part);
    if (centred_) centre();
    if constexpr (M::kCosine) {
      for (int64_t j = 0; j < p_.rows; ++j) {
        norms_[j] = inverse_norm<T>(inner_product(row(j), row(j), p_.features));
        sums_[j] = sums_[p_.rows + j] = V{};
      }
    }
  }

  const T* row(int64_t j) const { return y_ + j * p_.features; }

  // out_j = metric(x, y_j)
  void distances(const Queries<T>& x, V* out) {
    if (kCanCentre && centred_) {
      if constexpr (kCanCentre) centred_distances(x, out);
    } else {
      sum_terms<Term, kWeighted>(x, y_, p_.rows, p_.features, p_.weight, x.first + kLanes<T> * x.stride, out);
    }
    if constexpr (M::kCosine) {
      norm_ = inverse_norm<V>(inner_products(x, x, p_.features));
      for (int64_t j = 0; j < p_.rows; ++j) out[j] = 1 + norm_.inverse * norms_[j].inverse * out[j];
    } else if constexpr (!std::is_same_v<Link, IdentityLink>) {
      const V bias = broadcast<T>(p_.bias ? *p_.bias : T(0));
      for (int64_t j = 0; j < p_.rows; ++j) out[j] = Link::forward(out[j] + bias);
    }
  }

  // Takes grad_j, the gradient of out_j, which it overwrites; sets grad_x [count, D], adds to grad_y [J, D]
  // and grad_weight [D]; returns the gradient of the bias, one summand per lane.
  V backward(const Queries<T>& x, const V* out, V* grad, T* grad_x, T* grad_y, T* grad_weight) {
    V bias{}, own{};
    for (int64_t j = 0; j < p_.rows; ++j) {
      if constexpr (M::kCosine) {
        V cosine = grad[j] * (1 - out[j]);
        own += cosine * norm_.slope;
        sums_[j] += cosine * norms_[j].slope;
        grad[j] *= norm_.inverse * norms_[j].inverse;
      } else {
        V sum_grad = grad[j] * Link::first(out[j]);
        bias += sum_grad;
        grad[j] = sum_grad * Term::kDerivative;
      }
    }
    spread<Term, kWeighted>(x, y_, p_.rows, p_.features, p_.weight, grad, grad_x, grad_y, grad_weight);
    if constexpr (M::kCosine) {
      for (int i = 0; i < x.count; ++i) add_scaled(own[i], x[i], p_.features, grad_x + i * p_.features);
    }
    return bias;
  }

  // After the last tile: what backward() kept back of grad_y.
  void finish_backward(T* grad_y) {
    if constexpr (M::kCosine) {
      for (int64_t j = 0; j < p_.rows; ++j) {
        add_scaled(sum_of_lanes<T>(sums_[j]), row(j), p_.features, grad_y + j * p_.features);
      }
    }
  }

  // After distances() of the same tile: their tangents, x moving along u, y along v [J, D], the weight along
  // z, the bias along `bias_tangent`.
  void tangents(const Queries<T>& x, const Queries<T>& u, const T* v, const T* z, T bias_tangent,
                const V* out, V* tangent) {
    sum_tangents<Term, kWeighted>(x, u, y_, v, p_.rows, p_.features, p_.weight, z, tangent);
    if constexpr (M::kCosine) {
      tangent_x_ = norm_.slope * inner_products(x, u, p_.features);
      for (int64_t j = 0; j < p_.rows; ++j) {
        tangent[j] = cosine_tangent<V>(out[j], norm_.inverse * norms_[j].inverse, tangent[j], tangent_x_,
                                       broadcast<T>(tangent_y(v, j)));
      }
    } else {
      for (int64_t j = 0; j < p_.rows; ++j) tangent[j] = Link::first(out[j]) * (tangent[j] + bias_tangent);
    }
  }

  // Gradients of sum_j grad_j * tangent_j + first_j * out_j, with grad and first held fixed. It overwrites
  // both and takes from tangents() its `tangent`. As backward(), it adds to grad_y and grad_weight and
  // returns the bias's part.
  V double_backward(const Queries<T>& x, const Queries<T>& u, const T* v, const T* z, const V* out,
                    const V* tangent, V* grad, V* first, T* grad_x, T* grad_y, T* grad_weight) {
    V bias{}, rho{}, sigma{};
    for (int64_t j = 0; j < p_.rows; ++j) {
      if constexpr (M::kCosine) {
        const V ab = norm_.inverse * norms_[j].inverse;
        const CosineSecond<V> c =
            cosine_second<V>(grad[j], first[j], out[j], tangent[j], ab, tangent_x_,
                             broadcast<T>(tangent_y(v, j)), norm_.slope, broadcast<T>(norms_[j].slope));
        grad[j] = c.ddx;
        first[j] = c.dx;
        rho += c.rho_x;
        sigma += c.sigma_x;
        sums_[j] += c.rho_y;
        sums_[p_.rows + j] += c.sigma_y;
      } else {
        // tangent = link' * raw tangent: the link's curvature times grad * raw tangent joins the first-order
        // part.
        const V slope = Link::first(out[j]);
        V sum_grad = first[j] * slope;
        if constexpr (!std::is_same_v<Link, IdentityLink>) {
          const V raw = slope != V{} ? tangent[j] / slope : V{};
          sum_grad += grad[j] * Link::second(out[j]) * raw;
        }
        bias += sum_grad;
        first[j] = sum_grad * Term::kDerivative;
        grad[j] = grad[j] * slope * Term::kDerivative;
      }
    }
    spread_second<Term, kWeighted>(x, u, y_, v, p_.rows, p_.features, p_.weight, z, grad, first, grad_x,
                                   grad_y, grad_weight);
    if constexpr (M::kCosine) {
      for (int i = 0; i < x.count; ++i) {
        add_scaled(rho[i], u[i], p_.features, grad_x + i * p_.features);
        add_scaled(sigma[i], x[i], p_.features, grad_x + i * p_.features);
      }
    }
    return bias;
  }

  void finish_double_backward(const T* v, T* grad_y) {
    if constexpr (M::kCosine) {
      for (int64_t j = 0; j < p_.rows; ++j) {
        T* out = grad_y + j * p_.features;
        add_scaled(sum_of_lanes<T>(sums_[j]), v + j * p_.features, p_.features, out);
        add_scaled(sum_of_lanes<T>(sums_[p_.rows + j]), row(j), p_.features, out);
      }
    }
  }

 private:
  template <class F>
  void leave_out(const F& takes_part) {
    for (int64_t j = 0; j < p_.rows; ++j) {
      if (takes_part(j)) continue;
      if (y_ != rows_in_use_.get()) std::copy_n(y_, p_.rows * p_.features, rows_in_use_.get());
      y_ = rows_in_use_.get();
      clear(rows_in_use_.get() + j * p_.features, p_.features);
    }
  }

  void centre() {
    const int64_t features = p_.features;
    mean_row(y_, p_.rows, features, centre_.get());
    for (int64_t j = 0; j < p_.rows; ++j) {
      T* centred = centred_rows_.get() + j * features;
      centre_row(row(j), centre_.get(), features, centred);
      squares_[j] = inner_product(centred, centred, features);
    }
  }

  // Squared distances between the centred queries and rows.
  void centred_distances(const Queries<T>& x, V* out) {
    const int64_t features = p_.features;
    V sums[kLanes<T>] = {};
    for_vectors<T>(features, [&](auto at) {
      const V centre = at.load(centre_.get());
      for (int i = 0; i < x.count; ++i) {
        const V query = at.load(x.first + i * x.stride) - centre;
        at.store(centred_queries_.get() + i * features, query);
        sums[i] += query * query;
      }
    });
    const V squares = sum_lanes<T>(sums);
    const Queries<T> centred{centred_queries_.get(), features, x.count};
    sum_terms<NegativeProduct, false, T>(centred, centred_rows_.get(), p_.rows, features, nullptr,
                                         x.first + kLanes<T> * x.stride, out);
    for (int64_t j = 0; j < p_.rows; ++j) {
      const V scale = squares + squares_[j], distance = scale + 2 * out[j];
      out[j] = distance;
      const Mask<T> kept = keeps_digits<T>(distance, scale);
      if (any<T>(~kept)) {
        V exact;
        sum_terms<Term, false, T>(x, row(j), 1, features, nullptr, centre_.get(), &exact);
        out[j] = kept ? distance : exact;
      }
    }
  }

  T tangent_y(const T* v, int64_t j) const {
    return norms_[j].slope * inner_product(row(j), v + j * p_.features, p_.features);
  }

  const Pairs<T>& p_;
  const T* y_ = nullptr;
  bool leaves_out_;
  Scratch<T> rows_in_use_;
  Scratch<InverseNorm<T>> norms_;  // cosine: of the rows
  Scratch<V> sums_;                // cosine: multiples of the rows (and of v) that finish_*() adds to grad_y
  bool centred_;
  // Centred: the mean row, rows and queries minus it, the rows' squared norms.
  Scratch<T> centre_, centred_rows_, centred_queries_, squares_;
  InverseNorm<V> norm_{};  // cosine: of the tile's queries
  V tangent_x_{};          // cosine: slope * <x, u> of the tile's queries
};

}  // namespace metafast::METAFAST_ISA
