// The learned optimizer ops on CPU and CUDA: check the arguments (arguments.h), allocate the results, run
// the kernel. What each op computes is stated in library.cpp.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "common/sums.h"
#include "learned_optimizer/arguments.h"

namespace metafast {
namespace {

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
                                                       const OptionalTensor& losses, const Tensor& state,
                                                       at::TensorList weights, std::string_view head,
                                                       std::string_view preprocess, double p, double scale,
                                                       bool unrolled) {
  const Problem problem(grads, params, losses, state, weights, head, preprocess, p, scale, unrolled);
  std::vector<Tensor> out;
  for (const Tensor& grad : problem.grads()) out.push_back(empty(grad.sizes(), grad.options()));
  const Tensor new_state = empty(state.sizes(), state.options());
  run(problem, out, new_state);
  return {out, new_state};
}

void lstm_step_op(at::TensorList params, at::TensorList grads, const OptionalTensor& loss,
                  const Tensor& state, at::TensorList weights, std::string_view head,
                  std::string_view preprocess, double p, double scale) {
  const Problem problem(grads, params, loss, state, weights, head, preprocess, p, scale, false);
  TORCH_CHECK_VALUE(params.size() == grads.size(), "params: expected ", grads.size(),
                    " tensors, one for each of grads, got none");
  const char* name = head == "gates" ? "theta" : "params";
  for (size_t i = 0; i < params.size(); ++i) check_writable({params[i], indexed(name, i).c_str()});
  check_writable({state, "state"});
  const Uninterrupted in_place;
  run(problem, problem.params(), problem.state());
  // What is not dense was copied.
  for (size_t i = 0; i < params.size(); ++i) {
    if (!params[i].is_contiguous()) params[i].copy_(problem.params()[i]);
  }
  if (!state.is_contiguous()) state.copy_(problem.state());
}

// ---- the backward ----

template <typename T>
int64_t rows_of_sums(LstmUnrollBackward<T>& p, [[maybe_unused]] const Tensor& like,
                     [[maybe_unused]] Tensor& workspace) {
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
                                            at::TensorList grads, at::TensorList params,
                                            const OptionalTensor& losses, const Tensor& state,
                                            at::TensorList weights, std::string_view head,
                                            std::string_view preprocess, double p, double scale,
                                            bool unrolled, std::array<bool, 5> wanted) {
  const Problem problem(grads, params, losses, state, weights, head, preprocess, p, scale, unrolled);
  const bool wants_grads = wanted[0], wants_params = wanted[1], wants_losses = wanted[2],
             wants_state = wanted[3], wants_weights = wanted[4];
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
  for (const Tensor& grad : problem.grads()) grad_grads.push_back(like_where(wants_grads, grad));
  for (const Tensor& param : problem.params()) grad_params.push_back(like_where(wants_params, param));
  Tensor grad_first = like_where(wants_state, problem.state());
  const bool wants_sums = wants_weights || wants_losses;

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
        p.list[i] = {dense_out[tensor].template const_data_ptr<T>(), data(wants_params, grad_params),
                     data(wants_grads, grad_grads)};
      }
      if (grad_state) p.grad_new_state = static_cast<const T*>(Problem::at(dense_state, block));
      if (wants_state) p.grad_state = static_cast<T*>(Problem::at(grad_first, block));
      first_row.push_back(first_row.back() + rows_of_sums(p, like, workspaces.emplace_back()));
      launches.push_back(p);
    });
    int64_t columns = problem.losses() ? problem.losses()->numel() : 0;
    for (const Tensor& weight : problem.weights()) columns += weight.numel();
    columns *= wants_sums;
    const Tensor rows = empty({first_row.back(), columns}, like.options());
    const Tensor total = empty({columns}, like.options());
    for (size_t i = 0; i < launches.size(); ++i) {
      if (wants_sums) launches[i].sums = rows.mutable_data_ptr<T>() + first_row[i] * columns;
      run_kernel(launches[i], like);
    }
    if (wants_sums) {
      run_kernel(SumPartials<T>{rows.mutable_data_ptr<T>(), total.mutable_data_ptr<T>(), 1, first_row.back(),
                                columns},
                 like);
    }
    return total;
  });

  result = std::move(grad_grads);
  result.insert(result.end(), grad_params.begin(), grad_params.end());
  int64_t column = 0;
  const auto next_sums = [&](bool wants, const Tensor& tensor) {
    // A copy: results of an op may not share memory.
    const int64_t first = std::exchange(column, column + tensor.numel());
    return wants ? sums.narrow(0, first, tensor.numel()).view(tensor.sizes()).clone()
                 : at::empty({0}, like.options());
  };
  std::vector<Tensor> of_weights;
  for (const Tensor& weight : problem.weights()) of_weights.push_back(next_sums(wants_weights, weight));
  if (problem.losses()) result.push_back(next_sums(wants_losses, *problem.losses()));
  result.push_back(to_dtype(grad_first, state.scalar_type()));
  result.insert(result.end(), of_weights.begin(), of_weights.end());
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
