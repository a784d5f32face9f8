// First derivatives of the inner loop ops. The backward of inner_sgd and of maml_loss is an op, which refuses
// to be differentiated again; that of sgd_update can be, to any order.
#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include <functional>

#include "common/call.h"
#include "inner_loop/ops.h"

namespace metafast {

// ---- the ops, through the dispatcher ----

#define METAFAST_CALL(op, ...)                                     \
  static const auto handle = find_op<decltype(metafast::op)>(#op); \
  return handle.call(__VA_ARGS__)

std::vector<Tensor> inner_sgd(at::TensorList params, const Tensor& x, const Tensor& y, at::TensorList lr,
                              const OptionalTensor& example_weights, std::string_view loss, int64_t steps,
                              std::string_view activation, double momentum, bool first_order) {
  METAFAST_CALL(inner_sgd, params, x, y, lr, example_weights, loss, steps, activation, momentum, first_order);
}

std::vector<Tensor> inner_sgd_backward(at::TensorList grads, at::TensorList params, const Tensor& x,
                                       const Tensor& y, at::TensorList lr,
                                       const OptionalTensor& example_weights, std::string_view loss,
                                       int64_t steps, std::string_view activation, double momentum,
                                       bool first_order, std::array<bool, 5> wanted) {
  METAFAST_CALL(inner_sgd_backward, grads, params, x, y, lr, example_weights, loss, steps, activation,
                momentum, first_order, wanted);
}

Tensor maml_loss(at::TensorList params, const Tensor& support_x, const Tensor& support_y,
                 const Tensor& query_x, const Tensor& query_y, at::TensorList lr,
                 const OptionalTensor& step_weights, const OptionalTensor& support_weights,
                 const OptionalTensor& query_weights, std::string_view loss, int64_t steps,
                 std::string_view activation, double momentum, bool first_order, bool mean) {
  METAFAST_CALL(maml_loss, params, support_x, support_y, query_x, query_y, lr, step_weights, support_weights,
                query_weights, loss, steps, activation, momentum, first_order, mean);
}

std::tuple<Tensor, std::vector<Tensor>> maml_loss_backward(
    const Tensor& grad, at::TensorList params, const Tensor& support_x, const Tensor& support_y,
    const Tensor& query_x, const Tensor& query_y, at::TensorList lr, const OptionalTensor& step_weights,
    const OptionalTensor& support_weights, const OptionalTensor& query_weights, std::string_view loss,
    int64_t steps, std::string_view activation, double momentum, bool first_order, bool mean,
    std::array<bool, 9> wanted) {
  METAFAST_CALL(maml_loss_backward, grad, params, support_x, support_y, query_x, query_y, lr, step_weights,
                support_weights, query_weights, loss, steps, activation, momentum, first_order, mean, wanted);
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> sgd_update(at::TensorList params, at::TensorList grads,
                                                                at::TensorList lr,
                                                                at::TensorList momentum_buffers,
                                                                double momentum, double weight_decay,
                                                                bool nesterov) {
  METAFAST_CALL(sgd_update, params, grads, lr, momentum_buffers, momentum, weight_decay, nesterov);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Inputs lie in one list: the parameters, then lr, then the examples' tensors and what weighs them, undefined
// where it is not given. Gradients come in the same order.
struct Inputs {
  variable_list tensors;
  int64_t params, lr;

  Inputs(at::TensorList params_list, at::TensorList lr_list, std::initializer_list<Tensor> examples)
      : tensors(params_list.vec()), params(params_list.size()), lr(lr_list.size()) {
    tensors.insert(tensors.end(), lr_list.begin(), lr_list.end());
    tensors.insert(tensors.end(), examples);
  }
  Inputs(variable_list list, int64_t params_count, int64_t lr_count)
      : tensors(std::move(list)), params(params_count), lr(lr_count) {}

  at::TensorList params_list() const { return at::TensorList(tensors).slice(0, params); }
  at::TensorList lr_list() const { return at::TensorList(tensors).slice(params, lr); }
  const Tensor& example(int64_t i) const { return tensors[params + lr + i]; }
  OptionalTensor weights(int64_t i) const { return optional_of(example(i)); }

  // Those that are defined: what a graph has edges to.
  variable_list given() const {
    variable_list result;
    for (const Tensor& tensor : tensors) {
      if (tensor.defined()) result.push_back(tensor);
    }
    return result;
  }

  // Whether any parameter, any lr, each example tensor satisfies f(place among those given).
  template <size_t kCount, class F>
  std::array<bool, kCount> any(const F& f) const {
    std::array<bool, kCount> result{};
    for (int64_t i = 0, place = 0; i < static_cast<int64_t>(tensors.size()); ++i) {
      if (!tensors[i].defined()) continue;
      const int64_t group = i < params ? 0 : (i < params + lr ? 1 : 2 + i - params - lr);
      result[group] |= f(place++);
    }
    return result;
  }
};

// All that is no tensor.
struct Options {
  std::string loss;
  int64_t steps;
  std::string activation;
  double momentum;
  bool first_order;
};

// What a graph keeps of a call.
struct Call {
  Options options;
  Inputs in;
  bool mean;

  static void save(AutogradContext* ctx, const Options& o, const Inputs& in, bool mean = false) {
    ctx->save_for_backward(in.tensors);
    keep_call(ctx, Kept{o.loss, o.steps, o.activation, o.momentum, o.first_order, in.params, in.lr, mean});
  }
  static Call restore(AutogradContext* ctx) {
    auto [loss, steps, activation, momentum, first_order, params, lr, mean] = kept_call<Kept>(ctx);
    return {Options{std::move(loss), steps, std::move(activation), momentum, first_order},
            Inputs(ctx->get_saved_variables(), params, lr), mean};
  }

 private:
  using Kept = std::tuple<std::string, int64_t, std::string, double, bool, int64_t, int64_t, bool>;
};

// What a backward returns, for what was given: gradients of size 0 were not wanted, and what is no tensor has
// none.
variable_list gradients(const variable_list& grads, const Inputs& inputs, size_t options) {
  variable_list result;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& input = inputs.tensors[i];
    if (input.defined()) result.push_back(grads[i].sizes() == input.sizes() ? grads[i] : Tensor());
  }
  result.resize(result.size() + options);
  return result;
}

// ---- inner_sgd ----

std::vector<Tensor> inner_sgd_backward_autograd(at::TensorList grads, at::TensorList params, const Tensor& x,
                                                const Tensor& y, at::TensorList lr,
                                                const OptionalTensor& example_weights, std::string_view loss,
                                                int64_t steps, std::string_view activation, double momentum,
                                                bool first_order, std::array<bool, 5> wanted) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return inner_sgd_backward(grads, params, x, y, lr, example_weights, loss, steps, activation, momentum,
                              first_order, wanted);
  };
  Inputs inputs(params, lr, {x, y, tensor_or_undefined(example_weights)});
  inputs.tensors.insert(inputs.tensors.end(), grads.begin(), grads.end());
  if (!needs_graph_of("inner_sgd_backward", inputs.tensors)) return compute();
  return LastDerivative::apply(at::TensorList(inputs.given()), std::function<variable_list()>(compute),
                               "inner_sgd");
}

struct InnerSgdFunction : Function<InnerSgdFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList, const Inputs& in, const Options& o) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Call::save(ctx, o, in);
    return inner_sgd(in.params_list(), in.example(0), in.example(1), in.lr_list(), in.weights(2), o.loss,
                     o.steps, o.activation, o.momentum, o.first_order);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto [o, in, mean] = Call::restore(ctx);
    const auto wanted = in.any<5>([&](int64_t i) { return ctx->needs_input_grad(i); });
    return gradients(
        inner_sgd_backward(grads, in.params_list(), in.example(0), in.example(1), in.lr_list(), in.weights(2),
                           o.loss, o.steps, o.activation, o.momentum, o.first_order, wanted),
        in, 2);
  }
};

