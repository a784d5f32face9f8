// CUDA kernels of the learned optimizers and their launchers.
#include <algorithm>
#include <cstdint>

#include "learned_optimizer/cuda_backward.h"
#include "learned_optimizer/cuda_forward.h"
#include "learned_optimizer/cuda_tile_backward.h"
#include "learned_optimizer/cuda_tile_forward.h"

namespace metafast::cuda {
namespace {

// A kernel takes one struct.
template <class Params, class Plan>
struct Planned {
  Params p;
  Plan plan;
};

template <Memory kMemory, typename T>
__global__ void __launch_bounds__(kMostThreads<T>, kMemory == Memory::all && sizeof(T) == 4 ? 2 : 1)
    lstm_unroll(const __grid_constant__ Planned<LstmUnroll<T>, Plan<T>> problem) {
  if (block_index() >= problem.plan.grid) return;
  Unroll<kMemory, T>(problem.p, problem.plan, &shared_memory<unsigned char>()).run();
}

template <Memory kMemory, typename T>
__global__ void __launch_bounds__(kMostThreads<T>, 1)
    lstm_unroll_backward(const __grid_constant__ Planned<LstmUnrollBackward<T>, Plan<T>> problem) {
  if (block_index() >= problem.plan.grid) return;
  UnrollBackward<kMemory, T>(problem.p, problem.plan, &shared_memory<unsigned char>()).run();
}

// Small networks in float, on the tensor cores.
__global__ void __launch_bounds__(kTileThreads, TilePlan::kForwardBlocks)
    lstm_unroll_tiles(const __grid_constant__ Planned<LstmUnroll<float>, TilePlan> problem) {
  TileUnroll(problem.p, problem.plan, &shared_memory<float>()).run();
}

__global__ void __launch_bounds__(kTileThreads, TileBackwardPlan::kBlocks) lstm_unroll_tiles_backward(
    const __grid_constant__ Planned<LstmUnrollBackward<float>, TileBackwardPlan> problem) {
  TileUnrollBackward(problem.p, problem.plan, &shared_memory<float>()).run();
}

template <class Params, class Plan>
void launch_planned(const char* name, void (*kernel)(Planned<Params, Plan>),
                    const Planned<Params, Plan>& problem, int threads, Stream stream) {
  const auto bytes = static_cast<std::size_t>(problem.plan.bytes);
  launch_kernel({name, grid_of(problem.plan.grid), static_cast<unsigned>(threads), bytes, stream}, kernel,
                problem);
}

template <typename T>
Plan<T> plan_of(const LstmUnrollBackward<T>& p) {
  Plan<T> plan(p.forward, /*backward=*/true, p.columns());
  plan.aligned = plan.aligned && is_aligned(p.grad_new_state) && is_aligned(p.grad_state);
  plan.wants_inputs |= std::any_of(p.list, p.list + p.forward.count,
                                   [](const auto& item) { return item.grad_grads != nullptr; });
  return plan;
}

}  // namespace

template <typename T>
void launch(const LstmUnroll<T>& p, Stream stream) {
  const char* const name = "lstm_unroll";
  if constexpr (sizeof(T) == sizeof(float)) {
    if (TilePlan::fits(p)) {
      const Planned<LstmUnroll<T>, TilePlan> problem{p, TilePlan(p)};
      return launch_planned(name, lstm_unroll_tiles, problem, kTileThreads, stream);
    }
  }
  const Planned<LstmUnroll<T>, Plan<T>> problem{p, Plan<T>(p, /*backward=*/false, 0)};
  const auto kernel =
      problem.plan.memory == Memory::all ? lstm_unroll<Memory::all, T> : lstm_unroll<Memory::rows, T>;
  launch_planned(name, kernel, problem, problem.plan.threads, stream);
}

template <typename T>
LstmNeeds needs(const LstmUnrollBackward<T>& p) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (TileBackwardPlan::fits(p)) {
      const TileBackwardPlan plan(p);
      return {plan.grid, int64_t{plan.grid} * kTileWarps * plan.workspace};
    }
  }
  const Plan<T> plan = plan_of(p);
  return {plan.grid, plan.grid * plan.workspace};
}

template <typename T>
void launch(const LstmUnrollBackward<T>& p, Stream stream) {
  const char* const name = "lstm_unroll_backward";
  if constexpr (sizeof(T) == sizeof(float)) {
    if (TileBackwardPlan::fits(p)) {
      const Planned<LstmUnrollBackward<T>, TileBackwardPlan> problem{p, TileBackwardPlan(p)};
      return launch_planned(name, lstm_unroll_tiles_backward, problem, kTileThreads, stream);
    }
  }
  const Planned<LstmUnrollBackward<T>, Plan<T>> problem{p, plan_of(p)};
  const auto run = [&](auto kernel) { launch_planned(name, kernel, problem, problem.plan.threads, stream); };
  switch (problem.plan.memory) {
    case Memory::all:
      return run(lstm_unroll_backward<Memory::all, T>);
    case Memory::rows:
      return run(lstm_unroll_backward<Memory::rows, T>);
    case Memory::none:
      return run(lstm_unroll_backward<Memory::none, T>);
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
