// Class probabilities: the gradient of their gradients. They need a query's whole row of pairs at once, so a
// block holds a tile of queries against all rows in shared memory and finishes it, from features to
// gradients. Part of cuda.cu.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "pairwise/cuda_episode.h"
#include "pairwise/cuda_gradient.h"

namespace metafast::cuda {
namespace {

constexpr int kClassifyThreads = 128;
constexpr int kLargestTile = 32;

// How a block works.
struct ClassifyPlan {
  int tile;    // queries at a time: 32, 16 or 8
  int planes;  // numbers per pair
  bool vectorized;
  bool per_class;  // probabilities within every class are wanted, not only within each query's own
};

// Its shared memory. J is rounded up to kMaxSelves rows, which the last thread of a column may read beyond J.
template <typename T>
struct ClassifyShared {
  T* planes;  // [plan.planes, J, tile]: distances (and their tangents), then the factors of the gradients
  RowNorms<T> x, y;
  T* scratch;      // [kClassifyThreads]
  int* row_class;  // [J]: -1 for a row that takes no part
  T* class_log;    // [N, tile]: log-sum-exp of the class's logits
  T* class_mean;   // [N, tile]: mean of the logits' tangents

  template <class M>
  __host__ __device__ void take(SharedArrays& arrays, const Classes<T>& p, const ClassifyPlan& plan) {
    const std::size_t rows = div_up(p.rows, kMaxSelves) * kMaxSelves;
    planes = arrays.take<T>(plan.planes * rows * plan.tile);
    if constexpr (M::kCosine) {
      x = {arrays.take<T>(plan.tile), arrays.take<T>(plan.tile), arrays.take<T>(plan.tile)};
      y = {arrays.take<T>(rows), arrays.take<T>(rows), arrays.take<T>(rows)};
    }
    scratch = arrays.take<T>(kClassifyThreads);
    row_class = arrays.take<int>(rows);
    if (plan.per_class) class_log = arrays.take<T>(p.way * plan.tile);
    if (plan.per_class) class_mean = arrays.take<T>(p.way * plan.tile);
  }
};

// A block's state: one tile of a task's queries against all its rows. A thread works on one query, `column`
// of the tile, and on rows first_row, first_row + row_step, ...
template <class M, typename T>
class ClassifyBlock {
 public:
  __device__ ClassifyBlock(const Classes<T>& p, const ClassifyPlan& plan, int64_t task, const T* y_tangent)
      : p_(p),
        plan_(plan),
        task_(task),
        ways_(ways_of(p.ways, p.way, task)),
        column_(threadIdx.x % plan.tile),
        first_row_(threadIdx.x / plan.tile),
        row_step_(kClassifyThreads / plan.tile),
        rows_(static_cast<int>(p.rows)),
        y_{p.y + task * p.y_task_stride, rows_, p.features},
        v_{y_tangent + task * p.rows * p.features, rows_, p.features} {
    SharedArrays arrays{&shared_memory<unsigned char>()};
    shared_.template take<M>(arrays, p, plan);
    for (int j = threadIdx.x; j < rows_; j += kClassifyThreads) {
      const int64_t label = p.row_labels != nullptr ? p.row_labels[task * p.rows + j] : j;
      shared_.row_class[j] = label >= 0 && label < ways_ ? static_cast<int>(label) : -1;
    }
    if constexpr (M::kCosine) fill_norms<kClassifyThreads>(y_, v_, shared_.y);
  }

  // Distances of queries [begin, min(begin + tile, end)) to all rows, and their probabilities.
  __device__ void start(int64_t begin, int64_t end, const T* x_tangent) {
    x_ = rows_of(p_.x + task_ * p_.x_task_stride, begin, end, plan_.tile, p_.features);
    query_ = task_ * p_.queries + begin + column_;
    label_ = -1;
    if (p_.query_labels != nullptr && active()) {
      label_ = p_.query_labels[query_];
      if (label_ >= ways_) label_ = -1;
    }
    __syncthreads();
    u_ = rows_of(x_tangent + task_ * p_.queries * p_.features, begin, end, plan_.tile, p_.features);
    if constexpr (M::kCosine) {
      fill_norms<kClassifyThreads>(x_, u_, shared_.x);
      __syncthreads();
    }
    sum_terms<kClassifyThreads, M, false>(
        x_, y_, static_cast<const T*>(nullptr), plan_.vectorized, [&](int i, int j, T sum) {
          shared_.planes[j * plan_.tile + i] =
              finish_value<M>(p_.metric, sum, T(0), shared_.x, i, shared_.y, j);
        });
    __syncthreads();
    for_each_pair<kClassifyThreads, T>(
        x_.count, rows_,
        [&](int i, int j, T(&sums)[kMicroPairs]) {
          add_tangents<typename M::Term, T>(x_, u_, i, y_, v_, j, nullptr, nullptr, sums);
        },
        [&](int i, int j, T sum) {
          const T out = shared_.planes[j * plan_.tile + i];
          shared_.planes[plane() + j * plan_.tile + i] =
              finish_tangent<M>(p_.metric, out, sum, T(0), shared_.x, i, shared_.y, j);
        });
    __syncthreads();
    set_probabilities();
  }

