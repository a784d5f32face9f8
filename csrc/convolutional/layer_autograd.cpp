// Derivatives of the products of a convolution, to any order, backward and forward. The kernels for autograd
// are written as torch writes those of its own ops, with a Node, where the other families have a
// torch::autograd::Function: torch.func refuses that, and would need another door.
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
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

using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::IValuePacker;
using torch::dynamo::autograd::PackedArgs;
using torch::dynamo::autograd::SwapSavedVariables;

// What the backward of a product knows, besides its two factors.
struct ProductCall {
  Operand to;
  std::array<Operand, 2> from;  // of its inputs
  LayerSizes sizes;

  // The gradients of the factors, where they are wanted.
  variable_list gradients(const Tensor& grad, const std::array<Tensor, 2>& factors,
                          const std::array<bool, 2>& wanted) const {
    variable_list results(2);
    if (!grad.defined()) return results;
    Operands operands;
    for (int i = 0; i < 2; ++i) operands[from[i]] = factors[i];
    for (int i = 0; i < 2; ++i) {
      if (wanted[i]) results[i] = derivative(from[i], operands, to, grad, sizes);
    }
    return results;
  }
};

struct ProductBackward : torch::autograd::Node {
  ProductCall call;
  std::array<torch::autograd::SavedVariable, 2> saved;

  std::string name() const override { return "TaskConv2dBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return call.gradients(grads[0], unpacked(), wanted());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  // Compiled autograd puts gradients_of_packed() into its graph, once for all nodes that agree in the call;
  // their tensors and sizes become inputs of the graph.
  void compiled_args(CompiledNodeArgs& args) const override {
    for (const Operand operand : {call.to, call.from[0], call.from[1]}) {
      args.collect(static_cast<int64_t>(operand));
    }
    for (const auto& variable : saved) args.collect(variable, /*is_output=*/false);
    const LayerSizes& s = call.sizes;
    for (const auto& two : {s.image, s.kernel, s.stride, s.padding}) {
      for (const c10::SymInt& size : two) args.collect(size);
    }
  }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& swap) override {
    LayerSizes& s = call.sizes;
    for (auto& variable : saved) swap.before(variable);
    for (auto* two : {&s.image, &s.kernel, &s.stride, &s.padding}) swap.before(*two);
    PackedArgs packed;
    for (const Operand operand : {call.to, call.from[0], call.from[1]}) {
      packed.pack(static_cast<int64_t>(operand));
    }
    for (const auto& two : {s.image, s.kernel, s.stride, s.padding}) {
      packed.pack(std::vector<c10::SymInt>(two.begin(), two.end()));
    }
    for (const Tensor& factor : unpacked()) packed.pack(factor);
    for (const bool wants : wanted()) packed.pack(wants);
    const std::vector<at::IValue> args = std::move(packed).vec();
    std::vector<at::TypePtr> types;
    for (const at::IValue& arg : args) types.push_back(arg.type());
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const std::string function =
        compiler->bind_function(swap.get_py_compiler(), name(), gradients_of_packed, types,
                                /*is_custom_function=*/true, /*is_traceable=*/true);
    const variable_list results = compiler->call_function(
        swap.get_py_compiler(), "apply_functional", function, grads, args,
        IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            torch::dynamo::autograd::get_input_metadata(next_edges())));
    for (auto& variable : saved) swap.after(variable);
    for (auto* two : {&s.image, &s.kernel, &s.stride, &s.padding}) swap.after(*two);
    return results;
  }

 private:
  std::array<Tensor, 2> unpacked() const { return {saved[0].unpack(), saved[1].unpack()}; }
  std::array<bool, 2> wanted() { return {task_should_compute_output(0), task_should_compute_output(1)}; }

  static variable_list gradients_of_packed(const variable_list& grads, const std::vector<at::IValue>& args) {
    PackedArgs packed(args);
    const auto operand = [&] { return static_cast<Operand>(packed.unpack<int64_t>()); };
    const auto two = [&] { return packed.unpack<std::vector<c10::SymInt>>(); };
    const Operand to = operand(), one = operand(), other = operand();
    const auto image = two(), kernel = two(), stride = two(), padding = two();
    const Tensor factor = packed.unpack<Tensor>(), other_factor = packed.unpack<Tensor>();
    const bool wants = packed.unpack<bool>(), wants_other = packed.unpack<bool>();
    return ProductCall{to, {one, other}, {image, kernel, stride, padding}}.gradients(
        grads[0], {factor, other_factor}, {wants, wants_other});
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
    for (int i = 0; i < 2; ++i) node->saved[i] = {operands[from[i]], /*is_output=*/false};
    node->call = {to, from, sizes};
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
