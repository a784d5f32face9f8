// The inner loop ops on CPU and CUDA: check the arguments (arguments.h), allocate the results, run the
// kernel. What each op computes is stated in library.cpp.
#include <ATen/ExpandUtils.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "common/layers.h"
#include "common/sums.h"
#include "inner_loop/arguments.h"
#include "inner_loop/dual.h"

namespace metafast {
namespace {

// Runs the kernel where `like` lives. What its work items leave in rows of sums is then added up, in one more
// launch, into results that share no memory.
template <typename T>
class Run {
 public:
  Run(InnerLoop<T>& p, const Tensor& like) : like_(like) {
    int64_t items = p.items();
    Tensor workspace;
#if defined(METAFAST_WITH_CUDA) || defined(METAFAST_EMULATED)
    if (runs_cuda(like)) {
      const c10::DeviceGuard guard(like.device());
      const cuda::Needs needs = cuda::needs(p);
      items = needs.items;
      workspace = empty({needs.workspace}, like.options());
      p.workspace = workspace.mutable_data_ptr<T>();
    }
#endif
    rows_ = empty({items * p.sums.columns}, like.options());
    if (p.sums.columns > 0) p.sums.rows = rows_.template mutable_data_ptr<T>();
    if (items > 0) run_kernel(p, like);
    sums_.partial = rows_.template const_data_ptr<T>();
    sums_.chunks = items;
    sums_.inner = p.sums.columns;
  }

  // The sums from a column on, once finish() has been called.
  Tensor take(int64_t column, at::IntArrayRef sizes) {
    const Tensor out = empty(sizes, like_.options());
    sums_.parts[sums_.count++] = {out.mutable_data_ptr<T>(), column, column + out.numel()};
    return out;
  }

  void finish() {
    if (sums_.count > 0) run_kernel(sums_, like_);
  }

 private:
  const Tensor& like_;
  Tensor rows_;
  SumColumns<T> sums_{};
};

// What a backward returns: gradients of params, lr, support x and y, of maml_loss query x and y and
// step_weights, and of the weights of the support and the query; of size 0 where not wanted.
class Gradients {
 public:
  struct Wanted {
    bool params, lr, support_x, support_y, query_x, query_y, step_weights, support_weights, query_weights;
  };

  Gradients(const Problem& problem, const Wanted& wanted)
      : problem_(problem),
        want_params_(wanted.params),
        want_lr_(wanted.lr),
        want_step_weights_(wanted.step_weights) {
    const auto like = [&](const Tensor& tensor, bool wants) {
      wants = wants && tensor.defined() && tensor.is_floating_point();  // labels have no gradient
      return wants ? empty(tensor.sizes(), problem.options()) : empty({0}, problem.options());
    };
    const auto like_set = [&](const Set& set, bool x, bool y, bool weights) {
      return Set{like(set.x, x), like(set.y, y), like(set.weights, weights)};
    };
    support_ = like_set(problem.support(), wanted.support_x, wanted.support_y, wanted.support_weights);
    query_ = like_set(problem.query(), wanted.query_x, wanted.query_y, wanted.query_weights);
  }

  template <typename T>
  void fill(InnerLoop<T>& p) {
    p.backward = true;
    const auto data = [](const Tensor& tensor) {
      return tensor.numel() ? tensor.mutable_data_ptr<T>() : nullptr;
    };
    const auto fill_set = [&](Examples<T>& examples, const Set& grads) {
      examples.grad_x = data(grads.x);
      examples.grad_y = data(grads.y);
      examples.grad_weights = data(grads.weights);
    };
    fill_set(p.support, support_);
    fill_set(p.query, query_);
    if (want_lr_) {
      p.sums.lr = p.sums.columns;
      p.sums.columns += problem_.lr_columns();
    }
    if (want_step_weights_) {
      p.sums.step_weights = p.sums.columns;
      p.sums.columns += p.sgd.steps;
    }
    if (problem_.query().x.defined())
      dual_.prepare(p, problem_.support().x, problem_.query().x, problem_.params()[0], problem_.params()[1],
                    want_params_);
    for (size_t i = 0; i < problem_.params().size(); ++i) {
      const bool by_kernel = want_params_ && !(dual_.used() && i < 2);
      const bool of_tasks = by_kernel && !problem_.shared();
      if (of_tasks) {
        params_.push_back(empty(problem_.task_shape(i), problem_.options()));
      } else {  // what is wanted of shared ones, finish() finds
        params_.push_back(want_params_ ? Tensor() : empty({0}, problem_.options()));
      }
      p.grad_params[i] = of_tasks ? present(params_[i].mutable_data_ptr<T>()) : nullptr;
      if (by_kernel && problem_.shared()) {
        if (p.sums.params < 0) p.sums.params = p.sums.columns;
        p.sums.columns += problem_.params()[i].numel();
      }
    }
  }

