// First and second derivatives of the pairwise ops. Each op's backward is an op, so it is differentiated like
// one: op -> op_backward -> op_double_backward, which refuses a further derivative. prototypes and its
// backward are linear and transposes of each other, so they are differentiable without end.
#include <torch/library.h>

#include "common/call.h"
#include "common/dispatch.h"
#include "pairwise/ops.h"

namespace metafast {

// ---- the ops, through the dispatcher ----

#define METAFAST_CALL(op, ...)                                     \
  static const auto handle = find_op<decltype(metafast::op)>(#op); \
  return handle.call(__VA_ARGS__)

Tensor prototypes(const Tensor& embeddings, const Tensor& labels, c10::SymInt num_classes) {
  METAFAST_CALL(prototypes, embeddings, labels, num_classes);
}

Tensor prototypes_backward(const Tensor& grad, const Tensor& labels) {
  METAFAST_CALL(prototypes_backward, grad, labels);
}

Tensor pairwise(const Tensor& x, const Tensor& y, const OptionalTensor& weight, const OptionalTensor& bias,
                std::string_view metric) {
  METAFAST_CALL(pairwise, x, y, weight, bias, metric);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_backward(const Tensor& grad, const Tensor& x,
                                                             const Tensor& y, const OptionalTensor& weight,
                                                             const OptionalTensor& bias, const Tensor& out,
                                                             std::string_view metric) {
  METAFAST_CALL(pairwise_backward, grad, x, y, weight, bias, out, metric);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pairwise_double_backward(
    const Tensor& gg_x, const Tensor& gg_y, const OptionalTensor& gg_weight, const OptionalTensor& gg_bias,
    const Tensor& grad, const Tensor& x, const Tensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& out, std::string_view metric) {
  METAFAST_CALL(pairwise_double_backward, gg_x, gg_y, gg_weight, gg_bias, grad, x, y, weight, bias, out,
                metric);
}

std::tuple<Tensor, Tensor> relation_layer(const Tensor& query, const Tensor& prototypes, const Tensor& weight,
                                          const Tensor& bias) {
  METAFAST_CALL(relation_layer, query, prototypes, weight, bias);
}

Tensor relation_scores(const Tensor& query, const Tensor& prototypes, const Tensor& weight,
                       const Tensor& bias, const Tensor& out_weight, const Tensor& out_bias,
                       std::string_view metric) {
  METAFAST_CALL(relation_scores, query, prototypes, weight, bias, out_weight, out_bias, metric);
}

std::tuple<Tensor, Tensor, Tensor> classify(const Tensor& support, const Tensor& support_labels,
                                            const Tensor& query, const OptionalTensor& query_labels,
                                            const OptionalTensor& ways, c10::SymInt num_classes,
                                            std::string_view method, std::string_view metric, double scale,
                                            int64_t reduction) {
  METAFAST_CALL(classify, support, support_labels, query, query_labels, ways, num_classes, method, metric,
                scale, reduction);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> classify_with_gradients(
    const Tensor& support, const Tensor& support_labels, const Tensor& query, const Tensor& query_labels,
    const OptionalTensor& ways, c10::SymInt num_classes, std::string_view method, std::string_view metric,
    double scale, int64_t reduction) {
  METAFAST_CALL(classify_with_gradients, support, support_labels, query, query_labels, ways, num_classes,
                method, metric, scale, reduction);
}

std::tuple<Tensor, Tensor> classify_backward(const Tensor& grad, const Tensor& support,
                                             const Tensor& support_labels, const Tensor& query,
                                             const OptionalTensor& query_labels, const OptionalTensor& ways,
                                             const Tensor& rows, const Tensor& valid, c10::SymInt num_classes,
                                             std::string_view method, std::string_view metric, double scale,
                                             int64_t reduction) {
  METAFAST_CALL(classify_backward, grad, support, support_labels, query, query_labels, ways, rows, valid,
                num_classes, method, metric, scale, reduction);
}

std::tuple<Tensor, Tensor, Tensor> classify_double_backward(
    const Tensor& gg_support, const Tensor& gg_query, const Tensor& grad, const Tensor& support,
    const Tensor& support_labels, const Tensor& query, const OptionalTensor& query_labels,
    const OptionalTensor& ways, const Tensor& rows, const Tensor& valid, c10::SymInt num_classes,
    std::string_view method, std::string_view metric, double scale, int64_t reduction) {
  METAFAST_CALL(classify_double_backward, gg_support, gg_query, grad, support, support_labels, query,
                query_labels, ways, rows, valid, num_classes, method, metric, scale, reduction);
}

// ---- their autograd kernels ----

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct PrototypesFunction : Function<PrototypesFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& embeddings, const Tensor& labels,
                        c10::SymInt num_classes) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({labels});
    return prototypes(embeddings, labels, std::move(num_classes));
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {prototypes_backward(grads[0], ctx->get_saved_variables()[0]), Tensor(), Tensor()};
  }
};

Tensor prototypes_autograd(const Tensor& embeddings, const Tensor& labels, c10::SymInt num_classes) {
  if (needs_graph("prototypes", embeddings))
    return PrototypesFunction::apply(embeddings, labels, num_classes);
  at::AutoDispatchBelowADInplaceOrView guard;
  return prototypes(embeddings, labels, num_classes);
}

struct PrototypesBackwardFunction : Function<PrototypesBackwardFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& labels) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({labels});
    ctx->saved_data["num_classes"] = grad.sym_size(-2);
    return prototypes_backward(grad, labels);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {prototypes(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["num_classes"].toSymInt()),
            Tensor()};
  }
};

