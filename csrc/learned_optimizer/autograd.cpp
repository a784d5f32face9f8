// First derivatives of the learned optimizer ops. The backward is an op, which refuses to be differentiated
// again.
#include <torch/library.h>

#include "common/call.h"
#include "learned_optimizer/ops.h"

namespace metafast {

// ---- the ops, through the dispatcher ----

#define METAFAST_CALL(op, ...)                                     \
  static const auto handle = find_op<decltype(metafast::op)>(#op); \
  return handle.call(__VA_ARGS__)

std::tuple<std::vector<Tensor>, Tensor> lstm_unroll(at::TensorList grads, at::TensorList params,
                                                    const OptionalTensor& losses, const Tensor& state,
                                                    at::TensorList weights, std::string_view head,
                                                    std::string_view preprocess, double p, double scale,
                                                    bool unrolled) {
  METAFAST_CALL(lstm_unroll, grads, params, losses, state, weights, head, preprocess, p, scale, unrolled);
}

std::vector<Tensor> lstm_unroll_backward(at::TensorList grad_out, const OptionalTensor& grad_state,
                                         at::TensorList grads, at::TensorList params,
                                         const OptionalTensor& losses, const Tensor& state,
                                         at::TensorList weights, std::string_view head,
                                         std::string_view preprocess, double p, double scale, bool unrolled,
                                         std::array<bool, 5> wanted) {
  METAFAST_CALL(lstm_unroll_backward, grad_out, grad_state, grads, params, losses, state, weights, head,
                preprocess, p, scale, unrolled, wanted);
}

void lstm_step_(at::TensorList params, at::TensorList grads, const OptionalTensor& loss, const Tensor& state,
                at::TensorList weights, std::string_view head, std::string_view preprocess, double p,
                double scale) {
  METAFAST_CALL(lstm_step_, params, grads, loss, state, weights, head, preprocess, p, scale);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct Options {
  std::string head, preprocess;
  double p, scale;
  bool unrolled;
};

// What a graph keeps of a call besides its tensors, which are in one list: grads, params, losses (none or
// one), state and weights.
struct Call {
  Options options;
  size_t grads, params, losses;

  void save(AutogradContext* ctx) const {
    const auto count = [](size_t number) { return static_cast<int64_t>(number); };
    const Options& o = options;
    keep_call(ctx, Kept{o.head, o.preprocess, o.p, o.scale, o.unrolled, count(grads), count(params),
                        count(losses)});
  }
  static Call restore(AutogradContext* ctx) {
    auto [head, preprocess, p, scale, unrolled, grads, params, losses] = kept_call<Kept>(ctx);
    const auto size = [](int64_t number) { return static_cast<size_t>(number); };
    return {Options{std::move(head), std::move(preprocess), p, scale, unrolled}, size(grads), size(params),
            size(losses)};
  }

  size_t state() const { return grads + params + losses; }  // where it is
  // Which of the five groups an input belongs to.
  size_t group(size_t i) const {
    return i < grads ? 0 : i < grads + params ? 1 : i < state() ? 2 : i == state() ? 3 : 4;
  }
  OptionalTensor losses_of(at::TensorList inputs) const {
    return losses > 0 ? OptionalTensor(inputs[grads + params]) : std::nullopt;
  }

 private:
  using Kept = std::tuple<std::string, std::string, double, double, bool, int64_t, int64_t, int64_t>;
};

struct LstmUnrollFunction : Function<LstmUnrollFunction> {
  // -> the results, then the new state
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const Call& call) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(inputs.vec());
    ctx->set_materialize_grads(false);
    const Options& o = call.options;
    const size_t state = call.state();
    auto [out, new_state] = lstm_unroll(inputs.slice(0, call.grads), inputs.slice(call.grads, call.params),
                                        call.losses_of(inputs), inputs[state], inputs.slice(state + 1),
                                        o.head, o.preprocess, o.p, o.scale, o.unrolled);
    call.save(ctx);
    out.push_back(new_state);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_out) {
    const Call call = Call::restore(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList inputs(saved);
    const Options& o = call.options;
    std::array<bool, 5> wanted{};
    for (size_t i = 0; i < inputs.size(); ++i) wanted[call.group(i)] |= ctx->needs_input_grad(i);
    const OptionalTensor grad_state = optional_of(grad_out.back());
    grad_out.pop_back();
    for (size_t i = 0; i < grad_out.size(); ++i) {
      if (!grad_out[i].defined()) grad_out[i] = at::zeros_like(inputs[i]);
    }
    const size_t state = call.state();
    variable_list found =
        lstm_unroll_backward(grad_out, grad_state, inputs.slice(0, call.grads),
                             inputs.slice(call.grads, call.params), call.losses_of(inputs), inputs[state],
                             inputs.slice(state + 1), o.head, o.preprocess, o.p, o.scale, o.unrolled, wanted);
    for (size_t i = 0; i < found.size(); ++i) {
      if (!wanted[call.group(i)]) found[i] = Tensor();
    }
    found.emplace_back();  // of the call, which has none
    return found;
  }
};

variable_list joined(at::TensorList grads, at::TensorList params, const OptionalTensor& losses,
                     const Tensor& state, at::TensorList weights) {
  variable_list inputs = grads.vec();
  inputs.insert(inputs.end(), params.begin(), params.end());
  if (losses) inputs.push_back(*losses);
  inputs.push_back(state);
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  return inputs;
}

std::tuple<std::vector<Tensor>, Tensor> lstm_unroll_autograd(at::TensorList grads, at::TensorList params,
                                                             const OptionalTensor& losses,
                                                             const Tensor& state, at::TensorList weights,
                                                             std::string_view head,
                                                             std::string_view preprocess, double p,
                                                             double scale, bool unrolled) {
  const variable_list inputs = joined(grads, params, losses, state, weights);
  if (needs_graph_of("lstm_unroll", inputs)) {
    variable_list results = LstmUnrollFunction::apply(
        at::TensorList(inputs), Call{Options{std::string(head), std::string(preprocess), p, scale, unrolled},
                                     grads.size(), params.size(), losses.has_value()});
    const Tensor new_state = results.back();
    results.pop_back();
    return {results, new_state};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return lstm_unroll(grads, params, losses, state, weights, head, preprocess, p, scale, unrolled);
}

std::vector<Tensor> lstm_unroll_backward_autograd(at::TensorList grad_out, const OptionalTensor& grad_state,
                                                  at::TensorList grads, at::TensorList params,
                                                  const OptionalTensor& losses, const Tensor& state,
                                                  at::TensorList weights, std::string_view head,
                                                  std::string_view preprocess, double p, double scale,
                                                  bool unrolled, std::array<bool, 5> wanted) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return lstm_unroll_backward(grad_out, grad_state, grads, params, losses, state, weights, head, preprocess,
                                p, scale, unrolled, wanted);
  };
  variable_list inputs = joined(grads, params, losses, state, weights);
  inputs.insert(inputs.end(), grad_out.begin(), grad_out.end());
  if (grad_state) inputs.push_back(*grad_state);
  if (!needs_graph_of("lstm_unroll_backward", inputs)) return compute();
  return LastDerivative::apply(at::TensorList(inputs), std::function<variable_list()>(compute),
                               "lstm_unroll");
}

void lstm_step_autograd(at::TensorList params, at::TensorList grads, const OptionalTensor& loss,
                        const Tensor& state, at::TensorList weights, std::string_view head,
                        std::string_view preprocess, double p, double scale) {
  const variable_list inputs = joined(grads, params, loss, state, weights);
  TORCH_CHECK(
      !needs_graph_of("lstm_step_", inputs),
      "lstm_optimizer_step_: works in place, so it has no derivative; call it under torch.no_grad(), or "
      "lstm_optimizer_step");
  at::AutoDispatchBelowADInplaceOrView guard;
  lstm_step_(params, grads, loss, state, weights, head, preprocess, p, scale);
  for (const Tensor& param : params) param.unsafeGetTensorImpl()->bump_version();
  state.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, Autograd, m) {
  m.impl("lstm_unroll", lstm_unroll_autograd);
  m.impl("lstm_unroll_backward", lstm_unroll_backward_autograd);
  m.impl("lstm_step_", lstm_step_autograd);
}

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, AutocastCPU, m) {
  m.impl("lstm_unroll", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
}

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, AutocastCUDA, m) {
  m.impl("lstm_unroll", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
}

}  // namespace metafast
