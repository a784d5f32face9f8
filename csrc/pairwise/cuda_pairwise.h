// The comparison of rows alone: kernels that look like matrix products, for values (contracted over
// features), for gradients of x (over rows) and for gradients of y (over queries). Part of cuda.cu.
#pragma once

#include <algorithm>

#include "pairwise/cuda_gradient.h"

namespace metafast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// ---- pairwise: values and tangents ----

constexpr int kMaxXTile = 128, kMaxYTile = 32;

template <class Params>
struct PairTiles {
  Params params;
  int x_tile, y_tile;
  bool vectorized;

  __host__ __device__ int64_t x_tiles() const { return div_up(params.queries, static_cast<int64_t>(x_tile)); }
  __host__ __device__ int64_t y_tiles() const { return div_up(params.rows, static_cast<int64_t>(y_tile)); }
  __host__ __device__ int64_t blocks() const { return params.tasks * x_tiles() * y_tiles(); }
};

template <class Params>
PairTiles<Params> pair_tiles(const Params& p) {
  constexpr int64_t kPairs = 1024;            // per block: two micro-tiles for each of its 32 groups of lanes
  constexpr int64_t kEnoughBlocks = 4 * 132;  // to fill the largest GPU of today
  PairTiles<Params> tiles{p, 0, 0, is_vectorized(p)};
  tiles.y_tile = static_cast<int>(std::clamp<int64_t>(div_up(p.rows, kMicro) * kMicro, kMicro, kMaxYTile));
  tiles.x_tile = static_cast<int>(std::min<int64_t>(kPairs / tiles.y_tile / kMicro * kMicro, kMaxXTile));
  while (tiles.x_tile > 4 * kMicro && tiles.blocks() < kEnoughBlocks)
    tiles.x_tile = tiles.x_tile / 2 / kMicro * kMicro;
  return tiles;
}

template <typename T>
struct PairShared {
  NormArrays<T, kMaxXTile> x;
  NormArrays<T, kMaxYTile> y;
};

// Where a block's tile lies.
template <class Params>
struct PairTile {
  int64_t task, q, j;

  __device__ PairTile(const PairTiles<Params>& tiles, int64_t block)
      : task(block / tiles.y_tiles() / tiles.x_tiles()),
        q(block / tiles.y_tiles() % tiles.x_tiles() * tiles.x_tile),
        j(block % tiles.y_tiles() * tiles.y_tile) {}
};

template <class M, bool kWeighted, typename T>
__global__ void __launch_bounds__(kThreads, 1) pairwise(PairTiles<Pairwise<T>> tiles) {
  const Pairwise<T>& p = tiles.params;
  if (block_index() >= tiles.blocks()) return;
  const PairTile<Pairwise<T>> tile(tiles, block_index());
  const Rows<T> x = rows_of(p.x + tile.task * p.x_task_stride, tile.q, p.queries, tiles.x_tile, p.features);
  const Rows<T> y = rows_of(p.y + tile.task * p.y_task_stride, tile.j, p.rows, tiles.y_tile, p.features);
  RowNorms<T> x_norms{}, y_norms{};
  if constexpr (M::kCosine) {
    PairShared<T>& shared = shared_memory<PairShared<T>>();
    x_norms = shared.x.norms(false);
    y_norms = shared.y.norms(false);
    fill_norms<kThreads>(x, {}, x_norms);
    fill_norms<kThreads>(y, {}, y_norms);
    __syncthreads();
  }
  const T bias = p.bias != nullptr ? *p.bias : T(0);
  T* out = p.out + (tile.task * p.queries + tile.q) * p.rows + tile.j;
  sum_terms<kThreads, M, kWeighted>(x, y, p.weight, tiles.vectorized, [&](int i, int j, T sum) {
    out[i * p.rows + j] = finish_value<M>(p.metric, sum, bias, x_norms, i, y_norms, j);
  });
}

