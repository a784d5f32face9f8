// The losses' gradients, and their tangents. Part of cuda.cu.
#pragma once

#include "common/cuda.h"
#include "convolutional/params.h"
#include "inner_loop/math.h"

namespace metafast::cuda {
namespace {

constexpr int kLossThreads = 128, kLossWarps = kLossThreads / kWarpSize;
constexpr int kLossExamples = 4 * kLossWarps;  // of a block

struct LossShared {
  int counts[kLossWarps];
};

// A lane to an output, in turn.
template <typename T>
__device__ __forceinline__ void differentiate_squares(const OutputGradient<T>& p, int64_t example,
                                                      const T* out, const T* tangent, T share, T* grad) {
  for (int64_t o = threadIdx.x % kWarpSize; o < p.outputs; o += kWarpSize) {
    const int64_t i = example * p.outputs + o;
    T result = tangent != nullptr ? tangent[o] : T(0);
    if (tangent != nullptr) {
      MeanSquaredError::tangent(out + o, p.y + i, share, 1, &result);
      if (p.grad_y != nullptr) p.grad_y[i] -= result;
    } else {
      MeanSquaredError::gradient(out + o, p.y + i, share, 1, &result);
    }
    grad[o] = result;
  }
}

template <typename T>
__device__ __forceinline__ void differentiate_cross_entropy(const OutputGradient<T>& p, int64_t label,
                                                            const T* out, const T* tangent, T share,
                                                            T* grad) {
  using L = CrossEntropy;
  const int lane = threadIdx.x % kWarpSize;
  T top = out[0], others = 0, mean = 0;
  for (int64_t o = lane; o < p.outputs; o += kWarpSize) top = out[o] > top ? out[o] : top;
  top = warp_max(top);
  const T own_tangent = tangent != nullptr ? tangent[label] : T(0);
  for (int64_t o = lane; o < p.outputs; o += kWarpSize) {
    const T e = Math<T>::exp(out[o] - top);
    others += o == label ? T(0) : e;
    if (tangent != nullptr) mean += e * (tangent[o] - own_tangent);
  }
  others = warp_sum(others);
  const T sum = Math<T>::exp(out[label] - top) + others, scale = share / sum;
  if (tangent != nullptr) mean = warp_sum(mean) / sum;
  for (int64_t o = lane; o < p.outputs; o += kWarpSize) {
    const T e = Math<T>::exp(out[o] - top);
    grad[o] = tangent != nullptr ? scale * e * (tangent[o] - own_tangent - mean)
                                 : L::slope(e, T(o == label), others, scale);
  }
}

// A warp to an example.
template <typename T>
__global__ void __launch_bounds__(kLossThreads) loss_gradient(const __grid_constant__ OutputGradient<T> p) {
  auto& shared = shared_memory<LossShared>();
  const int64_t blocks = div_up(p.images, int64_t{kLossExamples}), task = block_index() / blocks;
  if (task >= p.tasks) return;
  const int64_t first = block_index() % blocks * kLossExamples;
  const int64_t* const labels = p.labels != nullptr ? p.labels + task * p.images : nullptr;
  T equal = 1;
  if (labels == nullptr) {
    equal /= static_cast<T>(p.images * p.outputs);
  } else {
    int count = 0;
    for (int64_t b = threadIdx.x; b < p.images; b += kLossThreads) {
      METAFAST_DEVICE_CHECK(labels[b] == kIgnoreLabel || (labels[b] >= 0 && labels[b] < p.outputs),
                            "labels: expected classes in [0, O) or -100 (ignored)");
      count += labels[b] != kIgnoreLabel;
    }
    equal /= static_cast<T>(block_sum(count, shared.counts));
  }
  for (int64_t b = first + threadIdx.x / kWarpSize; b < first + kLossExamples && b < p.images;
       b += kLossWarps) {
    const T share = p.shares != nullptr ? p.shares[task * p.images + b] : equal;
    const T* const out = p.out.at(task, b, 0, 0);
    const T* const tangent = p.out_tangent.data != nullptr ? p.out_tangent.at(task, b, 0, 0) : nullptr;
    T* const grad = p.grad.at(task, b, 0, 0);
    if (share == T(0) || (labels != nullptr && labels[b] == kIgnoreLabel)) {
      for (int64_t o = threadIdx.x % kWarpSize; o < p.outputs; o += kWarpSize) grad[o] = 0;
    } else if (labels == nullptr) {
      differentiate_squares(p, task * p.images + b, out, tangent, share, grad);
    } else {
      differentiate_cross_entropy(p, labels[b], out, tangent, share, grad);
    }
  }
}

}  // namespace

template <typename T>
void launch(const OutputGradient<T>& p, Stream stream) {
  const int64_t blocks = p.tasks * div_up(p.images, int64_t{kLossExamples});
  launch_kernel({"loss_gradient", grid_of(blocks), kLossThreads, sizeof(LossShared), stream},
                loss_gradient<T>, p);
}

}  // namespace metafast::cuda
