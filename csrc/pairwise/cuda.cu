// CUDA kernels of the pairwise family and their launchers: prototypes and sums here, the rest in the headers.
#include <algorithm>
#include <cstdint>

#include "pairwise/cuda_classify.h"
#include "pairwise/cuda_classify_second.h"
#include "pairwise/cuda_layer.h"
#include "pairwise/cuda_pairwise.h"
#include "pairwise/cuda_products.h"

namespace metafast::cuda {

int64_t query_chunks(int64_t tasks, int64_t queries, int64_t rows, int64_t) {
  constexpr int64_t kMostPartials = 8;    // partial sums hold at most this many times the elements of x
  constexpr int64_t kFewestQueries = 32;  // of a chunk
  const int64_t affordable = kMostPartials * queries / std::max<int64_t>(rows, 1);
  return std::max<int64_t>(std::min({parts_for_all(tasks), affordable, div_up(queries, kFewestQueries)}), 1);
}

// --- prototypes: a warp to a row of the result -----------------------------------------------------------

namespace {

constexpr int kColumns = 4;  // features that a lane holds at once

__device__ __forceinline__ int64_t warp_index() { return block_index() * kWarps + threadIdx.x / kWarpSize; }

template <typename T>
__global__ void __launch_bounds__(kThreads) prototypes(Prototypes<T> p) {
  const int64_t chunk = kWarpSize * kColumns, chunks = div_up(p.features, chunk);
  const int64_t index = warp_index();
  if (index >= p.tasks * p.way * chunks) return;
  const int64_t task = index / chunks / p.way, label = index / chunks % p.way;
  const int64_t first = index % chunks * chunk + threadIdx.x % kWarpSize;
  const int64_t* labels = p.labels + task * p.support;
  const T* embeddings = p.embeddings + task * p.support * p.features;
  const int64_t ways = ways_of(p.ways, p.way, task);
  const bool present = label < ways;

  if (label == 0 && first < kWarpSize) {
    check_ways(ways, p.way);
    for (int64_t s = threadIdx.x % kWarpSize; s < p.support; s += kWarpSize) check_label(labels[s], ways);
  }
  T sums[kColumns] = {};
  int64_t members = 0;
  if (present) {
    members = for_each_member(labels, p.support, label, [&](int64_t s) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int64_t d = first + c * kWarpSize;
        if (d < p.features) sums[c] += embeddings[s * p.features + d];
      }
    });
    check_members(members);
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t d = first + c * kWarpSize;
    if (d < p.features) {
      p.prototypes[(task * p.way + label) * p.features + d] =
          present ? sums[c] / static_cast<T>(members) : T(0);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) prototypes_backward(PrototypesBackward<T> p) {
  const int64_t index = warp_index();
  if (index >= p.tasks * p.support) return;
  const int64_t task = index / p.support;
  const int64_t label = p.labels[index];
  const bool present = label >= 0 && label < ways_of(p.ways, p.way, task);
  int64_t members = 1;
  if (present) members = for_each_member(p.labels + task * p.support, p.support, label, [](int64_t) {});
  const int64_t chunk = p.way * p.features;
  const T* grad = p.grad + task * p.chunks * chunk + label * p.features;
  T* out = p.grad_embeddings + index * p.features;
  for (int64_t d = threadIdx.x % kWarpSize; d < p.features; d += kWarpSize) {
    T sum = 0;
    for (int64_t c = 0; present && c < p.chunks; ++c) sum += grad[c * chunk + d];
    out[d] = sum / static_cast<T>(members);
  }
}

}  // namespace

template <typename T>
void launch(const Prototypes<T>& p, Stream stream) {
  const int64_t warps = p.tasks * p.way * div_up(p.features, kWarpSize * kColumns);
  launch_kernel({"prototypes", grid_of(div_up(warps, kWarps)), kThreads, 0, stream}, prototypes<T>, p);
}

template <typename T>
void launch(const PrototypesBackward<T>& p, Stream stream) {
  launch_kernel({"prototypes_backward", grid_of(div_up(p.tasks * p.support, kWarps)), kThreads, 0, stream},
                prototypes_backward<T>, p);
}

// --- sums ------------------------------------------------------------------------------------------------

namespace {

constexpr int kReduceThreads = 1024;

struct ReduceShared {
  double warps[kReduceThreads / kWarpSize];
};

// One block: there is one sum, and its order must not depend on anything.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads) reduce_loss(ReduceLoss<T> p) {
  ReduceShared& shared = shared_memory<ReduceShared>();
  double sum = 0, valid = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += kReduceThreads) {
    if (p.nll != nullptr) sum += p.nll[i];
    valid += p.query_labels[i] != kIgnoreLabel;
  }
  sum = block_sum(sum, shared.warps);
  valid = block_sum(valid, shared.warps);
  if (threadIdx.x != 0) return;
  *p.valid = static_cast<T>(valid);
  if (p.loss != nullptr) *p.loss = static_cast<T>(p.mean ? sum / valid : sum);
}

}  // namespace

template <typename T>
void launch(const ReduceLoss<T>& p, Stream stream) {
  launch_kernel({"reduce_loss", 1, kReduceThreads, sizeof(ReduceShared), stream}, reduce_loss<T>, p);
}

#define METAFAST_INSTANTIATE(Params)                  \
  template void launch(const Params<float>&, Stream); \
  template void launch(const Params<double>&, Stream);
METAFAST_INSTANTIATE(Prototypes)
METAFAST_INSTANTIATE(PrototypesBackward)
METAFAST_INSTANTIATE(Pairwise)
METAFAST_INSTANTIATE(PairwiseBackward)
METAFAST_INSTANTIATE(PairwiseDoubleBackward)
METAFAST_INSTANTIATE(MeanRow)
METAFAST_INSTANTIATE(CentreRows)
METAFAST_INSTANTIATE(FinishProducts)
METAFAST_INSTANTIATE(ProductFactors)
METAFAST_INSTANTIATE(AddScaledRows)
METAFAST_INSTANTIATE(Classify)
METAFAST_INSTANTIATE(ClassifyBackward)
METAFAST_INSTANTIATE(ClassifyDoubleBackward)
METAFAST_INSTANTIATE(ReduceLoss)
template void launch(const RelationLayer<float>&, Stream);
template int64_t loss_blocks(const Classify<float>&);
template int64_t loss_blocks(const Classify<double>&);
#undef METAFAST_INSTANTIATE

}  // namespace metafast::cuda
