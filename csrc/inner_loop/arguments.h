// The arguments of the inner loop ops: checked, dense, and in the part of the kernel's struct that they fill.
#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "common/checks.h"
#include "common/dispatch.h"
#include "inner_loop/ops.h"
#include "inner_loop/params.h"

namespace metafast {
namespace {

inline constexpr const char* kOtherNetworks = "; other networks adapt with metafast.adapt";

inline std::atomic<int64_t> g_trajectory_bytes{32 << 20};

inline Loss loss_of(std::string_view name) {
  if (name == "mse") return Loss::mse;
  if (name == "cross_entropy") return Loss::cross_entropy;
  TORCH_CHECK_VALUE(false, "loss: expected mse or cross_entropy, got ", name);
}

inline Activation activation_of(std::string_view name) {
  if (name == "relu") return Activation::relu;
  if (name == "tanh") return Activation::tanh;
  if (name == "none") return Activation::none;
  TORCH_CHECK_VALUE(false, "activation: expected relu, tanh or none, got ", name, kOtherNetworks);
}

// The kernels know by null what is absent, and torch gives null for what is empty.
template <typename T>
T* present(T* data) {
  static std::remove_const_t<T> nothing;
  return data ? data : &nothing;
}

struct Set {  // of examples of every task
  Tensor x, y, weights;
};

// The checked, dense arguments that all ops share, and the part of the kernel's struct that they fill.
class Problem {
 public:
  Problem(at::TensorList params, const Tensor& x, const Tensor& y, const OptionalTensor& weights,
          const char* x_name, const char* y_name, const char* weights_name, at::TensorList lr,
          std::string_view loss, int64_t steps, std::string_view activation, double momentum,
          bool first_order)
      : loss_(loss_of(loss)),
        activation_(activation_of(activation)),
        steps_(steps),
        momentum_(momentum),
        first_order_(first_order) {
    constexpr int64_t kMostSteps = std::numeric_limits<int32_t>::max();  // whose memory can still be counted
    TORCH_CHECK_VALUE(steps >= 0 && steps <= kMostSteps, "steps: expected a number >= 0, ",
                      steps < 0 ? "" : "below 2^31, ", "got ", steps);
    TORCH_CHECK_VALUE(x.dim() == 3, x_name, ": expected shape [T, S, D], got ", x.sizes(), kOtherNetworks);
    check_real({x, x_name});
    tasks_ = x.size(0);
    load_network(params, x, x_name);
    support_ = load_set(x, y, weights, x_name, y_name, weights_name);
    load_lr(lr);
  }

  void set_query(const Tensor& x, const Tensor& y, const OptionalTensor& weights,
                 const OptionalTensor& step_weights) {
    query_ = load_set(x, y, weights, "query_x", "query_y", "query_weights", 'Q');
    if (!step_weights) return;
    const Arg arg{*step_weights, "step_weights"}, like{support_.x, "support_x"};
    TORCH_CHECK_VALUE(steps_ > 0, "step_weights: expected None with steps = 0, got a tensor");
    check_same_dtype(like, {arg});
    check_same_device(like, {arg});
    check_sizes(arg, {steps_}, "[K]");
    step_weights_ = step_weights->contiguous();
  }

  int64_t tasks() const { return tasks_; }
  bool shared() const { return shared_; }
  const std::vector<Tensor>& params() const { return params_; }
  const std::vector<Tensor>& lr() const { return lr_; }
  const Set& support() const { return support_; }
  const Set& query() const { return query_; }
  at::TensorOptions options() const { return support_.x.options(); }
  int64_t lr_columns() const { return lr_.size() > 1 ? parameter_count() : steps_ * layers(); }
  int64_t layers() const { return static_cast<int64_t>(params_.size()) / 2; }

  int64_t parameter_count() const {  // of one task
    int64_t sum = 0;
    for (size_t i = 0; i < params_.size(); ++i) sum += c10::multiply_integers(shape(i));
    return sum;
  }

  // The shape of parameter i of one task.
  at::IntArrayRef shape(size_t i) const { return params_[i].sizes().slice(shared_ ? 0 : 1); }

