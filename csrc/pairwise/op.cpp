// The pairwise ops on CPU and CUDA: check the arguments, allocate the results, run the kernels. What each op
// computes is stated in library.cpp.
#include <torch/library.h>

#include <string>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/sums.h"
#include "pairwise/large.h"
#include "pairwise/ops.h"
#include "pairwise/params.h"

namespace metafast {
namespace {

// ---- arguments ----

Metric metric_of(std::string_view name) {
  if (name == "sqeuclidean") return Metric::sqeuclidean;
  if (name == "euclidean") return Metric::euclidean;
  if (name == "cosine") return Metric::cosine;
  if (name == "cityblock") return Metric::cityblock;
  if (name == "dot") return Metric::dot;
  if (name == "relation_relu") return Metric::relation_relu;
  if (name == "relation_tanh") return Metric::relation_tanh;
  TORCH_CHECK_VALUE(false, "metric: expected sqeuclidean, euclidean, cosine, cityblock or dot, got ", name);
}

bool is_relation(Metric metric) { return metric == Metric::relation_relu || metric == Metric::relation_tanh; }

// Calls f(position) for every label that is neither a class in [0, way of its task) nor, where allowed,
// ignored.
void check_label_values(const Tensor& labels, const OptionalTensor& ways, int64_t num_classes,
                        const char* name) {
  const int64_t columns = labels.size(-1), tasks = columns ? labels.numel() / columns : 0;
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const int64_t* way = ways ? ways->const_data_ptr<int64_t>() : nullptr;
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t classes = way ? way[t] : num_classes;
    bool bad = false;
    for (int64_t i = t * columns; i < (t + 1) * columns; ++i) {
      bad |= static_cast<uint64_t>(label[i]) >= static_cast<uint64_t>(classes) && label[i] != kIgnoreLabel;
    }
    if (!bad) continue;
    for (int64_t i = t * columns; i < (t + 1) * columns; ++i) {
      TORCH_CHECK_VALUE((label[i] >= 0 && label[i] < classes) || label[i] == kIgnoreLabel, name,
                        ": expected classes in [0, ", classes, ") or ", kIgnoreLabel, " (ignored), got ",
                        label[i], " at position ", i - t * columns, " of task ", t);
    }
  }
}

void check_every_class(const Tensor& labels, const OptionalTensor& ways, int64_t num_classes,
                       const char* name) {
  const int64_t columns = labels.size(-1);
  const int64_t tasks = labels.numel() / std::max<int64_t>(1, columns);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  std::vector<int64_t> seen(num_classes, -1);
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t classes = ways ? ways->const_data_ptr<int64_t>()[t] : num_classes;
    for (int64_t i = t * columns; i < (t + 1) * columns; ++i) {
      if (label[i] >= 0) seen[label[i]] = t;
    }
    for (int64_t n = 0; n < classes; ++n) {
      TORCH_CHECK_VALUE(seen[n] == t, name, ": expected a support example of every class, got none of class ",
                        n, " in task ", t);
    }
  }
}

// On the CPU, values are checked here; a CUDA kernel asserts on the device instead, which does not
// synchronise.
void check_support_labels(const Tensor& labels, const OptionalTensor& ways, int64_t num_classes,
                          const char* name) {
  if (runs_cuda(labels)) return;
  if (ways) {
    const int64_t* way = ways->const_data_ptr<int64_t>();
    for (int64_t t = 0; t < ways->numel(); ++t) {
      TORCH_CHECK_VALUE(way[t] >= 1 && way[t] <= num_classes,
                        "ways: expected values in [1, num_classes = ", num_classes, "], got ", way[t],
                        " for task ", t);
    }
  }
  check_label_values(labels, ways, num_classes, name);
  check_every_class(labels, ways, num_classes, name);
}

int64_t count_tasks(const Tensor& tensor, int64_t event_dims) {
  return c10::multiply_integers(leading(tensor, event_dims));
}

