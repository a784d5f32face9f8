// The arguments of the convolutional ops: checked, dense, and packed as the kernels want them.
#pragma once

#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "common/dispatch.h"
#include "common/sums.h"
#include "convolutional/groups.h"
#include "convolutional/ops.h"

namespace metafast {
namespace {

template <typename T>
Packed<T> packed_view(const Tensor& tensor) {  // [T, P], or [1, P] for all tasks
  if constexpr (std::is_const_v<T>) {
    return {tensor.const_data_ptr<std::remove_const_t<T>>(), tensor.size(0) == 1 ? 0 : tensor.stride(0)};
  } else {
    return {tensor.mutable_data_ptr<T>(), tensor.stride(0)};
  }
}

// ---- between torch's layouts and the kernels' ----

template <typename T>
void permute(const Tensor& like, const T* in, T* out, std::array<int64_t, 5> size,
             std::array<int64_t, 5> in_stride, std::array<int64_t, 5> out_stride, int64_t pad = 0) {
  Permute<T> p{};
  std::copy(size.begin(), size.end(), p.size);
  std::copy(in_stride.begin(), in_stride.end(), p.in_stride);
  std::copy(out_stride.begin(), out_stride.end(), p.out_stride);
  p.pad = pad;
  p.in = in;
  p.out = out;
  run_kernel(p, like);
}

// Calls f(size, strides of the parameter, strides of the packed one) for parameter i of `tasks` tasks.
template <class F>
void with_layouts(const Network& network, size_t i, int64_t tasks, const F& f) {
  const NetworkBlock& b = network.block_of(i);
  const int64_t P = network.size(), O = b.outputs, C = b.channels, kh = b.kernel_y, kw = b.kernel_x;
  if (static_cast<int64_t>(i) == b.first_param) {
    const int64_t pitch = b.pitch();
    // A channel after the other: its places of the kernel lie side by side, in as many rows as there are
    // outputs.
    f(std::array<int64_t, 5>{tasks, C, kh, kw, O},
      std::array<int64_t, 5>{O * C * kh * kw, kh * kw, kw, 1, C * kh * kw},
      std::array<int64_t, 5>{P, pitch, kw * C * pitch, C * pitch, 1});
  } else {
    f(std::array<int64_t, 5>{tasks, 1, 1, 1, O}, std::array<int64_t, 5>{O, 0, 0, 0, 1},
      std::array<int64_t, 5>{P, 0, 0, 0, 1});
  }
}

// Tensors of the parameters' shapes as packed vectors: those of all tasks, or of some tasks of a group, so
// that they are read where the cache still holds them.
template <typename T>
class PackedInput {
 public:
  // With `of_tasks` each tensor is [T, ...].
  PackedInput(const Network& network, at::TensorList tensors, bool of_tasks, int64_t group)
      : network_(network),
        of_tasks_(of_tasks),
        packed_(empty({of_tasks ? group : 1, network.size()}, tensors[0].options().requires_grad(false))) {
    for (const Tensor& tensor : tensors) dense_.push_back(tensor.contiguous());
    if (!of_tasks) fill({0, 1, 0});
  }

  // [count, P], or [1, P] for all tasks. It holds until the next group.
  Tensor load(Some tasks) const {
    if (!of_tasks_) return packed_;
    fill(tasks);
    return tasks.of_group(packed_);
  }

  // Of all tasks of a group.
  Tensor loaded(int64_t count) const { return packed_.narrow(0, 0, count); }

 private:
  const Network& network_;
  const bool of_tasks_;
  const Tensor packed_;
  std::vector<Tensor> dense_;

