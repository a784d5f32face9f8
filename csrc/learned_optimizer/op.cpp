// The learned optimizer ops on CPU and CUDA: check the arguments, allocate the results, run the kernel. What
// each op computes is stated in library.cpp.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/sums.h"
#include "learned_optimizer/ops.h"
#include "learned_optimizer/params.h"

namespace metafast {
namespace {

Head head_of(std::string_view name) {
  if (name == "update") return Head::update;
  if (name == "gates") return Head::gates;
  TORCH_CHECK_VALUE(false, "head: expected update or gates, got ", name);
}

Preprocess preprocess_of(std::string_view name) {
  if (name == "log_sign") return Preprocess::log_sign;
  if (name == "none") return Preprocess::none;
  TORCH_CHECK_VALUE(false, "preprocess: expected log_sign or none, got ", name);
}

// The checked, dense arguments that all ops share, and the part of the kernel's struct that they fill.
class Problem {
 public:
  Problem(at::TensorList grads, at::TensorList params, const Tensor& state, at::TensorList weights,
          std::string_view head, std::string_view preprocess, double p, double scale, bool unrolled)
      : head_(head_of(head)),
        preprocess_(preprocess_of(preprocess)),
        p_(p),
        scale_(scale),
        unrolled_(unrolled) {
    TORCH_CHECK_VALUE(!grads.empty(), "grads: expected at least one tensor, got none");
    TORCH_CHECK_VALUE(p > 0, "p: expected a number > 0, got ", p);
    check_real({grads[0], "grads[0]"});
    if (unrolled) {
      check_min_dim({grads[0], "grads[0]"}, 1, "[K, ...]");
      steps_ = grads[0].size(0);
    }
    load_tensors(grads, params);
    load_weights(weights);
    load_state(state);
  }

  const std::vector<Tensor>& grads() const { return grads_; }
  const std::vector<Tensor>& params() const { return params_; }
  const std::vector<Tensor>& weights() const { return weights_; }
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
  bool bias_per_step_ = false;
  std::vector<Tensor> grads_, params_, weights_;
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

