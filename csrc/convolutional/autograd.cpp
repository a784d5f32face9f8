// First derivatives of the convolutional ops. Their backwards are ops, which refuse to be differentiated
// again.
#include <torch/library.h>

#include <algorithm>

#include "common/call.h"
#include "convolutional/ops.h"

namespace metafast {

// ---- the ops, through the dispatcher ----

#define METAFAST_CALL(op, ...)                                     \
  static const auto handle = find_op<decltype(metafast::op)>(#op); \
  return handle.call(__VA_ARGS__)

std::tuple<std::vector<Tensor>, Tensor, Tensor> conv_inner_sgd(
    at::TensorList params, const Tensor& x, const Tensor& y, at::TensorList lr,
    const OptionalTensor& example_weights, at::IntArrayRef network, at::ArrayRef<double> eps,
    std::string_view loss, int64_t steps, double momentum, bool first_order,
    std::optional<at::ScalarType> product_dtype, int64_t keep) {
  METAFAST_CALL(conv_inner_sgd, params, x, y, lr, example_weights, network, eps, loss, steps, momentum,
                first_order, product_dtype, keep);
}

std::vector<Tensor> conv_inner_sgd_backward(at::TensorList grads, at::TensorList params, const Tensor& x,
                                            const Tensor& y, at::TensorList lr,
                                            const OptionalTensor& example_weights, const Tensor& kept,
                                            at::IntArrayRef network, at::ArrayRef<double> eps,
                                            std::string_view loss, int64_t steps, double momentum,
                                            bool first_order, std::optional<at::ScalarType> product_dtype,
                                            std::array<bool, 5> wanted) {
  METAFAST_CALL(conv_inner_sgd_backward, grads, params, x, y, lr, example_weights, kept, network, eps, loss,
                steps, momentum, first_order, product_dtype, wanted);
}

std::tuple<Tensor, Tensor> conv_forward(at::TensorList params, const Tensor& x, at::IntArrayRef network,
                                        at::ArrayRef<double> eps, std::optional<at::ScalarType> product_dtype,
                                        bool keep) {
  METAFAST_CALL(conv_forward, params, x, network, eps, product_dtype, keep);
}

std::vector<Tensor> conv_forward_backward(const Tensor& grad, at::TensorList params, const Tensor& x,
                                          const Tensor& kept, at::IntArrayRef network,
                                          at::ArrayRef<double> eps,
                                          std::optional<at::ScalarType> product_dtype,
                                          std::array<bool, 2> wanted) {
  METAFAST_CALL(conv_forward_backward, grad, params, x, kept, network, eps, product_dtype, wanted);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// All that is no tensor.
struct Options {
  std::vector<int64_t> network;
  std::vector<double> eps;
  std::string loss = {};
  int64_t steps = 0;
  double momentum = 0;
  bool first_order = false;
  std::optional<at::ScalarType> product_dtype;
};

// What a graph keeps of a call besides its tensors, the first of which are so many parameters, then lr.
struct Call {
  Options options;
  int64_t params, lr;

  void save(AutogradContext* ctx) const {
    const Options& o = options;
    keep_call(ctx, Kept{o.loss, o.steps, o.momentum, o.first_order, o.product_dtype, params, lr});
    ctx->saved_data["network"] = o.network;  // no list in a tuple has a value that can be compared
    ctx->saved_data["eps"] = o.eps;
  }
  static Call restore(AutogradContext* ctx) {
    auto [loss, steps, momentum, first_order, product_dtype, params, lr] = kept_call<Kept>(ctx);
    return {Options{ctx->saved_data["network"].toIntVector(), ctx->saved_data["eps"].toDoubleVector(),
                    std::move(loss), steps, momentum, first_order, product_dtype},
            params, lr};
  }

 private:
  using Kept =
      std::tuple<std::string, int64_t, double, bool, std::optional<at::ScalarType>, int64_t, int64_t>;
};

variable_list joined(at::TensorList first, std::initializer_list<Tensor> others, at::TensorList more = {}) {
  variable_list all = first.vec();
  all.insert(all.end(), more.begin(), more.end());
  all.insert(all.end(), others.begin(), others.end());
  return all;
}

bool any_requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& tensor) { return tensor.requires_grad(); });
}

bool any_needed(AutogradContext* ctx, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (ctx->needs_input_grad(i)) return true;
  }
  return false;
}