std::vector<Tensor> inner_sgd_autograd(at::TensorList params, const Tensor& x, const Tensor& y,
                                       at::TensorList lr, const OptionalTensor& example_weights,
                                       std::string_view loss, int64_t steps, std::string_view activation,
                                       double momentum, bool first_order) {
  const Inputs in(params, lr, {x, y, tensor_or_undefined(example_weights)});
  if (needs_graph_of("inner_sgd", in.tensors)) {
    return InnerSgdFunction::apply(
        at::TensorList(in.given()), in,
        Options{std::string(loss), steps, std::string(activation), momentum, first_order});
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return inner_sgd(params, x, y, lr, example_weights, loss, steps, activation, momentum, first_order);
}

// ---- maml_loss ----

Inputs maml_inputs(at::TensorList params, at::TensorList lr, const Tensor& support_x, const Tensor& support_y,
                   const Tensor& query_x, const Tensor& query_y, const OptionalTensor& step_weights,
                   const OptionalTensor& support_weights, const OptionalTensor& query_weights) {
  return {params,
          lr,
          {support_x, support_y, query_x, query_y, tensor_or_undefined(step_weights),
           tensor_or_undefined(support_weights), tensor_or_undefined(query_weights)}};
}

std::tuple<Tensor, std::vector<Tensor>> maml_loss_backward_autograd(
    const Tensor& grad, at::TensorList params, const Tensor& support_x, const Tensor& support_y,
    const Tensor& query_x, const Tensor& query_y, at::TensorList lr, const OptionalTensor& step_weights,
    const OptionalTensor& support_weights, const OptionalTensor& query_weights, std::string_view loss,
    int64_t steps, std::string_view activation, double momentum, bool first_order, bool mean,
    std::array<bool, 9> wanted) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return maml_loss_backward(grad, params, support_x, support_y, query_x, query_y, lr, step_weights,
                              support_weights, query_weights, loss, steps, activation, momentum, first_order,
                              mean, wanted);
  };
  Inputs inputs = maml_inputs(params, lr, support_x, support_y, query_x, query_y, step_weights,
                              support_weights, query_weights);
  inputs.tensors.push_back(grad);
  if (!needs_graph_of("maml_loss_backward", inputs.tensors)) return compute();
  variable_list results =
      LastDerivative::apply(at::TensorList(inputs.given()), std::function<variable_list()>([&] {
                              auto [value, grads] = compute();
                              grads.push_back(value);
                              return grads;
                            }),
                            "maml_loss");
  const Tensor value = results.back();
  results.pop_back();
  return {value, results};
}

