// Building blocks of the pairwise CUDA kernels: sums over features for tiles of pairs of rows. Part of
// cuda.cu.
//
// Rows are read straight from global memory. A tile's rows are shared by all its threads, so all but the
// first read hit L1, which serves aligned vectors as fast as shared memory does; what each thread keeps in
// registers (4 x 4 pairs, or the gradients of 8 rows) makes the reads as cheap as the arithmetic.
#pragma once

#include <stdexcept>

#include "common/cuda.h"
#include "pairwise/math.h"
#include "pairwise/params.h"

namespace metafast::cuda {
namespace {

// Consecutive rows of an array, of which the last stands in for those behind it, so that loads need no
// condition.
template <typename T>
struct Rows {
  const T* first;  // [count, features]
  int count;
  int64_t features;

  __device__ const T* operator[](int i) const { return first + (i < count ? i : count - 1) * features; }
};

template <typename T>
__device__ __forceinline__ Rows<T> rows_of(const T* array, int64_t begin, int64_t end, int64_t limit,
                                           int64_t features) {
  return {array + begin * features, static_cast<int>(min(end - begin, limit)), features};
}

template <typename T>
bool is_vectorized(const Pairs<T>& p) {
  return is_vectorizable<T>(p.x, p.features, p.x_task_stride) &&
         is_vectorizable<T>(p.y, p.features, p.y_task_stride) && is_vectorizable<T>(p.weight, 0, 0);
}

// Part `index` of `parts` of [0, count), in multiples of `quantum`.
struct Range {
  int64_t begin, end;