Tensor prototypes_backward_autograd(const Tensor& grad, const Tensor& labels) {
  if (needs_graph("prototypes_backward", grad)) return PrototypesBackwardFunction::apply(grad, labels);
  at::AutoDispatchBelowADInplaceOrView guard;
  return prototypes_backward(grad, labels);
}

// A gradient that the op returns only where the argument was given.
Tensor grad_if(const Tensor& argument, const Tensor& grad) { return argument.defined() ? grad : Tensor(); }

struct PairwiseDoubleBackwardFunction : Function<PairwiseDoubleBackwardFunction> {
  static variable_list forward(AutogradContext*, const Tensor& gg_x, const Tensor& gg_y,
                               const OptionalTensor& gg_weight, const OptionalTensor& gg_bias,
                               const Tensor& grad, const Tensor& x, const Tensor& y,
                               const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& out,
                               const std::string& metric) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [gg, gx, gy, gw, gb] =
        pairwise_double_backward(gg_x, gg_y, gg_weight, gg_bias, grad, x, y, weight, bias, out, metric);
    return {gg, gx, gy, gw, gb};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    return no_third_derivative("pairwise_double_backward");
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pairwise_double_backward_autograd(
    const Tensor& gg_x, const Tensor& gg_y, const OptionalTensor& gg_weight, const OptionalTensor& gg_bias,
    const Tensor& grad, const Tensor& x, const Tensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& out, std::string_view metric) {
  if (needs_graph("pairwise_double_backward", gg_x, gg_y, tensor_or_undefined(gg_weight),
                  tensor_or_undefined(gg_bias), grad, x, y, tensor_or_undefined(weight),
                  tensor_or_undefined(bias))) {
    const auto r = PairwiseDoubleBackwardFunction::apply(gg_x, gg_y, gg_weight, gg_bias, grad, x, y, weight,
                                                         bias, out, std::string(metric));
    return {r[0], r[1], r[2], r[3], r[4]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return pairwise_double_backward(gg_x, gg_y, gg_weight, gg_bias, grad, x, y, weight, bias, out, metric);
}

struct PairwiseBackwardFunction : Function<PairwiseBackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad, const Tensor& x, const Tensor& y,
                               const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& out,
                               const std::string& metric) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad, x, y, tensor_or_undefined(weight), tensor_or_undefined(bias), out});
    ctx->saved_data["metric"] = metric;
    auto [gx, gy, gw, gb] = pairwise_backward(grad, x, y, weight, bias, out, metric);
    return {gx, gy, gw, gb};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &weight = saved[3], &bias = saved[4];
    auto [gg, gx, gy, gw, gb] = pairwise_double_backward(
        grads[0], grads[1], optional_of(grad_if(weight, grads[2])), optional_of(grad_if(bias, grads[3])),
        saved[0], saved[1], saved[2], optional_of(weight), optional_of(bias), saved[5],
        ctx->saved_data["metric"].toStringView());
    return {gg, gx, gy, grad_if(weight, gw), grad_if(bias, gb), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_backward_autograd(
    const Tensor& grad, const Tensor& x, const Tensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& out, std::string_view metric) {
  if (needs_graph("pairwise_backward", grad, x, y, tensor_or_undefined(weight), tensor_or_undefined(bias))) {
    const auto r = PairwiseBackwardFunction::apply(grad, x, y, weight, bias, out, std::string(metric));
    return {r[0], r[1], r[2], r[3]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return pairwise_backward(grad, x, y, weight, bias, out, metric);
}

struct PairwiseFunction : Function<PairwiseFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& weight,
                        const OptionalTensor& bias, const std::string& metric) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor out = pairwise(x, y, weight, bias, metric);
    ctx->save_for_backward({x, y, tensor_or_undefined(weight), tensor_or_undefined(bias), out});
    ctx->saved_data["metric"] = metric;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &weight = saved[2], &bias = saved[3];
    auto [gx, gy, gw, gb] =
        pairwise_backward(grads[0], saved[0], saved[1], optional_of(weight), optional_of(bias), saved[4],
                          ctx->saved_data["metric"].toStringView());
    return {gx, gy, grad_if(weight, gw), grad_if(bias, gb), Tensor()};
  }
};