  void fill(Some tasks) const {
    T* const out = packed_.mutable_data_ptr<T>() + tasks.slot * network_.size();
    for (size_t i = 0; i < dense_.size(); ++i) {
      with_layouts(network_, i, tasks.count, [&](auto size, auto strides, auto packed_strides) {
        permute<T>(packed_, dense_[i].const_data_ptr<T>() + tasks.first * strides[0],
                   out + network_.place_of(i), size, strides, packed_strides, network_.block_of(i).pitch());
      });
    }
  }
};

// The sum of the rows, in an order that depends on their number alone: [R, n] -> [n].
template <typename T>
Tensor sum_rows(const Tensor& rows) {
  const Tensor dense = rows.contiguous(), out = empty({rows.size(1)}, rows.options());
  if (out.numel() == 0) return out;
  SumPartials<T> p{dense.const_data_ptr<T>(), out.mutable_data_ptr<T>(), 1, rows.size(0), rows.size(1)};
  run_kernel(p, out);
  return out;
}

// Results of the parameters' shapes: [T, ...], which store() writes from packed vectors of some tasks, or
// without T their sum over tasks, to which add() adds a group's, in an order that no number of threads
// changes.
template <typename T>
class PackedOutput {
 public:
  PackedOutput(const Network& network, int64_t tasks, bool sums, const at::TensorOptions& options)
      : network_(network), sum_(sums ? at::zeros({network.size()}, options) : Tensor()) {
    for (size_t i = 0; i < network.params(); ++i) {
      at::DimVector sizes;
      if (!sums) sizes.push_back(tasks);
      sizes.append(network.shape(i).begin(), network.shape(i).end());
      tensors_.push_back(empty(sizes, options));
    }
  }

  void store(int64_t first, const Tensor& packed) const {
    if (!sum_.defined()) unpack(first, packed);
  }
  void add(const Tensor& packed) const {
    if (!sum_.defined()) return;
    if (runs_cuda(packed)) {  // where what a group is follows from the sizes alone
      sum_.add_(sum_rows<T>(packed));
    } else {
      for (int64_t i = 0; i < packed.size(0); ++i) sum_.add_(packed[i]);
    }
  }

  // Where there is nothing to store.
  void clear() const {
    for (const Tensor& tensor : tensors_) tensor.zero_();
  }

  std::vector<Tensor> finish() const {
    if (sum_.defined()) unpack(0, sum_.unsqueeze(0));
    return tensors_;
  }

 private:
  const Network& network_;
  const Tensor sum_;
  std::vector<Tensor> tensors_;