template <class M, typename T>
__global__ void __launch_bounds__(kThreads, 1) pairwise_tangents(PairTiles<PairwiseDoubleBackward<T>> tiles) {
  const PairwiseDoubleBackward<T>& p = tiles.params;
  if (block_index() >= tiles.blocks()) return;
  const PairTile<PairwiseDoubleBackward<T>> tile(tiles, block_index());
  const Rows<T> x = rows_of(p.x + tile.task * p.x_task_stride, tile.q, p.queries, tiles.x_tile, p.features);
  const Rows<T> y = rows_of(p.y + tile.task * p.y_task_stride, tile.j, p.rows, tiles.y_tile, p.features);
  const Rows<T> u =
      rows_of(p.gg_x + tile.task * p.queries * p.features, tile.q, p.queries, tiles.x_tile, p.features);
  const Rows<T> v =
      rows_of(p.gg_y + tile.task * p.rows * p.features, tile.j, p.rows, tiles.y_tile, p.features);
  RowNorms<T> x_norms{}, y_norms{};
  if constexpr (M::kCosine) {
    PairShared<T>& shared = shared_memory<PairShared<T>>();
    x_norms = shared.x.norms(true);
    y_norms = shared.y.norms(true);
    fill_norms<kThreads>(x, u, x_norms);
    fill_norms<kThreads>(y, v, y_norms);
    __syncthreads();
  }
  const T bias = p.gg_bias != nullptr ? *p.gg_bias : T(0);
  const int64_t first = (tile.task * p.queries + tile.q) * p.rows + tile.j;
  for_each_pair<kThreads, T>(
      x.count, y.count,
      [&](int i, int j, T(&sums)[kMicroPairs]) {
        add_tangents<typename M::Term>(x, u, i, y, v, j, p.weight, p.gg_weight, sums);
      },
      [&](int i, int j, T sum) {
        const int64_t pair = first + i * p.rows + j;
        p.grad_grad[pair] = finish_tangent<M>(p.metric, p.out[pair], sum, bias, x_norms, i, y_norms, j);
      });
}

// ---- pairwise: gradients ----

constexpr int kSelfTile = 32, kOtherTile = 32;
template <bool kSecond>
constexpr int kFeatureTile = kThreads / (kSelfTile / kSelves<kSecond>);
constexpr int kPitch = kSelfTile + 4;  // of the factors; spreads the columns over the banks

template <typename T>
constexpr bool kIsSecond = false;
template <typename T>
constexpr bool kIsSecond<PairwiseDoubleBackward<T>> = true;

// A task's rows [Q, D] and [J, D], and in the double backward their tangents and the weight's.
template <class Params, typename T>
struct TaskArrays {
  const T *x, *y;
  const T *x_tangent = nullptr, *y_tangent = nullptr, *weight_tangent = nullptr;

  __device__ TaskArrays(const Params& p, int64_t task)
      : x(p.x + task * p.x_task_stride), y(p.y + task * p.y_task_stride) {
    if constexpr (kIsSecond<Params>) {
      x_tangent = p.gg_x + task * p.queries * p.features;
      y_tangent = p.gg_y + task * p.rows * p.features;
      weight_tangent = p.gg_weight;
    }
  }
};

// The factors of pair `pair` = (task, query, row), query i and row j of their norms.
template <class M, typename T>
__device__ __forceinline__ void pair_factors(const PairwiseBackward<T>& p, int64_t pair, const RowNorms<T>& x,
                                             int i, const RowNorms<T>& y, int j,
                                             T (&factors)[kFactors<M, false>]) {
  const T out = kIsLinear<M> && !M::kCosine ? T(0) : p.out[pair];
  first_factors<M>(p.metric, p.grad[pair], out, x, i, y, j, factors);
}

template <class M, typename T>
__device__ __forceinline__ void pair_factors(const PairwiseDoubleBackward<T>& p, int64_t pair,
                                             const RowNorms<T>& x, int i, const RowNorms<T>& y, int j,
                                             T (&factors)[kFactors<M, true>]) {
  const bool linear = kIsLinear<M> && !M::kCosine;
  second_factors<M>(p.metric, p.grad[pair], T(0), linear ? T(0) : p.out[pair],
                    linear ? T(0) : p.grad_grad[pair], x, i, y, j, factors);
}

template <typename T, int kPlanes>
struct GradientShared {
  alignas(16) T factors[kPlanes][kOtherTile][kPitch];
  NormArrays<T, kSelfTile> self;
  NormArrays<T, kOtherTile> other;
};