  int64_t inputs() const { return preprocess_ == Preprocess::log_sign ? 2 : 1; }

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
    // Of what comes first, the bias may be one for each step.
    const auto load_bias = [&](int64_t i, int64_t size, bool first, const char* shape) {
      const bool per_step = first && unrolled_ && weights[i].dim() == 2;
      bias_per_step_ |= per_step;
      if (per_step) {
        load(i, {steps_, size}, "of a bias for each step");
      } else {
        load(i, {size}, shape);
      }
    };
    for (int64_t l = 0; l < layers_; ++l) {
      load(3 * l, {4 * hidden_, l == 0 ? inputs() : hidden_}, l == 0 ? "[4H, I]" : "[4H, H]");
      load(3 * l + 1, {4 * hidden_, hidden_}, "[4H, H]");
      load_bias(3 * l + 2, 4 * hidden_, l == 0, "[4H]");
    }
    const int64_t top = layers_ == 0 ? inputs() : hidden_;
    load(count - 2, {gates ? 2 : 1, gates ? top + 2 : top}, gates ? "[2, H + 2]" : "[1, H]");
    load_bias(count - 1, gates ? 2 : 1, layers_ == 0, gates ? "[2]" : "[1]");
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
    lstm.bias_per_step = bias_per_step_;
    return lstm;
  }
};

// Calls f(kernel, first tensor, first block) for the tensors, as many at once as the kernel takes.
template <typename T, class F>
void for_launches(const Problem& problem, F&& f) {
  int64_t block = 0;
  for (size_t first = 0; first < problem.grads().size();) {
    LstmUnroll<T> p = problem.kernel<T>(first, block);
    f(p, first, block);
    first += p.count;
    block += p.blocks();
  }
}

// The results go where `out` and `new_state` are.
void run(const Problem& problem, const std::vector<Tensor>& out, const Tensor& new_state) {
  with_scalar(problem.grads()[0], [&]<typename T>() {
    for_launches<T>(problem, [&](LstmUnroll<T>& p, size_t first, int64_t block) {
      for (int i = 0; i < p.count; ++i) p.list[i].out = out[first + i].mutable_data_ptr<T>();
      p.new_state = Problem::at(new_state, block);
      if (p.blocks() > 0) run_kernel(p, problem.grads()[0]);
    });
  });
}

std::tuple<std::vector<Tensor>, Tensor> lstm_unroll_op(at::TensorList grads, at::TensorList params,
                                                       const Tensor& state, at::TensorList weights,
                                                       std::string_view head, std::string_view preprocess,
                                                       double p, double scale, bool unrolled) {
  const Problem problem(grads, params, state, weights, head, preprocess, p, scale, unrolled);
  std::vector<Tensor> out;
  for (const Tensor& grad : problem.grads()) out.push_back(empty(grad.sizes(), grad.options()));
  const Tensor new_state = empty(state.sizes(), state.options());
  run(problem, out, new_state);
  return {out, new_state};
}

void lstm_step_op(at::TensorList params, at::TensorList grads, const Tensor& state, at::TensorList weights,
                  std::string_view head, std::string_view preprocess, double p, double scale) {
  const Problem problem(grads, params, state, weights, head, preprocess, p, scale, false);
  TORCH_CHECK_VALUE(params.size() == grads.size(), "params: expected ", grads.size(),
                    " tensors, one for each of grads, got none");
  run(problem, problem.params(), problem.state());
  // What is not dense was copied.
  for (size_t i = 0; i < params.size(); ++i) {
    if (!params[i].is_contiguous()) params[i].copy_(problem.params()[i]);
  }
  if (!state.is_contiguous()) state.copy_(problem.state());
}

// ---- the backward ----

template <typename T>
int64_t rows_of_sums(LstmUnrollBackward<T>& p, const Tensor& like, Tensor& workspace) {
#if defined(METAFAST_WITH_CUDA) || defined(METAFAST_EMULATED)
  if (runs_cuda(like)) {
    const c10::DeviceGuard guard(like.device());
    const cuda::LstmNeeds needs = cuda::needs(p);
    workspace = empty({needs.workspace}, like.options());
    p.workspace = workspace.mutable_data_ptr<T>();
    return needs.rows;
  }
#endif
  return p.items();
}

// In the order of the arguments; of size 0 where not wanted.
std::vector<Tensor> lstm_unroll_backward_op(at::TensorList grad_out, const OptionalTensor& grad_state,
                                            at::TensorList grads, at::TensorList params, const Tensor& state,
                                            at::TensorList weights, std::string_view head,
                                            std::string_view preprocess, double p, double scale,
                                            bool unrolled, std::array<bool, 4> wanted) {
  const Problem problem(grads, params, state, weights, head, preprocess, p, scale, unrolled);
  const Tensor& like = problem.grads()[0];
  TORCH_CHECK_VALUE(grad_out.size() == grads.size(), "grad_out: expected ", grads.size(), " tensors, got ",
                    grad_out.size());
  std::vector<Tensor> dense_out;
  for (size_t i = 0; i < grad_out.size(); ++i) {
    const std::string name = indexed("grad_out", i);
    const Arg arg{grad_out[i], name.c_str()};
    check_same_dtype({like, "grads[0]"}, {arg});
    check_same_device({like, "grads[0]"}, {arg});
    check_sizes(arg, grads[i].sizes(), "of grads");
    dense_out.push_back(grad_out[i].contiguous());
  }
  Tensor dense_state;
  if (grad_state) {
    const Arg arg{*grad_state, "grad_state"};
    check_same_device({like, "grads[0]"}, {arg});
    check_sizes(arg, state.sizes(), "of state");
    dense_state = grad_state->to(like.scalar_type()).contiguous();
  }
  const auto like_where = [&](bool wants, const Tensor& tensor) {
    return wants ? empty(tensor.sizes(), like.options()) : at::empty({0}, like.options());
  };
  std::vector<Tensor> grad_grads, grad_params, result;
  for (const Tensor& grad : problem.grads()) grad_grads.push_back(like_where(wanted[0], grad));
  for (const Tensor& param : problem.params()) grad_params.push_back(like_where(wanted[1], param));
  Tensor grad_first = like_where(wanted[2], problem.state());

  const Tensor sums = with_scalar(like, [&]<typename T>() {
    std::vector<LstmUnrollBackward<T>> launches;
    std::vector<Tensor> workspaces;
    std::vector<int64_t> first_row{0};
    for_launches<T>(problem, [&](const LstmUnroll<T>& forward, size_t first, int64_t block) {
      if (forward.blocks() == 0) return;
      LstmUnrollBackward<T> p{};
      p.forward = forward;
      for (int i = 0; i < forward.count; ++i) {
        const size_t tensor = first + i;
        const auto data = [&](bool wants, const std::vector<Tensor>& list) {
          return wants && !list.empty() ? list[tensor].template mutable_data_ptr<T>() : nullptr;
        };
        p.list[i] = {dense_out[tensor].template const_data_ptr<T>(), data(wanted[1], grad_params),
                     data(wanted[0], grad_grads)};
      }
      if (grad_state) p.grad_new_state = static_cast<const T*>(Problem::at(dense_state, block));
      if (wanted[2]) p.grad_state = static_cast<T*>(Problem::at(grad_first, block));
      first_row.push_back(first_row.back() + rows_of_sums(p, like, workspaces.emplace_back()));
      launches.push_back(p);
    });
    int64_t columns = 0;
    for (const Tensor& weight : problem.weights()) columns += weight.numel();
    columns *= wanted[3];
    const Tensor rows = empty({first_row.back(), columns}, like.options());
    const Tensor total = empty({columns}, like.options());
    for (size_t i = 0; i < launches.size(); ++i) {
      if (wanted[3]) launches[i].sums = rows.mutable_data_ptr<T>() + first_row[i] * columns;
      run_kernel(launches[i], like);
    }
    if (wanted[3]) {
      run_kernel(SumPartials<T>{rows.mutable_data_ptr<T>(), total.mutable_data_ptr<T>(), 1, first_row.back(),
                                columns},
                 like);
    }
    return total;
  });

  result = std::move(grad_grads);
  result.insert(result.end(), grad_params.begin(), grad_params.end());
  result.push_back(to_dtype(grad_first, state.scalar_type()));
  int64_t column = 0;
  for (const Tensor& weight : problem.weights()) {
    // Copies: results of an op may not share memory.
    result.push_back(wanted[3] ? sums.narrow(0, column, weight.numel()).view(weight.sizes()).clone()
                               : at::empty({0}, like.options()));
    column += weight.numel();
  }
  return result;
}

void implement(torch::Library& m) {
  m.impl("lstm_unroll", lstm_unroll_op);
  m.impl("lstm_unroll_backward", lstm_unroll_backward_op);
  m.impl("lstm_step_", lstm_step_op);
}

}  // namespace

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CPU, m) { implement(m); }
#ifdef METAFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CUDA, m) { implement(m); }
#endif

}  // namespace metafast
