// The threads that share a task: a block, or one warp of a block. Part of cuda.cu.
#pragma once

#include "common/cuda.h"

namespace metafast::cuda {
namespace {

// Up to kTeamsPerBlock of them share a block.
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

  // f(row, col) for every element of a matrix, neighbours in a row by neighbouring threads.
  template <class F>
  static __device__ __forceinline__ void for_each(int rows, int cols, F f) {
    if (cols == 0) return;
    for (Walk at(cols); at.row < rows; at.advance()) f(at.row, at.col);
  }

  // The same for store(row, col, load(row, col)), where the loads take long: several are under way at once.
  template <class Load, class Store>
  static __device__ __forceinline__ void copy_each(int rows, int cols, Load load, Store store) {
    constexpr int kAtOnce = 4;
    if (cols == 0) return;
    for (Walk at(cols); at.row < rows;) {
      int row[kAtOnce], col[kAtOnce];
      decltype(load(0, 0)) values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i, at.advance()) {
        row[i] = at.row;
        col[i] = at.col;
        if (row[i] < rows) values[i] = load(row[i], col[i]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (row[i] < rows) store(row[i], col[i], values[i]);
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

 private:
  // From a thread's first element of a matrix to the next: divisions before the loop, none in it.
  struct Walk {
    int cols, row_step, col_step, row, col;
    __device__ __forceinline__ explicit Walk(int cols)
        : cols(cols),
          row_step(small_quotient(kThreads, cols)),
          col_step(kThreads - row_step * cols),
          row(small_quotient(rank(), cols)),
          col(rank() - row * cols) {}
    __device__ __forceinline__ void advance() {
      row += row_step;
      col += col_step;
      if (col < cols) return;
      col -= cols;
      ++row;
    }
  };
};

}  // namespace

}  // namespace metafast::cuda
