// The arguments of the learned optimizer ops: checked, dense, and in the part of the kernel's struct that
// they fill.
#pragma once

#include <ATen/ATen.h>

#include <string_view>
#include <vector>

#include "common/checks.h"
#include "common/dispatch.h"
#include "learned_optimizer/ops.h"
#include "learned_optimizer/params.h"

namespace metafast {
namespace {

inline Head head_of(std::string_view name) {
  if (name == "update") return Head::update;
  if (name == "gates") return Head::gates;
  TORCH_CHECK_VALUE(false, "head: expected update or gates, got ", name);
}

inline Preprocess preprocess_of(std::string_view name) {
  if (name == "log_sign") return Preprocess::log_sign;
  if (name == "none") return Preprocess::none;
  TORCH_CHECK_VALUE(false, "preprocess: expected log_sign or none, got ", name);
}

// The checked, dense arguments that all ops share, and the part of the kernel's struct that they fill.
class Problem {
 public:
  Problem(at::TensorList grads, at::TensorList params, const OptionalTensor& losses, const Tensor& state,
          at::TensorList weights, std::string_view head, std::string_view preprocess, double p, double scale,
          bool unrolled)
      : head_(head_of(head)),
        preprocess_(preprocess_of(preprocess)),
        p_(p),
        scale_(scale),
        unrolled_(unrolled) {
    TORCH_CHECK_VALUE(!grads.empty(), "grads: expected at least one tensor, got none");
    constexpr double kMostP = 88;  // exp(p) is a float
    TORCH_CHECK_VALUE(static_cast<float>(p) > 0 && p <= kMostP, "p: expected a number > 0, at most ", kMostP,
                      ", got ", p);
    check_real({grads[0], "grads[0]"});
    if (unrolled) {
      check_min_dim({grads[0], "grads[0]"}, 1, "[K, ...]");
      steps_ = grads[0].size(0);
    }
    load_tensors(grads, params);
    load_losses(losses);
    load_weights(weights);
    load_state(state);
  }

  const std::vector<Tensor>& grads() const { return grads_; }
  const std::vector<Tensor>& params() const { return params_; }
  const std::vector<Tensor>& weights() const { return weights_; }
  const OptionalTensor& losses() const { return losses_; }
  const Tensor& state() const { return state_; }
  int64_t steps() const { return steps_; }
  at::TensorOptions options() const { return grads_[0].options(); }
  int64_t coordinates(size_t i) const {
    return unrolled_ ? c10::multiply_integers(grads_[i].sizes().slice(1)) : grads_[i].numel();
  }

  // The kernel's struct for as many tensors as it takes, from tensor `first` on, whose first block is
  // `block`.
  template <typename T>
  LstmUnroll<T> kernel(size_t first, int64_t block) const {
    LstmUnroll<T> p{};
    p.lstm = lstm<T>();
    p.steps = steps_;
    p.bfloat16_state = state_.scalar_type() == at::kBFloat16;
    p.state = at(state_, block);
    for (size_t i = first; i < grads_.size() && p.count < p.kMaxTensors; ++i) {
      p.add({coordinates(i), grads_[i].const_data_ptr<T>(),
             params_.empty() ? nullptr : params_[i].const_data_ptr<T>(), nullptr});
    }
    return p;
  }

  // The packed rows from `block` on.
  static void* at(const Tensor& state, int64_t block) {
    return static_cast<char*>(state.data_ptr()) + block * state.stride(0) * state.itemsize();
  }

 private:
  Head head_;
  Preprocess preprocess_;
  double p_, scale_;
  bool unrolled_;
  int64_t steps_ = 1, layers_ = 0, hidden_ = 0;
  std::vector<Tensor> grads_, params_, weights_;
  OptionalTensor losses_;
  Tensor state_;

  void load_tensors(at::TensorList grads, at::TensorList params) {
    const char* name = head_ == Head::gates ? "theta" : "params";
    TORCH_CHECK_VALUE(params.size() == grads.size() || (params.empty() && head_ == Head::update), name,
                      ": expected ", grads.size(), " tensors, one for each of grads, got ", params.size());
    const Arg like{grads[0], "grads[0]"};
    for (size_t i = 0; i < grads.size(); ++i) {
      const std::string grad_name = indexed("grads", i), param_name = indexed(name, i);
      const Arg grad{grads[i], grad_name.c_str()};
      check_same_dtype(like, {grad});
      check_same_device(like, {grad});
      if (unrolled_) {
        TORCH_CHECK_VALUE(grads[i].dim() > 0 && grads[i].size(0) == steps_, grad_name,
                          ": expected shape [K, ...] with K = ", steps_, ", got ", grads[i].sizes());
      }
      grads_.push_back(grads[i].contiguous());
      if (params.empty()) continue;
      const Arg param{params[i], param_name.c_str()};
      check_same_dtype(like, {param});
      check_same_device(like, {param});
      check_sizes(param, grads[i].sizes().slice(unrolled_ ? 1 : 0), "of its gradient");
      params_.push_back(params[i].contiguous());
    }
  }

