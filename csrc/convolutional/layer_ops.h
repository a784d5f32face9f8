// The three products of a convolution of each task's own. It pairs images x [T, B, C, H, W], kernels [T, O,
// C, kh, kw] and maps [T, B, O, H', W'] to a number that is linear in each of them, with terms
//   x[t, b, c, y stride + i - padding, ...] * weight[t, o, c, i, ...] * map[t, b, o, y, ...];
// the product onto one of them is its derivative by that one. So each one's derivatives are the other two.
#pragma once

#include <ATen/ATen.h>

#include <array>

namespace metafast {

using at::Tensor;

enum Operand { kImages, kWeight, kMaps };
constexpr int kOperands = 3;

// Tensors by Operand. That onto which a product goes is not read.
using Operands = std::array<Tensor, kOperands>;

struct LayerSizes {
  c10::SymDimVector image, kernel, stride, padding;  // two each: of rows, of columns

  LayerSizes() = default;
  LayerSizes(c10::SymIntArrayRef image, c10::SymIntArrayRef kernel, c10::SymIntArrayRef stride,
             c10::SymIntArrayRef padding)
      : image(image), kernel(kernel), stride(stride), padding(padding) {}
};

// The registered op for the product onto `to`, through torch's dispatcher.
Tensor task_product(Operand to, const Operands& operands, const LayerSizes& sizes);

}  // namespace metafast