// Blocks of the gradient kernel: tasks x parts x tiles of own rows x tiles of features. For gradients of y
// there is a part for each chunk of queries; those of x have one part.
template <class Params, bool kOfY>
struct GradientTiles {
  Params params;

  __host__ __device__ int64_t parts() const { return kOfY ? params.chunks : 1; }
  __host__ __device__ int64_t selves() const { return kOfY ? params.rows : params.queries; }
  __host__ __device__ int64_t self_tiles() const { return div_up(selves(), static_cast<int64_t>(kSelfTile)); }
  __host__ __device__ int64_t feature_tiles() const {
    return div_up(params.features, static_cast<int64_t>(kFeatureTile<kIsSecond<Params>>));
  }
  __host__ __device__ int64_t blocks() const {
    return params.tasks * parts() * self_tiles() * feature_tiles();
  }
};

template <class M, bool kOfY, class Params, typename T>
__global__ void __launch_bounds__(kThreads, 1) pairwise_gradient(GradientTiles<Params, kOfY> tiles) {
  constexpr bool kSecond = kIsSecond<Params>;
  constexpr int kPlanes = kFactors<M, kSecond>;
  const Params& p = tiles.params;
  int64_t block = block_index();
  if (block >= tiles.blocks()) return;
  const int64_t feature_tile = block % tiles.feature_tiles();
  block /= tiles.feature_tiles();
  const int64_t first = block % tiles.self_tiles() * kSelfTile;
  block /= tiles.self_tiles();
  const int64_t part = block % tiles.parts(), task = block / tiles.parts();

  const int64_t others = kOfY ? p.queries : p.rows;
  const TaskArrays<Params, T> arrays(p, task);
  const Rows<T> self = rows_of(kOfY ? arrays.y : arrays.x, first, tiles.selves(), kSelfTile, p.features);
  const Rows<T> self_tangent =
      rows_of(kOfY ? arrays.y_tangent : arrays.x_tangent, first, tiles.selves(), kSelfTile, p.features);

  GradientShared<T, kPlanes>& shared = shared_memory<GradientShared<T, kPlanes>>();
  const RowNorms<T> self_norms = shared.self.norms(kSecond), other_norms = shared.other.norms(kSecond);
  if constexpr (M::kCosine) fill_norms<kThreads>(self, self_tangent, self_norms);

  const int64_t d = feature_tile * kFeatureTile<kSecond> + threadIdx.x % kFeatureTile<kSecond>;
  const int64_t column = min(d, p.features - 1);
  const int own = threadIdx.x / kFeatureTile<kSecond> * kSelves<kSecond>;
  const FeatureWeight<T> weight(p.weight, arrays.weight_tangent, column);
  FeatureGradient<M, kSecond, kOfY, T> grads[kSelves<kSecond>];
#pragma unroll
  for (int i = 0; i < kSelves<kSecond>; ++i)
    grads[i] = {self[own + i][column], kSecond ? self_tangent[own + i][column] : T(0)};

  const Range range(others, tiles.parts(), part, kOtherTile);
  for (int64_t start = range.begin; start < range.end; start += kOtherTile) {
    const Rows<T> other = rows_of(kOfY ? arrays.x : arrays.y, start, range.end, kOtherTile, p.features);
    const Rows<T> other_tangent =
        rows_of(kOfY ? arrays.x_tangent : arrays.y_tangent, start, range.end, kOtherTile, p.features);
    __syncthreads();
    if constexpr (M::kCosine) {
      fill_norms<kThreads>(other, other_tangent, other_norms);
      __syncthreads();
    }
    // Consecutive threads take consecutive rows y, which lie side by side in [Q, J].
    for (int k = threadIdx.x; k < kSelfTile * kOtherTile; k += kThreads) {
      const int s = kOfY ? k % kSelfTile : k / kOtherTile, o = kOfY ? k / kSelfTile : k % kOtherTile;
      T factors[kPlanes] = {};
      if (s < self.count && o < other.count) {
        const int64_t q = kOfY ? start + o : first + s, j = kOfY ? first + s : start + o;
        pair_factors<M>(p, (task * p.queries + q) * p.rows + j, kOfY ? other_norms : self_norms, kOfY ? o : s,
                        kOfY ? self_norms : other_norms, kOfY ? s : o, factors);
      }
#pragma unroll
      for (int f = 0; f < kPlanes; ++f) shared.factors[f][o][s] = factors[f];
    }
    __syncthreads();
    add_others<false>(grads, FactorPlanes<T>{&shared.factors[0][0][0], kOtherTile * kPitch, kPitch}, own,
                      other, other_tangent, column, weight);
  }

  if constexpr (M::kCosine) __syncthreads();  // the norms, where there are no others
  if (d >= p.features) return;
  T* const out = (kOfY ? p.grad_y + (task * p.chunks + part) * p.rows * p.features
                       : p.grad_x + task * p.queries * p.features) +
                 first * p.features + d;
#pragma unroll
  for (int i = 0; i < kSelves<kSecond>; ++i) {
    if (own + i < self.count) out[(own + i) * p.features] = grads[i].total(weight, self_norms, own + i);
  }
}

