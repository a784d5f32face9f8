// The pairwise ops on CPU and CUDA: check the arguments (arguments.h), allocate the results, run the kernels.
// What each op computes is stated in library.cpp.
#include <torch/library.h>

#include "common/counter.h"
#include "common/sums.h"
#include "pairwise/arguments.h"
#include "pairwise/large.h"
#include "pairwise/large_cuda.h"

namespace metafast {
namespace {

// Adds up the partial sums that the chunks left in `partial` [outer, chunks, ...], unless there is only one.
Tensor sum_chunks(const Tensor& partial, int64_t outer, at::IntArrayRef sizes) {
  const int64_t inner = c10::multiply_integers(sizes) / std::max<int64_t>(1, outer);
  if (partial.numel() == outer * inner && inner > 0) return partial.view(sizes);
  Tensor out = empty(sizes, partial.options());
  const int64_t chunks = inner > 0 && outer > 0 ? partial.numel() / (outer * inner) : 0;
  with_scalar(partial, [&]<typename T>() {
    run_kernel(SumPartials<T>{partial.const_data_ptr<T>(), out.mutable_data_ptr<T>(), outer, chunks, inner},
               out);
  });
  return out;
}

// ---- prototypes ----

Tensor run_prototypes(const Tensor& embeddings, const Tensor& labels, const OptionalTensor& ways,
                      int64_t num_classes) {
  const int64_t support = embeddings.size(-2), features = embeddings.size(-1);
  Tensor out = empty(sizes_of(leading(embeddings, 2), {num_classes, features}), embeddings.options());
  with_scalar(embeddings, [&]<typename T>() {
    run_kernel(
        Prototypes<T>{embeddings.const_data_ptr<T>(), labels.const_data_ptr<int64_t>(), data<int64_t>(ways),
                      out.mutable_data_ptr<T>(), count_tasks(embeddings, 2), support, num_classes, features},
        out);
  });
  return out;
}

// `grad` [T, chunks, N, D]; on the CPU there is one chunk.
Tensor run_prototypes_backward(const Tensor& grad, int64_t chunks, const Tensor& labels,
                               const OptionalTensor& ways) {
  const int64_t way = grad.size(-2), features = grad.size(-1), support = labels.size(-1);
  Tensor out = empty(sizes_of(labels.sizes(), {features}), grad.options());
  with_scalar(grad, [&]<typename T>() {
    run_kernel(PrototypesBackward<T>{grad.const_data_ptr<T>(), labels.const_data_ptr<int64_t>(),
                                     data<int64_t>(ways), out.mutable_data_ptr<T>(), count_tasks(labels, 1),
                                     support, way, features, chunks},
               out);
  });
  return out;
}

Tensor prototypes_op(const Tensor& embeddings, const Tensor& labels, int64_t num_classes) {
  const Arg e{embeddings, "embeddings"}, l{labels, "labels"};
  check_floating(e);
  check_labels_dtype(l);
  check_same_device(e, {l});
  check_min_dim(e, 2, "[..., S, D]");
  check_sizes(l, embeddings.sizes().slice(0, embeddings.dim() - 1), "[..., S]");
  TORCH_CHECK_VALUE(num_classes >= 0, "num_classes: expected a number >= 0, got ", num_classes);
  const Tensor dense_l = dense_labels(labels);
  check_support_labels(dense_l, std::nullopt, num_classes, "labels");
  return to_dtype(run_prototypes(dense(embeddings), dense_l, std::nullopt, num_classes),
                  embeddings.scalar_type());
}

Tensor prototypes_backward_op(const Tensor& grad, const Tensor& labels) {
  const Arg g{grad, "grad"}, l{labels, "labels"};
  check_floating(g);
  check_labels_dtype(l);
  check_same_device(g, {l});
  check_min_dim(g, 2, "[..., N, D]");
  check_min_dim(l, 1, "[..., S]");
  check_same_leading(g, 2, l, 1);
  const Tensor dense_l = dense_labels(labels);
  if (!runs_cuda(grad)) check_label_values(dense_l, std::nullopt, grad.size(-2), "labels");
  return to_dtype(run_prototypes_backward(dense(grad), 1, dense_l, std::nullopt), grad.scalar_type());
}

// ---- pairwise ----

// The gradient of y, in its dtype, from the sums of the chunks; of weight and bias, empty where there is
// none.
Tensor grad_y(const PairArguments& args, const Tensor& partial) {
  return to_dtype(sum_chunks(partial, args.tasks, args.y_sizes()), args.dtype);
}

Tensor grad_vector(const PairArguments& args, const OptionalTensor& vector, const Tensor& partial) {
  if (!vector) return at::empty({0}, args.options().dtype(args.dtype));
  return to_dtype(sum_chunks(partial, 1, vector->sizes()), args.dtype);
}

template <typename T>
T* data_or_null(const Tensor& tensor, bool wanted) {
  return wanted ? tensor.mutable_data_ptr<T>() : nullptr;
}

template <template <typename> class Params, typename T>
void run_comparison(const Params<T>& params, const Tensor& like) {
  if (runs_cuda(like) ? is_large_on_cuda(params) : is_large(params)) {
    return runs_cuda(like) ? run_large_on_cuda(params, like) : run_large(params);
  }
  run_kernel(params, like);
}

Tensor pairwise_op(const Tensor& x, const Tensor& y, const OptionalTensor& weight, const OptionalTensor& bias,
                   std::string_view metric) {
  const PairArguments args(x, y, weight, bias, metric);
  Tensor out = empty(args.out_sizes(), args.options());
  with_scalar(out, [&]<typename T>() {
    run_comparison(Pairwise<T>{args.pairs<T>(), out.mutable_data_ptr<T>()}, out);
  });
  return to_dtype(out, args.dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_backward_op(const Tensor& grad, const Tensor& x,
                                                                const Tensor& y, const OptionalTensor& weight,
                                                                const OptionalTensor& bias, const Tensor& out,
                                                                std::string_view metric) {
  PairArguments args(x, y, weight, bias, metric);
  const Arg ax{x, "x"}, ag{grad, "grad"}, ao{out, "out"};
  check_same_dtype(ax, {ag, ao});
  check_same_device(ax, {ag, ao});
  check_sizes(ag, args.out_sizes(), "[..., Q, N]");
  check_sizes(ao, args.out_sizes(), "[..., Q, N]");
  const Tensor dense_out = dense(out), dense_grad = dense(grad);
  Tensor grad_x = empty(args.x_sizes(), args.options());
  // A product sums all queries.
  if (runs_cuda(grad_x) &&
      with_scalar(grad_x, [&]<typename T>() { return is_large_on_cuda(args.pairs<T>()); })) {
    args.chunks = 1;
  }
  const Tensor partial_y = args.partial_y(), partial_weight = args.partial_weight(),
               partial_bias = args.partial_bias();
  with_scalar(grad_x, [&]<typename T>() {
    run_comparison(
        PairwiseBackward<T>{args.pairs<T>(), dense_out.const_data_ptr<T>(), dense_grad.const_data_ptr<T>(),
                            grad_x.mutable_data_ptr<T>(), partial_y.mutable_data_ptr<T>(),
                            data_or_null<T>(partial_weight, args.weight.has_value()),
                            data_or_null<T>(partial_bias, args.bias.has_value())},
        grad_x);
  });
  return {to_dtype(grad_x, args.dtype), grad_y(args, partial_y),
          grad_vector(args, args.weight, partial_weight), grad_vector(args, args.bias, partial_bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pairwise_double_backward_op(
    const Tensor& gg_x, const Tensor& gg_y, const OptionalTensor& gg_weight, const OptionalTensor& gg_bias,
    const Tensor& grad, const Tensor& x, const Tensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& out, std::string_view metric) {
  const PairArguments args(x, y, weight, bias, metric);
  const Arg ax{x, "x"}, ag{grad, "grad"}, ao{out, "out"}, agx{gg_x, "gg_x"}, agy{gg_y, "gg_y"};
  check_same_dtype(ax, {ag, ao, agx, agy});
  check_same_device(ax, {ag, ao, agx, agy});
  check_sizes(ag, args.out_sizes(), "[..., Q, N]");
  check_sizes(ao, args.out_sizes(), "[..., Q, N]");
  check_sizes(agx, x.sizes(), "[..., Q, D]");
  check_sizes(agy, y.sizes(), "[..., N, D]");
  if (gg_weight) PairArguments::check_vector(ax, {*gg_weight, "gg_weight"}, args.features, "[D]");
  if (gg_bias) PairArguments::check_vector(ax, {*gg_bias, "gg_bias"}, 1, "[1]");

  const Tensor dense_out = dense(out), dense_grad = dense(grad), dense_gg_x = dense(gg_x),
               dense_gg_y = dense(gg_y);
  // A weighted kernel always reads the weight's tangent.
  const OptionalTensor dense_gg_weight =
      args.weight && !gg_weight ? OptionalTensor(at::zeros_like(*args.weight)) : dense(gg_weight);
  const OptionalTensor dense_gg_bias = dense(gg_bias);
  Tensor grad_grad = empty(args.out_sizes(), args.options()), grad_x = empty(args.x_sizes(), args.options());
  const Tensor partial_y = args.partial_y(), partial_weight = args.partial_weight(),
               partial_bias = args.partial_bias();
  with_scalar(grad_x, [&]<typename T>() {
    run_kernel(PairwiseDoubleBackward<T>{args.pairs<T>(), dense_out.const_data_ptr<T>(),
                                         dense_grad.const_data_ptr<T>(), dense_gg_x.const_data_ptr<T>(),
                                         dense_gg_y.const_data_ptr<T>(), data<T>(dense_gg_weight),
                                         data<T>(dense_gg_bias), grad_grad.mutable_data_ptr<T>(),
                                         grad_x.mutable_data_ptr<T>(), partial_y.mutable_data_ptr<T>(),
                                         data_or_null<T>(partial_weight, args.weight.has_value()),
                                         data_or_null<T>(partial_bias, args.bias.has_value())},
               grad_x);
  });
  return {to_dtype(grad_grad, args.dtype), to_dtype(grad_x, args.dtype), grad_y(args, partial_y),
          grad_vector(args, args.weight, partial_weight), grad_vector(args, args.bias, partial_bias)};
}

// ---- the first layer of a relation head ----

// On CUDA float32 has a kernel of its own; the rest are the library's products.
std::tuple<Tensor, Tensor> relation_layer_op(const Tensor& query, const Tensor& prototypes,
                                             const Tensor& weight, const Tensor& bias) {
  const Arg q{query, "query"}, p{prototypes, "prototypes"}, w{weight, "weight"}, b{bias, "bias"};
  check_real(q);
  check_same_dtype(q, {p, w, b});
  check_same_device(q, {p, w, b});
  check_min_dim(q, 2, "[..., Q, D]");
  check_min_dim(p, 2, "[..., N, D]");
  check_min_dim(b, 1, "[H]");
  const int64_t features = query.size(-1), hidden = bias.size(0);
  check_sizes(p, sizes_of(leading(prototypes, 1), {features}), "[..., N, D]");
  check_sizes(w, {hidden, 2 * features}, "[H, 2 D]");
  check_sizes(b, {hidden}, "[H]");
#if defined(METAFAST_WITH_CUDA) || defined(METAFAST_EMULATED)
  if (runs_cuda(query) && query.scalar_type() == at::kFloat) {
    const Tensor dense_query = dense(query), dense_prototypes = dense(prototypes),
                 dense_weight = dense(weight), dense_bias = dense(bias);
    const auto results = [&](const Tensor& rows) {
      return empty(sizes_of(leading(rows, 1), {hidden}), query.options());
    };
    Tensor of_query = results(query), of_class = results(prototypes);
    const auto side = [](const Tensor& rows, const Tensor& out) {
      return RelationLayer<float>::Side{rows.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
                                        count_tasks(rows, 1)};
    };
    run_kernel(RelationLayer<float>{side(dense_query, of_query), side(dense_prototypes, of_class),
                                    dense_weight.const_data_ptr<float>(), dense_bias.const_data_ptr<float>(),
                                    features, hidden},
               query);
    return {of_query, of_class};
  }
#endif
  return {at::linear(query, weight.narrow(1, 0, features), bias),
          at::linear(prototypes, weight.narrow(1, features, features))};
}

// ---- classify ----

// What queries are compared with, [..., J, D]. CUDA's kernel finds prototypes itself.
Tensor rows_of(const Episode& episode) {
  if (!episode.prototypical) return episode.support;
  if (runs_cuda(episode.support)) return empty(episode.prototype_sizes(), episode.options());
  return run_prototypes(episode.support, episode.support_labels, episode.ways, episode.way);
}

// Of them what derivatives cannot take from the arguments.
Tensor rows_to_keep(const Episode& episode, const Tensor& rows) {
  return episode.prototypical ? rows : empty({0}, episode.options());
}

// The gradient of the support, from the sums of the chunks of queries, which are of the rows.
Tensor grad_support(const Episode& episode, const Tensor& partial, const Tensor& rows) {
  if (episode.prototypical && runs_cuda(partial)) {
    return run_prototypes_backward(partial, episode.chunks, episode.support_labels, episode.ways);
  }
  const Tensor grad_rows = sum_chunks(partial, episode.tasks, rows.sizes());
  if (!episode.prototypical) return grad_rows;
  return run_prototypes_backward(grad_rows, 1, episode.support_labels, episode.ways);
}

// The gradients of support and query, not yet rounded to a half type. `nll` may be undefined.
std::tuple<Tensor, Tensor> gradients(const Episode& episode, const Tensor& rows, const OptionalTensor& grad,
                                     const Tensor& divisor, const Tensor& nll) {
  Tensor of_query = empty(episode.query_sizes(), episode.options());
  const Tensor partial = episode.partial_rows(rows);
  // CUDA's kernel goes all the way to the support where it sums all queries.
  const bool whole = episode.prototypical && episode.chunks == 1 && runs_cuda(of_query) &&
                     episode.shots <= cuda::kMostSpread;
  const Tensor of_support = whole ? empty(episode.support.sizes(), episode.options()) : Tensor();
  with_scalar(of_query, [&]<typename T>() {
    run_kernel(ClassifyBackward<T>{episode.classes<T>(rows), episode.loss_gradient<T>(grad, divisor),
                                   nll.defined() ? nll.mutable_data_ptr<T>() : nullptr,
                                   of_query.mutable_data_ptr<T>(), partial.mutable_data_ptr<T>(),
                                   whole ? of_support.mutable_data_ptr<T>() : nullptr,
                                   episode.support_labels.const_data_ptr<int64_t>(), episode.shots},
               of_query);
  });
  return {whole ? of_support : grad_support(episode, partial, rows), of_query};
}

// Sum, or mean over the valid queries, of one number per query; how many are valid.
std::tuple<Tensor, Tensor> reduce(const Episode& episode, const Tensor& per_query) {
  Tensor result = empty({}, episode.options()), valid = empty({1}, episode.options());
  with_scalar(per_query, [&]<typename T>() {
    run_kernel(ReduceLoss<T>{per_query.const_data_ptr<T>(), episode.query_labels->const_data_ptr<int64_t>(),
                             result.mutable_data_ptr<T>(), valid.mutable_data_ptr<T>(),
                             episode.reduction == Reduction::mean, per_query.numel()},
               result);
  });
  return {result, valid};
}

Tensor count_valid(const Episode& episode) {
  Tensor valid = empty({1}, episode.options());
  with_scalar(valid, [&]<typename T>() {
    run_kernel(ReduceLoss<T>{nullptr, episode.query_labels->const_data_ptr<int64_t>(), nullptr,
                             valid.mutable_data_ptr<T>(), false, episode.query_labels->numel()},
               valid);
  });
  return valid;
}

// -> out, valid
std::tuple<Tensor, Tensor> classify_on_cpu(const Episode& episode, const Tensor& rows) {
  Tensor out = empty(episode.unreduced_sizes(), episode.options());
  with_scalar(out, [&]<typename T>() {
    T* const data = out.mutable_data_ptr<T>();
    run_kernel(Classify<T>{episode.classes<T>(rows),
                           episode.query_labels ? nullptr : data,
                           episode.query_labels ? data : nullptr,
                           {},
                           {}},
               out);
  });
  if (episode.reduction != Reduction::none) return reduce(episode, out);
  return {out, empty({0}, episode.options())};
}

// One launch: prototypes, log-probabilities, the reduced loss.
std::tuple<Tensor, Tensor> classify_on_cuda(const Episode& episode, [[maybe_unused]] const Tensor& rows) {
  const bool reduced = episode.reduction != Reduction::none;
  Tensor out = empty(episode.out_sizes(), episode.options()), valid = empty({reduced}, episode.options());
#if defined(METAFAST_WITH_CUDA) || defined(METAFAST_EMULATED)
  with_scalar(out, [&]<typename T>() {
    T* const data = out.mutable_data_ptr<T>();
    Classify<T> params{episode.classes<T>(rows), nullptr, nullptr, {}, {}};
    if (!reduced) (episode.query_labels ? params.nll : params.log_probs) = data;
    if (episode.prototypical) {
      params.means = {episode.support.const_data_ptr<T>(), episode.support_labels.const_data_ptr<int64_t>(),
                      episode.shots, rows.mutable_data_ptr<T>()};
    }
    Tensor partial;
    ZeroCounter counter;
    if (reduced) {
      partial = empty({cuda::loss_blocks(params), 2}, out.options().dtype(at::kDouble));
      counter = ZeroCounter(out);
      params.total = {data, valid.mutable_data_ptr<T>(), partial.mutable_data_ptr<double>(), counter.data(),
                      episode.reduction == Reduction::mean};
    }
    run_kernel(params, out);
  });
#endif
  return {out, valid};
}

std::tuple<Tensor, Tensor, Tensor> classify_op(const Tensor& support, const Tensor& support_labels,
                                               const Tensor& query, const OptionalTensor& query_labels,
                                               const OptionalTensor& ways, int64_t num_classes,
                                               std::string_view method, std::string_view metric, double scale,
                                               int64_t reduction) {
  const Episode episode(support, support_labels, query, query_labels, ways, num_classes, method, metric,
                        scale, reduction);
  episode.check_values();
  const Tensor rows = rows_of(episode);
  const auto [out, valid] =
      runs_cuda(rows) ? classify_on_cuda(episode, rows) : classify_on_cpu(episode, rows);
  return {to_dtype(out, episode.dtype), rows_to_keep(episode, rows), valid};
}

// The gradients are not rounded to a half type: they are not yet scaled.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> classify_with_gradients_op(
    const Tensor& support, const Tensor& support_labels, const Tensor& query, const Tensor& query_labels,
    const OptionalTensor& ways, int64_t num_classes, std::string_view method, std::string_view metric,
    double scale, int64_t reduction) {
  const Episode episode(support, support_labels, query, query_labels, ways, num_classes, method, metric,
                        scale, reduction);
  TORCH_CHECK_VALUE(episode.reduction != Reduction::none, "reduction: expected 1 (mean) or 2 (sum), got ",
                    reduction);
  episode.check_values();
  const Tensor rows = rows_of(episode);
  if (runs_cuda(rows)) {
    const auto [out, valid] = classify_on_cuda(episode, rows);
    const auto [of_support, of_query] = gradients(episode, rows, std::nullopt, valid, Tensor());
    return {to_dtype(out, episode.dtype), rows_to_keep(episode, rows), valid, of_support, of_query};
  }
  const Tensor nll = empty(sizes_of(episode.lead, {episode.queries}), episode.options());
  const auto [of_support, of_query] = gradients(episode, rows, std::nullopt, count_valid(episode), nll);
  const auto [out, valid] = reduce(episode, nll);
  return {to_dtype(out, episode.dtype), rows_to_keep(episode, rows), valid, of_support, of_query};
}

void check_saved(const Episode& episode, const Tensor& grad, const Tensor& like) {
  const Arg ag{grad, "grad"}, as{like, "support"};
  check_same_dtype(as, {ag});
  check_same_device(as, {ag});
  check_sizes(ag, episode.out_sizes(), "of the result");
}

std::tuple<Tensor, Tensor> classify_backward_op(const Tensor& grad, const Tensor& support,
                                                const Tensor& support_labels, const Tensor& query,
                                                const OptionalTensor& query_labels,
                                                const OptionalTensor& ways, const Tensor& saved_rows,
                                                const Tensor& valid, int64_t num_classes,
                                                std::string_view method, std::string_view metric,
                                                double scale, int64_t reduction) {
  const Episode episode(support, support_labels, query, query_labels, ways, num_classes, method, metric,
                        scale, reduction);
  check_saved(episode, grad, support);
  const Tensor rows = episode.prototypical ? saved_rows : episode.support;
  const auto [of_support, of_query] = gradients(episode, rows, dense(grad), valid, Tensor());
  return {to_dtype(of_support, episode.dtype), to_dtype(of_query, episode.dtype)};
}

std::tuple<Tensor, Tensor, Tensor> classify_double_backward_op(
    const Tensor& gg_support, const Tensor& gg_query, const Tensor& grad, const Tensor& support,
    const Tensor& support_labels, const Tensor& query, const OptionalTensor& query_labels,
    const OptionalTensor& ways, const Tensor& saved_rows, const Tensor& valid, int64_t num_classes,
    std::string_view method, std::string_view metric, double scale, int64_t reduction) {
  const Episode episode(support, support_labels, query, query_labels, ways, num_classes, method, metric,
                        scale, reduction);
  check_saved(episode, grad, support);
  const Arg as{support, "support"}, ags{gg_support, "gg_support"}, agq{gg_query, "gg_query"};
  check_same_dtype(as, {ags, agq});
  check_same_device(as, {ags, agq});
  check_sizes(ags, support.sizes(), "[..., S, D]");
  check_sizes(agq, query.sizes(), "[..., Q, D]");
  const Tensor rows = episode.prototypical ? saved_rows : episode.support;
  const Tensor dense_grad = dense(grad), gg_x = dense(gg_query);
  const Tensor gg_y = episode.prototypical ? run_prototypes(dense(gg_support), episode.support_labels,
                                                            episode.ways, num_classes)
                                           : dense(gg_support);
  Tensor grad_grad = empty(episode.unreduced_sizes(), episode.options());
  Tensor grad_query = empty(query.sizes(), episode.options());
  const Tensor partial = episode.partial_rows(rows);
  with_scalar(grad_query, [&]<typename T>() {
    run_kernel(
        ClassifyDoubleBackward<T>{episode.classes<T>(rows), episode.loss_gradient<T>(dense_grad, valid),
                                  gg_x.const_data_ptr<T>(), gg_y.const_data_ptr<T>(),
                                  grad_grad.mutable_data_ptr<T>(), grad_query.mutable_data_ptr<T>(),
                                  partial.mutable_data_ptr<T>()},
        grad_query);
  });
  if (episode.reduction != Reduction::none) grad_grad = std::get<0>(reduce(episode, grad_grad));
  return {to_dtype(grad_grad, episode.dtype), to_dtype(grad_support(episode, partial, rows), episode.dtype),
          to_dtype(grad_query, episode.dtype)};
}

void implement(torch::Library& m) {
  m.impl("prototypes", prototypes_op);
  m.impl("prototypes_backward", prototypes_backward_op);
  m.impl("pairwise", pairwise_op);
  m.impl("pairwise_backward", pairwise_backward_op);
  m.impl("pairwise_double_backward", pairwise_double_backward_op);
  m.impl("relation_layer", relation_layer_op);
  m.impl("classify", classify_op);
  m.impl("classify_with_gradients", classify_with_gradients_op);
  m.impl("classify_backward", classify_backward_op);
  m.impl("classify_double_backward", classify_double_backward_op);
}

}  // namespace

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CPU, m) { implement(m); }
#ifdef METAFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CUDA, m) { implement(m); }
#endif

}  // namespace metafast