  void unpack(int64_t first, const Tensor& rows) const {
    const Tensor packed = rows.contiguous();  // of tasks that share a row as well
    for (size_t i = 0; i < tensors_.size(); ++i) {
      with_layouts(network_, i, packed.size(0), [&](auto size, auto strides, auto packed_strides) {
        permute<T>(packed, packed.const_data_ptr<T>() + network_.place_of(i),
                   tensors_[i].mutable_data_ptr<T>() + first * strides[0], size, packed_strides, strides);
      });
    }
  }
};

// Images [T, B, C, H, W] as maps with the border that the first block wants; `memory` holds them.
template <typename T>
Maps<const T> load_images(const Network& network, const Tensor& x, Tensor& memory) {
  const NetworkBlock& b = network.blocks()[0];
  const int64_t tasks = x.size(0), images = x.size(1), C = b.channels, H = b.height, W = b.width;
  const Maps<T> maps = in_memory<T>(memory, x.options(), [&](Workspace<T>& space) {
    return space.take_maps(tasks, images, H, W, C, network.input_border(0));
  });
  if (x.numel() == 0) return as_const(maps);
  if (!runs_cuda(x)) clear_border(maps, tasks, images, H, W, network.input_border(0));
  const Tensor dense = x.contiguous();
  const T* const in = dense.const_data_ptr<T>();
  const int64_t image = C * H * W;
  if (C == 1) {  // the longer rows
    permute<T>(memory, in, maps.data, {tasks, images, 1, H, W}, {images * image, image, 0, W, 1},
               {maps.task, maps.image, 0, maps.row, 1});
  } else {
    permute<T>(memory, in, maps.data, {tasks, images, H, W, C}, {images * image, image, W, 1, H * W},
               {maps.task, maps.image, maps.row, maps.pixel, 1});
  }
  return as_const(maps);
}

// Gradients of images, whose pixels are pitch(C) apart, in torch's layout.
template <typename T>
void store_images(const Network& network, const Tensor& like, const Maps<T>& maps, int64_t tasks,
                  int64_t images, T* out) {
  const NetworkBlock& b = network.blocks()[0];
  const int64_t C = b.channels, H = b.height, W = b.width, image = C * H * W;
  permute<T>(like, maps.data, out, {tasks, images, C, H, W}, {maps.task, maps.image, 1, maps.row, maps.pixel},
             {images * image, image, H * W, W, 1});
}

// ---- arguments ----

// What products may round to that are of `dtype`, or without one of float32 as torch's switch for TF32 in
// convolutions says. TF32 has all of float16's mantissa, and float32's range.
inline Rounding rounding_of(const Tensor& like, std::optional<at::ScalarType> dtype) {
  if (!runs_cuda(like) || like.scalar_type() == at::kDouble) return Rounding::none;
  if (dtype == at::kBFloat16) return Rounding::bfloat16;
  if (dtype == at::kHalf) return Rounding::tf32;
  const bool tf32 = like.is_cuda() && at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
  return tf32 ? Rounding::tf32 : Rounding::none;
}

inline Rounding checked_rounding(const Tensor& x, std::optional<at::ScalarType> product_dtype) {
  if (product_dtype) {
    TORCH_CHECK_VALUE(runs_cuda(x), "product_dtype: expected None on the CPU, got ", *product_dtype);
    TORCH_CHECK_TYPE(product_dtype == at::kBFloat16 || product_dtype == at::kHalf,
                     "product_dtype: expected bfloat16, float16 or None, got ", *product_dtype);
  }
  return rounding_of(x, product_dtype);
}

inline void check_params(at::TensorList params, const Tensor& x) {
  check_real({x, "x"});
  for (size_t i = 0; i < params.size(); ++i) {
    const std::string name = indexed("params", i);
    check_same_dtype({x, "x"}, {{params[i], name.c_str()}});
    check_same_device({x, "x"}, {{params[i], name.c_str()}});
  }
}

// What the weights w of a task's examples make of the mean over them: w_b / (terms sum w) is the share of an
// example whose loss is a sum of so many terms. Examples without a label have none.
struct Shares {
  Tensor of_examples;  // [T, B]
  Tensor totals;       // [T, 1]: sum w
  int64_t terms;

  Shares(const Tensor& weights, const Tensor& y, bool labels) : terms(labels ? 1 : y.size(2)) {
    const SameArithmetic arithmetic;
    const Tensor counting = labels ? weights.masked_fill(y == kIgnoreLabel, 0) : weights;
    totals = counting.sum(1, /*keepdim=*/true);
    of_examples = (counting / (totals * terms)).masked_fill(totals == 0, 0).contiguous();
  }

  // The gradient of the weights, from that of the shares times these. What is left out has none.
  Tensor gradient(const Tensor& changes) const {
    const SameArithmetic arithmetic;
    const Tensor each = changes / (of_examples * terms), mean = changes.sum(1, /*keepdim=*/true);
    return ((each - mean) / totals).masked_fill(of_examples == 0, 0);
  }
};

// What conv_inner_sgd and its backward have in common.
struct Problem {
  const Network network;
  const Tensor x;
  Tensor y;  // no label beside a weight of 0
  std::optional<Shares> shares;
  const std::vector<Tensor> lr;
  const bool labels;  // cross entropy, not mse
  const int64_t steps;
  const double momentum;
  const bool first_order;

