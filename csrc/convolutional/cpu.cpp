// CPU kernels of the convolutional family.
#include <algorithm>

#include "convolutional/block.h"
#include "convolutional/convolve.h"

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
    const T share = T(1) / static_cast<T>(count > 0 ? count * (p.labels ? 1 : p.outputs) : 1);
    for (int64_t b = 0; b < p.images; ++b) {
      const int64_t example = task * p.images + b;
      const T* const out = p.out.at(task, b, 0, 0);
      const T* const tangent = p.out_tangent.data ? p.out_tangent.at(task, b, 0, 0) : nullptr;
      T* const grad = p.grad.at(task, b, 0, 0);
      if (p.labels == nullptr) {
        differentiate_squares(p, example, out, tangent, share, grad);
      } else if (p.labels[example] == kIgnoreLabel) {
        std::fill_n(grad, p.outputs, T(0));
      } else {
        differentiate_cross_entropy(p, p.labels[example], out, tangent, share, grad);
      }
    }
  }
}

// ---- layouts ----

template <typename T>
void run(const Permute<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t i0 = item / p.size[1], i1 = item % p.size[1];
    for (int64_t i2 = 0; i2 < p.size[2]; ++i2) {
      for (int64_t i3 = 0; i3 < p.size[3]; ++i3) {
        const int64_t index[4] = {i0, i1, i2, i3};
        const T* in = p.in;
        T* out = p.out;
        for (int d = 0; d < 4; ++d) {
          in += index[d] * p.in_stride[d];
          out += index[d] * p.out_stride[d];
        }
        for (int64_t i = 0; i < p.size[4]; ++i) out[i * p.out_stride[4]] = in[i * p.in_stride[4]];
        for (int64_t i = p.size[4]; i < p.pad; ++i) out[i * p.out_stride[4]] = 0;
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
METAFAST_INSTANTIATE(OutputGradient)
METAFAST_INSTANTIATE(Permute)
#undef METAFAST_INSTANTIATE

}  // namespace metafast::METAFAST_ISA
