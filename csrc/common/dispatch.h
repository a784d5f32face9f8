// From an op's tensors to its kernel: dtype, device, instruction set, threads or stream, and memory for
// results.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include "common/kernel.h"
#include "common/pages.h"
#include "common/parallel.h"

#ifdef METAFAST_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace metafast {

template <class Params>
void run_on_cpu(const Params& params) {
  parallel_for(params.items(), params.item_cost(),
               [&params](int64_t begin, int64_t end) { run_on_isa(params, begin, end); });
}

// Runs the kernel that `params` describes where `like` lives, on the current stream of its device.
template <class Params>
void run_kernel(const Params& params, [[maybe_unused]] const at::Tensor& like) {
#if defined(METAFAST_EMULATED)
  launch_cuda(params, nullptr);  // tests/cuda_emulator runs the CUDA kernel on the CPU
#else
#if defined(METAFAST_WITH_CUDA)
  if (like.is_cuda()) {
    const c10::cuda::CUDAGuard guard(like.device());
    return launch_cuda(params, c10::cuda::getCurrentCUDAStream().stream());
  }
#endif
  if constexpr (requires { params.items(); }) {
    run_on_cpu(params);
  } else {
    TORCH_INTERNAL_ASSERT(false, "a kernel that only a GPU has");
  }
#endif
}

// Whether kernels run on the GPU (or as if on it), where reading a value would wait for it.
inline bool runs_cuda([[maybe_unused]] const at::Tensor& like) {
#if defined(METAFAST_EMULATED)
  return true;
#else
  return like.is_cuda();
#endif
}

// Calls f.template operator()<T>() with the scalar type the kernels compute in.
template <class F>
auto with_scalar(const at::Tensor& like, F&& f) {
  return like.scalar_type() == at::kDouble ? f.template operator()<double>() : f.template operator()<float>();
}

// float16 and bfloat16 are computed in float32.
inline at::ScalarType compute_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The tensor itself where it has the dtype: `Tensor::to` costs a call through the dispatcher to find that
// out.
inline at::Tensor to_dtype(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

// An uninitialised tensor for a result. On the CPU without the dispatcher: a small call has a dozen results.
// Large ones there ask for huge pages.
inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor result = options.device().is_cpu() ? at::Tensor(at::detail::empty_cpu(sizes, options))
                                                : at::empty(sizes, options);
  if (result.is_cpu() && result.nbytes() >= 2 * kHugePage)
    ask_for_huge_pages(result.data_ptr(), result.nbytes());
  return result;
}

}  // namespace metafast
