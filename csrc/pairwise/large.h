// A large comparison on the CPU, through matrix products of torch's library: with this many rows of this many
// features nothing outside them takes long, and no tile of our own is faster than a library's.
//
// A work item is a chunk of queries, as in the kernels. Each computes its products by itself, on one thread:
// the same bits, then, with any number of threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>

#include "common/dispatch.h"
#include "common/one_thread.h"
#include "pairwise/params.h"

namespace metafast {

// Whether products pay: below these sizes, preparing and finishing them takes as long as what they save.
template <typename T>
bool is_large(const Pairs<T>& p) {
  constexpr int64_t kQueries = 512, kRows = 128, kFeatures = 128;
  const bool product = p.metric == Metric::sqeuclidean || p.metric == Metric::euclidean ||
                       p.metric == Metric::cosine || p.metric == Metric::dot;
  return product && p.weight == nullptr && p.queries >= kQueries && p.rows >= kRows &&
         p.features >= kFeatures;
}

template <typename T>
at::Tensor matrix(const T* data, int64_t rows, int64_t columns) {
  return at::from_blob(const_cast<T*>(data), {rows, columns}, c10::CppTypeToScalarType<T>::value);
}

// The rows of every task, ready for products.
template <typename T>
class LargeComparison {
 public:
  explicit LargeComparison(const Pairs<T>& p)
      : p_(p),
        centres_(p.metric == Metric::sqeuclidean || p.metric == Metric::euclidean),
        sets_(p.y_task_stride == 0 ? std::min<int64_t>(p.tasks, 1) : p.tasks),
        centre_(floats(centres_ ? sets_ * p.features : 0)),
        y_(floats(centres_ ? sets_ * p.rows * p.features : 0)),
        y_squares_(floats(sets_ * p.rows)) {
    for (int64_t set = 0; set < sets_; ++set) {
      const T* rows = p.y + set * p.y_task_stride;
      T* centre = centres_ ? data(centre_) + set * p.features : nullptr;
      if (centres_) run_on_cpu(MeanRow<T>{rows, centre, p.rows, p.features});
      run_on_cpu(CentreRows<T>{rows, centre, centres_ ? data(y_) + set * p.rows * p.features : nullptr,
                               data(y_squares_) + set * p.rows, p.rows, p.features});
    }
  }

  // For each item: start(item); f(item, rows, first) for blocks of its queries that stay in the cache, where
  // `rows` compares queries from `first` on, counted over all tasks, with the rows of their task; and
  // finish(item, the rows of the task as products take them).
  template <class Start, class F, class Finish>
  void for_each_block(Start&& start, F&& f, Finish&& finish) const {
    constexpr int64_t kMaxBlock = 640;
    const int64_t size = p_.chunk_size(), blocks = (size + kMaxBlock - 1) / kMaxBlock;
    const int64_t block = (size + blocks - 1) / blocks;
    parallel_for(p_.items(), p_.item_cost(), [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const OneThreadedLibrary one_thread;
      const at::Tensor centred = floats(centres_ ? block * p_.features : 0), squares = floats(block);
      for (int64_t item = begin; item < end; ++item) {
        start(item);
        const int64_t task = item / p_.chunks, chunk = item % p_.chunks;
        const int64_t last = std::min(p_.queries, (chunk + 1) * size);
        for (int64_t q = chunk * size; q < last; q += block) {
          heed_interrupts();
          const T* x = p_.x + task * p_.x_task_stride + q * p_.features;
          const int64_t count = std::min(block, last - q);
          const T* centre = centres_ ? data(centre_) + set_of(task) * p_.features : nullptr;
          run_on_isa(CentreRows<T>{x, centre, data(centred), data(squares), count, p_.features}, 0, count);
          f(item,
            ProductRows<T>{centres_ ? data(centred) : x, rows_of(task), x, p_.y + task * p_.y_task_stride,
                           data(squares), data(y_squares_) + set_of(task) * p_.rows, p_.metric, count,
                           p_.rows, p_.features},
            task * p_.queries + q);
        }
        finish(item, rows_of(task));
      }
    });
  }

  static at::Tensor floats(int64_t count) {
    return empty({count}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  }
  static T* data(const at::Tensor& tensor) { return tensor.mutable_data_ptr<T>(); }

 private:
  const T* rows_of(int64_t task) const {
    return centres_ ? data(y_) + set_of(task) * p_.rows * p_.features : p_.y + task * p_.y_task_stride;
  }
  int64_t set_of(int64_t task) const { return sets_ > 1 ? task : 0; }

  const Pairs<T>& p_;
  bool centres_;
  int64_t sets_;  // of rows: one for each task, or one for all
  at::Tensor centre_, y_, y_squares_;
};

template <typename T>
void run_large(const Pairwise<T>& p) {
  LargeComparison<T>(p).for_each_block([](int64_t) {},
                                       [&](int64_t, const ProductRows<T>& rows, int64_t first) {
                                         T* out = p.out + first * p.rows;
                                         at::Tensor products = matrix(out, rows.queries, p.rows);
                                         at::mm_out(products, matrix(rows.x, rows.queries, p.features),
                                                    matrix(rows.y, p.rows, p.features).t());
                                         run_on_isa(FinishProducts<T>{rows, out}, 0, rows.queries);
                                       },
                                       [](int64_t, const T*) {});
}

template <typename T>
void run_large(const PairwiseBackward<T>& p) {
  const LargeComparison<T> comparison(p);
  const at::Tensor y_factors = LargeComparison<T>::floats(p.items() * p.rows);
  const auto factors_of = [&](int64_t item) { return y_factors.mutable_data_ptr<T>() + item * p.rows; };
  const auto grad_of = [&](int64_t item) { return p.grad_y + item * p.rows * p.features; };
  comparison.for_each_block(
      [&](int64_t item) {
        std::fill_n(factors_of(item), p.rows, T(0));
        std::fill_n(grad_of(item), p.rows * p.features, T(0));
      },
      [&](int64_t item, const ProductRows<T>& rows, int64_t first) {
        const at::Tensor factors = LargeComparison<T>::floats(rows.queries * p.rows).view({-1, p.rows});
        T *grad_x = p.grad_x + first * p.features, *grad_y = grad_of(item);
        run_on_isa(ProductFactors<T>{rows, p.out + first * p.rows, p.grad + first * p.rows,
                                     factors.mutable_data_ptr<T>(), factors_of(item), grad_x, grad_y},
                   0, rows.queries);
        matrix(grad_x, rows.queries, p.features).addmm_(factors, matrix(rows.y, p.rows, p.features), 1, -1);
        matrix(grad_y, p.rows, p.features)
            .addmm_(factors.t(), matrix(rows.x, rows.queries, p.features), 1, -1);
      },
      [&](int64_t item, const T* rows) {
        run_on_isa(AddScaledRows<T>{factors_of(item), rows, grad_of(item), p.rows, p.features}, 0, p.rows);
      });
}

}  // namespace metafast
