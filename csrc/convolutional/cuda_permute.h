// Copies between layouts. Part of cuda.cu.
#pragma once

#include "common/cuda.h"
#include "common/ptx.h"
#include "convolutional/params.h"

namespace metafast::cuda {
namespace {

constexpr int kPermuteThreads = 256;
constexpr int kPermuteTile = kWarpSize, kPermuteRows = kPermuteThreads / kPermuteTile;

// What is written of the last dimension.
template <typename T>
__host__ __device__ int64_t columns(const Permute<T>& p) {
  return p.pad > p.size[4] ? p.pad : p.size[4];
}

// The last dimension of out and another one, in which neighbours lie closer in `in`, change places by way of
// shared memory: a warp reads neighbours there, and writes them here.
template <typename T>
struct Transpose {
  Permute<T> p;
  int axis;  // the other one
};

template <typename T>
struct PermuteShared {
  T tile[kPermuteTile][kPermuteTile + 1];
};

template <typename T>
__global__ void __launch_bounds__(kPermuteThreads)
    transpose(const __grid_constant__ Transpose<T> transposed) {
  const Permute<T>& p = transposed.p;
  auto& shared = shared_memory<PermuteShared<T>>();
  const int axis = transposed.axis;
  const int64_t col_tiles = div_up(columns(p), kPermuteTile), row_tiles = div_up(p.size[axis], kPermuteTile);
  int64_t rest = block_index();
  const int64_t first_col = rest % col_tiles * kPermuteTile;
  rest /= col_tiles;
  const int64_t first_row = rest % row_tiles * kPermuteTile;
  rest /= row_tiles;
  const T* in = p.in + first_row * p.in_stride[axis] + first_col * p.in_stride[4];
  T* out = p.out + first_row * p.out_stride[axis] + first_col * p.out_stride[4];
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    if (d == axis) continue;
    in += rest % p.size[d] * p.in_stride[d];
    out += rest % p.size[d] * p.out_stride[d];
    rest /= p.size[d];
  }
  if (rest > 0) return;  // behind the last block
  const int lane = threadIdx.x % kPermuteTile, warp = threadIdx.x / kPermuteTile;
  const bool has_row = first_row + lane < p.size[axis], has_col = first_col + lane < columns(p);
#pragma unroll
  for (int i = warp; i < kPermuteTile; i += kPermuteRows) {
    if (has_row && first_col + i < p.size[4]) {
      shared.tile[i][lane] = in[lane * p.in_stride[axis] + i * p.in_stride[4]];
    } else {
      shared.tile[i][lane] = 0;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = warp; i < kPermuteTile; i += kPermuteRows) {
    if (has_col && first_row + i < p.size[axis]) {
      out[i * p.out_stride[axis] + lane * p.out_stride[4]] = shared.tile[lane][i];
    }
  }
}

// A thread to an element of out.
template <typename T>
__global__ void __launch_bounds__(kPermuteThreads) permute(const __grid_constant__ Permute<T> p) {
  int64_t rest = block_index() * kPermuteThreads + threadIdx.x;
  const int64_t last = rest % columns(p);
  rest /= columns(p);
  const T* in = p.in + last * p.in_stride[4];
  T* out = p.out + last * p.out_stride[4];
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    in += rest % p.size[d] * p.in_stride[d];
    out += rest % p.size[d] * p.out_stride[d];
    rest /= p.size[d];
  }
  if (rest == 0) *out = last < p.size[4] ? *in : T(0);
}

// A thread to a vector of pairs.
__global__ void __launch_bounds__(kPermuteThreads) pair_rows(const __grid_constant__ PairRows<float> p) {
  constexpr int kVector = kVectorLength<float>;
  const int64_t index = (block_index() * kPermuteThreads + threadIdx.x) * kVector;
  const int64_t task = index / (p.pairs * p.columns), at = index % (p.pairs * p.columns);
  if (task >= p.tasks) return;
  const float* const in = p.in + task * p.in_task + at / p.columns * 2 * p.columns + at % p.columns;
  const Vector<float, kVector> first = load_vector<kVector>(in),
                               second = load_vector<kVector>(in + p.columns);
  Vector<float, kVector> pairs;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    pairs.values[e] = __uint_as_float(bfloat16_pair(first.values[e], second.values[e]));
  }
  store_vector(p.out + task * p.out_task + at, pairs);
}

}  // namespace

template <typename T>
void launch(const Permute<T>& p, Stream stream) {
  const int64_t others = p.size[0] * p.size[1] * p.size[2] * p.size[3];
  if (others == 0 || columns(p) == 0) return;
  int axis = 0;
  for (int d = 1; d < 4; ++d) {
    const bool closer = p.in_stride[d] < p.in_stride[axis] || p.size[axis] == 1;
    if (p.size[d] > 1 && closer) axis = d;
  }
  const bool pays =
      p.in_stride[4] > p.in_stride[axis] && p.size[axis] >= kChannelBlock && p.size[4] >= kChannelBlock;
  if (pays) {
    const int64_t blocks =
        others / p.size[axis] * div_up(p.size[axis], kPermuteTile) * div_up(columns(p), kPermuteTile);
    launch_kernel({"transpose", grid_of(blocks), kPermuteThreads, sizeof(PermuteShared<T>), stream},
                  transpose<T>, Transpose<T>{p, axis});
    return;
  }
  launch_kernel(
      {"permute", grid_of(div_up(others * columns(p), kPermuteThreads)), kPermuteThreads, 0, stream},
      permute<T>, p);
}

template <typename T>
void launch(const PairRows<T>& p, Stream stream) {
  const int64_t vectors = p.tasks * p.pairs * p.columns / kVectorLength<T>;
  if (vectors == 0) return;
  launch_kernel({"pair_rows", grid_of(div_up(vectors, kPermuteThreads)), kPermuteThreads, 0, stream},
                pair_rows, p);
}

}  // namespace metafast::cuda