at::DimVector sizes_of(at::IntArrayRef leading, std::initializer_list<int64_t> event) {
  at::DimVector sizes(leading.begin(), leading.end());
  sizes.append(event.begin(), event.end());
  return sizes;
}

// The tensor in the type that kernels compute in and with dense rows. Where all tasks share one block of rows
// (an expanded tensor), they go on sharing it: the task stride is 0 and nothing is copied.
struct Operand {
  Tensor tensor;
  int64_t task_stride;
};

Tensor dense(const Tensor& tensor) { return to_dtype(tensor, compute_type(tensor)).contiguous(); }

Operand rows_of(const Tensor& tensor) {
  const int64_t block = tensor.size(-2) * tensor.size(-1);
  bool shared = tensor.dim() > 2 && tensor.stride(-1) == 1 && tensor.stride(-2) == tensor.size(-1);
  for (int64_t d = 0; d < tensor.dim() - 2; ++d) shared = shared && tensor.stride(d) == 0;
  if (shared && tensor.scalar_type() == compute_type(tensor)) return {tensor, 0};
  return {dense(tensor), block};
}

Tensor dense_labels(const Tensor& tensor) { return tensor.contiguous(); }
OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt;
}
OptionalTensor dense_labels(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

template <typename T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Into how many chunks a task's queries are split, from the shapes alone. With many tasks there is work for
// all threads; with few, chunks are made, large enough that what each prepares from the rows is little beside
// its queries.
int64_t query_chunks(const Tensor& like, int64_t tasks, int64_t queries, int64_t rows, int64_t features) {
#if defined(METAFAST_WITH_CUDA) || defined(METAFAST_EMULATED)
  if (runs_cuda(like)) return cuda::query_chunks(tasks, queries, rows, features);
#endif
  (void)like;
  constexpr int64_t kItems = 32, kCacheable = 1 << 16;
  const int64_t wanted = (kItems + tasks - 1) / std::max<int64_t>(1, tasks);
  const int64_t enough = rows * features > kCacheable ? 512 : 128;  // queries, to be worth preparing the rows
  const int64_t worthwhile = std::min(queries / enough, queries * rows * features / kGrain);
  return std::max<int64_t>(1, std::min(wanted, worthwhile));
}

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

Tensor run_prototypes_backward(const Tensor& grad, const Tensor& labels, const OptionalTensor& ways) {
  const int64_t way = grad.size(-2), features = grad.size(-1), support = labels.size(-1);
  Tensor out = empty(sizes_of(leading(grad, 2), {support, features}), grad.options());
  with_scalar(grad, [&]<typename T>() {
    run_kernel(
        PrototypesBackward<T>{grad.const_data_ptr<T>(), labels.const_data_ptr<int64_t>(), data<int64_t>(ways),
                              out.mutable_data_ptr<T>(), count_tasks(grad, 2), support, way, features},
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
  return to_dtype(run_prototypes_backward(dense(grad), dense_l, std::nullopt), grad.scalar_type());
}

// ---- pairwise ----

// The checked, dense arguments of a pairwise comparison and the part of the kernel's struct that they fill.
struct PairArguments {
  Metric metric;
  at::ScalarType dtype;
  Operand x, y;
  OptionalTensor weight, bias;
  at::DimVector lead;
  int64_t tasks, queries, rows, features, chunks;

  PairArguments(const Tensor& x_arg, const Tensor& y_arg, const OptionalTensor& weight_arg,
                const OptionalTensor& bias_arg, std::string_view metric_name)
      : metric(metric_of(metric_name)), dtype(x_arg.scalar_type()) {
    const Arg ax{x_arg, "x"}, ay{y_arg, "y"};
    check_floating(ax);
    check_same_dtype(ax, {ay});
    check_same_device(ax, {ay});
    check_min_dim(ax, 2, "[..., Q, D]");
    check_min_dim(ay, 2, "[..., N, D]");
    check_same_leading(ax, 2, ay, 2);
    TORCH_CHECK_VALUE(x_arg.size(-1) == y_arg.size(-1), "y: expected the number of features of x, ",
                      x_arg.size(-1), ", got ", y_arg.size(-1));
    const bool weighted = is_relation(metric) || metric == Metric::sqeuclidean || metric == Metric::cityblock;
    TORCH_CHECK_VALUE(!weight_arg || weighted, "weight: expected None with metric ", metric_name,
                      ", got a tensor");
    TORCH_CHECK_VALUE(!is_relation(metric) || (weight_arg && bias_arg),
                      "weight, bias: expected tensors with metric ", metric_name, ", got None");
    TORCH_CHECK_VALUE(!bias_arg || is_relation(metric), "bias: expected None with metric ", metric_name,
                      ", got a tensor");
    if (weight_arg) check_vector(ax, {*weight_arg, "weight"}, x_arg.size(-1), "[D]");
    if (bias_arg) check_vector(ax, {*bias_arg, "bias"}, 1, "[1]");

    x = rows_of(x_arg);
    y = rows_of(y_arg);
    weight = dense(weight_arg);
    bias = dense(bias_arg);
    const auto leading_sizes = leading(x_arg, 2);
    lead.assign(leading_sizes.begin(), leading_sizes.end());
    tasks = c10::multiply_integers(leading_sizes);
    queries = x_arg.size(-2);
    rows = y_arg.size(-2);
    features = x_arg.size(-1);
    chunks = query_chunks(x_arg, tasks, queries, rows, features);
  }

  static void check_vector(const Arg& like, const Arg& arg, int64_t size, const char* shape) {
    check_same_dtype(like, {arg});
    check_same_device(like, {arg});
    check_sizes(arg, {size}, shape);
  }

  template <typename T>
  Pairs<T> pairs() const {
    return {x.tensor.const_data_ptr<T>(),
            y.tensor.const_data_ptr<T>(),
            data<T>(weight),
            data<T>(bias),
            metric,
            tasks,
            queries,
            rows,
            features,
            x.task_stride,
            y.task_stride,
            chunks};
  }

  at::TensorOptions options() const { return x.tensor.options(); }
  at::DimVector x_sizes() const { return sizes_of(lead, {queries, features}); }
  at::DimVector y_sizes() const { return sizes_of(lead, {rows, features}); }
  at::DimVector out_sizes() const { return sizes_of(lead, {queries, rows}); }
  Tensor partial_y() const { return empty({tasks, chunks, rows, features}, options()); }
  Tensor partial_weight() const { return empty({weight ? tasks * chunks : 0, features}, options()); }
  Tensor partial_bias() const { return empty({bias ? tasks * chunks : 0}, options()); }

  // The gradient of an argument, in its dtype.
  Tensor finish_y(const Tensor& partial) const {
    return to_dtype(sum_chunks(partial, tasks, y_sizes()), dtype);
  }
  Tensor finish_weight(const Tensor& partial) const {
    return weight ? to_dtype(sum_chunks(partial, 1, {features}), dtype)
                  : at::empty({0}, options().dtype(dtype));
  }
  Tensor finish_bias(const Tensor& partial) const {
    return bias ? to_dtype(sum_chunks(partial, 1, {1}), dtype) : at::empty({0}, options().dtype(dtype));
  }
};

template <typename T>
T* data_or_null(const Tensor& tensor, bool wanted) {
  return wanted ? tensor.mutable_data_ptr<T>() : nullptr;
}

template <class Params>
void run_comparison(const Params& params, const Tensor& like) {
  if (!runs_cuda(like) && is_large(params)) return run_large(params);
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
  const PairArguments args(x, y, weight, bias, metric);
  const Arg ax{x, "x"}, ag{grad, "grad"}, ao{out, "out"};
  check_same_dtype(ax, {ag, ao});
  check_same_device(ax, {ag, ao});
  check_sizes(ag, args.out_sizes(), "[..., Q, N]");
  check_sizes(ao, args.out_sizes(), "[..., Q, N]");
  const Tensor dense_out = dense(out), dense_grad = dense(grad);
  Tensor grad_x = empty(args.x_sizes(), args.options());
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
  return {to_dtype(grad_x, args.dtype), args.finish_y(partial_y), args.finish_weight(partial_weight),
          args.finish_bias(partial_bias)};
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
  return {to_dtype(grad_grad, args.dtype), to_dtype(grad_x, args.dtype), args.finish_y(partial_y),
          args.finish_weight(partial_weight), args.finish_bias(partial_bias)};
}

// ---- classify ----

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

// The checked, dense arguments of classify and its derivatives.
struct Episode {
  Metric metric;
  bool prototypical;
  Reduction reduction;
  double scale;
  at::ScalarType dtype;
  int64_t way;
  Tensor support, support_labels;
  Operand query;
  OptionalTensor query_labels, ways;
  at::DimVector lead;
  int64_t tasks, queries, shots, features, chunks;

  Episode(const Tensor& support_arg, const Tensor& support_labels_arg, const Tensor& query_arg,
          const OptionalTensor& query_labels_arg, const OptionalTensor& ways_arg, int64_t num_classes,
          std::string_view method, std::string_view metric_name, double scale_arg, int64_t reduction_arg)
      : metric(metric_of(metric_name)),
        prototypical(method == "prototypical"),
        reduction(static_cast<Reduction>(reduction_arg)),
        scale(scale_arg),
        dtype(query_arg.scalar_type()),
        way(num_classes) {
    const Arg as{support_arg, "support"}, al{support_labels_arg, "support_labels"}, aq{query_arg, "query"};
    TORCH_CHECK_VALUE(prototypical || method == "matching", "method: expected prototypical or matching, got ",
                      method);
    TORCH_CHECK_VALUE(!is_relation(metric), "metric: expected a distance, got ", metric_name);
    TORCH_CHECK_VALUE(reduction_arg >= 0 && reduction_arg <= 2 && (query_labels_arg || reduction_arg == 0),
                      "reduction: expected 0 (none), 1 (mean) or 2 (sum), and 0 without query_labels, got ",
                      reduction_arg);
    TORCH_CHECK_VALUE(num_classes >= 1, "num_classes: expected a number >= 1, got ", num_classes);
    check_floating(as);
    check_same_dtype(as, {aq});
    check_labels_dtype(al);
    check_same_device(as, {al, aq});
    check_min_dim(as, 2, "[..., S, D]");
    check_min_dim(aq, 2, "[..., Q, D]");
    check_sizes(al, support_arg.sizes().slice(0, support_arg.dim() - 1), "[..., S]");
    check_same_leading(as, 2, aq, 2);
    TORCH_CHECK_VALUE(support_arg.size(-1) == query_arg.size(-1),
                      "query: expected the number of features of support, ", support_arg.size(-1), ", got ",
                      query_arg.size(-1));
    if (query_labels_arg) {
      const Arg a{*query_labels_arg, "query_labels"};
      check_labels_dtype(a);
      check_same_device(as, {a});
      check_sizes(a, query_arg.sizes().slice(0, query_arg.dim() - 1), "[..., Q]");
    }
    if (ways_arg) {
      const Arg a{*ways_arg, "ways"};
      check_labels_dtype(a);
      check_same_device(as, {a});
      check_sizes(a, leading(support_arg, 2), "[...]");
    }
    support = dense(support_arg);
    support_labels = dense_labels(support_labels_arg);
    query = rows_of(query_arg);
    query_labels = dense_labels(query_labels_arg);
    ways = dense_labels(ways_arg);
    const auto leading_sizes = leading(query_arg, 2);
    lead.assign(leading_sizes.begin(), leading_sizes.end());
    tasks = c10::multiply_integers(leading_sizes);
    queries = query_arg.size(-2);
    shots = support_arg.size(-2);
    features = query_arg.size(-1);
    chunks = query_chunks(query_arg, tasks, queries, prototypical ? way : shots, features);
  }

  void check_values() const {
    check_support_labels(support_labels, ways, way, "support_labels");
    if (query_labels && !runs_cuda(*query_labels))
      check_label_values(*query_labels, ways, way, "query_labels");
  }

  template <typename T>
  Classes<T> classes(const Tensor& rows) const {
    return {{query.tensor.const_data_ptr<T>(), rows.const_data_ptr<T>(), nullptr, nullptr, metric, tasks,
             queries, rows.size(-2), features, query.task_stride, rows.size(-2) * features, chunks},
            prototypical ? nullptr : support_labels.const_data_ptr<int64_t>(),
            data<int64_t>(query_labels),
            data<int64_t>(ways),
            way,
            static_cast<T>(scale)};
  }

  template <typename T>
  LossGradient<T> loss_gradient(const OptionalTensor& grad, const Tensor& valid) const {
    return {data<T>(grad), reduction == Reduction::mean ? valid.const_data_ptr<T>() : nullptr,
            !query_labels ? way : (reduction == Reduction::none ? 1 : 0)};
  }

  at::DimVector out_sizes() const {
    if (!query_labels) return sizes_of(lead, {queries, way});
    return reduction == Reduction::none ? sizes_of(lead, {queries}) : at::DimVector();
  }

  at::TensorOptions options() const { return support.options(); }

  // From the gradient of the rows to that of the support.
  Tensor grad_support(const Tensor& partial, const Tensor& rows) const {
    const Tensor grad_rows = sum_chunks(partial, tasks, rows.sizes());
    return prototypical ? run_prototypes_backward(grad_rows, support_labels, ways) : grad_rows;
  }

  // Sum, or mean over the valid queries, of one number per query; how many are valid.
  std::tuple<Tensor, Tensor> reduce(const Tensor& per_query) const {
    Tensor result = empty({}, options()), valid = empty({1}, options());
    with_scalar(per_query, [&]<typename T>() {
      run_kernel(ReduceLoss<T>{per_query.const_data_ptr<T>(), query_labels->const_data_ptr<int64_t>(),
                               result.mutable_data_ptr<T>(), valid.mutable_data_ptr<T>(),
                               reduction == Reduction::mean, per_query.numel()},
                 result);
    });
    return {result, valid};
  }

  Tensor count_valid() const {
    Tensor valid = empty({1}, options());
    with_scalar(valid, [&]<typename T>() {
      run_kernel(ReduceLoss<T>{nullptr, query_labels->const_data_ptr<int64_t>(), nullptr,
                               valid.mutable_data_ptr<T>(), false, query_labels->numel()},
                 valid);
    });
    return valid;
  }

  // What queries are compared with, [..., J, D].
  Tensor rows() const { return prototypical ? run_prototypes(support, support_labels, ways, way) : support; }
  // Of them what derivatives cannot take from the arguments.
  Tensor rows_to_keep(const Tensor& rows) const { return prototypical ? rows : empty({0}, options()); }
};

std::tuple<Tensor, Tensor, Tensor> classify_op(const Tensor& support, const Tensor& support_labels,
                                               const Tensor& query, const OptionalTensor& query_labels,
                                               const OptionalTensor& ways, int64_t num_classes,
                                               std::string_view method, std::string_view metric, double scale,
                                               int64_t reduction) {
  const Episode episode(support, support_labels, query, query_labels, ways, num_classes, method, metric,
                        scale, reduction);
  episode.check_values();
  const Tensor rows = episode.rows();
  const bool loss = query_labels.has_value();
  Tensor out =
      empty(sizes_of(episode.lead, loss ? std::initializer_list<int64_t>{episode.queries}
                                        : std::initializer_list<int64_t>{episode.queries, num_classes}),
            episode.options());
  with_scalar(out, [&]<typename T>() {
    T* result = out.mutable_data_ptr<T>();
    run_kernel(Classify<T>{episode.classes<T>(rows), loss ? nullptr : result, loss ? result : nullptr}, out);
  });
  Tensor valid;
  if (episode.reduction == Reduction::none) {
    valid = empty({0}, episode.options());
  } else {
    std::tie(out, valid) = episode.reduce(out);
  }
  return {to_dtype(out, episode.dtype), episode.rows_to_keep(rows), valid};
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
  const Tensor rows = episode.rows(), divisor = episode.count_valid();
  const Tensor nll = empty(sizes_of(episode.lead, {episode.queries}), episode.options());
  Tensor grad_query = empty(query.sizes(), episode.options());
  const Tensor partial =
      empty({episode.tasks, episode.chunks, rows.size(-2), episode.features}, episode.options());
  with_scalar(nll, [&]<typename T>() {
    run_kernel(
        ClassifyBackward<T>{episode.classes<T>(rows), episode.loss_gradient<T>(OptionalTensor(), divisor),
                            nll.mutable_data_ptr<T>(), grad_query.mutable_data_ptr<T>(),
                            partial.mutable_data_ptr<T>()},
        nll);
  });
  const auto [out, valid] = episode.reduce(nll);
  return {to_dtype(out, episode.dtype), episode.rows_to_keep(rows), valid,
          episode.grad_support(partial, rows), grad_query};
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
  const Tensor rows = episode.prototypical ? saved_rows : episode.support, dense_grad = dense(grad);
  Tensor grad_query = empty(query.sizes(), episode.options());
  const Tensor partial =
      empty({episode.tasks, episode.chunks, rows.size(-2), episode.features}, episode.options());
  with_scalar(grad_query, [&]<typename T>() {
    run_kernel(ClassifyBackward<T>{episode.classes<T>(rows), episode.loss_gradient<T>(dense_grad, valid),
                                   nullptr, grad_query.mutable_data_ptr<T>(), partial.mutable_data_ptr<T>()},
               grad_query);
  });
  return {to_dtype(episode.grad_support(partial, rows), episode.dtype), to_dtype(grad_query, episode.dtype)};
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
  const bool loss = query_labels.has_value();
  Tensor grad_grad =
      empty(sizes_of(episode.lead, loss ? std::initializer_list<int64_t>{episode.queries}
                                        : std::initializer_list<int64_t>{episode.queries, num_classes}),
            episode.options());
  Tensor grad_query = empty(query.sizes(), episode.options());
  const Tensor partial =
      empty({episode.tasks, episode.chunks, rows.size(-2), episode.features}, episode.options());
  with_scalar(grad_query, [&]<typename T>() {
    run_kernel(
        ClassifyDoubleBackward<T>{episode.classes<T>(rows), episode.loss_gradient<T>(dense_grad, valid),
                                  gg_x.const_data_ptr<T>(), gg_y.const_data_ptr<T>(),
                                  grad_grad.mutable_data_ptr<T>(), grad_query.mutable_data_ptr<T>(),
                                  partial.mutable_data_ptr<T>()},
        grad_query);
  });
  if (episode.reduction != Reduction::none) grad_grad = std::get<0>(episode.reduce(grad_grad));
  return {to_dtype(grad_grad, episode.dtype), to_dtype(episode.grad_support(partial, rows), episode.dtype),
          to_dtype(grad_query, episode.dtype)};
}

void implement(torch::Library& m) {
  m.impl("prototypes", prototypes_op);
  m.impl("prototypes_backward", prototypes_backward_op);
  m.impl("pairwise", pairwise_op);
  m.impl("pairwise_backward", pairwise_backward_op);
  m.impl("pairwise_double_backward", pairwise_double_backward_op);
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