Tensor pairwise_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& weight,
                         const OptionalTensor& bias, std::string_view metric) {
  if (needs_graph("pairwise", x, y, tensor_or_undefined(weight), tensor_or_undefined(bias))) {
    return PairwiseFunction::apply(x, y, weight, bias, std::string(metric));
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return pairwise(x, y, weight, bias, metric);
}

// The part of the weight [H, 2 D] that is the queries' or the classes'.
Tensor half_of(const Tensor& weight, const c10::SymInt& features, bool of_class) {
  return weight.narrow_symint(1, of_class ? features : c10::SymInt(0), features);
}

// Differentiable without end: its gradients are products of torch's.
struct RelationLayerFunction : Function<RelationLayerFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& prototypes,
                               const Tensor& weight, const Tensor& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({query, prototypes, weight});
    auto [of_query, of_class] = relation_layer(query, prototypes, weight, bias);
    return {of_query, of_class};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &query = saved[0], &prototypes = saved[1], &weight = saved[2];
    const c10::SymInt features = query.sym_size(-1);
    const auto of_rows = [&](const Tensor& grad, bool of_class) {
      return grad.matmul(half_of(weight, features, of_class));
    };
    const auto flat = [](const Tensor& rows) { return rows.flatten(0, -2); };
    variable_list result(4);
    if (ctx->needs_input_grad(0)) result[0] = of_rows(grads[0], false);
    if (ctx->needs_input_grad(1)) result[1] = of_rows(grads[1], true);
    if (ctx->needs_input_grad(2)) {
      result[2] = at::cat({flat(grads[0]).t().mm(flat(query)), flat(grads[1]).t().mm(flat(prototypes))}, 1);
    }
    if (ctx->needs_input_grad(3)) result[3] = flat(grads[0]).sum(0);
    return result;
  }
};

