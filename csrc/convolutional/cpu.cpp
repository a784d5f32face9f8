// CPU kernels of the convolutional family.
#include <algorithm>

#include "convolutional/block_backward.h"
#include "convolutional/block_forward.h"
#include "convolutional/convolve.h"
#include "convolutional/permute.h"

namespace metafast::METAFAST_ISA {

// ---- the loss ----

// Of one example: the gradient, or its tangent, times `scale`.
template <typename T>
void differentiate_squares(const OutputGradient<T>& p, int64_t example, const T* out, const T* tangent,
                           T scale, T* grad) {
  for (int64_t o = 0; o < p.outputs; ++o) {
    grad[o] = 2 * scale * (tangent ? tangent[o] : out[o] - p.y[example * p.outputs + o]);
    if (p.grad_y != nullptr) p.grad_y[example * p.outputs + o] -= grad[o];
  }
}

template <typename T>
void differentiate_cross_entropy(const OutputGradient<T>& p, int64_t label, const T* out, const T* tangent,
                                 T scale, T* grad) {
  const T most = *std::max_element(out, out + p.outputs);
  T sum = 0, product = 0;
  for (int64_t o = 0; o < p.outputs; ++o) {
    grad[o] = Math<T>::exp(out[o] - most);
    sum += grad[o];
    if (tangent) product += grad[o] * tangent[o];
  }
  for (int64_t o = 0; o < p.outputs; ++o) {
    const T probability = grad[o] / sum;
    grad[o] = scale * (tangent ? probability * (tangent[o] - product / sum) : probability - T(o == label));
  }
}

template <typename T>
void run(const OutputGradient<T>& p, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    int64_t count = p.images;
    if (p.labels != nullptr) {
      count = 0;
      for (int64_t b = 0; b < p.images; ++b) count += p.labels[task * p.images + b] != kIgnoreLabel;
    }
    const T equal = T(1) / static_cast<T>(count > 0 ? count * (p.labels ? 1 : p.outputs) : 1);
    for (int64_t b = 0; b < p.images; ++b) {
      const int64_t example = task * p.images + b;
      const T share = p.shares ? p.shares[example] : equal;
      const T* const out = p.out.at(task, b, 0, 0);
      const T* const tangent = p.out_tangent.data ? p.out_tangent.at(task, b, 0, 0) : nullptr;
      T* const grad = p.grad.at(task, b, 0, 0);
      if (share == 0 || (p.labels != nullptr && p.labels[example] == kIgnoreLabel)) {
        std::fill_n(grad, p.outputs, T(0));
      } else if (p.labels == nullptr) {
        differentiate_squares(p, example, out, tangent, share, grad);
      } else {
        differentiate_cross_entropy(p, p.labels[example], out, tangent, share, grad);
      }
    }
  }
}

#define METAFAST_INSTANTIATE(Params)                         \
  template void run(const Params<float>&, int64_t, int64_t); \
  template void run(const Params<double>&, int64_t, int64_t);
METAFAST_INSTANTIATE(Convolve)
METAFAST_INSTANTIATE(ConvolveWeights)
METAFAST_INSTANTIATE(BlockForward)
METAFAST_INSTANTIATE(BlockBackward)
METAFAST_INSTANTIATE(ThinMoments)
METAFAST_INSTANTIATE(OutputGradient)
METAFAST_INSTANTIATE(Permute)
#undef METAFAST_INSTANTIATE

}  // namespace metafast::METAFAST_ISA