  // After the kernel, from the columns that fill() gave out.
  template <typename T>
  std::vector<Tensor> finish(const InnerLoop<T>& p, Run<T>& run) {
    const size_t first = dual_.used() ? 2 : 0;  // parameter that the kernel knows
    if (p.sums.params >= 0) take(run, p.sums.params, params_, first);
    std::vector<Tensor> lr;
    for (size_t i = 0; i < problem_.lr().size(); ++i) lr.push_back(empty({0}, problem_.options()));
    const bool of_one_rate = lr.size() == 1 && problem_.lr()[0].dim() == 0;
    if (p.sums.lr >= 0 && lr.size() > 1) {
      take(run, p.sums.lr, lr, 0);
    } else if (p.sums.lr >= 0) {
      const int64_t columns = problem_.lr_columns();
      lr[0] = run.take(p.sums.lr, of_one_rate ? at::IntArrayRef(columns) : problem_.lr()[0].sizes());
    }
    const Tensor step_weights =
        want_step_weights_ ? run.take(p.sums.step_weights, {p.sgd.steps}) : empty({0}, problem_.options());
    run.finish();
    if (p.sums.lr >= 0 && of_one_rate) lr[0] = lr[0].sum();
    if (want_params_ && dual_.used()) {
      auto [weight, bias] = dual_.template gradients<T>(problem_.params()[0]);
      params_[0] = weight;
      params_[1] = bias;
    }
    std::vector<Tensor> all = params_;
    all.insert(all.end(), lr.begin(), lr.end());
    all.insert(all.end(), {support_.x, support_.y});
    const bool has_query = problem_.query().x.defined();
    if (has_query) all.insert(all.end(), {query_.x, query_.y, step_weights});
    all.push_back(support_.weights);
    if (has_query) all.push_back(query_.weights);
    return all;
  }

 private:
  const Problem& problem_;
  bool want_params_, want_lr_, want_step_weights_;
  std::vector<Tensor> params_;
  Set support_, query_;
  DualForm dual_;