  at::DimVector task_shape(size_t i) const {
    at::DimVector sizes{tasks_};
    sizes.append(shape(i).begin(), shape(i).end());
    return sizes;
  }

  template <typename T>
  InnerLoop<T> kernel() const {
    InnerLoop<T> p{};
    p.mlp.layers = static_cast<int>(layers());
    p.mlp.activation = activation_;
    p.mlp.loss = loss_;
    p.mlp.shared = shared_;
    p.mlp.widths[0] = support_.x.size(2);
    for (size_t i = 0; i < params_.size(); ++i) {
      p.mlp.params[i] = params_[i].const_data_ptr<T>();
      p.mlp.widths[i / 2 + 1] = shape(i)[0];
    }
    p.sgd.steps = steps_;
    p.sgd.momentum = static_cast<T>(momentum_);
    p.sgd.first_order = first_order_;
    if (lr_.size() == 1) {
      p.sgd.rates = present(lr_[0].const_data_ptr<T>());
      p.sgd.step_stride = lr_[0].dim() == 2 ? layers() : 0;
      p.sgd.layer_stride = lr_[0].dim() == 2 ? 1 : 0;
    } else {
      for (size_t i = 0; i < lr_.size(); ++i) p.sgd.elements[i] = lr_[i].const_data_ptr<T>();
    }
    p.tasks = tasks_;
    fill(p.support, support_);
    if (query_.x.defined()) fill(p.query, query_);
    if (step_weights_.defined()) p.step_weights = step_weights_.const_data_ptr<T>();
    p.loss_scale = 1;
    p.sums.params = p.sums.lr = p.sums.step_weights = p.sums.loss = -1;
    p.trajectory_bytes = get_trajectory_bytes();
    return p;
  }

 private:
  Loss loss_;
  Activation activation_;
  int64_t steps_, tasks_;
  double momentum_;
  bool first_order_, shared_ = true;
  std::vector<Tensor> params_, lr_;
  Set support_, query_;
  Tensor step_weights_;

  void load_network(at::TensorList params, const Tensor& x, const char* x_name) {
    TORCH_CHECK_VALUE(params.size() >= 2 && params.size() % 2 == 0 && params.size() <= 2 * kMaxLayers,
                      "params: expected W1, b1, ..., WL, bL of 1 to ", kMaxLayers, " layers, got ",
                      params.size(), " tensors", kOtherNetworks);
    TORCH_CHECK_VALUE(params[0].dim() == 2 || params[0].dim() == 3,
                      "params[0]: expected shape [O, I] or [T, O, I], got ", params[0].sizes(),
                      kOtherNetworks);
    shared_ = params[0].dim() == 2;
    int64_t inputs = x.size(2);
    for (size_t i = 0; i < params.size(); ++i) {
      const std::string name = indexed("params", i);
      const Arg arg{params[i], name.c_str()};
      check_same_dtype({x, x_name}, {arg});
      check_same_device({x, x_name}, {arg});
      const int64_t outputs = params[i - i % 2].size(-2);  // of its layer's W
      at::DimVector expected;
      if (!shared_) expected.push_back(tasks_);
      expected.push_back(outputs);
      if (i % 2 == 0) expected.push_back(inputs);
      check_sizes(arg, expected,
                  i % 2 == 0 ? (shared_ ? "[O, I]" : "[T, O, I]") : (shared_ ? "[O]" : "[T, O]"));
      if (i % 2 == 1) inputs = outputs;
      if (i + 2 < params.size()) {
        TORCH_CHECK_VALUE(params[i - i % 2 + 2].dim() == params[0].dim(), "params[", i - i % 2 + 2,
                          "]: expected ", params[0].dim(), " dimensions as params[0], got shape ",
                          params[i - i % 2 + 2].sizes());
      }
      params_.push_back(params[i].contiguous());
    }
  }

