// What is left to the caller of the kernel in the dual form of the first layer (params.h): the two products
// over all tasks, by the library's GEMM, whose operands are large here.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <array>

#include "common/dispatch.h"
#include "common/one_thread.h"
#include "common/sums.h"
#include "inner_loop/params.h"

namespace metafast {

using at::Tensor;

// out = beta self + a b: [M, K] x [K, N], or batches of them, T of each. The library may share a product
// among its threads, and then add in an order that depends on how many there are. So the shapes alone cut it
// into parts, two of them at least for two threads, and each runs on one. On CUDA it is one product.
inline void multiply_in_parts(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b,
                              double beta) {
  constexpr int64_t kPart = 128;  // rows or columns, or batches
  const bool batched = out.dim() == 3;
  if (out.is_cuda()) {
    Tensor result = out;
    batched ? at::baddbmm_out(result, self, a, b, beta) : at::addmm_out(result, self, a, b, beta);
    return;
  }
  const int64_t dim = !batched && out.size(1) > out.size(0) ? 1 : 0, size = out.size(dim);
  const int64_t parts = std::max<int64_t>(2, batched ? size : (size + kPart - 1) / kPart);
  parallel_for(parts, out.numel() / parts * a.size(-1), [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const OneThreadedLibrary one_thread;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t from = size * part / parts, count = size * (part + 1) / parts - from;
      if (count == 0) continue;
      heed_interrupts();
      const auto of_out = [&](const Tensor& tensor) { return tensor.narrow(dim, from, count); };
      Tensor result = of_out(out);
      if (batched) {
        at::baddbmm_out(result, of_out(self), of_out(a), of_out(b), beta);
      } else {
        at::addmm_out(result, of_out(self), dim == 0 ? a.narrow(0, from, count) : a,
                      dim == 1 ? b.narrow(1, from, count) : b, beta);
      }
    }
  });
}

class DualForm {
 public:
  // Fills p.dual if the dual form pays; then the kernel leaves the gradients of the first layer to
  // gradients().
  template <typename T>
  void prepare(InnerLoop<T>& p, const Tensor& support_x, const Tensor& query_x, const Tensor& weight,
               const Tensor& bias, bool grad_params) {
    if (!p.dual_pays()) return;
    used_ = true;
    Batch* const batches[] = {&support_, &query_};
    const Tensor* const inputs[] = {&support_x, &query_x};
    for (int i = 0; i < 2; ++i) {
      Batch& batch = *batches[i];
      batch.tasks = p.tasks;
      batch.examples = inputs[i]->size(1);
      batch.x = weight.dim() == 2 ? inputs[i]->flatten(0, 1) : *inputs[i];
      at::DimVector sizes(batch.x.sizes());
      sizes.back() = weight.size(-2);
      batch.start = empty(sizes, batch.x.options());
      if (grad_params) batch.grad = empty(sizes, batch.x.options());
      multiply_in_parts(batch.start, bias.unsqueeze(-2).expand(sizes), batch.x, weight.mT(), 1);
    }
    p.dual.support = support_.start.const_data_ptr<T>();
    p.dual.query = query_.start.const_data_ptr<T>();
    if (!grad_params) return;
    p.dual.grad_support = support_.grad.mutable_data_ptr<T>();
    p.dual.grad_query = query_.grad.mutable_data_ptr<T>();
  }

  bool used() const { return used_; }

  // After the kernel: the gradient of the first layer's W, of the shape of `weight`, and of its b.
  template <typename T>
  std::array<Tensor, 2> gradients(const Tensor& weight) const {
    const Tensor grad = empty(weight.sizes(), weight.options());
    multiply_in_parts(grad, grad, support_.grad.mT(), support_.x, 0);
    multiply_in_parts(grad, grad, query_.grad.mT(), query_.x, 1);
    return {grad, support_.template sum_of_grad<T>() + query_.template sum_of_grad<T>()};
  }

 private:
  struct Batch {
    Tensor x, start, grad;    // [T B, D], [T B, H], [T B, H] with shared parameters, else [T, B, ...]
    int64_t tasks, examples;  // examples of a task

    // Over the examples of each task, then over tasks if they share the parameters: few columns in one sum
    // over many rows would leave most of a GPU idle.
    template <typename T>
    Tensor sum_of_grad() const {
      const Tensor of_tasks = sum<T>(grad, tasks, examples);
      return grad.dim() == 3 ? of_tasks : sum<T>(of_tasks, 1, tasks).flatten();
    }

    // [outer, rows, H] to [outer, H].
    template <typename T>
    static Tensor sum(const Tensor& of, int64_t outer, int64_t rows) {
      const Tensor out = empty({outer, of.size(-1)}, of.options());
      run_kernel(SumPartials<T>{of.const_data_ptr<T>(), out.mutable_data_ptr<T>(), outer, rows, of.size(-1)},
                 of);
      return out;
    }
  };
  bool used_ = false;
  Batch support_, query_;
};

}  // namespace metafast
