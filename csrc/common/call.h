// Calling registered ops from C++, and what their autograd kernels share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <string>
#include <tuple>

namespace metafast {

#define METAFAST_STRING_(x) #x
#define METAFAST_STRING(x) METAFAST_STRING_(x)

// The registered op `name`, with the signature of the function that stands for it in the family's ops.h. Look
// it up once, in a static variable.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string(METAFAST_STRING(METAFAST_NAMESPACE) "::") + name).c_str(), "")
      .template typed<Signature>();
}

// Whether an op has to be recorded for its backward. A forward-mode tangent would be lost without notice; the
// Python API takes such calls to the reference before they come here.
template <class... Tensors>
bool needs_graph(const char* op, const Tensors&... inputs) {
  const auto has_tangent = [](const at::Tensor& t) {
    return t.defined() && t._fw_grad(/*level=*/0).defined();
  };
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(has_tangent(inputs) || ...), op,
      ": forward-mode automatic differentiation is not implemented in the compiled op; "
      "call it through the metafast package, which uses the reference there");
  return at::GradMode::is_enabled() && ((inputs.defined() && inputs.requires_grad()) || ...);
}

inline bool needs_graph_of(const char* op, at::TensorList inputs) {
  bool needs = false;
  for (const at::Tensor& input : inputs) needs |= needs_graph(op, input);
  return needs;
}

inline at::Tensor tensor_or_undefined(const std::optional<at::Tensor>& tensor) {
  return tensor.value_or(at::Tensor());
}

inline std::optional<at::Tensor> optional_of(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

inline c10::DeviceType autocast_device(c10::DispatchKeySet keys) {
  return keys.has(c10::DispatchKey::AutocastCUDA) ? c10::DeviceType::CUDA : c10::DeviceType::CPU;
}

// Under autocast distances, losses and inner loops run in float32, as torch.cdist does: every floating tensor
// argument of an op that is registered so is cast, whatever its position.
inline void autocast_to_float32(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                torch::jit::Stack* stack) {
  const c10::DeviceType device = autocast_device(keys);
  c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  for (auto it = stack->end() - op.schema().arguments().size(); it != stack->end(); ++it) {
    c10::IValue& argument = *it;
    if (argument.isTensor() && argument.toTensor().defined()) {
      argument = at::autocast::cached_cast(at::kFloat, argument.toTensor(), device);
    } else if (argument.isTensorList()) {
      const std::vector<at::Tensor> tensors = argument.toTensorVector();
      argument = at::autocast::cached_cast(at::kFloat, at::TensorList(tensors), device);
    }
  }
  op.callBoxed(stack);
}

// What a graph keeps of a call besides its tensors: a std::tuple of strings, numbers and flags, as one entry,
// since every entry of saved_data costs an allocation or two. Compiled autograd compares their values, and
// refuses an object of a class.
template <class... Values>
void keep_call(torch::autograd::AutogradContext* ctx, const std::tuple<Values...>& call) {
  ctx->saved_data["call"] = call;
}
template <class Call>
Call kept_call(torch::autograd::AutogradContext* ctx) {
  const auto values = ctx->saved_data["call"].toTupleRef().elements().asArrayRef();
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return Call{values[i].template to<std::tuple_element_t<i, Call>>()...};
  }(std::make_index_sequence<std::tuple_size_v<Call>>{});
}

// Gradients that a forward found on its way, where they are defined, until the first backward takes them.
// Compiled autograd finds tensors only in entries of their own.
inline void keep_gradients(torch::autograd::AutogradContext* ctx, at::TensorList grads) {
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].defined()) ctx->saved_data[std::to_string(i)] = grads[i];
  }
}
// Those of `count` inputs; or none, if they were taken.
inline torch::autograd::variable_list take_gradients(torch::autograd::AutogradContext* ctx, size_t count) {
  torch::autograd::variable_list grads;
  for (size_t i = 0; i < count; ++i) {
    const auto found = ctx->saved_data.find(std::to_string(i));
    if (found == ctx->saved_data.end()) continue;
    grads.resize(count);
    grads[i] = std::move(found->second).toTensor();
    ctx->saved_data.erase(found);
  }
  return grads;
}

// Most backwards begin with a gradient of 1, which changes nothing. Reading it is free on the CPU, and would
// wait for a GPU.
inline bool is_one(const at::Tensor& grad) {
  return grad.is_cpu() && !at::isTensorSubclassLike(grad) && grad.item<double>() == 1;
}

// The backward of a double backward: a third derivative is refused, not returned wrong.
inline torch::autograd::variable_list no_third_derivative(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": third derivatives are not implemented in the compiled op; ",
                              "metafast.reference differentiates to any order. A Hessian-vector product is "
                              "a second derivative: torch.autograd.functional.hvp takes a third on its way, "
                              "vhp, of the same product, does not");
}

// Gradients as compute() gives them, which raise when they are differentiated by any of `inputs`.
struct LastDerivative : torch::autograd::Function<LastDerivative> {
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* ctx, at::TensorList,
      const std::function<torch::autograd::variable_list()>& compute, const char* op) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["op"] = std::string(op);
    return compute();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, ctx->saved_data["op"].toStringRef(),
                                ": derivatives of its gradient are not implemented in the compiled op; "
                                "metafast.reference differentiates to any order");
  }
};

}  // namespace metafast