  __device__ Range(int64_t count, int64_t parts, int64_t index, int64_t quantum) {
    const int64_t size = div_up(div_up(count, parts), quantum) * quantum;
    begin = min(count, index * size);
    end = min(count, begin + size);
  }
};

// ---- metrics: which one a kernel is compiled for ----

template <class F>
void with_metric(Metric metric, F&& f) {
  switch (metric) {
    case Metric::sqeuclidean:
    case Metric::euclidean:
      return f.template operator()<SqEuclidean>();
    case Metric::cosine:
      return f.template operator()<Cosine>();
    case Metric::cityblock:
      return f.template operator()<CityBlock>();
    case Metric::dot:
      return f.template operator()<Dot>();
    case Metric::relation_relu:
      return f.template operator()<RelationRelu>();
    case Metric::relation_tanh:
      return f.template operator()<RelationTanh>();
  }
}

// Metrics that take a weight.
template <class F>
void with_weighted_metric(Metric metric, F&& f) {
  switch (metric) {
    case Metric::sqeuclidean:
      return f.template operator()<SqEuclidean>();
    case Metric::cityblock:
      return f.template operator()<CityBlock>();
    case Metric::relation_relu:
      return f.template operator()<RelationRelu>();
    case Metric::relation_tanh:
      return f.template operator()<RelationTanh>();
    default:
      throw std::invalid_argument("metafast: this metric takes no weight");
  }
}

// Metrics that class probabilities are made from.
template <class F>
void with_distance(Metric metric, F&& f) {
  switch (metric) {
    case Metric::sqeuclidean:
    case Metric::euclidean:
      return f.template operator()<SqEuclidean>();
    case Metric::cosine:
      return f.template operator()<Cosine>();
    case Metric::cityblock:
      return f.template operator()<CityBlock>();
    case Metric::dot:
      return f.template operator()<Dot>();
    default:
      throw std::invalid_argument("metafast: class probabilities need a distance");
  }
}

// SqEuclidean stands for euclidean as well: their kernels differ in the link alone, a few operations per
// pair.

template <class M>
constexpr bool kHasRoot = std::is_same_v<M, SqEuclidean>;
template <class M>
constexpr bool kIsLinear = std::is_same_v<typename M::Link, IdentityLink> && !kHasRoot<M>;

template <class M, typename T>
__device__ __forceinline__ T link(Metric metric, T sum) {
  if (kHasRoot<M> && metric == Metric::euclidean) return RootLink::forward(sum);
  return M::Link::forward(sum);
}

template <class M, typename T>
__device__ __forceinline__ T link_first(Metric metric, T out) {
  if (kHasRoot<M> && metric == Metric::euclidean) return RootLink::first(out);
  return M::Link::first(out);
}

template <class M, typename T>
__device__ __forceinline__ T link_second(Metric metric, T out) {
  if (kHasRoot<M> && metric == Metric::euclidean) return RootLink::second(out);
  return M::Link::second(out);
}

// ---- sums over features ----

constexpr int kMicro = 4;       // a micro-tile is 4 x 4 pairs
constexpr int kMicroLanes = 8;  // the lanes that share a micro-tile's features
constexpr int kMicroPairs = kMicro * kMicro;

// This lane's part of sum_d w_d value(x_d, y_d) for the pairs of rows i.. of x with rows j.. of y.
template <class Term, bool kWeighted, int kLength, typename T>
__device__ __forceinline__ void add_terms(const Rows<T>& x, int i, const Rows<T>& y, int j, const T* weight,
                                          T (&sums)[kMicroPairs]) {
  for (int64_t d = threadIdx.x % kMicroLanes * kLength; d < x.features; d += kMicroLanes * kLength) {
    Vector<T, kLength> xs[kMicro], ys[kMicro], w;
#pragma unroll
    for (int k = 0; k < kMicro; ++k) {
      xs[k] = load_vector<kLength>(x[i + k] + d);
      ys[k] = load_vector<kLength>(y[j + k] + d);
    }
    if constexpr (kWeighted) w = load_vector<kLength>(weight + d);
#pragma unroll
    for (int e = 0; e < kLength; ++e) {
#pragma unroll
      for (int pair = 0; pair < kMicroPairs; ++pair) {
        const T value = Term::value(xs[pair / kMicro].values[e], ys[pair % kMicro].values[e]);
        sums[pair] += kWeighted ? w.values[e] * value : value;
      }
    }
  }
}

// This lane's part of the tangents sum_d kDerivative w (u dx + v dy) + z value, x moving along u, y along v,
// the weight along z.
template <class Term, typename T>
__device__ __forceinline__ void add_tangents(const Rows<T>& x, const Rows<T>& u, int i, const Rows<T>& y,
                                             const Rows<T>& v, int j, const T* weight, const T* z,
                                             T (&sums)[kMicroPairs]) {
  for (int64_t d = threadIdx.x % kMicroLanes; d < x.features; d += kMicroLanes) {
    T xs[kMicro], us[kMicro], ys[kMicro], vs[kMicro];
#pragma unroll
    for (int k = 0; k < kMicro; ++k) {
      xs[k] = x[i + k][d];
      us[k] = u[i + k][d];
      ys[k] = y[j + k][d];
      vs[k] = v[j + k][d];
    }
    const T w = weight != nullptr ? weight[d] * Term::kDerivative : T(Term::kDerivative);
    const T weight_tangent = z != nullptr ? z[d] : T(0);
#pragma unroll
    for (int pair = 0; pair < kMicroPairs; ++pair) {
      const T a = xs[pair / kMicro], b = ys[pair % kMicro];
      sums[pair] += w * (us[pair / kMicro] * Term::dx(a, b) + vs[pair % kMicro] * Term::dy(a, b));
      if (z != nullptr) sums[pair] += weight_tangent * Term::value(a, b);
    }
  }
}

// Adds over the 8 lanes of a micro-tile; lane l is left with the totals of pairs 2l and 2l + 1 in sums[0] and
// sums[1].
template <int kOffset = kMicroLanes / 2, typename T>
__device__ __forceinline__ void reduce_scatter(T (&sums)[kMicroPairs]) {
  const bool upper = threadIdx.x & kOffset;
#pragma unroll
  for (int k = 0; k < 2 * kOffset; ++k) {
    const T low = sums[k], high = sums[k + 2 * kOffset];
    sums[k] = (upper ? high : low) + __shfl_xor_sync(kFullWarp, upper ? low : high, kOffset);
  }
  if constexpr (kOffset > 1) reduce_scatter<kOffset / 2>(sums);
}

// Calls store(i, j, sum) for each pair i < x_rows, j < y_rows, by one thread of the block each; add(i, j,
// sums) adds a lane's part of the sums of a micro-tile.
template <int kThreads, typename T, typename Add, typename Store>
__device__ __forceinline__ void for_each_pair(int x_rows, int y_rows, Add add, Store store) {
  const int columns = div_up(y_rows, kMicro), tiles = div_up(x_rows, kMicro) * columns;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  constexpr int kTilesPerWarp = kWarpSize / kMicroLanes;
  for (int first = warp * kTilesPerWarp; first < tiles; first += kThreads / kMicroLanes) {
    const int tile = first + lane / kMicroLanes;
    const int taken = tile < tiles ? tile : tiles - 1;  // all lanes take part in the shuffles
    const int i = taken / columns * kMicro, j = taken % columns * kMicro;
    T sums[kMicroPairs] = {};
    add(i, j, sums);
    reduce_scatter(sums);
    const int pair = lane % kMicroLanes * 2;
    const int x_row = i + pair / kMicro, y_row = j + pair % kMicro;
    if (tile >= tiles || x_row >= x_rows) continue;
    if (y_row < y_rows) store(x_row, y_row, sums[0]);
    if (y_row + 1 < y_rows) store(x_row, y_row + 1, sums[1]);
  }
}

// The sums of terms of all pairs. `vectorized`: every row begins at a multiple of 16 bytes.
template <int kThreads, class M, bool kWeighted, typename T, typename Store>
__device__ __forceinline__ void sum_terms(const Rows<T>& x, const Rows<T>& y, const T* weight,
                                          bool vectorized, Store store) {
  for_each_pair<kThreads, T>(
      x.count, y.count,
      [&](int i, int j, T(&sums)[kMicroPairs]) {
        if (vectorized) {
          add_terms<typename M::Term, kWeighted, kVectorLength<T>>(x, i, y, j, weight, sums);
        } else {
          add_terms<typename M::Term, kWeighted, 1>(x, i, y, j, weight, sums);
        }
      },
      store);
}

// ---- cosine: what it needs to know of each row ----

template <typename T>
struct RowNorms {
  T* inverse;  // as InverseNorm
  T* slope;
  T* inner;  // slope * <row, tangent>; only for second derivatives
};

template <typename T, int kCount>
struct alignas(16) NormArrays {
  T inverse[kCount], slope[kCount], inner[kCount];

