// A large comparison on the GPU, and its gradients, through matrix products of torch's library, as on the CPU
// (large.h): exact but for what torch.backends.cuda.matmul allows the library.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "common/dispatch.h"
#include "pairwise/large.h"

namespace metafast {

// Whether a task's products keep the GPU busy longer than the kernels around them take to launch.
template <typename T>
bool is_large_on_cuda(const Pairs<T>& p) {
  constexpr double kMultiplications = 1 << 28;
  return is_large(p) && static_cast<double>(p.queries) * p.rows * p.features >= kMultiplications;
}

// For each task begin(task); f(rows, first) for blocks of its queries, where `rows` compares queries from
// `first` on, counted over all tasks, with the rows of their task; and finish(task, the rows as products take
// them).
template <typename T>
class LargeComparisonOnCuda {
 public:
  LargeComparisonOnCuda(const Pairs<T>& p, const at::Tensor& like)
      : p_(p),
        like_(like),
        centres_(p.metric == Metric::sqeuclidean || p.metric == Metric::euclidean),
        block_(std::min(p.queries, kMostQueries)) {}

  at::Tensor numbers(int64_t rows, int64_t columns) const { return empty({rows, columns}, like_.options()); }
  at::Tensor matrix(const T* data, int64_t rows, int64_t columns) const {
    return at::from_blob(const_cast<T*>(data), {rows, columns}, like_.options());
  }
  static T* data(const at::Tensor& tensor) { return tensor.mutable_data_ptr<T>(); }
  int64_t block() const { return block_; }

  template <class Begin, class F, class Finish>
  void for_each_block(Begin&& begin, F&& f, Finish&& finish) const {
    const at::Tensor centre = numbers(centres_, p_.features);
    const at::Tensor x = numbers(centres_ ? block_ : 0, p_.features), x_squares = numbers(block_, 1);
    const at::Tensor y = numbers(centres_ ? p_.rows : 0, p_.features), y_squares = numbers(p_.rows, 1);
    const auto centred = [&](const T* rows, const at::Tensor& out, const at::Tensor& squares, int64_t count) {
      run_kernel(CentreRows<T>{rows, centres_ ? data(centre) : nullptr, centres_ ? data(out) : nullptr,
                               data(squares), count, p_.features},
                 like_);
      return centres_ ? static_cast<const T*>(data(out)) : rows;
    };
    for (int64_t task = 0; task < p_.tasks; ++task) {
      const T* const given_y = p_.y + task * p_.y_task_stride;
      if (centres_) run_kernel(MeanRow<T>{given_y, data(centre), p_.rows, p_.features}, like_);
      const T* const rows = centred(given_y, y, y_squares, p_.rows);
      begin(task);
      for (int64_t q = 0; q < p_.queries; q += block_) {
        const int64_t count = std::min(block_, p_.queries - q);
        const T* const given_x = p_.x + task * p_.x_task_stride + q * p_.features;
        const T* const queries = centred(given_x, x, x_squares, count);
        f(ProductRows<T>{queries, rows, given_x, given_y, data(x_squares), data(y_squares), p_.metric, count,
                         p_.rows, p_.features},
          task * p_.queries + q);
      }
      finish(task, rows);
    }
  }

 private:
  static constexpr int64_t kMostQueries = 1 << 14;  // at a time: as much is copied, where there is a centre

  const Pairs<T>& p_;
  const at::Tensor& like_;
  bool centres_;
  int64_t block_;
};

template <typename T>
void run_large_on_cuda(const Pairwise<T>& p, const at::Tensor& like) {
  const LargeComparisonOnCuda<T> comparison(p, like);
  comparison.for_each_block([](int64_t) {},
                            [&](const ProductRows<T>& rows, int64_t first) {
                              T* const out = p.out + first * p.rows;
                              at::Tensor products = comparison.matrix(out, rows.queries, p.rows);
                              at::mm_out(products, comparison.matrix(rows.x, rows.queries, p.features),
                                         comparison.matrix(rows.y, p.rows, p.features).t());
                              run_kernel(FinishProducts<T>{rows, out}, like);
                            },
                            [](int64_t, const T*) {});
}

// With one chunk: the products are the sums over the queries.
template <typename T>
void run_large_on_cuda(const PairwiseBackward<T>& p, const at::Tensor& like) {
  const LargeComparisonOnCuda<T> comparison(p, like);
  const at::Tensor factors = comparison.numbers(comparison.block(), p.rows),
                   y_factors = comparison.numbers(p.rows, 1);
  const auto grad_of = [&](int64_t task) { return p.grad_y + task * p.rows * p.features; };
  comparison.for_each_block(
      [&](int64_t task) {
        y_factors.zero_();
        comparison.matrix(grad_of(task), p.rows, p.features).zero_();
      },
      [&](const ProductRows<T>& rows, int64_t first) {
        T *const grad_x = p.grad_x + first * p.features, *const grad_y = grad_of(first / p.queries);
        run_kernel(ProductFactors<T>{rows, p.out + first * p.rows, p.grad + first * p.rows,
                                     comparison.data(factors), comparison.data(y_factors), grad_x, grad_y},
                   like);
        const at::Tensor of_block = factors.narrow(0, 0, rows.queries);
        comparison.matrix(grad_x, rows.queries, p.features)
            .addmm_(of_block, comparison.matrix(rows.y, p.rows, p.features), 1, -1);
        comparison.matrix(grad_y, p.rows, p.features)
            .addmm_(of_block.t(), comparison.matrix(rows.x, rows.queries, p.features), 1, -1);
      },
      [&](int64_t task, const T* rows) {
        run_kernel(AddScaledRows<T>{comparison.data(y_factors), rows, grad_of(task), p.rows, p.features},
                   like);
      });
}

}  // namespace metafast