  Problem(at::TensorList params, const Tensor& x, const Tensor& y, at::TensorList lr,
          const OptionalTensor& example_weights, at::IntArrayRef numbers, at::ArrayRef<double> eps,
          std::string_view loss, int64_t steps, double momentum, bool first_order,
          std::optional<at::ScalarType> product_dtype)
      : network((check_params(params, x), numbers), eps, params, x, checked_rounding(x, product_dtype)),
        x(x),
        y(y.contiguous()),
        lr(lr.vec()),
        labels(loss == "cross_entropy"),
        steps(steps),
        momentum(momentum),
        first_order(first_order) {
    TORCH_CHECK_VALUE(labels || loss == "mse", "loss: expected mse or cross_entropy, got ", loss);
    constexpr int64_t kMostSteps = std::numeric_limits<int32_t>::max();  // whose memory can still be counted
    TORCH_CHECK_VALUE(steps >= 0 && steps <= kMostSteps, "steps: expected a number >= 0, ",
                      steps < 0 ? "" : "below 2^31, ", "got ", steps);
    check_targets();
    if (example_weights) weigh({*example_weights, "example_weights"});
    if (labels) check_label_values();
    check_lr(lr, params);
  }

  int64_t tasks() const { return x.size(0); }
  int64_t images() const { return x.size(1); }
  int64_t blocks() const { return static_cast<int64_t>(network.blocks().size()); }
  at::TensorOptions options() const { return x.options().requires_grad(false); }
  template <typename T>
  Groups groups(int64_t elements) const {
    return Groups::of<T>(tasks(), network.image_cost() * images() * steps, elements, x);
  }

  // The learning rates of all steps as rows that go with a packed vector: [K or 1, P or 1].
  template <typename T>
  Tensor rates() const {
    if (lr.size() > 1) return PackedInput<T>(network, lr, false, 1).load({0, 1, 0});
    if (lr[0].dim() == 0) return lr[0].detach().view({1, 1});
    std::vector<Tensor> columns;
    for (size_t i = 0; i < network.params(); ++i) {
      const int64_t end = i + 1 < network.params() ? network.place_of(i + 1) : network.size();
      columns.push_back(lr[0]
                            .detach()
                            .select(1, static_cast<int64_t>(network.block_number_of(i)))
                            .unsqueeze(1)
                            .expand({steps, end - network.place_of(i)}));
    }
    return at::cat(columns, 1);
  }

 private:
  void check_targets() const {
    const Arg arg{y, "y"}, like{x, "x"};
    check_same_device(like, {arg});
    if (!labels) {
      check_same_dtype(like, {arg});
      return check_sizes(arg, {tasks(), images(), network.outputs()}, "[T, B, O]");
    }
    check_labels_dtype(arg);
    check_sizes(arg, {tasks(), images()}, "[T, B]");
  }

  void weigh(const Arg& weights) {
    check_same_device({x, "x"}, {weights});
    check_same_dtype({x, "x"}, {weights});
    check_sizes(weights, {tasks(), images()}, "[T, B]");
    const Tensor given = weights.tensor.detach();
    if (labels) y = y.masked_fill(given == 0, kIgnoreLabel);
    shares.emplace(given, y, labels);
  }

  void check_label_values() const {
    if (runs_cuda(y)) return;  // the kernel asserts there, which does not synchronise
    const int64_t* label = y.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < y.numel(); ++i) {
      TORCH_CHECK_VALUE((label[i] >= 0 && label[i] < network.outputs()) || label[i] == kIgnoreLabel,
                        "y: expected classes in [0, ", network.outputs(), ") or ", kIgnoreLabel,
                        " (ignored), got ", label[i], " at position ", i % images(), " of task ",
                        i / images());
    }
  }

  void check_lr(at::TensorList lr, at::TensorList params) const {
    TORCH_CHECK_VALUE(lr.size() == 1 || lr.size() == params.size(),
                      "lr: expected one tensor or one for each parameter, got ", lr.size(), " for ",
                      params.size(), " parameters");
    for (size_t i = 0; i < lr.size(); ++i) {
      const std::string name = lr.size() == 1 ? "lr" : indexed("lr", i);
      const Arg arg{lr[i], name.c_str()};
      check_same_dtype({x, "x"}, {arg});
      check_same_device({x, "x"}, {arg});
      if (lr.size() > 1) {
        check_sizes(arg, network.shape(i), "of the parameter");
      } else if (lr[0].dim() != 0) {
        check_sizes(arg, {steps, blocks()}, "[K, L]");
      }
    }
  }
};

}  // namespace
}  // namespace metafast