  void load_losses(const OptionalTensor& losses) {
    if (!losses) return;
    const Arg like{grads_[0], "grads[0]"}, arg{*losses, unrolled_ ? "losses" : "loss"};
    check_same_dtype(like, {arg});
    check_same_device(like, {arg});
    if (unrolled_) {
      check_sizes(arg, {steps_}, "[K]");
    } else {
      check_sizes(arg, {}, "[]");
    }
    losses_ = losses->contiguous();
  }

  int64_t inputs() const { return (preprocess_ == Preprocess::log_sign ? 2 : 1) + (losses_ ? 2 : 0); }

  void load_weights(at::TensorList weights) {
    const bool gates = head_ == Head::gates;
    const int64_t count = static_cast<int64_t>(weights.size());
    layers_ = (count - 2) / 3;
    TORCH_CHECK_VALUE(
        count >= 2 && count == 3 * layers_ + 2 && layers_ >= (gates ? 0 : 1) && layers_ <= kMaxLstmLayers,
        "weights: expected W_ih, W_hh, b of each of ", gates ? 0 : 1, " to ", kMaxLstmLayers,
        " layers, then W, b of the head, got ", count, " tensors");
    if (layers_ > 0) {
      TORCH_CHECK_VALUE(weights[1].dim() == 2 && weights[1].size(1) > 0,
                        "weights[1]: expected shape [4H, H], got ", weights[1].sizes());
      hidden_ = weights[1].size(1);
    }
    const Arg like{grads_[0], "grads[0]"};
    const auto load = [&](int64_t i, at::IntArrayRef sizes, const char* shape) {
      const std::string name = indexed("weights", i);
      const Arg arg{weights[i], name.c_str()};
      check_same_dtype(like, {arg});
      check_same_device(like, {arg});
      check_sizes(arg, sizes, shape);
      weights_.push_back(weights[i].contiguous());
    };
    for (int64_t l = 0; l < layers_; ++l) {
      load(3 * l, {4 * hidden_, l == 0 ? inputs() : hidden_}, l == 0 ? "[4H, I]" : "[4H, H]");
      load(3 * l + 1, {4 * hidden_, hidden_}, "[4H, H]");
      load(3 * l + 2, {4 * hidden_}, "[4H]");
    }
    const int64_t top = layers_ == 0 ? inputs() : hidden_;
    load(count - 2, {gates ? 2 : 1, gates ? top + 2 : top},
         !gates         ? "[1, H]"
         : layers_ == 0 ? "[2, I + 2]"
                        : "[2, H + 2]");
    load(count - 1, {gates ? 2 : 1}, gates ? "[2]" : "[1]");
  }

  void load_state(const Tensor& state) {
    const Arg arg{state, "state"};
    check_same_device({grads_[0], "grads[0]"}, {arg});
    const bool half = state.scalar_type() == at::kBFloat16 && grads_[0].scalar_type() == at::kFloat;
    TORCH_CHECK_TYPE(half || state.scalar_type() == grads_[0].scalar_type(),
                     "state: expected the dtype of grads[0], ", grads_[0].scalar_type(),
                     grads_[0].scalar_type() == at::kFloat ? ", or bfloat16" : "", ", got ",
                     state.scalar_type());
    int64_t blocks = 0;
    for (size_t i = 0; i < grads_.size(); ++i) blocks += state_blocks(coordinates(i));
    check_sizes(arg, {blocks, 2 * layers_ * hidden_ + (head_ == Head::gates ? 2 : 0), kStateBlock},
                "[B, R, 64] of these tensors and weights");
    state_ = state.contiguous();
  }

  template <typename T>
  Lstm<T> lstm() const {
    Lstm<T> lstm{};
    const auto weight = [&](int64_t i) { return weights_[i].const_data_ptr<T>(); };
    lstm.layers = static_cast<int>(layers_);
    lstm.hidden = hidden_;
    for (int64_t l = 0; l < layers_; ++l)
      lstm.layer[l] = {weight(3 * l), weight(3 * l + 1), weight(3 * l + 2)};
    lstm.head_weight = weight(3 * layers_);
    lstm.head_bias = weight(3 * layers_ + 1);
    lstm.head = head_;
    lstm.preprocess = preprocess_;
    lstm.p = static_cast<T>(p_);
    lstm.scale = static_cast<T>(scale_);
    lstm.has_losses = losses_.has_value();
    if (losses_) lstm.losses = losses_->const_data_ptr<T>();
    return lstm;
  }
};

}  // namespace

}  // namespace metafast
