// Class probabilities, their losses and first gradients. Part of cuda.cu.
#pragma once

#include "pairwise/cuda_episode.h"
#include "pairwise/cuda_gradient.h"

namespace metafast::cuda {
namespace {

template <class Params>
struct EpisodeLaunch {
  Params params;
  EpisodePlan plan;
  EpisodeShared shared;
  int64_t blocks;

  // A task without queries has one too, which finds its prototypes.
  __host__ __device__ int64_t tiles() const {
    const int64_t tiles = div_up(params.queries, static_cast<int64_t>(plan.tile));
    return tiles > 0 ? tiles : 1;
  }
};

// By one of the threads of a query: its negative log-likelihood, 0 where it is ignored.
template <class M, typename T>
__device__ __forceinline__ T query_nll(const EpisodeTile<M, T>& tile, const QueryLogits<T>& logits,
                                       int64_t label) {
  check_label(label, tile.ways());
  return logits.label >= 0 ? logits.log_all - logits.log_own : T(0);
}

// What the CPU checks before it starts, a block can check of its task alone.
template <typename T>
__device__ __forceinline__ void check_rows(const Classes<T>& p, int64_t task, const int64_t* labels,
                                           int64_t count) {
  const int64_t ways = ways_of(p.ways, p.way, task);
  check_ways(ways, p.way);
  for (int64_t i = threadIdx.x; labels != nullptr && i < count; i += blockDim.x) {
    check_label(labels[task * count + i], ways);
  }
  if (p.row_labels == nullptr) return;  // prototypes: their members are counted where they are averaged
  for (int64_t n = threadIdx.x / kWarpSize; n < ways; n += blockDim.x / kWarpSize) {
    check_members(for_each_member(labels + task * count, count, n, [](int64_t) {}));
  }
}

// Two sums over the block, on its first thread.
__device__ __forceinline__ void sum_block(double& a, double& b, double* scratch) {
  a = warp_sum(a);
  b = warp_sum(b);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) {
    scratch[threadIdx.x / kWarpSize * 2] = a;
    scratch[threadIdx.x / kWarpSize * 2 + 1] = b;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
    a += scratch[warp * 2];
    b += scratch[warp * 2 + 1];
  }
}

// From each thread's sum and number of valid queries to the loss: the last block to come adds up what all
// have left, in the order of the blocks.
template <typename T>
__device__ __forceinline__ void finish_loss(const TotalLoss<T>& total, double sum, double valid,
                                            double* scratch) {
  const int64_t blocks = static_cast<int64_t>(gridDim.x) * gridDim.y;
  sum_block(sum, valid, scratch);
  if (threadIdx.x == 0) {
    total.partial[block_index() * 2] = sum;
    total.partial[block_index() * 2 + 1] = valid;
  }
  if (!is_last_block(total.counter, blocks)) return;
  sum = valid = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) {
    sum += __ldcg(total.partial + i * 2);
    valid += __ldcg(total.partial + i * 2 + 1);
  }
  sum_block(sum, valid, scratch);
  if (threadIdx.x != 0) return;
  *total.valid = static_cast<T>(valid);
  *total.loss = static_cast<T>(total.mean ? sum / valid : sum);
}

