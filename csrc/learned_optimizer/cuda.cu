// CUDA kernels of the learned optimizers and their launchers.
#include <algorithm>
#include <cstdint>

#include "learned_optimizer/cuda_backward.h"
#include "learned_optimizer/cuda_forward.h"

namespace metafast::cuda {
namespace {

// A kernel takes one struct.
template <class Params, typename T>
struct Planned {
  Params p;
  Plan<T> plan;
};

template <Memory kMemory, typename T>
__global__ void __launch_bounds__(kMostThreads<T>, kMemory == Memory::all && sizeof(T) == 4 ? 2 : 1)
    lstm_unroll(const __grid_constant__ Planned<LstmUnroll<T>, T> problem) {
  if (block_index() >= problem.plan.grid) return;
  Unroll<kMemory, T>(problem.p, problem.plan, &shared_memory<unsigned char>()).run();
}

template <Memory kMemory, typename T>
__global__ void __launch_bounds__(kMostThreads<T>, 1)
    lstm_unroll_backward(const __grid_constant__ Planned<LstmUnrollBackward<T>, T> problem) {
  if (block_index() >= problem.plan.grid) return;
  UnrollBackward<kMemory, T>(problem.p, problem.plan, &shared_memory<unsigned char>()).run();
}

template <class Params, typename T>
void launch_planned(const char* name, void (*kernel)(Planned<Params, T>), const Planned<Params, T>& problem,
                    Stream stream) {
  const Plan<T>& plan = problem.plan;
  const auto bytes = static_cast<std::size_t>(plan.bytes);
  launch_kernel({name, grid_of(plan.grid), static_cast<unsigned>(plan.threads), bytes, stream}, kernel,
                problem);
}

template <typename T>
Plan<T> plan_of(const LstmUnrollBackward<T>& p) {
  Plan<T> plan(p.forward, /*backward=*/true, p.columns());
  plan.aligned = plan.aligned && is_aligned(p.grad_new_state) && is_aligned(p.grad_state);
  plan.wants_grads = std::any_of(p.list, p.list + p.forward.count,
                                 [](const auto& item) { return item.grad_grads != nullptr; });
  return plan;
}

}  // namespace

template <typename T>
void launch(const LstmUnroll<T>& p, Stream stream) {
  const Planned<LstmUnroll<T>, T> problem{p, Plan<T>(p, /*backward=*/false, 0)};
  const auto kernel =
      problem.plan.memory == Memory::all ? lstm_unroll<Memory::all, T> : lstm_unroll<Memory::rows, T>;
  launch_planned("lstm_unroll", kernel, problem, stream);
}

template <typename T>
LstmNeeds needs(const LstmUnrollBackward<T>& p) {
  const Plan<T> plan = plan_of(p);
  return {plan.grid, plan.grid * plan.workspace};
}

template <typename T>
void launch(const LstmUnrollBackward<T>& p, Stream stream) {
  const Planned<LstmUnrollBackward<T>, T> problem{p, plan_of(p)};
  const char* const name = "lstm_unroll_backward";
  switch (problem.plan.memory) {
    case Memory::all:
      return launch_planned(name, lstm_unroll_backward<Memory::all, T>, problem, stream);
    case Memory::rows:
      return launch_planned(name, lstm_unroll_backward<Memory::rows, T>, problem, stream);
    case Memory::none:
      return launch_planned(name, lstm_unroll_backward<Memory::none, T>, problem, stream);
  }
}

#define METAFAST_INSTANTIATE(T)                           \
  template LstmNeeds needs(const LstmUnrollBackward<T>&); \
  template void launch(const LstmUnroll<T>&, Stream);     \
  template void launch(const LstmUnrollBackward<T>&, Stream);
METAFAST_INSTANTIATE(float)
METAFAST_INSTANTIATE(double)
#undef METAFAST_INSTANTIATE

}  // namespace metafast::cuda
