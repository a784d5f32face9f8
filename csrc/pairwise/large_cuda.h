// A large comparison on the GPU, through matrix products of torch's library, as on the CPU (large.h): exact
// but for what torch.backends.cuda.matmul allows the library.
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

template <typename T>
void run_large_on_cuda(const Pairwise<T>& p, const at::Tensor& like) {
  constexpr int64_t kMostQueries = 1 << 14;  // at a time: as much is copied, where there is a centre
  const bool centres = p.metric == Metric::sqeuclidean || p.metric == Metric::euclidean;
  const auto numbers = [&](int64_t rows, int64_t columns) { return empty({rows, columns}, like.options()); };
  const auto matrix = [&](const T* data, int64_t rows, int64_t columns) {
    return at::from_blob(const_cast<T*>(data), {rows, columns}, like.options());
  };
  const int64_t block = std::min(p.queries, kMostQueries);
  const at::Tensor centre = numbers(centres, p.features);
  const at::Tensor x = numbers(centres ? block : 0, p.features), x_squares = numbers(block, 1);
  const at::Tensor y = numbers(centres ? p.rows : 0, p.features), y_squares = numbers(p.rows, 1);
  const auto data = [](const at::Tensor& tensor) { return tensor.mutable_data_ptr<T>(); };
  const auto centred = [&](const T* rows, const at::Tensor& out, const at::Tensor& squares, int64_t count) {
    run_kernel(CentreRows<T>{rows, centres ? data(centre) : nullptr, centres ? data(out) : nullptr,
                             data(squares), count, p.features},
               like);
    return centres ? static_cast<const T*>(data(out)) : rows;
  };
  for (int64_t task = 0; task < p.tasks; ++task) {
    const T* const given_y = p.y + task * p.y_task_stride;
    if (centres) run_kernel(MeanRow<T>{given_y, data(centre), p.rows, p.features}, like);
    const T* const rows = centred(given_y, y, y_squares, p.rows);
    for (int64_t q = 0; q < p.queries; q += block) {
      const int64_t count = std::min(block, p.queries - q);
      const T* const given_x = p.x + task * p.x_task_stride + q * p.features;
      const T* const queries = centred(given_x, x, x_squares, count);
      T* const out = p.out + (task * p.queries + q) * p.rows;
      at::Tensor products = matrix(out, count, p.rows);
      at::mm_out(products, matrix(queries, count, p.features), matrix(rows, p.rows, p.features).t());
      run_kernel(FinishProducts<T>{{queries, rows, given_x, given_y, data(x_squares), data(y_squares),
                                    p.metric, count, p.rows, p.features},
                                   out},
                 like);
    }
  }
}

}  // namespace metafast