// ---- pairwise: gradients of weight and bias ----

template <typename T, int kPlanes, bool kSecond>
struct WeightShared {
  alignas(16) T factors[kPlanes][kOtherTile][kPitch];  // [row][query]
  T parts[kSelfTile / kSelves<kSecond>][kFeatureTile<kSecond>];
  T warps[kWarps];
};

// Blocks: tasks x chunks x tiles of features. A thread sums one feature over some of each tile's
// queries.
template <class Params>
struct WeightTiles {
  Params params;

  __host__ __device__ int64_t feature_tiles() const {  // at least one, for the bias
    const int64_t tiles = div_up(params.features, static_cast<int64_t>(kFeatureTile<kIsSecond<Params>>));
    return tiles > 0 ? tiles : 1;
  }
  __host__ __device__ int64_t blocks() const { return params.tasks * params.chunks * feature_tiles(); }
};

template <class M, class Params, typename T>
__global__ void __launch_bounds__(kThreads, 1) pairwise_weight_gradient(WeightTiles<Params> tiles) {
  using Term = typename M::Term;
  constexpr bool kSecond = kIsSecond<Params>;
  constexpr int kPlanes = kFactors<M, kSecond>;
  constexpr T kScale = T(1) / Term::kDerivative;
  const Params& p = tiles.params;
  if (block_index() >= tiles.blocks()) return;
  const int64_t feature_tile = block_index() % tiles.feature_tiles(),
                chunk = block_index() / tiles.feature_tiles();
  const int64_t task = chunk / p.chunks;
  const TaskArrays<Params, T> arrays(p, task);
  WeightShared<T, kPlanes, kSecond>& shared = shared_memory<WeightShared<T, kPlanes, kSecond>>();

  const int64_t d = feature_tile * kFeatureTile<kSecond> + threadIdx.x % kFeatureTile<kSecond>;
  const int own = threadIdx.x / kFeatureTile<kSecond> * kSelves<kSecond>;
  T grad = 0, bias = 0;
  const Range range(p.queries, p.chunks, chunk % p.chunks, kSelfTile);
  for (int64_t q = range.begin; q < range.end; q += kSelfTile) {
    const int queries = static_cast<int>(min(range.end - q, static_cast<int64_t>(kSelfTile)));
    for (int64_t j = 0; j < p.rows; j += kOtherTile) {
      const int rows = static_cast<int>(min(p.rows - j, static_cast<int64_t>(kOtherTile)));
      __syncthreads();
      for (int k = threadIdx.x; k < kSelfTile * kOtherTile; k += kThreads) {
        const int i = k / kOtherTile, r = k % kOtherTile;
        T factors[kPlanes] = {};
        if (i < queries && r < rows) {
          pair_factors<M>(p, (task * p.queries + q + i) * p.rows + j + r, RowNorms<T>{}, i, RowNorms<T>{}, r,
                          factors);
        }
        bias += kScale * factors[kPlanes - 1];
#pragma unroll
        for (int f = 0; f < kPlanes; ++f) shared.factors[f][r][i] = factors[f];
      }
      __syncthreads();
      if (d >= p.features) continue;
      for (int r = 0; r < rows; ++r) {
        const T row = arrays.y[(j + r) * p.features + d];
        const T row_tangent = kSecond ? arrays.y_tangent[(j + r) * p.features + d] : T(0);
#pragma unroll
        for (int i = own; i < own + kSelves<kSecond>; ++i) {
          if (i >= queries) continue;
          const T query = arrays.x[(q + i) * p.features + d];
          grad += kScale * shared.factors[kPlanes - 1][r][i] * Term::value(query, row);
          if constexpr (kSecond) {
            const T query_tangent = arrays.x_tangent[(q + i) * p.features + d];
            grad += shared.factors[0][r][i] *
                    (query_tangent * Term::dx(query, row) + row_tangent * Term::dy(query, row));
          }
        }
      }
    }
  }

  shared.parts[own / kSelves<kSecond>][threadIdx.x % kFeatureTile<kSecond>] = grad;
  bias = block_sum(bias, shared.warps);
  if (threadIdx.x == 0 && feature_tile == 0 && p.grad_bias != nullptr) p.grad_bias[chunk] = bias;
  if (own != 0 || d >= p.features || p.grad_weight == nullptr) return;
  grad = 0;
#pragma unroll
  for (int part = 0; part < kSelfTile / kSelves<kSecond>; ++part) grad += shared.parts[part][threadIdx.x];
  p.grad_weight[chunk * p.features + d] = grad;
}

