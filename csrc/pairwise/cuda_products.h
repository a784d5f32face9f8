// What is left of a large comparison when a matrix product of the library does the arithmetic (large_cuda.h).
// The formulas and the rule by which squared distances are trusted to products are those of products.h. Part
// of cuda.cu.
#pragma once

#include "pairwise/cuda_tile.h"

namespace metafast::cuda {
namespace {

constexpr int kMeanThreads = 1024, kMeanWarps = kMeanThreads / kWarpSize;
constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kWarpSize;

template <typename T>
struct MeanShared {
  T sums[kMeanWarps][kWarpSize];
};

// A block to 32 features, a lane to each; every warp adds a slice of the rows, the first warp the slices.
template <typename T>
__global__ void __launch_bounds__(kMeanThreads) mean_row(MeanRow<T> p) {
  MeanShared<T>& shared = shared_memory<MeanShared<T>>();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t d = block_index() * kWarpSize + lane;
  T sum = 0;
  if (d < p.features) {
#pragma unroll 4
    for (int64_t j = warp; j < p.count; j += kMeanWarps) sum += p.rows[j * p.features + d];
  }
  shared.sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || d >= p.features) return;
  for (int slice = 1; slice < kMeanWarps; ++slice) sum += shared.sums[slice][lane];
  const T centre = sum / static_cast<T>(p.count);
  p.mean[d] = centre - centre == 0 ? centre : T(0);
}

// A warp to a row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) centre_rows(CentreRows<T> p) {
  const int64_t i = block_index() * kRowWarps + threadIdx.x / kWarpSize;
  if (i >= p.count) return;
  T squares = 0;
  for (int64_t d = threadIdx.x % kWarpSize; d < p.features; d += kWarpSize) {
    T value = p.rows[i * p.features + d];
    if (p.centre != nullptr) {
      value -= p.centre[d];
      p.centred[i * p.features + d] = value;
    }
    squares += value * value;
  }
  squares = warp_sum(squares);
  if (threadIdx.x % kWarpSize == 0) p.squares[i] = squares;
}

// A warp to a query; its lanes find the distances that products cannot be trusted with together.
template <class M, typename T>
__global__ void __launch_bounds__(kRowThreads) finish_products(FinishProducts<T> p) {
  const int64_t i = block_index() * kRowWarps + threadIdx.x / kWarpSize;
  if (i >= p.queries) return;
  const int lane = threadIdx.x % kWarpSize;
  const T x_square = p.x_squares[i], x_inverse = inverse_norm(x_square).inverse;
  T* const out = p.out + i * p.rows;
  for (int64_t first = 0; first < p.rows; first += kWarpSize) {
    const int64_t j = first + lane;
    const bool inside = j < p.rows;
    const T y_square = inside ? p.y_squares[j] : T(0);
    T result = inside ? -out[j] : T(0);
    if constexpr (M::kCosine) {
      result = 1 + x_inverse * inverse_norm(y_square).inverse * result;
    } else if constexpr (kHasRoot<M>) {
      const T scale = x_square + y_square;
      result = scale + 2 * result;
      unsigned cancelled = __ballot_sync(kFullWarp, inside && !(result >= T(kCancelled) * scale));
      for (; cancelled != 0; cancelled &= cancelled - 1) {
        const int owner = __ffs(static_cast<int>(cancelled)) - 1;
        const T* y = p.given_y + (first + owner) * p.features;
        T sum = 0;
        for (int64_t d = lane; d < p.features; d += kWarpSize) {
          sum += SquaredDifference::value(p.given_x[i * p.features + d], y[d]);
        }
        sum = warp_sum(sum);
        if (lane == owner) result = sum;
      }
      result = link<M>(p.metric, result);
    }
    if (inside) out[j] = result;
  }
}

}  // namespace

template <typename T>
void launch(const MeanRow<T>& p, Stream stream) {
  launch_kernel({"mean_row", grid_of(div_up(p.features, int64_t{kWarpSize})), kMeanThreads,
                 sizeof(MeanShared<T>), stream},
                mean_row<T>, p);
}

template <typename T>
void launch(const CentreRows<T>& p, Stream stream) {
  launch_kernel({"centre_rows", grid_of(div_up(p.count, int64_t{kRowWarps})), kRowThreads, 0, stream},
                centre_rows<T>, p);
}

template <typename T>
void launch(const FinishProducts<T>& p, Stream stream) {
  with_distance(p.metric, [&]<class M>() {
    launch_kernel({"finish_products", grid_of(div_up(p.queries, int64_t{kRowWarps})), kRowThreads, 0, stream},
                  finish_products<M, T>, p);
  });
}

}  // namespace metafast::cuda
