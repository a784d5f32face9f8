// The threads that share a task: a block, or one warp of a block. Part of cuda.cu.
#pragma once

#include "common/cuda.h"

namespace metafast::cuda {
namespace {

template <int kTeamThreads, int kTeamsPerBlock>
struct Team {
  static constexpr int kThreads = kTeamThreads, kTeams = kTeamsPerBlock;
  static constexpr int kBlockThreads = kThreads * kTeams, kWarps = kThreads / kWarpSize;
  static_assert(kTeams == 1 || kThreads == kWarpSize,
                "teams that share a block have no barrier but a warp's");

  static __device__ __forceinline__ int index() { return static_cast<int>(threadIdx.x) / kThreads; }
  static __device__ __forceinline__ int rank() { return static_cast<int>(threadIdx.x) % kThreads; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  static __device__ __forceinline__ int warp() { return rank() / kWarpSize; }

  static __device__ __forceinline__ void sync() {
    if constexpr (kTeams > 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // f(i) for i < count.
  template <class F>
  static __device__ __forceinline__ void for_each(int64_t count, F f) {
    for (int64_t i = rank(); i < count; i += kThreads) f(i);
  }

  // f(row, col) for every element of a matrix, neighbours in a row by neighbouring threads. One division for
  // each loop, none for each element.
  template <class F>
  static __device__ __forceinline__ void for_each(int rows, int cols, F f) {
    if (cols == 0) return;
    const int row_step = kThreads / cols, col_step = kThreads % cols;
    int row = rank() / cols, col = rank() % cols;
    while (row < rows) {
      f(row, col);
      row += row_step;
      col += col_step;
      if (col >= cols) {
        col -= cols;
        ++row;
      }
    }
  }

  // Every thread gets the sum, the same bits in every run. `scratch` [kWarps] may be used again at once.
  template <typename T>
  static __device__ __forceinline__ T sum(T value, T* scratch) {
    value = warp_sum(value);
    if constexpr (kWarps == 1) return value;
    sync();  // the readers of an earlier sum are done
    if (lane() == 0) scratch[warp()] = value;
    sync();
    value = scratch[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) value += scratch[w];
    return value;
  }
};

}  // namespace

}  // namespace metafast::cuda