template <bool kOfY, class Params, typename T>
void launch_gradient(const Params& p, Stream stream) {
  const GradientTiles<Params, kOfY> tiles{p};
  with_metric(p.metric, [&]<class M>() {
    constexpr std::size_t kShared = sizeof(GradientShared<T, kFactors<M, kIsSecond<Params>>>);
    launch_kernel({"pairwise_gradient", grid_of(tiles.blocks()), kThreads, kShared, stream},
                  pairwise_gradient<M, kOfY, Params, T>, tiles);
  });
}

template <class Params, typename T>
void launch_gradients(const Params& p, Stream stream) {
  launch_gradient<false, Params, T>(p, stream);
  launch_gradient<true, Params, T>(p, stream);
  if (p.grad_weight == nullptr && p.grad_bias == nullptr) return;
  const WeightTiles<Params> tiles{p};
  with_weighted_metric(p.metric, [&]<class M>() {
    constexpr std::size_t kShared =
        sizeof(WeightShared<T, kFactors<M, kIsSecond<Params>>, kIsSecond<Params>>);
    launch_kernel({"pairwise_weight_gradient", grid_of(tiles.blocks()), kThreads, kShared, stream},
                  pairwise_weight_gradient<M, Params, T>, tiles);
  });
}

}  // namespace

template <typename T>
void launch(const Pairwise<T>& p, Stream stream) {
  const PairTiles<Pairwise<T>> tiles = pair_tiles(p);
  const auto run = [&](auto kernel, std::size_t shared_bytes) {
    launch_kernel({"pairwise", grid_of(tiles.blocks()), kThreads, shared_bytes, stream}, kernel, tiles);
  };
  if (p.weight != nullptr) {
    with_weighted_metric(p.metric, [&]<class M>() { run(pairwise<M, true, T>, 0); });
  } else {
    with_distance(p.metric,
                  [&]<class M>() { run(pairwise<M, false, T>, M::kCosine ? sizeof(PairShared<T>) : 0); });
  }
}

template <typename T>
void launch(const PairwiseBackward<T>& p, Stream stream) {
  launch_gradients<PairwiseBackward<T>, T>(p, stream);
}

template <typename T>
void launch(const PairwiseDoubleBackward<T>& p, Stream stream) {
  const PairTiles<PairwiseDoubleBackward<T>> tiles = pair_tiles(p);
  with_metric(p.metric, [&]<class M>() {
    launch_kernel({"pairwise_tangents", grid_of(tiles.blocks()), kThreads,
                   M::kCosine ? sizeof(PairShared<T>) : 0, stream},
                  pairwise_tangents<M, T>, tiles);
  });
  launch_gradients<PairwiseDoubleBackward<T>, T>(p, stream);
}

}  // namespace metafast::cuda