// What a backward returns: gradients of size 0 were not wanted, and what is no tensor has none.
variable_list gradients(variable_list grads, const variable_list& inputs, size_t others) {
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].sizes() != inputs[i].sizes()) grads[i] = Tensor();
  }
  grads.resize(grads.size() + others);
  return grads;
}

// ---- conv_inner_sgd ----

variable_list inner_sgd_inputs(at::TensorList params, at::TensorList lr, const Tensor& x, const Tensor& y,
                               const OptionalTensor& example_weights) {
  variable_list inputs = joined(params, {x, y}, lr);
  if (example_weights) inputs.push_back(*example_weights);
  return inputs;
}

std::vector<Tensor> conv_inner_sgd_backward_autograd(
    at::TensorList grads, at::TensorList params, const Tensor& x, const Tensor& y, at::TensorList lr,
    const OptionalTensor& example_weights, const Tensor& kept, at::IntArrayRef network,
    at::ArrayRef<double> eps, std::string_view loss, int64_t steps, double momentum, bool first_order,
    std::optional<at::ScalarType> product_dtype, std::array<bool, 5> wanted) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return conv_inner_sgd_backward(grads, params, x, y, lr, example_weights, kept, network, eps, loss, steps,
                                   momentum, first_order, product_dtype, wanted);
  };
  variable_list inputs = inner_sgd_inputs(params, lr, x, y, example_weights);
  inputs.insert(inputs.end(), grads.begin(), grads.end());
  if (!needs_graph_of("conv_inner_sgd_backward", inputs)) return compute();
  return LastDerivative::apply(at::TensorList(inputs), std::function<variable_list()>(compute),
                               "conv_inner_sgd");
}

// The inputs are the parameters, lr, x, y and, if given, the weights of examples; the results the adapted
// parameters. What has no gradient goes past the node.
struct ConvInnerSgdFunction : Function<ConvInnerSgdFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const Call& call,
                               Tensor* statistics, Tensor* kept) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Options& o = call.options;
    const int64_t data = call.params + call.lr;
    const at::TensorList rates = inputs.slice(call.params, call.lr);
    variable_list adapted;
    std::tie(adapted, *statistics, *kept) =
        conv_inner_sgd(inputs.slice(0, call.params), inputs[data], inputs[data + 1], rates,
                       example_weights(inputs, data), o.network, o.eps, o.loss, o.steps, o.momentum,
                       o.first_order, o.product_dtype, 1 + any_requires_grad(rates));
    ctx->save_for_backward(joined(inputs, {*kept}));
    call.save(ctx);
    return adapted;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Call call = Call::restore(ctx);
    const Options& o = call.options;
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList inputs = at::TensorList(saved).slice(0, saved.size() - 1);
    const int64_t data = call.params + call.lr;
    const OptionalTensor weights = example_weights(inputs, data);
    const std::array<bool, 5> wanted{any_needed(ctx, 0, call.params), any_needed(ctx, call.params, data),
                                     ctx->needs_input_grad(data), ctx->needs_input_grad(data + 1),
                                     weights && ctx->needs_input_grad(data + 2)};
    variable_list found =
        conv_inner_sgd_backward(grads, inputs.slice(0, call.params), inputs[data], inputs[data + 1],
                                inputs.slice(call.params, call.lr), weights, saved.back(), o.network, o.eps,
                                o.loss, o.steps, o.momentum, o.first_order, o.product_dtype, wanted);
    found.resize(inputs.size());  // without what was not given
    return gradients(std::move(found), saved, 3);
  }

 private:
  static OptionalTensor example_weights(at::TensorList inputs, int64_t data) {
    const size_t place = data + 2;
    return place < inputs.size() ? OptionalTensor(inputs[place]) : std::nullopt;
  }
};

