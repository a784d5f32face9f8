// The arguments of the pairwise ops: checked, dense, and in the part of the kernels' structs that they fill.
#pragma once

#include <ATen/ATen.h>

#include <string_view>
#include <vector>

#include "common/checks.h"
#include "common/dispatch.h"
#include "pairwise/ops.h"
#include "pairwise/params.h"

namespace metafast {
namespace {

inline Metric metric_of(std::string_view name) {
  if (name == "sqeuclidean") return Metric::sqeuclidean;
  if (name == "euclidean") return Metric::euclidean;
  if (name == "cosine") return Metric::cosine;
  if (name == "cityblock") return Metric::cityblock;
  if (name == "dot") return Metric::dot;
  if (name == "relation_relu") return Metric::relation_relu;
  if (name == "relation_tanh") return Metric::relation_tanh;
  TORCH_CHECK_VALUE(false, "metric: expected sqeuclidean, euclidean, cosine, cityblock or dot, got ", name);
}

inline bool is_relation(Metric metric) {
  return metric == Metric::relation_relu || metric == Metric::relation_tanh;
}

// Raises for a label that is neither a class in [0, way of its task) nor ignored.
inline void check_label_values(const Tensor& labels, const OptionalTensor& ways, int64_t num_classes,
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

inline void check_every_class(const Tensor& labels, const OptionalTensor& ways, int64_t num_classes,
                              const char* name) {
  const int64_t columns = labels.size(-1), tasks = labels.numel() / columns;
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

inline int64_t count_tasks(const Tensor& tensor, int64_t event_dims) {
  return c10::multiply_integers(leading(tensor, event_dims));
}

// On the CPU, values are checked here; a CUDA kernel asserts on the device instead, which does not
// synchronise.
inline void check_support_labels(const Tensor& labels, const OptionalTensor& ways, int64_t num_classes,
                                 const char* name) {
  if (labels.size(-1) == 0) {
    TORCH_CHECK_VALUE(num_classes == 0 || count_tasks(labels, 1) == 0, name,
                      ": expected a support example of every class, got none");
    return;
  }
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

inline at::DimVector sizes_of(at::IntArrayRef leading, std::initializer_list<int64_t> event) {
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

inline Tensor dense(const Tensor& tensor) { return to_dtype(tensor, compute_type(tensor)).contiguous(); }

inline Operand rows_of(const Tensor& tensor) {
  const int64_t block = tensor.size(-2) * tensor.size(-1);
  bool shared = tensor.dim() > 2 && tensor.stride(-1) == 1 && tensor.stride(-2) == tensor.size(-1);
  for (int64_t d = 0; d < tensor.dim() - 2; ++d) shared = shared && tensor.stride(d) == 0;
  if (shared && tensor.scalar_type() == compute_type(tensor)) return {tensor, 0};
  return {dense(tensor), block};
}

inline Tensor dense_labels(const Tensor& tensor) { return tensor.contiguous(); }
inline OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt;
}
inline OptionalTensor dense_labels(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

template <typename T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Into how many chunks a task's queries are split, from the shapes alone. With many tasks there is work for
// all threads; with few, chunks are made, large enough that what each prepares from the rows is little beside
// its queries.
inline int64_t query_chunks(const Tensor& like, int64_t tasks, int64_t queries, int64_t rows,
                            int64_t features) {
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
};

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

  at::DimVector unreduced_sizes() const {
    return query_labels ? sizes_of(lead, {queries}) : sizes_of(lead, {queries, way});
  }
  at::DimVector out_sizes() const {
    return reduction == Reduction::none ? unreduced_sizes() : at::DimVector();
  }

  at::DimVector prototype_sizes() const { return sizes_of(lead, {way, features}); }
  at::DimVector query_sizes() const { return sizes_of(lead, {queries, features}); }

  at::TensorOptions options() const { return support.options(); }
  Tensor partial_rows(const Tensor& rows) const {
    return empty({tasks, chunks, rows.size(-2), features}, options());
  }
};

}  // namespace

}  // namespace metafast