  __device__ bool active() const { return column_ < x_.count; }
  __device__ int64_t query() const { return query_; }
  __device__ int64_t label() const {
    return label_;
  }  // the query's, or -1 where it has none or its class is absent
  __device__ int64_t ways() const { return ways_; }
  __device__ int first_row() const { return first_row_; }
  __device__ int row_step() const { return row_step_; }

  // The gradient of the log-probability of class n, and the sum of these over the classes.
  __device__ void set_gradient(const LossGradient<T>& grad) {
    grad_ = grad.grad + query_ * grad.query_stride;
    grad_sum_ = 0;
    if (p_.query_labels != nullptr) {
      const T of_loss = grad.grad != nullptr && label_ >= 0 ? *grad_ : T(1);
      if (label_ >= 0) grad_sum_ = grad.divisor != nullptr ? -of_loss / *grad.divisor : -of_loss;
    } else {
      for (int64_t n = first_row_; n < ways_ && active(); n += row_step_) grad_sum_ += grad_[n];
      grad_sum_ = over_rows(grad_sum_, Sum<T>{});
    }
  }

  // Replaces distances and tangents by the factors of second derivatives, and writes the gradient of the
  // gradient.
  __device__ void set_second_factors(T* grad_grad) {
    T mean = 0, own_mean = 0;  // of the logits' tangents, over all rows and over those of the query's class
    for (int j = first_row_; j < rows_; j += row_step_) {
      const int n = shared_.row_class[j];
      if (n < 0) continue;
      mean += all(j) * change(j);
      if (n == label_) own_mean += own(j, n) * change(j);
    }
    mean = over_rows(mean, Sum<T>{});
    own_mean = over_rows(own_mean, Sum<T>{});
    for (int64_t n = first_row_; plan_.per_class && n < ways_; n += row_step_) {
      T& class_mean = shared_.class_mean[n * plan_.tile + column_];
      class_mean = 0;
      for (int j = 0; j < rows_; ++j) {
        if (shared_.row_class[j] == n) class_mean += own(j, n) * change(j);
      }
    }
    __syncthreads();
    if (active()) write_grad_grad(grad_grad, mean, own_mean);
    __syncthreads();
    for (int j = first_row_; j < rows_; j += row_step_) {
      const int n = shared_.row_class[j];
      T grad = 0, first = 0;
      if (n >= 0) {
        const T g = gradient(n), h = change(j);
        grad = distance_gradient(j, n);
        first =
            -p_.scale * logit_second(g, own(j, n), grad_sum_, all(j), h, class_change(j, n, own_mean), mean);
      }
      T factors[kFactors<M, true>];
      second_factors<M>(p_.metric, grad, first, at(0, j), at(1, j), shared_.x, column_, shared_.y, j,
                        factors);
#pragma unroll
      for (int f = 0; f < kFactors<M, true>; ++f) at(f, j) = factors[f];
    }
    __syncthreads();
  }

  // From the factors to grad_x [T, Q, D] of this tile, and to the chunk's grad_y [J, D], which the first tile
  // sets.
  __device__ void spread(T* grad_x, T* grad_y, bool first_tile) {
    spread_side<false>(x_, u_, y_, v_, shared_.x, grad_x + (query_ - column_) * p_.features, true);
    spread_side<true>(y_, v_, x_, u_, shared_.y, grad_y, first_tile);
  }

 private:
  __device__ int plane() const { return div_up(rows_, kMaxSelves) * kMaxSelves * plan_.tile; }
  __device__ T& at(int f, int j) const { return shared_.planes[f * plane() + j * plan_.tile + column_]; }
  // Around the query's largest, beside which what a likely class has left of its log-probability would
  // vanish.
  __device__ T logit(int j) const { return -p_.scale * at(0, j) - top_; }
  __device__ T change(int j) const { return -p_.scale * at(1, j); }