std::tuple<std::vector<Tensor>, Tensor, Tensor> conv_inner_sgd_autograd(
    at::TensorList params, const Tensor& x, const Tensor& y, at::TensorList lr,
    const OptionalTensor& example_weights, at::IntArrayRef network, at::ArrayRef<double> eps,
    std::string_view loss, int64_t steps, double momentum, bool first_order,
    std::optional<at::ScalarType> product_dtype, int64_t keep) {
  const variable_list inputs = inner_sgd_inputs(params, lr, x, y, example_weights);
  if (needs_graph_of("conv_inner_sgd", inputs)) {
    const Call call{
        Options{network.vec(), eps.vec(), std::string(loss), steps, momentum, first_order, product_dtype},
        static_cast<int64_t>(params.size()), static_cast<int64_t>(lr.size())};
    Tensor statistics, kept;
    const variable_list adapted =
        ConvInnerSgdFunction::apply(at::TensorList(inputs), call, &statistics, &kept);
    return {adapted, statistics, kept};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return conv_inner_sgd(params, x, y, lr, example_weights, network, eps, loss, steps, momentum, first_order,
                        product_dtype, keep);
}

// ---- conv_forward ----

std::vector<Tensor> conv_forward_backward_autograd(const Tensor& grad, at::TensorList params, const Tensor& x,
                                                   const Tensor& kept, at::IntArrayRef network,
                                                   at::ArrayRef<double> eps,
                                                   std::optional<at::ScalarType> product_dtype,
                                                   std::array<bool, 2> wanted) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return conv_forward_backward(grad, params, x, kept, network, eps, product_dtype, wanted);
  };
  const variable_list inputs = joined(params, {x, grad});
  if (!needs_graph_of("conv_forward_backward", inputs)) return compute();
  return LastDerivative::apply(at::TensorList(inputs), std::function<variable_list()>(compute),
                               "conv_forward");
}

// The inputs are the parameters and x.
struct ConvForwardFunction : Function<ConvForwardFunction> {
  static Tensor forward(AutogradContext* ctx, at::TensorList inputs, const Call& call, Tensor* kept) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Options& o = call.options;
    Tensor out;
    std::tie(out, *kept) = conv_forward(inputs.slice(0, call.params), inputs[call.params], o.network, o.eps,
                                        o.product_dtype, true);
    ctx->save_for_backward(joined(inputs, {*kept}));
    call.save(ctx);
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Call call = Call::restore(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const std::array<bool, 2> wanted{any_needed(ctx, 0, call.params), ctx->needs_input_grad(call.params)};
    return gradients(conv_forward_backward(grads[0], at::TensorList(saved).slice(0, call.params),
                                           saved[call.params], saved.back(), call.options.network,
                                           call.options.eps, call.options.product_dtype, wanted),
                     saved, 2);
  }
};

std::tuple<Tensor, Tensor> conv_forward_autograd(at::TensorList params, const Tensor& x,
                                                 at::IntArrayRef network, at::ArrayRef<double> eps,
                                                 std::optional<at::ScalarType> product_dtype, bool keep) {
  const variable_list inputs = joined(params, {x});
  if (needs_graph_of("conv_forward", inputs)) {
    const Call call{Options{.network = network.vec(), .eps = eps.vec(), .product_dtype = product_dtype},
                    static_cast<int64_t>(params.size()), 0};
    Tensor kept;
    const Tensor out = ConvForwardFunction::apply(at::TensorList(inputs), call, &kept);
    return {out, kept};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return conv_forward(params, x, network, eps, product_dtype, keep);
}

// ---- autocast ----

// In float32, with products of autocast's dtype where there are tensor cores for them. An argument says so,
// as the backward runs outside the region.
void autocast_products(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const auto place = schema.argumentIndexWithName("product_dtype").value();
  c10::IValue& product_dtype = *(stack->end() - schema.arguments().size() + place);
  if (product_dtype.isNone()) product_dtype = at::autocast::get_autocast_dtype(autocast_device(keys));
  autocast_to_float32(op, keys, stack);
}

void implement_autocast_on_gpus(torch::Library& m) {
  m.impl("conv_inner_sgd", torch::CppFunction::makeFromBoxedFunction<&autocast_products>());
  m.impl("conv_forward", torch::CppFunction::makeFromBoxedFunction<&autocast_products>());
}

}  // namespace

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, Autograd, m) {
  m.impl("conv_inner_sgd", conv_inner_sgd_autograd);
  m.impl("conv_inner_sgd_backward", conv_inner_sgd_backward_autograd);
  m.impl("conv_forward", conv_forward_autograd);
  m.impl("conv_forward_backward", conv_forward_backward_autograd);
}

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, AutocastCUDA, m) { implement_autocast_on_gpus(m); }
#ifdef METAFAST_EMULATED
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, AutocastCPU, m) { implement_autocast_on_gpus(m); }
#else
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, AutocastCPU, m) {
  m.impl("conv_inner_sgd", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
  m.impl("conv_forward", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
}
#endif

}  // namespace metafast
