// CUDA kernels of the inner loop family and their launchers.
#include <cstdint>

#include "inner_loop/cuda_adaptation.h"

namespace metafast::cuda {
namespace {

// ---- inner loop: a team of threads to a task, tasks dealt out in turn ----

template <class Team, class Products, typename T>
__global__ void __launch_bounds__(Team::kBlockThreads, kBusyThreads / Team::kBlockThreads)
    adapt(const __grid_constant__ Plan<T> plan) {
  const int64_t item = block_index() * plan.teams + Team::index();
  if (item >= plan.items) return;  // a whole team
  const Adaptation<Team, Products, T> adaptation(
      plan, item, &shared_memory<unsigned char>() + Team::index() * plan.team_bytes);
  adaptation.start();
  for (int64_t task = item; task < plan.p.tasks; task += plan.items) adaptation.run(task);
}

template <class Team, class Products, typename T>
void launch_adapt(const Plan<T>& plan, Stream stream) {
  const auto bytes = static_cast<std::size_t>(plan.team_bytes * plan.teams);
  const auto threads = static_cast<unsigned>(Team::kThreads * plan.teams);
  launch_kernel({"inner_loop", grid_of(div_up<int64_t>(plan.items, plan.teams)), threads, bytes, stream},
                adapt<Team, Products, T>, plan);
}

}  // namespace

template <typename T>
Needs needs(const InnerLoop<T>& p) {
  const Plan<T> plan(p);
  return {plan.items, plan.items * plan.workspace};
}

template <typename T>
void launch(const InnerLoop<T>& p, Stream stream) {
  const Plan<T> plan(p);
  switch (plan.path) {
    case Path::warp:
      return launch_adapt<WarpTeam, Resident>(plan, stream);
    case Path::small_block:
      return launch_adapt<SmallBlockTeam, Resident>(plan, stream);
    case Path::large_block:
      return launch_adapt<LargeBlockTeam, Resident>(plan, stream);
    case Path::staged:
      return launch_adapt<LargeBlockTeam, Staged>(plan, stream);
  }
}

// ---- SGD on many tensors: a block to a part of a chunk ----

namespace {

constexpr int kUpdateThreads = 256, kUpdateElements = 1024;  // of a block

template <typename T>
__global__ void __launch_bounds__(kUpdateThreads) sgd_update(const __grid_constant__ SgdUpdate<T> p) {
  constexpr int64_t kParts = SgdUpdate<T>::kChunk / kUpdateElements;
  const int64_t chunk = block_index() / kParts;
  if (chunk >= p.first_chunk[p.count]) return;
  int low = 0, high = p.count;  // the tensor is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.first_chunk[middle] <= chunk ? low : high) = middle;
  }
  const auto& item = p.list[low];
  const int64_t begin = (chunk - p.first_chunk[low]) * p.kChunk + block_index() % kParts * kUpdateElements;
#pragma unroll
  for (int64_t i = begin + threadIdx.x; i < begin + kUpdateElements; i += kUpdateThreads) {
    if (i >= item.size) return;
    const T param = item.param[i];
    T step = item.grad[i] + p.weight_decay * param;
    if (p.momentum != T(0)) {
      const T buffer = item.buffer != nullptr ? p.momentum * item.buffer[i] + step : step;
      item.new_buffer[i] = buffer;
      step = p.nesterov ? step + p.momentum * buffer : buffer;
    }
    item.new_param[i] = param - item.lr[i * item.lr_stride] * step;
  }
}

}  // namespace

template <typename T>
void launch(const SgdUpdate<T>& p, Stream stream) {
  const int64_t blocks = p.items() * (p.kChunk / kUpdateElements);
  launch_kernel({"sgd_update", grid_of(blocks), kUpdateThreads, 0, stream}, sgd_update<T>, p);
}

#define METAFAST_INSTANTIATE(T)                      \
  template Needs needs(const InnerLoop<T>&);         \
  template void launch(const InnerLoop<T>&, Stream); \
  template void launch(const SgdUpdate<T>&, Stream);
METAFAST_INSTANTIATE(float)
METAFAST_INSTANTIATE(double)
#undef METAFAST_INSTANTIATE

}  // namespace metafast::cuda