  // Results from `first` on, of the shapes of parameters, from columns one after the other.
  template <typename T>
  void take(Run<T>& run, int64_t column, std::vector<Tensor>& results, size_t first) const {
    for (size_t i = first; i < results.size(); ++i) {
      results[i] = run.take(column, problem_.shape(i));
      column += results[i].numel();
    }
  }
};

// ---- inner_sgd ----

std::vector<Tensor> inner_sgd_op(at::TensorList params, const Tensor& x, const Tensor& y, at::TensorList lr,
                                 const OptionalTensor& example_weights, std::string_view loss, int64_t steps,
                                 std::string_view activation, double momentum, bool first_order) {
  const Problem problem(params, x, y, example_weights, "x", "y", "example_weights", lr, loss, steps,
                        activation, momentum, first_order);
  std::vector<Tensor> adapted;
  for (size_t i = 0; i < params.size(); ++i)
    adapted.push_back(empty(problem.task_shape(i), problem.options()));
  with_scalar(x, [&]<typename T>() {
    InnerLoop<T> p = problem.kernel<T>();
    for (size_t i = 0; i < adapted.size(); ++i) p.adapted[i] = present(adapted[i].mutable_data_ptr<T>());
    Run<T>(p, x);
  });
  return adapted;
}

std::vector<Tensor> inner_sgd_backward_op(at::TensorList grads, at::TensorList params, const Tensor& x,
                                          const Tensor& y, at::TensorList lr,
                                          const OptionalTensor& example_weights, std::string_view loss,
                                          int64_t steps, std::string_view activation, double momentum,
                                          bool first_order, std::array<bool, 5> wanted) {
  const Problem problem(params, x, y, example_weights, "x", "y", "example_weights", lr, loss, steps,
                        activation, momentum, first_order);
  TORCH_CHECK_VALUE(grads.size() == params.size(), "grads: expected ", params.size(), " tensors, got ",
                    grads.size());
  std::vector<Tensor> dense_grads;
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::string name = indexed("grads", i);
    const Arg arg{grads[i], name.c_str()};
    check_same_dtype({x, "x"}, {arg});
    check_same_device({x, "x"}, {arg});
    check_sizes(arg, problem.task_shape(i), "of the adapted parameter");
    dense_grads.push_back(grads[i].contiguous());
  }
  Gradients::Wanted which{};
  which.params = wanted[0];
  which.lr = wanted[1];
  which.support_x = wanted[2];
  which.support_y = wanted[3];
  which.support_weights = wanted[4];
  Gradients gradients(problem, which);
  return with_scalar(x, [&]<typename T>() {
    InnerLoop<T> p = problem.kernel<T>();
    for (size_t i = 0; i < dense_grads.size(); ++i)
      p.grad_adapted[i] = present(dense_grads[i].const_data_ptr<T>());
    gradients.fill(p);
    Run<T> run(p, x);
    return gradients.finish(p, run);
  });
}

// ---- maml_loss ----

// The loss [T] or, as mean over tasks, [].
template <typename T>
Tensor prepare_loss(InnerLoop<T>& p, const Problem& problem, bool mean) {
  if (!mean) {
    const Tensor losses = empty({problem.tasks()}, problem.options());
    p.losses = losses.mutable_data_ptr<T>();
    return losses;
  }
  p.loss_scale = T(1) / static_cast<T>(problem.tasks());
  p.sums.loss = p.sums.columns++;
  return Tensor();
}

template <typename T>
Tensor finish_loss(const InnerLoop<T>& p, const Tensor& losses, Run<T>& run, const Problem& problem) {
  if (p.sums.loss < 0) return losses;
  if (p.tasks == 0)
    return at::full({}, std::numeric_limits<T>::quiet_NaN(), problem.options());  // as torch's mean
  return run.take(p.sums.loss, {});
}

Tensor maml_loss_op(at::TensorList params, const Tensor& support_x, const Tensor& support_y,
                    const Tensor& query_x, const Tensor& query_y, at::TensorList lr,
                    const OptionalTensor& step_weights, const OptionalTensor& support_weights,
                    const OptionalTensor& query_weights, std::string_view loss, int64_t steps,
                    std::string_view activation, double momentum, bool first_order, bool mean) {
  Problem problem(params, support_x, support_y, support_weights, "support_x", "support_y", "support_weights",
                  lr, loss, steps, activation, momentum, first_order);
  problem.set_query(query_x, query_y, query_weights, step_weights);
  return with_scalar(support_x, [&]<typename T>() {
    InnerLoop<T> p = problem.kernel<T>();
    const Tensor losses = prepare_loss(p, problem, mean);
    DualForm dual;
    dual.prepare(p, problem.support().x, problem.query().x, problem.params()[0], problem.params()[1], false);
    Run<T> run(p, support_x);
    const Tensor result = finish_loss(p, losses, run, problem);
    run.finish();
    return result;
  });
}

std::tuple<Tensor, std::vector<Tensor>> maml_loss_backward_op(
    const Tensor& grad, at::TensorList params, const Tensor& support_x, const Tensor& support_y,
    const Tensor& query_x, const Tensor& query_y, at::TensorList lr, const OptionalTensor& step_weights,
    const OptionalTensor& support_weights, const OptionalTensor& query_weights, std::string_view loss,
    int64_t steps, std::string_view activation, double momentum, bool first_order, bool mean,
    std::array<bool, 9> wanted) {
  Problem problem(params, support_x, support_y, support_weights, "support_x", "support_y", "support_weights",
                  lr, loss, steps, activation, momentum, first_order);
  problem.set_query(query_x, query_y, query_weights, step_weights);
  const Arg arg{grad, "grad"};
  check_same_dtype({support_x, "support_x"}, {arg});
  check_same_device({support_x, "support_x"}, {arg});
  if (mean) {
    check_sizes(arg, {}, "[]");
  } else {
    check_sizes(arg, {problem.tasks()}, "[T]");
  }
  Gradients gradients(problem, {wanted[0], wanted[1], wanted[2], wanted[3], wanted[4], wanted[5], wanted[6],
                                wanted[7], wanted[8]});
  return with_scalar(support_x, [&]<typename T>() -> std::tuple<Tensor, std::vector<Tensor>> {
    InnerLoop<T> p = problem.kernel<T>();
    const Tensor dense_grad = grad.contiguous();
    p.task_weights = dense_grad.const_data_ptr<T>();
    p.task_weight_stride = mean ? 0 : 1;
    gradients.fill(p);
    const Tensor losses = prepare_loss(p, problem, mean);
    Run<T> run(p, support_x);
    const Tensor result = finish_loss(p, losses, run, problem);
    return {result, gradients.finish(p, run)};
  });
}

// ---- sgd_update ----

std::tuple<std::vector<Tensor>, std::vector<Tensor>> sgd_update_op(at::TensorList params,
                                                                   at::TensorList grads, at::TensorList lr,
                                                                   at::TensorList momentum_buffers,
                                                                   double momentum, double weight_decay,
                                                                   bool nesterov) {
  const size_t count = params.size();
  TORCH_CHECK_VALUE(grads.size() == count, "grads: expected ", count,
                    " tensors, one for each of params, got ", grads.size());
  TORCH_CHECK_VALUE(lr.size() == 1 || lr.size() == count,
                    "lr: expected one tensor or one for each of params, got ", lr.size());
  TORCH_CHECK_VALUE(momentum_buffers.empty() || momentum_buffers.size() == count,
                    "momentum_buffers: expected ", count, " tensors, one for each of params, got ",
                    momentum_buffers.size());
  TORCH_CHECK_VALUE(!nesterov || momentum != 0, "nesterov: expected momentum, got momentum = 0");
  std::vector<Tensor> new_params, new_buffers, dense;  // `dense` keeps what the kernel reads alive
  const auto read = [&](const Tensor& tensor) {
    return dense.emplace_back(tensor.contiguous()).const_data_ptr();
  };
  if (count == 0) return {new_params, new_buffers};

  with_scalar(params[0], [&]<typename T>() {
    SgdUpdate<T> p{};
    p.momentum = static_cast<T>(momentum);
    p.weight_decay = static_cast<T>(weight_decay);
    p.nesterov = nesterov;
    for (size_t i = 0; i < count; ++i) {
      const std::string param_name = indexed("params", i), grad_name = indexed("grads", i),
                        buffer_name = indexed("momentum_buffers", i),
                        lr_name = lr.size() == 1 ? "lr" : indexed("lr", i);
      const Tensor& rate = lr[lr.size() == 1 ? 0 : i];
      const Arg param{params[i], param_name.c_str()}, grad{grads[i], grad_name.c_str()},
          arg_lr{rate, lr_name.c_str()};
      check_real({params[0], "params[0]"});
      check_same_dtype({params[0], "params[0]"}, {param, grad, arg_lr});
      check_same_device({params[0], "params[0]"}, {param, grad, arg_lr});
      check_sizes(grad, params[i].sizes(), "of its parameter");
      TORCH_CHECK_VALUE(at::is_expandable_to(rate.sizes(), params[i].sizes()), lr_name,
                        ": expected a shape that broadcasts to that of ", param_name, ", ", params[i].sizes(),
                        ", got ", rate.sizes());
      typename SgdUpdate<T>::Item item{};
      item.size = params[i].numel();
      item.param = static_cast<const T*>(read(params[i]));
      item.grad = static_cast<const T*>(read(grads[i]));
      item.lr_stride = rate.numel() == 1 ? 0 : 1;
      item.lr = static_cast<const T*>(read(rate.numel() == 1 ? rate : rate.expand(params[i].sizes())));
      item.new_param = new_params.emplace_back(empty(params[i].sizes(), params[i].options()))
                           .template mutable_data_ptr<T>();
      if (momentum != 0) {
        item.new_buffer = new_buffers.emplace_back(empty(params[i].sizes(), params[i].options()))
                              .template mutable_data_ptr<T>();
        if (!momentum_buffers.empty()) {
          const Arg buffer{momentum_buffers[i], buffer_name.c_str()};
          check_same_dtype({params[0], "params[0]"}, {buffer});
          check_same_device({params[0], "params[0]"}, {buffer});
          check_sizes(buffer, params[i].sizes(), "of its parameter");
          item.buffer = static_cast<const T*>(read(momentum_buffers[i]));
        }
      }
      p.add(item);
      if (p.count < SgdUpdate<T>::kMaxTensors && i + 1 < count) continue;
      run_kernel(p, params[0]);
      p.count = 0;
    }
  });
  return {new_params, new_buffers};
}

// ---- task_linear: the library's, at its best here, with derivatives of every order ----

// A batched GEMM of the library, in the dtype of x, or autocast's. What a CPU's library adds 16-bit numbers
// up in depends on the CPU. So there they are computed in float32 and rounded once: 3 to 35 times as fast
// where it would have added them in 16 bits, 1 to 3 times as slow where the CPU multiplies bfloat16. cuBLAS
// accumulates in float32.
Tensor task_linear_op(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Arg ab{bias, "bias"};
  check_layer({x, "x"}, {{weight, "weight"}, ab});
  TORCH_CHECK_VALUE(x.dim() == 3, "x: expected shape [T, B, I], got ", x.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 3 && weight.size(0) == x.size(0) && weight.size(2) == x.size(2),
                    "weight: expected shape [T, O, I] with T = ", x.size(0), ", I = ", x.size(2), ", got ",
                    weight.sizes());
  check_sizes(ab, {x.size(0), weight.size(1)}, "[T, O]");
  const at::ScalarType dtype = layer_dtype(x);
  if (!x.device().is_cpu() || !at::isReducedFloatingType(dtype))
    return at::baddbmm(bias.unsqueeze(1), x, weight.mT());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  return at::baddbmm(bias.to(at::kFloat).unsqueeze(1), x.to(at::kFloat), weight.to(at::kFloat).mT())
      .to(dtype);
}

void implement(torch::Library& m) {
  m.impl("sgd_update", sgd_update_op);
  m.impl("inner_sgd", inner_sgd_op);
  m.impl("inner_sgd_backward", inner_sgd_backward_op);
  m.impl("maml_loss", maml_loss_op);
  m.impl("maml_loss_backward", maml_loss_backward_op);
}

}  // namespace

int64_t get_trajectory_bytes() { return g_trajectory_bytes; }

void set_trajectory_bytes(int64_t limit) {
  TORCH_CHECK_VALUE(limit >= 0, "limit: expected a number >= 0, got ", limit);
  g_trajectory_bytes = limit;
}

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CompositeImplicitAutograd, m) {
  m.impl("task_linear", task_linear_op);
}
// Else vmap would call it once for each of its elements.
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, FuncTorchBatchedDecomposition, m) {
  m.impl("task_linear", task_linear_op);
}
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CPU, m) { implement(m); }
#ifdef METAFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CUDA, m) { implement(m); }
#endif

}  // namespace metafast
