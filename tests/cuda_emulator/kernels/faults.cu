// Kernels with one fault each, which the emulator must find.
#include "common/cuda.h"

namespace {

using metafast::cuda::kFullWarp;
using metafast::cuda::launch_kernel;

constexpr int kThreads = 128;

struct Params {
  const float* x;  // [128]
  float* out;      // [128]
};

struct Shared {
  float tile[kThreads];
};

// Reverses x; a barrier is missing between the writes and the reads.
__global__ void missing_barrier(Params p) {
  Shared& shared = metafast::cuda::shared_memory<Shared>();
  shared.tile[threadIdx.x] = p.x[threadIdx.x];
  p.out[threadIdx.x] = shared.tile[kThreads - 1 - threadIdx.x];
}

// Rotates x by one, twice; the barrier that keeps the second round's writes behind the first round's reads is
// missing.
__global__ void missing_second_barrier(Params p) {
  Shared& shared = metafast::cuda::shared_memory<Shared>();
  float value = p.x[threadIdx.x];
  for (int round = 0; round < 2; ++round) {
    shared.tile[threadIdx.x] = value;
    __syncthreads();
    value = shared.tile[(threadIdx.x + 1) % kThreads];
  }
  p.out[threadIdx.x] = value;
}

// Swaps neighbours; relies on the lanes of a warp running in step.
__global__ void missing_syncwarp(Params p) {
  Shared& shared = metafast::cuda::shared_memory<Shared>();
  shared.tile[threadIdx.x] = p.x[threadIdx.x];
  p.out[threadIdx.x] = shared.tile[threadIdx.x ^ 1];
}

__global__ void barrier_after_exit(Params p) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  p.out[threadIdx.x] = p.x[threadIdx.x];
}

__global__ void barrier_in_branch(Params p) {
  if (threadIdx.x < 32) {
    __syncthreads();
    p.out[threadIdx.x] = p.x[threadIdx.x];
  } else {
    __syncthreads();
  }
}

__global__ void barrier_against_shuffle(Params p) {
  if (threadIdx.x == 0) {
    __syncthreads();
  } else {
    p.out[threadIdx.x] = __shfl_xor_sync(kFullWarp, p.x[threadIdx.x], 1);
  }
}

__global__ void shuffle_from_inactive_lane(Params p) {
  if (threadIdx.x % 32 < 16) p.out[threadIdx.x] = __shfl_xor_sync(0xffffu, p.x[threadIdx.x], 16);
}

__global__ void shuffle_with_missing_lanes(Params p) {
  p.out[threadIdx.x] = __shfl_xor_sync(kFullWarp, p.x[threadIdx.x], 1);  // launched with 16 threads
}

__global__ void shared_overrun(Params p) {
  Shared& shared = metafast::cuda::shared_memory<Shared>();
  float* tile = shared.tile;
  tile[threadIdx.x + 1] = p.x[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = tile[threadIdx.x + 1];
}

}  // namespace

#define RUN(kernel, threads)                                                               \
  extern "C" void run_##kernel(const float* x, float* out) {                               \
    launch_kernel({#kernel, 1, threads, sizeof(Shared), nullptr}, kernel, Params{x, out}); \
  }

RUN(missing_barrier, kThreads)
RUN(missing_second_barrier, kThreads)
RUN(missing_syncwarp, kThreads)
RUN(barrier_after_exit, kThreads)
RUN(barrier_in_branch, kThreads)
RUN(barrier_against_shuffle, kThreads)
RUN(shuffle_from_inactive_lane, kThreads)
RUN(shuffle_with_missing_lanes, 16)
RUN(shared_overrun, kThreads)