// A block to a tile of a task's queries.
template <class M, typename T>
__global__ void __launch_bounds__(kMostThreads, kLeastBlocks<T>) classify(EpisodeLaunch<Classify<T>> k) {
  const Classify<T>& p = k.params;
  double sum = 0, valid = 0;
  if (block_index() < k.blocks) {
    const int64_t task = block_index() / k.tiles(), begin = block_index() % k.tiles() * k.plan.tile;
    const int count = static_cast<int>(min(p.queries - begin, static_cast<int64_t>(k.plan.tile)));
    EpisodeTile<M, T> tile(p, k.plan, k.shared, task);
    tile.find_distances(begin, count, p.means, begin == 0, [&] {
      tile.find_row_classes();
      if (k.plan.mask_words > 0) tile.find_members(p.means);
      if (begin == 0)
        check_rows(p, task, p.means.support != nullptr ? p.means.labels : p.row_labels,
                   p.means.support != nullptr ? p.means.shots : p.rows);
    });
    tile.for_each_query(count, [&](int q, bool there) {
      const int64_t query = task * p.queries + begin + q;
      const QueryLogits<T> logits = tile.logits(q, tile.label_of(begin + q, there));
      if (!there) return;
      if (p.query_labels == nullptr) {
        for (int64_t n = tile.lane(); n < p.way; n += k.plan.lanes) {
          p.log_probs[query * p.way + n] = n < tile.ways()
                                               ? tile.class_log_sum(q, n, logits.top) - logits.log_all
                                               : -std::numeric_limits<T>::infinity();
        }
      } else if (tile.lane() == 0) {
        const int64_t label = p.query_labels[query];
        const T nll = query_nll(tile, logits, label);
        if (p.nll != nullptr) p.nll[query] = nll;
        sum += nll;
        valid += label != kIgnoreLabel;
      }
    });
  }
  if (p.total.loss != nullptr) finish_loss(p.total, sum, valid, EpisodeShared::at<double>(k.shared.warps));
}

// ---- gradients ----

// Replaces the distances of a tile by the factors of their gradients.
template <class M, typename T>
__device__ __forceinline__ void set_factors(const Classes<T>& p, const LossGradient<T>& grad,
                                            const EpisodePlan& plan, const EpisodeShared& shared,
                                            const EpisodeTile<M, T>& tile, int64_t task, int64_t begin,
                                            int count) {
  constexpr int kPlanes = kFactors<M, false>, kLength = kVectorLength<T>;
  tile.for_each_query(count, [&](int q, bool there) {
    const QueryLogits<T> logits = tile.logits(q, tile.label_of(begin + q, there));
    const T* of_query = grad.grad + (task * p.queries + begin + q) * grad.query_stride;
    const bool of_classes = p.query_labels == nullptr;
    T* const class_log = plan.per_class ? EpisodeShared::at<T>(shared.class_log) + q * p.way : nullptr;
    T grad_sum = 0;  // over the classes
    if (of_classes && there) {
      for (int64_t n = tile.lane(); n < tile.ways(); n += plan.lanes) {
        grad_sum += of_query[n];
        if (class_log != nullptr) class_log[n] = tile.class_log_sum(q, n, logits.top);
      }
    } else if (logits.label >= 0 && tile.lane() == 0) {
      grad_sum = grad.grad != nullptr ? -*of_query : T(-1);
      if (grad.divisor != nullptr) grad_sum /= *grad.divisor;
    }
    grad_sum = tile.over_lanes(grad_sum, Sum<T>{});
    __syncwarp();  // class_log

    T of_own = 0;  // what cosine adds to the query's gradient, as a multiple of the query
    tile.for_each_vector(q, [&](int first, const auto& distances, const auto& classes) {
      Vector<T, kLength> factors[kPlanes] = {};
#pragma unroll
      for (int e = 0; e < kLength; ++e) {
        const int n = classes.values[e], j = first + e;
        const T logit = -p.scale * distances.values[e] - logits.top;
        // In a loss only the query's class has a gradient.
        T own = 1, of_class = n == logits.label ? grad_sum : T(0);
        if (class_log != nullptr) {
          own = n >= 0 && there ? Math<T>::exp(logit - class_log[n]) : T(0);
        } else if (p.row_labels != nullptr) {
          own = Math<T>::exp(logit - logits.log_own);
        }
        if (of_classes) of_class = n >= 0 && there ? of_query[n] : T(0);
        const T all = Math<T>::exp(logit - logits.log_all);
        const T of_logit = (of_class != 0 ? of_class * own : T(0)) - grad_sum * all;
        T pair[kPlanes];
        first_factors<M>(p.metric, -p.scale * of_logit, distances.values[e], tile.x_norms(), q,
                         tile.y_norms(), j, pair);
#pragma unroll
        for (int f = 0; f < kPlanes; ++f) factors[f].values[e] = n >= 0 && there ? pair[f] : T(0);
        if constexpr (M::kCosine) of_own += factors[1].values[e];
      }
#pragma unroll
      for (int f = 0; f < kPlanes; ++f) store_vector(tile.plane(f, q) + first, factors[f]);
    });
    if constexpr (M::kCosine) {
      of_own = tile.over_lanes(of_own, Sum<T>{});
      if (there && tile.lane() == 0) tile.x_norms().slope[q] *= of_own;
    }
  });
  __syncthreads();
}