  Set load_set(const Tensor& x, const Tensor& y, const OptionalTensor& weights, const char* x_name,
               const char* y_name, const char* weights_name, char letter = 'S') const {
    const Arg ax{x, x_name}, ay{y, y_name}, like{params_[0], "params[0]"};
    check_same_dtype(like, {ax});
    check_same_device(like, {ax, ay});
    TORCH_CHECK_VALUE(x.dim() == 3 && x.size(0) == tasks_ && x.size(2) == params_[0].size(-1), x_name,
                      ": expected shape [T, ", letter, ", D] with T = ", tasks_,
                      ", D = ", params_[0].size(-1), ", got ", x.sizes());
    const int64_t outputs = params_.back().size(-1);
    if (loss_ == Loss::mse) {
      check_same_dtype(like, {ay});
      check_sizes(ay, {tasks_, x.size(1), outputs}, letter == 'Q' ? "[T, Q, O]" : "[T, S, O]");
    } else {
      TORCH_CHECK_VALUE(outputs > 0,
                        "params: expected an output for each class with cross_entropy, got none");
      check_labels_dtype(ay);
      check_sizes(ay, {tasks_, x.size(1)}, letter == 'Q' ? "[T, Q]" : "[T, S]");
    }
    Set set{x.contiguous(), y.contiguous(), Tensor()};
    if (weights) weigh(set, {*weights, weights_name}, letter == 'Q' ? "[T, Q]" : "[T, S]");
    if (loss_ == Loss::cross_entropy) check_label_values(set.y, outputs, y_name);
    return set;
  }

  // With nothing in the place of the examples of weight 0: whatever they hold, no product of it with 0 is
  // NaN, and their labels need not be classes.
  void weigh(Set& set, const Arg& weights, const char* shape) const {
    const Arg like{params_[0], "params[0]"};
    check_same_dtype(like, {weights});
    check_same_device(like, {weights});
    check_sizes(weights, set.x.sizes().slice(0, 2), shape);
    set.weights = weights.tensor.contiguous();
    const Tensor out = set.weights == 0;
    set.x = set.x.masked_fill(out.unsqueeze(-1), 0);
    if (loss_ == Loss::cross_entropy) set.y = set.y.masked_fill(out, kIgnoreLabel);
  }

  // On the CPU; a CUDA kernel asserts on the device instead, which does not synchronise.
  static void check_label_values(const Tensor& labels, int64_t outputs, const char* name) {
    if (runs_cuda(labels)) return;
    const int64_t* label = labels.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < labels.numel(); ++i) {
      TORCH_CHECK_VALUE((label[i] >= 0 && label[i] < outputs) || label[i] == kIgnoreLabel, name,
                        ": expected classes in [0, ", outputs, ") or ", kIgnoreLabel, " (ignored), got ",
                        label[i], " at position ", i % labels.size(1), " of task ", i / labels.size(1));
    }
  }

  void load_lr(at::TensorList lr) {
    TORCH_CHECK_VALUE(lr.size() == 1 || lr.size() == params_.size(),
                      "lr: expected one tensor or one for each parameter, got ", lr.size(), " for ",
                      params_.size(), " parameters");
    for (size_t i = 0; i < lr.size(); ++i) {
      const std::string name = lr.size() == 1 ? "lr" : indexed("lr", i);
      const Arg arg{lr[i], name.c_str()}, like{params_[0], "params[0]"};
      check_same_dtype(like, {arg});
      check_same_device(like, {arg});
      if (lr.size() > 1) {
        check_sizes(arg, shape(i), "of the parameter");
      } else if (lr[0].dim() != 0) {
        check_sizes(arg, {steps_, layers()}, "[K, L]");
      }
      lr_.push_back(lr[i].contiguous());
    }
  }

  template <typename T>
  void fill(Examples<T>& examples, const Set& set) const {
    examples.count = set.x.size(1);
    examples.x = present(set.x.const_data_ptr<T>());
    if (loss_ == Loss::mse) {
      examples.y = set.y.const_data_ptr<T>();
    } else {
      examples.labels = set.y.const_data_ptr<int64_t>();
    }
    if (set.weights.defined()) examples.weights = present(set.weights.const_data_ptr<T>());
  }
};

}  // namespace

}  // namespace metafast
