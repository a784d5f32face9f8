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

// The gradient of a pair's product or, with `cancelled`, of its difference; and what it adds to the factors
// of its own rows.
template <typename T>
struct PairFactor {
  T factor = 0, of_x = 0, of_y = 0;
  bool cancelled = false;
};

template <class M, typename T>
__device__ __forceinline__ PairFactor<T> product_factor(const ProductFactors<T>& p, int64_t i, int64_t j) {
  const T distance = p.out[i * p.rows + j], grad = p.grad[i * p.rows + j];
  PairFactor<T> pair;
  if constexpr (M::kCosine) {
    const InverseNorm<T> x = inverse_norm(p.x_squares[i]), y = inverse_norm(p.y_squares[j]);
    pair.factor = grad * x.inverse * y.inverse;
    pair.of_x = grad * (1 - distance) * x.slope;
    pair.of_y = grad * (1 - distance) * y.slope;
  } else if constexpr (kHasRoot<M>) {
    const T square = p.metric == Metric::euclidean ? distance * distance : distance;
    pair.factor = grad * link_first<M>(p.metric, distance) * T(M::Term::kDerivative);
    pair.cancelled = !(square >= T(kCancelled) * (p.x_squares[i] + p.y_squares[j]));
    if (!pair.cancelled) pair.of_x = pair.of_y = pair.factor;
  } else {
    pair.factor = grad;
  }
  return pair;
}

// grad [D] += factor (row - other), by a warp whose lanes keep to features of their own.
template <typename T>
__device__ __forceinline__ void add_difference(T factor, const T* row, const T* other, int64_t features,
                                               T* grad) {
  for (int64_t d = threadIdx.x % kWarpSize; d < features; d += kWarpSize)
    grad[d] += factor * (row[d] - other[d]);
}

// A warp to a query: its factors, and what its own gradient has besides the product.
template <class M, typename T>
__global__ void __launch_bounds__(kRowThreads) query_factors(ProductFactors<T> p) {
  const int64_t i = block_index() * kRowWarps + threadIdx.x / kWarpSize;
  if (i >= p.queries) return;
  const int lane = threadIdx.x % kWarpSize;
  T* const grad = p.grad_x + i * p.features;
  for (int64_t d = lane; d < p.features; d += kWarpSize) grad[d] = 0;
  T of_x = 0;
  for (int64_t first = 0; first < p.rows; first += kWarpSize) {
    const int64_t j = first + lane;
    PairFactor<T> pair;
    if (j < p.rows) {
      pair = product_factor<M>(p, i, j);
      p.factors[i * p.rows + j] = pair.cancelled ? T(0) : pair.factor;
    }
    of_x += pair.of_x;
    if constexpr (kHasRoot<M>) {
      unsigned cancelled = __ballot_sync(kFullWarp, pair.cancelled);
      for (; cancelled != 0; cancelled &= cancelled - 1) {
        const int owner = __ffs(static_cast<int>(cancelled)) - 1;
        add_difference(__shfl_sync(kFullWarp, pair.factor, owner), p.given_x + i * p.features,
                       p.given_y + (first + owner) * p.features, p.features, grad);
      }
    }
  }
  of_x = warp_sum(of_x);
  for (int64_t d = lane; d < p.features; d += kWarpSize) grad[d] += of_x * p.x[i * p.features + d];
}

constexpr int kBatch = 1024;  // queries whose cancelled pairs a block notes at a time

template <typename T>
struct RowShared {
  unsigned cancelled[kBatch];  // a bit for each row of the block
  T sums[kMeanWarps][kWarpSize];
};

// A block to 32 rows of y, the sums of their factors and what their gradients have besides the product. Each
// warp takes every 32nd query, a lane to a row; then a warp adds the differences of a row of its own, in the
// order of the queries.
template <class M, typename T>
__global__ void __launch_bounds__(kMeanThreads) row_factors(ProductFactors<T> p) {
  static_assert(kMeanWarps == kWarpSize, "a warp for each row of a block");
  RowShared<T>& shared = shared_memory<RowShared<T>>();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t first = block_index() * kWarpSize, j = first + lane, own = first + warp;
  [[maybe_unused]] constexpr int kUnroll =
      M::kCosine && sizeof(T) == sizeof(double) ? 1 : 4;  // as registers allow
  T of_y = 0;
  for (int64_t start = 0; start < p.queries; start += kBatch) {
    const int count = static_cast<int>(min(p.queries - start, static_cast<int64_t>(kBatch)));
#pragma unroll kUnroll
    for (int i = warp; i < count; i += kMeanWarps) {
      PairFactor<T> pair;
      if (j < p.rows) pair = product_factor<M>(p, start + i, j);
      of_y += pair.of_y;
      if constexpr (kHasRoot<M>) {
        const unsigned cancelled = __ballot_sync(kFullWarp, pair.cancelled);
        if (lane == 0) shared.cancelled[i] = cancelled;
      }
    }
    if constexpr (kHasRoot<M>) {
      __syncthreads();
      for (int i = 0; i < count; i += kWarpSize) {
        const bool mine = i + lane < count && (shared.cancelled[i + lane] >> warp & 1u) != 0;
        unsigned queries = __ballot_sync(kFullWarp, mine);
        for (; queries != 0; queries &= queries - 1) {
          const int64_t query = start + i + __ffs(static_cast<int>(queries)) - 1;
          add_difference(product_factor<M>(p, query, own).factor, p.given_y + own * p.features,
                         p.given_x + query * p.features, p.features, p.grad_y + own * p.features);
        }
      }
      __syncthreads();
    }
  }
  shared.sums[warp][lane] = of_y;
  __syncthreads();
  if (warp != 0 || j >= p.rows) return;
  for (int other = 1; other < kMeanWarps; ++other) of_y += shared.sums[other][lane];
  p.y_factors[j] += of_y;
}

// A warp to a row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) add_scaled_rows(AddScaledRows<T> p) {
  const int64_t i = block_index() * kRowWarps + threadIdx.x / kWarpSize;
  if (i >= p.count) return;
  for (int64_t d = threadIdx.x % kWarpSize; d < p.features; d += kWarpSize)
    p.out[i * p.features + d] += p.factors[i] * p.rows[i * p.features + d];
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

template <typename T>
void launch(const ProductFactors<T>& p, Stream stream) {
  with_distance(p.metric, [&]<class M>() {
    launch_kernel({"query_factors", grid_of(div_up(p.queries, int64_t{kRowWarps})), kRowThreads, 0, stream},
                  query_factors<M, T>, p);
    if constexpr (M::kCosine || kHasRoot<M>) {
      launch_kernel({"row_factors", grid_of(div_up(p.rows, int64_t{kWarpSize})), kMeanThreads,
                     sizeof(RowShared<T>), stream},
                    row_factors<M, T>, p);
    }
  });
}

template <typename T>
void launch(const AddScaledRows<T>& p, Stream stream) {
  launch_kernel({"add_scaled_rows", grid_of(div_up(p.count, int64_t{kRowWarps})), kRowThreads, 0, stream},
                add_scaled_rows<T>, p);
}

}  // namespace metafast::cuda