// The mean over tasks has one gradient but for a factor, so the forward finds it on its way, and the backward
// scales it; a second backward computes it anew. The loss of every task is differentiated in the backward,
// when it is known how much each of them counts.
struct MamlLossFunction : Function<MamlLossFunction> {
  static Tensor forward(AutogradContext* ctx, at::TensorList, const Inputs& in, const Options& o, bool mean) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Call::save(ctx, o, in, mean);
    if (!mean) {
      return maml_loss(in.params_list(), in.example(0), in.example(1), in.example(2), in.example(3),
                       in.lr_list(), in.weights(4), in.weights(5), in.weights(6), o.loss, o.steps,
                       o.activation, o.momentum, o.first_order, mean);
    }
    const variable_list given = in.given();
    const auto wanted = in.any<9>([&](int64_t i) { return given[i].requires_grad(); });
    auto [value, grads] = differentiate(
        o, in, mean, at::scalar_tensor(1, in.tensors[0].options().requires_grad(false)), wanted);
    keep_gradients(ctx, grads);
    return value;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto [o, in, mean] = Call::restore(ctx);
    const Tensor& grad = grads[0];
    variable_list result;
    if (!at::GradMode::is_enabled()) result = take_gradients(ctx, in.given().size());
    if (result.empty()) {
      const auto wanted = in.any<9>([&](int64_t i) { return ctx->needs_input_grad(i); });
      result = std::get<1>(differentiate(o, in, mean, grad, wanted));
    } else if (!is_one(grad)) {
      for (Tensor& of_one : result) {
        if (of_one.defined()) of_one = of_one * grad;
      }
    }
    constexpr size_t kOptions = 3;  // arguments of forward behind the list of tensors
    result.resize(result.size() + kOptions);
    return result;
  }

 private:
  // The result, and the gradients of the inputs where they are wanted.
  static std::tuple<Tensor, variable_list> differentiate(const Options& o, const Inputs& in, bool mean,
                                                         const Tensor& grad,
                                                         const std::array<bool, 9>& wanted) {
    auto [value, grads] =
        maml_loss_backward(grad, in.params_list(), in.example(0), in.example(1), in.example(2), in.example(3),
                           in.lr_list(), in.weights(4), in.weights(5), in.weights(6), o.loss, o.steps,
                           o.activation, o.momentum, o.first_order, mean, wanted);
    return {value, gradients(grads, in, 0)};
  }
};

