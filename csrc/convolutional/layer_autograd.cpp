// Derivatives of the products of a convolution, to any order, backward and forward. The kernels for autograd
// are written as torch writes those of its own ops, with a Node, where the other families have a
// torch::autograd::Function: torch.func refuses that, and would need another door.
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "common/call.h"
#include "convolutional/layer_ops.h"

namespace metafast {

// ---- the ops, through the dispatcher ----

Tensor task_product(Operand to, const Operands& operands, const LayerSizes& s) {
  using Dims = c10::SymIntArrayRef;
  using Forward = Tensor(const Tensor&, const Tensor&, Dims, Dims);
  using Back = Tensor(const Tensor&, const Tensor&, Dims, Dims, Dims);
  static const auto maps = find_op<Forward>("task_conv2d_maps");
  static const auto images = find_op<Back>("task_conv2d_images");
  static const auto weight = find_op<Back>("task_conv2d_weight");
  switch (to) {
    case kMaps:
      return maps.call(operands[kImages], operands[kWeight], s.stride, s.padding);
    case kImages:
      return images.call(operands[kMaps], operands[kWeight], s.image, s.stride, s.padding);
    default:
      return weight.call(operands[kImages], operands[kMaps], s.kernel, s.stride, s.padding);
  }
}

namespace {

// The product onto `by` that is the derivative of the one onto `to`: what comes back, or along, takes the
// place of an operand.
Tensor derivative(Operand by, Operands operands, Operand place, const Tensor& value,
                  const LayerSizes& sizes) {
  operands[place] = value;
  return task_product(by, operands, sizes);
}

// ---- backward ----

struct ProductBackward : torch::autograd::Node {
  Operand to;
  std::array<Operand, 2> from;  // of its inputs
  std::array<torch::autograd::SavedVariable, 2> saved;
  LayerSizes sizes;

  std::string name() const override { return "TaskConv2dBackward"; }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    torch::autograd::variable_list results(2);
    if (!grads[0].defined()) return results;
    Operands operands;
    for (int i = 0; i < 2; ++i) operands[from[i]] = saved[i].unpack();
    for (int i = 0; i < 2; ++i) {
      if (task_should_compute_output(i)) results[i] = derivative(from[i], operands, to, grads[0], sizes);
    }
    return results;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }
};

// ---- forward, with the tangents of forward-mode AD ----

Tensor differentiable_product(Operand to, std::array<Operand, 2> from, const Operands& operands,
                              const LayerSizes& sizes) {
  const Tensor &one = operands[from[0]], &other = operands[from[1]];
  c10::intrusive_ptr<ProductBackward> node;
  if (torch::autograd::compute_requires_grad(one, other)) {
    node = c10::make_intrusive<ProductBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(one, other));
    node->to = to;
    node->from = from;
    for (int i = 0; i < 2; ++i) node->saved[i] = {operands[from[i]], /*is_output=*/false};
    node->sizes = sizes;
  }
  Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return task_product(to, operands, sizes);
  }();
  if (node) torch::autograd::set_history(result, node);
  Tensor tangent;
  for (int i = 0; i < 2; ++i) {
    if (!torch::autograd::isFwGradDefined(operands[from[i]])) continue;
    Operands along;
    along[from[i]] = operands[from[i]]._fw_grad(/*level=*/0);
    along[from[1 - i]] = operands[from[1 - i]]._fw_primal(/*level=*/0);
    const Tensor part = task_product(to, along, sizes);
    tangent = tangent.defined() ? tangent + part : part;
  }
  if (tangent.defined()) result._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
  return result;
}

// ---- each op as the product that it is ----

using Dims = c10::SymIntArrayRef;

Dims pixels(const Tensor& tensor) { return tensor.sym_sizes().slice(3); }

Tensor maps_autograd(const Tensor& x, const Tensor& weight, Dims stride, Dims padding) {
  const LayerSizes sizes{pixels(x), pixels(weight), stride, padding};
  return differentiable_product(kMaps, {kImages, kWeight}, {x, weight, Tensor()}, sizes);
}

Tensor images_autograd(const Tensor& grad, const Tensor& weight, Dims size, Dims stride, Dims padding) {
  const LayerSizes sizes{size, pixels(weight), stride, padding};
  return differentiable_product(kImages, {kMaps, kWeight}, {Tensor(), weight, grad}, sizes);
}

Tensor weight_autograd(const Tensor& x, const Tensor& grad, Dims size, Dims stride, Dims padding) {
  const LayerSizes sizes{pixels(x), size, stride, padding};
  return differentiable_product(kWeight, {kImages, kMaps}, {x, Tensor(), grad}, sizes);
}

}  // namespace

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, Autograd, m) {
  m.impl("task_conv2d_maps", maps_autograd);
  m.impl("task_conv2d_images", images_autograd);
  m.impl("task_conv2d_weight", weight_autograd);
}

}  // namespace metafast