  // Combines a value of each of the threads that share a query.
  template <typename Combine>
  __device__ T over_rows(T value, Combine combine) const {
    __syncthreads();
    shared_.scratch[threadIdx.x] = value;
    __syncthreads();
    value = shared_.scratch[column_];
    for (int k = 1; k < row_step_; ++k) value = combine(value, shared_.scratch[k * plan_.tile + column_]);
    return value;
  }

  // The largest logit, and the log-sum-exp from there, of the rows that `takes_part` names: this thread's own
  // or (kShared) those of all that share the query.
  template <bool kShared, typename TakesPart>
  __device__ T largest(TakesPart takes_part) const {
    T top = -std::numeric_limits<T>::infinity();
    for (int j = kShared ? first_row_ : 0; j < rows_; j += kShared ? row_step_ : 1) {
      if (takes_part(shared_.row_class[j])) top = Max<T>{}(logit(j), top);
    }
    return kShared ? over_rows(top, Max<T>{}) : top;
  }

  template <bool kShared, typename TakesPart>
  __device__ T log_sum_exp(T top, TakesPart takes_part) const {
    T sum = 0;
    for (int j = kShared ? first_row_ : 0; j < rows_; j += kShared ? row_step_ : 1) {
      if (takes_part(shared_.row_class[j])) sum += Math<T>::exp(logit(j) - top);
    }
    if constexpr (kShared) sum = over_rows(sum, Sum<T>{});
    return top + Math<T>::log(sum);
  }

  __device__ void set_probabilities() {
    const auto any = [](int n) { return n >= 0; };
    top_ = 0;
    top_ = largest<true>(any);
    log_all_ = log_sum_exp<true>(T(0), any);
    log_own_ = 0;
    if (p_.query_labels != nullptr) {
      const auto own = [this](int n) { return n == label_ && n >= 0; };
      log_own_ = log_sum_exp<true>(largest<true>(own), own);
    } else if (plan_.per_class) {
      for (int64_t n = first_row_; n < ways_; n += row_step_) {
        const auto of_class = [n](int of_row) { return of_row == n; };
        shared_.class_log[n * plan_.tile + column_] = log_sum_exp<false>(largest<false>(of_class), of_class);
      }
      __syncthreads();
    }
  }

  // The probability of row j, of class n, among all rows, and among those of its class. In a loss only the
  // query's class has a gradient, so that the others' need no probabilities of their own.
  __device__ T all(int j) const { return Math<T>::exp(logit(j) - log_all_); }
  __device__ T own(int j, int64_t n) const {
    if (p_.query_labels != nullptr) return n == label_ ? Math<T>::exp(logit(j) - log_own_) : T(0);
    return p_.row_labels != nullptr ? Math<T>::exp(logit(j) - shared_.class_log[n * plan_.tile + column_])
                                    : T(1);
  }

  __device__ T gradient(int64_t n) const {
    if (p_.query_labels != nullptr) return n == label_ ? grad_sum_ : T(0);
    return active() ? grad_[n] : T(0);
  }

  __device__ T distance_gradient(int j, int n) const {
    return -p_.scale * logit_gradient(gradient(n), own(j, n), grad_sum_, all(j));
  }

  // The mean change of the logits of class n, of which row j is one.
  __device__ T class_change(int j, int n, T own_mean) const {
    if (p_.query_labels != nullptr) return own_mean;
    return p_.row_labels != nullptr ? shared_.class_mean[n * plan_.tile + column_] : change(j);
  }

  __device__ void write_grad_grad(T* grad_grad, T mean, T own_mean) const {
    if (p_.query_labels != nullptr) {
      if (first_row_ == 0) grad_grad[query_] = label_ >= 0 ? mean - own_mean : T(0);
      return;
    }
    for (int64_t n = first_row_; n < p_.way; n += row_step_) {
      grad_grad[query_ * p_.way + n] =
          n < ways_ ? class_change(static_cast<int>(n), static_cast<int>(n), own_mean) - mean : T(0);
    }
  }