std::tuple<Tensor, Tensor> relation_layer_autograd(const Tensor& query, const Tensor& prototypes,
                                                   const Tensor& weight, const Tensor& bias) {
  if (needs_graph("relation_layer", query, prototypes, weight, bias)) {
    const auto r = RelationLayerFunction::apply(query, prototypes, weight, bias);
    return {r[0], r[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return relation_layer(query, prototypes, weight, bias);
}

Tensor relation_scores_composite(const Tensor& query, const Tensor& prototypes, const Tensor& weight,
                                 const Tensor& bias, const Tensor& out_weight, const Tensor& out_bias,
                                 std::string_view metric) {
  const auto [of_query, of_class] = relation_layer(query, prototypes, weight, bias);
  return pairwise(of_query, of_class, out_weight.reshape({-1}), out_bias.reshape({1}), metric);
}

// What is not a tensor in the arguments of classify and its derivatives.
struct ClassifyOptions {
  c10::SymInt num_classes;
  std::string method, metric;
  double scale;
  int64_t reduction;

  void save(AutogradContext* ctx) const {
    keep_call(ctx, Kept{num_classes, method, metric, scale, reduction});
  }
  static ClassifyOptions restore(AutogradContext* ctx) {
    return std::make_from_tuple<ClassifyOptions>(kept_call<Kept>(ctx));
  }

 private:
  using Kept = std::tuple<c10::SymInt, std::string, std::string, double, int64_t>;
};

struct ClassifyDoubleBackwardFunction : Function<ClassifyDoubleBackwardFunction> {
  static variable_list forward(AutogradContext*, const Tensor& gg_support, const Tensor& gg_query,
                               const Tensor& grad, const Tensor& support, const Tensor& support_labels,
                               const Tensor& query, const Tensor& rows, const Tensor& valid,
                               const OptionalTensor& query_labels, const OptionalTensor& ways,
                               const ClassifyOptions& o) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [gg, gs, gq] =
        classify_double_backward(gg_support, gg_query, grad, support, support_labels, query, query_labels,
                                 ways, rows, valid, o.num_classes, o.method, o.metric, o.scale, o.reduction);
    return {gg, gs, gq};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    return no_third_derivative("classify_double_backward");
  }
};

std::tuple<Tensor, Tensor, Tensor> classify_double_backward_autograd(
    const Tensor& gg_support, const Tensor& gg_query, const Tensor& grad, const Tensor& support,
    const Tensor& support_labels, const Tensor& query, const OptionalTensor& query_labels,
    const OptionalTensor& ways, const Tensor& rows, const Tensor& valid, c10::SymInt num_classes,
    std::string_view method, std::string_view metric, double scale, int64_t reduction) {
  if (needs_graph("classify_double_backward", gg_support, gg_query, grad, support, query)) {
    const auto r = ClassifyDoubleBackwardFunction::apply(
        gg_support, gg_query, grad, support, support_labels, query, rows, valid, query_labels, ways,
        ClassifyOptions{num_classes, std::string(method), std::string(metric), scale, reduction});
    return {r[0], r[1], r[2]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return classify_double_backward(gg_support, gg_query, grad, support, support_labels, query, query_labels,
                                  ways, rows, valid, num_classes, method, metric, scale, reduction);
}

struct ClassifyBackwardFunction : Function<ClassifyBackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad, const Tensor& support,
                               const Tensor& support_labels, const Tensor& query, const Tensor& rows,
                               const Tensor& valid, const OptionalTensor& query_labels,
                               const OptionalTensor& ways, const ClassifyOptions& o) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad, support, support_labels, query, rows, valid,
                            tensor_or_undefined(query_labels), tensor_or_undefined(ways)});
    o.save(ctx);
    auto [gs, gq] = classify_backward(grad, support, support_labels, query, query_labels, ways, rows, valid,
                                      o.num_classes, o.method, o.metric, o.scale, o.reduction);
    return {gs, gq};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const ClassifyOptions o = ClassifyOptions::restore(ctx);
    auto [gg, gs, gq] = classify_double_backward(grads[0], grads[1], s[0], s[1], s[2], s[3],
                                                 optional_of(s[6]), optional_of(s[7]), s[4], s[5],
                                                 o.num_classes, o.method, o.metric, o.scale, o.reduction);
    return {gg, gs, Tensor(), gq, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> classify_backward_autograd(const Tensor& grad, const Tensor& support,
                                                      const Tensor& support_labels, const Tensor& query,
                                                      const OptionalTensor& query_labels,
                                                      const OptionalTensor& ways, const Tensor& rows,
                                                      const Tensor& valid, c10::SymInt num_classes,
                                                      std::string_view method, std::string_view metric,
                                                      double scale, int64_t reduction) {
  if (needs_graph("classify_backward", grad, support, query)) {
    const auto r = ClassifyBackwardFunction::apply(
        grad, support, support_labels, query, rows, valid, query_labels, ways,
        ClassifyOptions{num_classes, std::string(method), std::string(metric), scale, reduction});
    return {r[0], r[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return classify_backward(grad, support, support_labels, query, query_labels, ways, rows, valid, num_classes,
                           method, metric, scale, reduction);
}

// Only the first result of classify is a result of the node: `rows` and `valid`, which only its derivative
// needs, go past it, since every result of a node costs most of a microsecond.
//
// The gradients of a reduced loss are known but for a factor, so on the CPU the forward finds them on its
// way, where it has all that they need in the cache. A backward that is to be differentiated, or a second
// one, computes them anew. A GPU does so always: it would have to wait to see that the factor is 1, and a
// pass over finished gradients to multiply them moves more bytes than finding them.
struct ClassifyFunction : Function<ClassifyFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& support, const Tensor& support_labels,
                        const Tensor& query, const OptionalTensor& query_labels, const OptionalTensor& ways,
                        const ClassifyOptions& o, Tensor* rows, Tensor* valid) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor out;
    if (o.reduction == 0 || runs_cuda(query)) {
      std::tie(out, *rows, *valid) = classify(support, support_labels, query, query_labels, ways,
                                              o.num_classes, o.method, o.metric, o.scale, o.reduction);
    } else {
      Tensor grad_support, grad_query;
      std::tie(out, *rows, *valid, grad_support, grad_query) =
          classify_with_gradients(support, support_labels, query, *query_labels, ways, o.num_classes,
                                  o.method, o.metric, o.scale, o.reduction);
      keep_gradients(ctx, {grad_support, grad_query});
    }
    ctx->save_for_backward({support, support_labels, query, *rows, *valid, tensor_or_undefined(query_labels),
                            tensor_or_undefined(ways)});
    o.save(ctx);
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    Tensor gs, gq;
    variable_list of_one;
    if (!at::GradMode::is_enabled()) of_one = take_gradients(ctx, 2);
    if (!of_one.empty()) {
      gs = std::move(of_one[0]);
      gq = std::move(of_one[1]);
      if (!is_one(grads[0])) {
        const Tensor grad = to_dtype(grads[0], gq.scalar_type());
        gs = gs * grad;
        gq = gq * grad;
      }
      gs = to_dtype(gs, grads[0].scalar_type());
      gq = to_dtype(gq, grads[0].scalar_type());
    } else {
      const auto s = ctx->get_saved_variables();
      const ClassifyOptions o = ClassifyOptions::restore(ctx);
      std::tie(gs, gq) =
          classify_backward(grads[0], s[0], s[1], s[2], optional_of(s[5]), optional_of(s[6]), s[3], s[4],
                            o.num_classes, o.method, o.metric, o.scale, o.reduction);
    }
    return {gs, Tensor(), gq, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> classify_autograd(const Tensor& support, const Tensor& support_labels,
                                                     const Tensor& query, const OptionalTensor& query_labels,
                                                     const OptionalTensor& ways, c10::SymInt num_classes,
                                                     std::string_view method, std::string_view metric,
                                                     double scale, int64_t reduction) {
  if (needs_graph("classify", support, query)) {
    Tensor rows, valid;
    const Tensor out = ClassifyFunction::apply(
        support, support_labels, query, query_labels, ways,
        ClassifyOptions{num_classes, std::string(method), std::string(metric), scale, reduction}, &rows,
        &valid);
    return {out, rows, valid};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return classify(support, support_labels, query, query_labels, ways, num_classes, method, metric, scale,
                  reduction);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> classify_with_gradients_autograd(
    const Tensor& support, const Tensor& support_labels, const Tensor& query, const Tensor& query_labels,
    const OptionalTensor& ways, c10::SymInt num_classes, std::string_view method, std::string_view metric,
    double scale, int64_t reduction) {
  TORCH_CHECK_NOT_IMPLEMENTED(!needs_graph("classify_with_gradients", support, query),
                              "classify_with_gradients: it cannot be differentiated; classify can");
  at::AutoDispatchBelowADInplaceOrView guard;
  return classify_with_gradients(support, support_labels, query, query_labels, ways, num_classes, method,
                                 metric, scale, reduction);
}

}  // namespace

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, Autograd, m) {
  m.impl("prototypes", prototypes_autograd);
  m.impl("prototypes_backward", prototypes_backward_autograd);
  m.impl("pairwise", pairwise_autograd);
  m.impl("pairwise_backward", pairwise_backward_autograd);
  m.impl("pairwise_double_backward", pairwise_double_backward_autograd);
  m.impl("relation_layer", relation_layer_autograd);
  m.impl("classify", classify_autograd);
  m.impl("classify_with_gradients", classify_with_gradients_autograd);
  m.impl("classify_backward", classify_backward_autograd);
  m.impl("classify_double_backward", classify_double_backward_autograd);
}

// Of ops that differentiate themselves.
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CompositeImplicitAutograd, m) {
  m.impl("relation_scores", relation_scores_composite);
}

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, AutocastCPU, m) {
  m.impl("pairwise", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
  m.impl("relation_layer", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
  m.impl("classify", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
}

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, AutocastCUDA, m) {
  m.impl("pairwise", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
  m.impl("relation_layer", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
  m.impl("classify", torch::CppFunction::makeFromBoxedFunction<&autocast_to_float32>());
}

}  // namespace metafast
