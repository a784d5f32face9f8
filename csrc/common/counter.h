// A counter in the GPU's memory that is 0 whenever a kernel begins to count with it, for is_last_block
// (cuda.h), which leaves it at 0 again. So no launch has to clear it: kernels on one stream run one after the
// other, and each stream has one. A kernel that a CUDA graph captures gets one of its own, cleared in every
// replay, since graphs that were captured on one stream may run side by side.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <mutex>
#include <utility>

#include "common/dispatch.h"

#ifdef METAFAST_WITH_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace metafast {

class ZeroCounter {
 public:
  ZeroCounter() = default;
  // For a launch on the device of `like`, on its current stream; keep it until it is launched.
  explicit ZeroCounter(const at::Tensor& like) {
    const auto make = [&] { return at::zeros({1}, like.options().dtype(at::kLong)); };
#ifdef METAFAST_WITH_CUDA
    if (like.is_cuda()) {
      const c10::cuda::CUDAGuard guard(like.device());
      if (c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None) {
        static std::mutex mutex;
        static auto& counters =
            *new std::map<std::pair<int, int64_t>, at::Tensor>;  // outlives the CUDA context
        const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
        const std::lock_guard<std::mutex> lock(mutex);
        at::Tensor& counter = counters[{like.device().index(), stream.id()}];
        if (!counter.defined()) counter = make();
        tensor_ = counter;
        return;
      }
    }
#endif
    tensor_ = make();
  }

  unsigned long long* data() const {
    return reinterpret_cast<unsigned long long*>(tensor_.mutable_data_ptr<int64_t>());
  }

 private:
  at::Tensor tensor_;
};

}  // namespace metafast