  __device__ RowNorms<T> norms(bool with_tangent) { return {inverse, slope, with_tangent ? inner : nullptr}; }
};

// Fills the norms of the rows, a warp to a row; `tangent` is read where norms.inner is not null.
template <int kThreads, typename T>
__device__ __forceinline__ void fill_norms(const Rows<T>& rows, const Rows<T>& tangent,
                                           const RowNorms<T>& norms) {
  const int lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x / kWarpSize; i < rows.count; i += kThreads / kWarpSize) {
    T squares = 0, inner = 0;
    for (int64_t d = lane; d < rows.features; d += kWarpSize) {
      const T value = rows[i][d];
      squares += value * value;
      if (norms.inner != nullptr) inner += value * tangent[i][d];
    }
    const InverseNorm<T> norm = inverse_norm(warp_sum(squares));
    if (norms.inner != nullptr) inner = warp_sum(inner);
    if (lane != 0) continue;
    norms.inverse[i] = norm.inverse;
    norms.slope[i] = norm.slope;
    if (norms.inner != nullptr) norms.inner[i] = norm.slope * inner;
  }
}

// The comparison's value and its tangent, from their sums over features.
template <class M, typename T>
__device__ __forceinline__ T finish_value(Metric metric, T sum, T bias, const RowNorms<T>& x, int i,
                                          const RowNorms<T>& y, int j) {
  if constexpr (M::kCosine) return 1 + x.inverse[i] * y.inverse[j] * sum;
  return link<M>(metric, sum + bias);
}

template <class M, typename T>
__device__ __forceinline__ T finish_tangent(Metric metric, T out, T sum, T bias, const RowNorms<T>& x, int i,
                                            const RowNorms<T>& y, int j) {
  if constexpr (M::kCosine) {
    return cosine_tangent(out, x.inverse[i] * y.inverse[j], sum, x.inner[i], y.inner[j]);
  }
  return link_first<M>(metric, out) * (sum + bias);
}

}  // namespace

}  // namespace metafast::cuda