// Where the gradients of rows go.
template <typename T>
struct RowGradients {
  T* of_rows;     // [J, D], of this task or chunk
  T* of_support;  // [S, D], or null
  int64_t shots;
  bool first, last;  // tile of those that add to the same
};

// From the factors of a tile to the gradients of its queries, and its share of those of the rows. A lane is a
// feature, a warp every so many queries; a thread keeps 20 rows and their gradients in registers while the
// queries pass, so that a difference is taken once for both sides.
template <class M, typename T>
__device__ __forceinline__ void spread(const Classes<T>& p, const EpisodeShared& shared,
                                       const EpisodeTile<M, T>& tile, int64_t task, const T* x, int count,
                                       T* __restrict__ grad_x, const RowGradients<T>& out) {
  using Term = typename M::Term;
  constexpr int kQueries = std::is_same_v<M, CityBlock> ? 2 : 4, kLength = kVectorLength<T>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  const int rows = static_cast<int>(p.rows);
  const T* const y = p.y + task * p.y_task_stride;
  T* const stage = EpisodeShared::at<T>(shared.stage);
  const int* const support_class = EpisodeShared::at<int>(shared.support_class);
  const T* const counts = EpisodeShared::at<T>(shared.counts);
  for (int64_t feature = 0; feature < p.features; feature += kWarpSize) {
    const bool inside = feature + lane < p.features;
    const int64_t d = inside ? feature + lane : p.features - 1;
    for (int first = 0; first < rows; first += kSpreadRows) {
      // A row that takes no part is 0, whatever it holds: its factors are.
      T ys[kSpreadRows], grads[kSpreadRows] = {};
#pragma unroll
      for (int j = 0; j < kSpreadRows; ++j) {
        ys[j] = first + j < rows && tile.row_class()[first + j] >= 0 ? y[(first + j) * p.features + d] : T(0);
      }
      const int64_t begin = count > 0 ? warp * kQueries * p.features + d : 0,
                    turn = warps * kQueries * p.features;
      const T* of_query = x + begin;
      T* grad_of_query = grad_x + begin;
      for (int q = warp * kQueries; q < count;
           q += warps * kQueries, of_query += turn, grad_of_query += turn) {
        T xs[kQueries], sums[kQueries];
#pragma unroll
        for (int i = 0; i < kQueries; ++i) xs[i] = q + i < count ? of_query[i * p.features] : T(0);
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
          sums[i] = 0;
          if (first > 0) {
            if (q + i < count) sums[i] = grad_of_query[i * p.features];
          } else if constexpr (M::kCosine) {
            sums[i] = xs[i] * tile.x_norms().slope[q + i];
          }
        }
#pragma unroll
        for (int j = 0; j < kSpreadRows; j += kLength) {
          if (first + j >= rows) break;
#pragma unroll
          for (int i = 0; i < kQueries; ++i) {
            const Vector<T, kLength> factors = load_vector<kLength>(tile.plane(0, q + i) + first + j);
#pragma unroll
            for (int e = 0; e < kLength; ++e) {
              sums[i] += factors.values[e] * Term::dx(xs[i], ys[j + e]);
              grads[j + e] += factors.values[e] * Term::dy(xs[i], ys[j + e]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
          if (inside && q + i < count) grad_of_query[i * p.features] = sums[i];
        }
      }
#pragma unroll
      for (int j = 0; j < kSpreadRows; ++j) stage[(warp * kSpreadRows + j) * kWarpSize + lane] = grads[j];
      __syncthreads();

      // A warp to a row: the sum over the warps.
      for (int j = warp; j < kSpreadRows && first + j < rows; j += warps) {
        T& total = stage[j * kWarpSize + lane];
        T sum = total;
        for (int w = 1; w < warps; ++w) sum += stage[(w * kSpreadRows + j) * kWarpSize + lane];
        if (!inside) continue;
        if constexpr (M::kCosine) {
          if (tile.row_class()[first + j] >= 0) {
            sum += tile.y_norms().slope[first + j] * y[(first + j) * p.features + d];
          }
        }
        T& of_row = out.of_rows[(first + j) * p.features + d];
        if (!out.first) sum += of_row;
        total = tile.row_class()[first + j] >= 0 ? sum : T(0);
        if (out.of_support == nullptr || !out.last) of_row = total;
      }
      __syncthreads();
      if (out.of_support != nullptr && out.last && inside) {
        for (int64_t s = warp; s < out.shots; s += warps) {
          const int n = support_class[s];
          T* const target = out.of_support + s * p.features + d;
          if (n < 0 && first == 0) *target = 0;
          if (n < first || n >= first + kSpreadRows) continue;
          *target = stage[(n - first) * kWarpSize + lane] / counts[n];
        }
      }
      __syncthreads();
    }
  }
}

// Cosine: what it adds to the gradient of each row, as a multiple of the row, in place of its norm's slope.
// A warp to a row.
template <class M, typename T>
__device__ __forceinline__ void set_own_of_rows(const EpisodeTile<M, T>& tile, int rows, int count) {
  const int lane = threadIdx.x % kWarpSize;
  for (int j = threadIdx.x / kWarpSize; j < rows; j += blockDim.x / kWarpSize) {
    T sum = 0;
    for (int q = lane; q < count; q += kWarpSize) sum += tile.plane(1, q)[j];
    sum = warp_sum(sum);
    if (lane == 0) tile.y_norms().slope[j] *= sum;
  }
  __syncthreads();
}

// The classes of the support, and how many examples each has.
template <typename T>
__device__ __forceinline__ void find_support_classes(const ClassifyBackward<T>& p, int64_t task,
                                                     const EpisodeShared& shared) {
  const int64_t* labels = p.support_labels + task * p.shots;
  const int64_t ways = ways_of(p.ways, p.way, task);
  int* const support_class = EpisodeShared::at<int>(shared.support_class);
  T* const counts = EpisodeShared::at<T>(shared.counts);
  for (int64_t s = threadIdx.x; s < p.shots; s += blockDim.x) {
    support_class[s] = labels[s] >= 0 && labels[s] < ways ? static_cast<int>(labels[s]) : -1;
  }
  for (int64_t n = threadIdx.x / kWarpSize; n < p.way; n += blockDim.x / kWarpSize) {
    const int64_t members = for_each_member(labels, p.shots, n, [](int64_t) {});
    if (threadIdx.x % kWarpSize == 0) counts[n] = static_cast<T>(members);
  }
}

// A block to a chunk of a task's queries.
template <class M, typename T>
__global__ void __launch_bounds__(kMostThreads, kLeastBlocks<T>)
    classify_backward(EpisodeLaunch<ClassifyBackward<T>> k) {
  const ClassifyBackward<T>& p = k.params;
  if (block_index() >= k.blocks) return;
  const int64_t task = block_index() / p.chunks;
  const Range range(p.queries, p.chunks, block_index() % p.chunks, kOwn);
  EpisodeTile<M, T> tile(p, k.plan, k.shared, task);
  RowGradients<T> out{p.grad_y + block_index() * p.rows * p.features,
                      p.grad_support != nullptr ? p.grad_support + task * p.shots * p.features : nullptr,
                      p.shots, true, false};
  for (int64_t q = range.begin; out.first || q < range.end; q += k.plan.tile, out.first = false) {
    const int count = static_cast<int>(min(range.end - q, static_cast<int64_t>(k.plan.tile)));
    out.last = q + k.plan.tile >= range.end;
    tile.find_distances(q, count, Means<T>{}, false, [&] {
      if (!out.first) return;
      tile.find_row_classes();
      if (out.of_support != nullptr) find_support_classes(p, task, k.shared);
    });
    set_factors(p, p.grad, k.plan, k.shared, tile, task, q, count);
    if constexpr (M::kCosine) set_own_of_rows(tile, static_cast<int>(p.rows), count);
    const int64_t query = task * p.queries + q;
    spread(p, k.shared, tile, task, p.x + task * p.x_task_stride + q * p.features, count,
           p.grad_x + query * p.features, out);
  }
}

// Support examples beyond these are averaged by a kernel of their own: their copies would leave no room.
constexpr int64_t kMostAveraged = 256;

template <class M, typename T>
EpisodeLaunch<Classify<T>> plan_classify(const Classify<T>& p) {
  EpisodeLaunch<Classify<T>> k{p, {}, {}, 0};
  const bool averages = p.means.support != nullptr && p.means.shots <= kMostAveraged;
  if (!averages) k.params.means.support = nullptr;
  const bool vectorized = is_vectorized(p) && is_vectorizable<T>(k.params.means.support, p.features, 0);
  k.plan = plan_episode<M>(p, {p.queries, true, 1, averages ? p.means.shots : 0, 0, vectorized}, k.shared);
  k.blocks = p.tasks * k.tiles();
  return k;
}

}  // namespace

// At least one: a loss of no query is a loss too.
template <typename T>
int64_t loss_blocks(const Classify<T>& p) {
  int64_t blocks = 0;
  with_distance(p.metric, [&]<class M>() { blocks = plan_classify<M>(p).blocks; });
  const dim3 grid = grid_of(std::max<int64_t>(blocks, 1));
  return static_cast<int64_t>(grid.x) * grid.y;
}

template <typename T>
void launch(const Classify<T>& p, Stream stream) {
  with_distance(p.metric, [&]<class M>() {
    const EpisodeLaunch<Classify<T>> k = plan_classify<M>(p);
    if (p.means.support != nullptr && k.params.means.support == nullptr) {
      launch(Prototypes<T>{p.means.support, p.means.labels, p.ways, p.means.prototypes, p.tasks,
                           p.means.shots, p.way, p.features},
             stream);
    }
    const dim3 grid = grid_of(p.total.loss != nullptr ? std::max<int64_t>(k.blocks, 1) : k.blocks);
    launch_kernel({"classify", grid, static_cast<unsigned>(k.plan.threads), k.shared.bytes, stream},
                  classify<M, T>, k);
  });
}

template <typename T>
void launch(const ClassifyBackward<T>& p, Stream stream) {
  with_distance(p.metric, [&]<class M>() {
    EpisodeLaunch<ClassifyBackward<T>> k{p, {}, {}, p.tasks * p.chunks};
    const int64_t spread_to = p.grad_support != nullptr ? p.shots : 0;
    k.plan = plan_episode<M>(
        p, {div_up(p.queries, p.chunks), false, kFactors<M, false>, 0, spread_to, is_vectorized(p)},
        k.shared);
    launch_kernel({"classify_backward", grid_of(k.blocks), static_cast<unsigned>(k.plan.threads),
                   k.shared.bytes, stream},
                  classify_backward<M, T>, k);
  });
}

}  // namespace metafast::cuda