  template <bool kOfY>
  __device__ void spread_side(const Rows<T>& self, const Rows<T>& self_tangent, const Rows<T>& other,
                              const Rows<T>& other_tangent, const RowNorms<T>& norms, T* out,
                              bool set) const {
    // Threads lie along the features, as many as there are, up to the next power of two.
    constexpr int kSmallestColumns = 8;
    int columns = kClassifyThreads;
    while (columns / 2 >= p_.features && columns > kSmallestColumns) columns /= 2;
    const FactorPlanes<T> factors{shared_.planes, plane(), plan_.tile};
    const FeatureWeight<T> weight(nullptr, nullptr, 0);
    for (int64_t d = threadIdx.x % columns; d < p_.features; d += columns) {
      for (int first = threadIdx.x / columns * kSelves<true>; first < self.count;
           first += kClassifyThreads / columns * kSelves<true>) {
        FeatureGradient<M, true, kOfY, T> grads[kSelves<true>];
#pragma unroll
        for (int i = 0; i < kSelves<true>; ++i) grads[i] = {self[first + i][d], self_tangent[first + i][d]};
        add_others<kOfY>(grads, factors, first, other, other_tangent, d, weight);
#pragma unroll
        for (int i = 0; i < kSelves<true>; ++i) {
          if (first + i >= self.count) continue;
          T& target = out[(first + i) * p_.features + d];
          const T total = grads[i].total(weight, norms, first + i);
          target = set ? total : target + total;
        }
      }
    }
  }

  const Classes<T>& p_;
  const ClassifyPlan& plan_;
  const int64_t task_, ways_;
  const int column_, first_row_, row_step_, rows_;
  const Rows<T> y_, v_;
  Rows<T> x_{}, u_{};
  ClassifyShared<T> shared_{};
  int64_t query_ = 0, label_ = -1;
  T top_ = 0, log_all_ = 0, log_own_ = 0, grad_sum_ = 0;
  const T* grad_ = nullptr;
};

template <class Params>
struct ClassifyLaunch {
  Params params;
  ClassifyPlan plan;
};

// Blocks: tasks x chunks of queries.
template <class M, typename T>
__global__ void __launch_bounds__(kClassifyThreads, 1)
    classify_double_backward(ClassifyLaunch<ClassifyDoubleBackward<T>> k) {
  const ClassifyDoubleBackward<T>& p = k.params;
  if (block_index() >= p.tasks * p.chunks) return;
  const Range range(p.queries, p.chunks, block_index() % p.chunks, kOwn);
  T* const grad_y = p.grad_y + block_index() * p.rows * p.features;
  ClassifyBlock<M, T> block(p, k.plan, block_index() / p.chunks, p.gg_y);
  for (int64_t q = range.begin; q < range.end; q += k.plan.tile) {
    block.start(q, range.end, p.gg_x);
    block.set_gradient(p.grad);
    block.set_second_factors(p.grad_grad);
    block.spread(p.grad_x, grad_y, q == range.begin);
  }
  if (range.begin < range.end) return;
  for (int64_t i = threadIdx.x; i < p.rows * p.features; i += kClassifyThreads) grad_y[i] = 0;
}

// The largest tile that leaves room for several blocks on a multiprocessor, or the smallest that fits at all.
template <class M, typename T>
std::size_t plan_second(const Classes<T>& p, int planes, ClassifyPlan& plan) {
  constexpr std::size_t kRoomForSeveral = 32 << 10;
  constexpr int kSmallestTile = 8;
  if (p.rows > std::numeric_limits<int>::max() || p.way > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("metafast: class probabilities on CUDA: more than 2^31 rows or classes");
  }
  plan.planes = planes;
  plan.vectorized = is_vectorized(p);
  plan.per_class = p.row_labels != nullptr && p.query_labels == nullptr;
  plan.tile = kLargestTile;
  while (plan.tile > kSmallestTile && plan.tile / 2 >= p.queries) plan.tile /= 2;
  for (;; plan.tile /= 2) {
    SharedArrays arrays{nullptr};
    ClassifyShared<T>{}.template take<M>(arrays, p, plan);
    if (arrays.bytes <= kRoomForSeveral) return arrays.bytes;
    if (plan.tile > kSmallestTile) continue;
    const std::size_t limit = max_shared_bytes();
    if (arrays.bytes <= limit) return arrays.bytes;
    throw std::invalid_argument("metafast: class probabilities on CUDA: " + std::to_string(p.rows) +
                                " rows and " + std::to_string(p.way) + " classes need " +
                                std::to_string(arrays.bytes) + " bytes of shared memory; this GPU has " +
                                std::to_string(limit));
  }
}

}  // namespace

template <typename T>
void launch(const ClassifyDoubleBackward<T>& p, Stream stream) {
  with_distance(p.metric, [&]<class M>() {
    ClassifyLaunch<ClassifyDoubleBackward<T>> k{p, {}};
    const std::size_t shared_bytes = plan_second<M>(p, kFactors<M, true>, k.plan);
    launch_kernel(
        {"classify_double_backward", grid_of(p.tasks * p.chunks), kClassifyThreads, shared_bytes, stream},
        classify_double_backward<M, T>, k);
  });
}

}  // namespace metafast::cuda