Tensor maml_loss_autograd(at::TensorList params, const Tensor& support_x, const Tensor& support_y,
                          const Tensor& query_x, const Tensor& query_y, at::TensorList lr,
                          const OptionalTensor& step_weights, const OptionalTensor& support_weights,
                          const OptionalTensor& query_weights, std::string_view loss, int64_t steps,
                          std::string_view activation, double momentum, bool first_order, bool mean) {
  const Inputs in = maml_inputs(params, lr, support_x, support_y, query_x, query_y, step_weights,
                                support_weights, query_weights);
  if (needs_graph_of("maml_loss", in.tensors)) {
    return MamlLossFunction::apply(
        at::TensorList(in.given()), in,
        Options{std::string(loss), steps, std::string(activation), momentum, first_order}, mean);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return maml_loss(params, support_x, support_y, query_x, query_y, lr, step_weights, support_weights,
                   query_weights, loss, steps, activation, momentum, first_order, mean);
}

// ---- sgd_update ----

// The backward is written in torch's own ops, so it has derivatives of every order.
struct SgdUpdateFunction : Function<SgdUpdateFunction> {
  // tensors: params, grads, lr (one, or one for each of params), momentum buffers (or none)
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, int64_t count, int64_t lr_count,
                               double momentum, double weight_decay, bool nesterov) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(tensors.vec());
    ctx->saved_data["count"] = count;
    ctx->saved_data["lr_count"] = lr_count;
    ctx->saved_data["momentum"] = momentum;
    ctx->saved_data["weight_decay"] = weight_decay;
    ctx->saved_data["nesterov"] = nesterov;
    auto [params, buffers] =
        sgd_update(tensors.slice(0, count), tensors.slice(count, count), tensors.slice(2 * count, lr_count),
                   tensors.slice(2 * count + lr_count), momentum, weight_decay, nesterov);
    params.insert(params.end(), buffers.begin(), buffers.end());
    return params;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& data = ctx->saved_data;
    const variable_list saved = ctx->get_saved_variables();
    const int64_t count = data["count"].toInt(), lr_count = data["lr_count"].toInt();
    const double momentum = data["momentum"].toDouble(), weight_decay = data["weight_decay"].toDouble();
    const bool nesterov = data["nesterov"].toBool(),
               has_buffers = saved.size() > static_cast<size_t>(2 * count + lr_count);
    variable_list result(saved.size() + 5);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t lr_index = 2 * count + (lr_count == 1 ? 0 : i), buffer_index = 2 * count + lr_count + i;
      const Tensor &param = saved[i], &grad = saved[count + i], &lr = saved[lr_index], &grad_param = grads[i];
      const Tensor decayed = weight_decay != 0 ? grad + weight_decay * param : grad;
      Tensor step = decayed, grad_step = -lr * grad_param, grad_decayed = grad_step;
      if (momentum != 0) {
        const Tensor buffer = has_buffers ? momentum * saved[buffer_index] + decayed : decayed;
        step = nesterov ? decayed + momentum * buffer : buffer;
        const Tensor grad_buffer = grads[count + i] + (nesterov ? momentum * grad_step : grad_step);
        grad_decayed = nesterov ? grad_step + grad_buffer : grad_buffer;
        if (has_buffers) result[buffer_index] = momentum * grad_buffer;
      }
      result[i] = weight_decay != 0 ? grad_param + weight_decay * grad_decayed : grad_param;
      result[count + i] = grad_decayed;
      if (ctx->needs_input_grad(lr_index)) {
        const Tensor grad_lr = at::sum_to(-grad_param * step, lr.sizes());
        result[lr_index] = result[lr_index].defined() ? result[lr_index] + grad_lr : grad_lr;
      }
    }
    return result;
  }
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>> sgd_update_autograd(
    at::TensorList params, at::TensorList grads, at::TensorList lr, at::TensorList momentum_buffers,
    double momentum, double weight_decay, bool nesterov) {
  variable_list tensors = params.vec();
  for (at::TensorList list : {grads, lr, momentum_buffers})
    tensors.insert(tensors.end(), list.begin(), list.end());
  if (needs_graph_of("sgd_update", tensors) && grads.size() == params.size()) {
    const variable_list results =
        SgdUpdateFunction::apply(at::TensorList(tensors), static_cast<int64_t>(params.size()),
                                 static_cast<int64_t>(lr.size()), momentum, weight_decay, nesterov);
    const auto buffers = results.begin() + static_cast<int64_t>(params.size());
    return {variable_list(results.begin(), buffers), variable_list(buffers, results.end())};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return sgd_update(params, grads, lr, momentum_buffers, momentum, weight_decay, nesterov);
}

}  // namespace

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, Autograd, m) {
  m.impl("inner_sgd", inner_sgd_autograd);
  m.impl("inner_sgd_backward", inner_sgd_backward_autograd);
  m.impl("maml_loss", maml_loss_autograd);
  m.impl("maml_loss_backward", maml_loss_backward_autograd);
  m.impl("sgd_update", sgd_update_autograd);
}

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, AutocastCPU, m) {
  m.impl("inner_sgd", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
  m.impl("maml_loss", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
  m.impl("maml_loss_backward", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
}

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, AutocastCUDA, m) {
  m.impl("inner_sgd", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
  m.impl("maml_loss", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
  m.impl("maml_loss_backward", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
}

}  // namespace metafast
