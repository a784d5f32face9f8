// An episode's queries against all its rows, as one small matrix product: a block takes a tile of queries and
// finds, in shared memory, their distances to every row and what their probabilities need. Part of cuda.cu.
//
// Both operands pass through shared memory in chunks of 64 bytes of features, two buffers deep, so that the
// next chunk is on its way while one is worked on. (With 128 bytes, fewer blocks fit a
// multiprocessor.) Prototypes are averaged there, between the copy and the product. A thread sums 5 x 5
// pairs: ten loads of 16 bytes for 200 operations (100 of products), and as five rows of an odd number of
// vectors are an odd number too, neighbouring threads read from different banks.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "pairwise/cuda_labels.h"
#include "pairwise/cuda_tile.h"

namespace metafast::cuda {
namespace {

constexpr int kOwn = 5;             // a thread's queries, and its rows
constexpr int kUsualThreads = 160;  // of a block, where there are blocks for all multiprocessors,
constexpr int kMostThreads = 256;   // and where there are few
constexpr int kMostSplits = 4;
constexpr int kSpreadRows = 20;  // whose gradients a thread sums, of one feature
// Blocks of kMostThreads to a multiprocessor, as registers allow.
template <typename T>
constexpr int kLeastBlocks = sizeof(T) == 4 ? 2 : 1;

template <typename T>
constexpr int kChunk = 64 / static_cast<int>(sizeof(T));  // features
template <typename T>
constexpr int kChunkPitch = kChunk<T> + kVectorLength<T>;
template <typename T>
constexpr int kChunkVectors = kChunk<T> / kVectorLength<T>;

// What a kernel wants of its blocks.
struct EpisodeWork {
  int64_t queries;    // of a block or, where each tile is a block, of a task
  bool tiles;         // is it? Such a kernel finds no gradients
  int planes;         // numbers of a pair
  int64_t averaged;   // support examples that the rows are the means of; 0 where the rows are there already
  int64_t spread_to;  // support examples that get the gradient of these means
  bool vectorized;
};

// How a block does it.
struct EpisodePlan {
  int threads;
  int tile;         // queries at a time, and
  int row_tile;     // rows at a time: multiples of kOwn
  int splits;       // threads that share the features of the same pairs
  int lanes;        // threads that share a query, once its distances are there: neighbours in a warp
  int pitch;        // from query to query of the planes: an odd number of vectors
  int planes;       // numbers of a pair, at last
  int mask_words;   // of each class's members; 0 where the rows are there already
  bool vectorized;  // all rows begin at multiples of 16 bytes
  bool per_class;   // probabilities within every class are wanted, not only within each query's own

  __host__ __device__ int query_groups() const { return tile / kOwn; }
  __host__ __device__ int row_groups() const { return row_tile / kOwn; }
  __host__ __device__ int plane_rows() const { return div_up(tile, 4) * 4; }  // spread() takes four at once
  // As many rows as tiles of them, or the vectors of a plane, reach.
  __host__ __device__ int padded_rows(int64_t rows) const {
    const int of_tiles = static_cast<int>(div_up(rows, row_tile)) * row_tile;
    return of_tiles > pitch ? of_tiles : pitch;
  }
  template <typename T>
  __host__ __device__ int x_buffer() const {
    return tile * kChunkPitch<T>;
  }
  template <typename T>
  __host__ __device__ int y_buffer() const {
    return row_tile * kChunkPitch<T>;
  }
};

// Where things lie in a block's shared memory, in bytes. The kernels read these from their parameters, so
// that no register keeps a pointer.
struct EpisodeShared {
  int stage;         // what follows, or what spread() leaves of each warp's sums:
  int x, y, source;  // two buffers of [tile, kChunkPitch], of [row_tile, ...] (one, of means), of [S, ...]
  int planes;        // [plan.planes, plane_rows, pitch]: distances, then the factors of gradients
  int x_norms, y_norms;  // [2, plane_rows], [2, J]: inverse and slope, of cosine
  int class_log;         // [tile, N]: log-sum-exp of each class's logits
  int row_class;         // [pitch]: -1 for a row that takes no part
  int members;           // [N, mask_words]
  int support_class;     // [S]
  int counts;            // [N]: members of each class
  int warps;             // [kMostThreads / 32, 2]: a pair of sums for each
  std::size_t bytes;

  template <typename U>
  static __device__ __forceinline__ U* at(int offset) {
    return reinterpret_cast<U*>(&shared_memory<unsigned char>() + offset);
  }
};

template <typename T>
EpisodeShared share_memory(const Classes<T>& p, const EpisodePlan& plan, const EpisodeWork& work,
                           bool cosine) {
  EpisodeShared shared{};
  const auto take = [&shared](int64_t count, std::size_t size) {
    const int offset = static_cast<int>(std::min<std::size_t>(shared.bytes, std::numeric_limits<int>::max()));
    shared.bytes += (count * size + 15) / 16 * 16;
    return offset;
  };
  shared.stage = shared.x = take(2 * plan.x_buffer<T>(), sizeof(T));
  shared.y = take((work.averaged > 0 ? 1 : 2) * plan.y_buffer<T>(), sizeof(T));
  shared.source = take(2 * work.averaged * kChunkPitch<T>, sizeof(T));
  const std::size_t sums = work.tiles ? 0 : plan.threads * kSpreadRows * sizeof(T);
  shared.bytes = std::max(shared.bytes, sums);
  shared.planes = take(int64_t{plan.planes} * plan.plane_rows() * plan.pitch, sizeof(T));
  shared.x_norms = take(cosine ? 2 * plan.plane_rows() : 0, sizeof(T));
  shared.y_norms = take(cosine ? 2 * plan.padded_rows(p.rows) : 0, sizeof(T));
  shared.class_log = take(plan.per_class ? plan.tile * p.way : 0, sizeof(T));
  shared.row_class = take(plan.pitch, sizeof(int));
  shared.members = take(p.way * plan.mask_words, sizeof(unsigned));
  shared.support_class = take(work.spread_to, sizeof(int));
  shared.counts = take(work.spread_to > 0 ? p.way : 0, sizeof(T));
  shared.warps = take(2 * kMostThreads / kWarpSize, sizeof(double));
  return shared;
}

// Copies features [first, first + kChunk) of `count` rows, and zeros behind them up to `padded`.
template <int kLength, typename T>
__device__ __forceinline__ void stage_rows(T* out, const T* rows, int count, int padded, int64_t features,
                                           int64_t first) {
  constexpr int kPieces =
      kChunk<T> / kLength;  // of a row; a thread copies the same one of every so many rows
  const int column = threadIdx.x % kPieces * kLength, step = blockDim.x / kPieces;
  const bool inside = first + column < features;
  int row = threadIdx.x / kPieces;
  int64_t from = row * features + first + column;
  T* to = out + row * kChunkPitch<T> + column;
  for (; row < padded; row += step, from += step * features, to += step * kChunkPitch<T>) {
    const bool there = inside && row < count;
    copy_async<kLength>(to, there ? rows + from : rows, there);
  }
}

template <typename T>
struct Sum {
  __device__ T operator()(T a, T b) const { return a + b; }
};
template <typename T>
struct Max {
  __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// This thread's sums over the chunk, of queries x, ... with rows y, ...
template <class Term, typename T>
__device__ __forceinline__ void add_chunk(const T* x, const T* y, int split, int splits,
                                          T (&sums)[kOwn][kOwn]) {
  constexpr int kLength = kVectorLength<T>;
  for (int v = split * kLength; v < kChunk<T>; v += splits * kLength) {
    Vector<T, kLength> ys[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) ys[k] = load_vector<kLength>(y + k * kChunkPitch<T> + v);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const Vector<T, kLength> xs = load_vector<kLength>(x + i * kChunkPitch<T> + v);
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
#pragma unroll
        for (int e = 0; e < kLength; ++e) sums[i][k] += Term::value(xs.values[e], ys[k].values[e]);
      }
    }
  }
}

// What the probabilities of one query need. Logits are taken around the query's largest, beside which what a
// likely class has left of its log-probability would vanish.
template <typename T>
struct QueryLogits {
  T top;      // the largest logit
  T log_all;  // log-sum-exp of all rows around it, and
  T log_own;  // of those of the query's class; only where it has a label
  int label;  // -1 where it has none, or its class is absent
};

template <class M, typename T>
class EpisodeTile {
 public:
  static constexpr int kLength = kVectorLength<T>;

  __device__ EpisodeTile(const Classes<T>& p, const EpisodePlan& plan, const EpisodeShared& shared,
                         int64_t task)
      : p_(p),
        plan_(plan),
        shared_(shared),
        task_(task),
        ways_(ways_of(p.ways, p.way, task)),
        rows_(static_cast<int>(p.rows)) {}

  __device__ int64_t ways() const { return ways_; }

  // Distances of queries [begin, begin + count) to all rows into the plane. The task's first tile `prepare`s
  // what is known of the rows while its first chunk is on its way.
  template <typename Prepare>
  __device__ void find_distances(int64_t begin, int count, const Means<T>& means, bool keep_means,
                                 Prepare prepare) {
    const T* x = p_.x + task_ * p_.x_task_stride + begin * p_.features;
    const int split = threadIdx.x % plan_.splits, pair = threadIdx.x / plan_.splits;
    const int row_group = pair % plan_.row_groups(), query_group = pair / plan_.row_groups();
    const bool works = query_group < plan_.query_groups();
    const int chunks = static_cast<int>(div_up(p_.features, kChunk<T>));
    for (int first = 0; first < rows_; first += plan_.row_tile) {
      const int rows = min(rows_ - first, plan_.row_tile);
      T sums[kOwn][kOwn] = {};
      stage(x, count, first, rows, means, 0);
      if (first == 0) prepare();
      for (int chunk = 0; chunk < chunks; ++chunk) {
        stage(x, count, first, rows, means, chunk + 1);  // behind the last one: an empty batch
        wait_for_copies<1>();
        __syncthreads();
        const T *xs = x_buffer(chunk), *ys = y_buffer(chunk);
        if (plan_.mask_words > 0) {
          average(first, rows, chunk, means, keep_means);
          __syncthreads();
        }
        if constexpr (M::kCosine) add_squares(xs, ys, first, chunk);
        if (works) {
          add_chunk<typename M::Term>(xs + query_group * kOwn * kChunkPitch<T>,
                                      ys + row_group * kOwn * kChunkPitch<T>, split, plan_.splits, sums);
        }
        __syncthreads();
      }
      if constexpr (M::kCosine) {
        finish_squares(first);
        __syncthreads();
      }
      for (int offset = 1; offset < plan_.splits; offset *= 2) {
#pragma unroll
        for (T& sum : sums[0]) sum += __shfl_xor_sync(kFullWarp, sum, offset);
#pragma unroll
        for (int i = 1; i < kOwn; ++i) {
#pragma unroll
          for (T& sum : sums[i]) sum += __shfl_xor_sync(kFullWarp, sum, offset);
        }
      }
      if (works && split == 0) store(sums, query_group * kOwn, first, row_group * kOwn);
    }
    __syncthreads();
  }

  // Calls f(query of the tile, is it there) with `lanes` threads each; all threads of a warp make all calls.
  template <typename F>
  __device__ void for_each_query(int count, F f) const {
    for (int first = 0; first < plan_.plane_rows(); first += plan_.threads / plan_.lanes) {
      const int q = first + threadIdx.x / plan_.lanes;
      f(q, q < count);
    }
  }

  __device__ int lane() const { return threadIdx.x % plan_.lanes; }

  // The query's label, -1 where none is known or its class is absent.
  __device__ int label_of(int64_t query, bool there) const {
    if (p_.query_labels == nullptr || !there) return -1;
    const int64_t label = p_.query_labels[task_ * p_.queries + query];
    return label < ways_ ? static_cast<int>(max(label, static_cast<int64_t>(-1))) : -1;
  }

  // Calls f(first row, distances, classes) for each vector of rows that this lane has of query q.
  template <typename F>
  __device__ void for_each_vector(int q, F f) const {
    if (q >= plan_.plane_rows()) return;
    for (int j = lane() * kLength; j < plan_.pitch; j += plan_.lanes * kLength) {
      f(j, load_vector<kLength>(plane(0, q) + j), load_vector<kLength>(row_class() + j));
    }
  }

  __device__ QueryLogits<T> logits(int q, int label) const {
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    T top = kLowest, own_top = kLowest;
    for_each_vector(q, [&](int, const auto& distances, const auto& classes) {
#pragma unroll
      for (int e = 0; e < kLength; ++e) {
        const T logit = classes.values[e] >= 0 ? -p_.scale * distances.values[e] : kLowest;
        top = Max<T>{}(logit, top);
        own_top = Max<T>{}(classes.values[e] == label ? logit : kLowest, own_top);
      }
    });
    top = over_lanes(top, Max<T>{});
    own_top = over_lanes(own_top, Max<T>{});
    const T sum = sum_of_exponentials(q, top, [](int n) { return n >= 0; });
    // A prototype is its class's only row.
    T own_sum = 1;
    if (p_.row_labels != nullptr)
      own_sum = sum_of_exponentials(q, own_top, [=](int n) { return n == label; });
    return {top, Math<T>::log(sum), own_top - top + Math<T>::log(own_sum), label};
  }

  // Of the logits around `top` of the rows of such classes, over all of the query's lanes.
  template <typename TakesPart>
  __device__ T sum_of_exponentials(int q, T top, TakesPart takes_part) const {
    T sum = 0;
    for_each_vector(q, [&](int, const auto& distances, const auto& classes) {
#pragma unroll
      for (int e = 0; e < kLength; ++e) {
        const T power = Math<T>::exp(-p_.scale * distances.values[e] - top);
        sum += takes_part(classes.values[e]) ? power : T(0);
      }
    });
    return over_lanes(sum, Sum<T>{});
  }

  // log-sum-exp of class n's logits around `top`, by one thread.
  __device__ T class_log_sum(int q, int64_t n, T top) const {
    const T* distances = plane(0, q);
    if (p_.row_labels == nullptr) return -p_.scale * distances[n] - top;
    T own_top = -std::numeric_limits<T>::infinity(), sum = 0;
    for (int j = 0; j < rows_; ++j) {
      if (row_class()[j] == n) own_top = Max<T>{}(-p_.scale * distances[j] - top, own_top);
    }
    for (int j = 0; j < rows_; ++j) {
      if (row_class()[j] == n) sum += Math<T>::exp(-p_.scale * distances[j] - top - own_top);
    }
    return own_top + Math<T>::log(sum);
  }

  template <typename Combine>
  __device__ T over_lanes(T value, Combine combine) const {
    for (int offset = 1; offset < plan_.lanes; offset *= 2) {
      value = combine(value, __shfl_xor_sync(kFullWarp, value, offset));
    }
    return value;
  }

  __device__ T* plane(int number, int q) const {
    return EpisodeShared::at<T>(shared_.planes) + (number * plan_.plane_rows() + q) * plan_.pitch;
  }

  __device__ int* row_class() const { return EpisodeShared::at<int>(shared_.row_class); }
  __device__ RowNorms<T> x_norms() const { return norms(shared_.x_norms, plan_.plane_rows()); }
  __device__ RowNorms<T> y_norms() const { return norms(shared_.y_norms, plan_.padded_rows(rows_)); }

  // ---- what is known of the rows ----

  __device__ void find_row_classes() const {
    for (int j = threadIdx.x; j < plan_.pitch; j += blockDim.x) {
      int64_t label = -1;
      if (j < rows_) label = p_.row_labels != nullptr ? p_.row_labels[task_ * p_.rows + j] : j;
      row_class()[j] = label >= 0 && label < ways_ ? static_cast<int>(label) : -1;
    }
  }

  // Which examples are of which class: a bit each.
  __device__ void find_members(const Means<T>& means) const {
    const int64_t* labels = means.labels + task_ * means.shots;
    const int lane = threadIdx.x % kWarpSize;
    for (int n = threadIdx.x / kWarpSize; n < p_.way; n += blockDim.x / kWarpSize) {
      bool some = false;
      for (int word = 0; word < plan_.mask_words; ++word) {
        const int s = word * kWarpSize + lane;
        const unsigned found = __ballot_sync(kFullWarp, s < means.shots && labels[s] == n);
        some |= found != 0;
        if (lane == 0) members()[n * plan_.mask_words + word] = found;
      }
      if (n < ways_) check_members(some);
    }
  }

 private:
  static __device__ RowNorms<T> norms(int offset, int count) {
    T* const first = EpisodeShared::at<T>(offset);
    return {first, first + count, nullptr};
  }

  __device__ T* x_buffer(int chunk) const {
    return EpisodeShared::at<T>(shared_.x) + chunk % 2 * plan_.template x_buffer<T>();
  }
  __device__ T* y_buffer(int chunk) const {  // means have one
    return EpisodeShared::at<T>(shared_.y) +
           (plan_.mask_words > 0 ? 0 : chunk % 2 * plan_.template y_buffer<T>());
  }
  __device__ T* source_buffer(const Means<T>& means, int chunk) const {
    return EpisodeShared::at<T>(shared_.source) + chunk % 2 * static_cast<int>(means.shots) * kChunkPitch<T>;
  }
  __device__ unsigned* members() const { return EpisodeShared::at<unsigned>(shared_.members); }

  // Begins to copy a chunk, as a batch.
  __device__ void stage(const T* x, int count, int first, int rows, const Means<T>& means, int chunk) const {
    const int64_t d = static_cast<int64_t>(chunk) * kChunk<T>;
    if (d < p_.features) {
      if (plan_.vectorized) {
        stage_both<kLength>(x, count, first, rows, means, chunk, d);
      } else {
        stage_both<1>(x, count, first, rows, means, chunk, d);
      }
    }
    commit_copies();
  }

  template <int kPiece>
  __device__ void stage_both(const T* x, int count, int first, int rows, const Means<T>& means, int chunk,
                             int64_t d) const {
    stage_rows<kPiece>(x_buffer(chunk), x, count, plan_.tile, p_.features, d);
    if (plan_.mask_words > 0) {
      const int shots = static_cast<int>(means.shots);
      stage_rows<kPiece>(source_buffer(means, chunk), means.support + task_ * means.shots * p_.features,
                         shots, shots, p_.features, d);
    } else {
      stage_rows<kPiece>(y_buffer(chunk), p_.y + task_ * p_.y_task_stride + first * p_.features, rows,
                         plan_.row_tile, p_.features, d);
    }
  }

  // The chunk's prototypes, from its support.
  __device__ void average(int first, int rows, int chunk, const Means<T>& means, bool keep) const {
    for (int k = threadIdx.x; k < plan_.row_tile * kChunkVectors<T>; k += blockDim.x) {
      const int row = k / kChunkVectors<T>, column = k % kChunkVectors<T> * kLength;
      Vector<T, kLength> mean{};
      if (row < rows) {
        int count = 0;
        for (int word = 0; word < plan_.mask_words; ++word) {
          unsigned found = members()[(first + row) * plan_.mask_words + word];
          count += __popc(found);
          for (; found != 0; found &= found - 1) {
            const int s = word * kWarpSize + __ffs(static_cast<int>(found)) - 1;
            const Vector<T, kLength> example =
                load_vector<kLength>(source_buffer(means, chunk) + s * kChunkPitch<T> + column);
#pragma unroll
            for (int e = 0; e < kLength; ++e) mean.values[e] += example.values[e];
          }
        }
        if (count > 1) {
#pragma unroll
          for (T& value : mean.values) value /= static_cast<T>(count);
        }
        if (keep) keep_mean(mean, means.prototypes, first + row, chunk * kChunk<T> + column);
      }
      store_vector(y_buffer(chunk) + row * kChunkPitch<T> + column, mean);
    }
  }

  __device__ void keep_mean(const Vector<T, kLength>& mean, T* prototypes, int row, int d) const {
    T* out = prototypes + (task_ * p_.rows + row) * p_.features + d;
    if (plan_.vectorized) {
      if (d < p_.features) store_vector(out, mean);
    } else {
#pragma unroll
      for (int e = 0; e < kLength; ++e) {
        if (d + e < p_.features) out[e] = mean.values[e];
      }
    }
  }

  // Cosine: the sums of squares of queries and rows, a thread to a row; they lie where their norms will.
  __device__ void add_squares(const T* xs, const T* ys, int first, int chunk) const {
    for (int k = threadIdx.x; k < plan_.tile + plan_.row_tile; k += blockDim.x) {
      const bool of_x = k < plan_.tile;
      const int row = of_x ? k : k - plan_.tile;
      const T* values = (of_x ? xs : ys) + row * kChunkPitch<T>;
      T& total = of_x ? x_norms().inverse[row] : y_norms().inverse[first + row];
      T sum = 0;
#pragma unroll
      for (int d = 0; d < kChunk<T>; d += kLength) {
        const Vector<T, kLength> vector = load_vector<kLength>(values + d);
#pragma unroll
        for (const T value : vector.values) sum += value * value;
      }
      total = chunk == 0 ? sum : total + sum;
    }
  }

  __device__ void finish_squares(int first) const {
    for (int k = threadIdx.x; k < plan_.tile + plan_.row_tile; k += blockDim.x) {
      const bool of_x = k < plan_.tile;
      const RowNorms<T> norms = of_x ? x_norms() : y_norms();
      const int row = of_x ? k : k - plan_.tile + first;
      const InverseNorm<T> norm = inverse_norm(p_.features > 0 ? norms.inverse[row] : T(0));
      norms.inverse[row] = norm.inverse;
      norms.slope[row] = norm.slope;
    }
  }

  __device__ void store(const T (&sums)[kOwn][kOwn], int query, int first, int row) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        const int j = first + row + k;
        if (j >= rows_) continue;
        plane(0, query + i)[j] =
            finish_value<M>(p_.metric, sums[i][k], T(0), x_norms(), query + i, y_norms(), j);
      }
    }
  }

  const Classes<T>& p_;
  const EpisodePlan& plan_;
  const EpisodeShared& shared_;
  const int64_t task_, ways_;
  const int rows_;
};

// ---- plans ----

// How many parts to make of each task's queries so that the blocks, at two to a multiprocessor, run at once.
inline int64_t parts_for_all(int64_t tasks) {
  return std::max<int64_t>(2 * multiprocessors() / std::max<int64_t>(tasks, 1), 1);
}

template <class M, typename T>
EpisodePlan plan_episode(const Classes<T>& p, const EpisodeWork& work, EpisodeShared& shared) {
  if (p.rows > std::numeric_limits<int>::max() / 2 || p.way > std::numeric_limits<int>::max() / 2) {
    throw std::invalid_argument("metafast: class probabilities on CUDA: more than 2^30 rows or classes");
  }
  constexpr int kMostRowGroups = 32, kFewRowGroups = 4;
  EpisodePlan plan{};
  plan.planes = work.planes;
  plan.vectorized = work.vectorized;
  plan.per_class = !work.tiles && p.row_labels != nullptr && p.query_labels == nullptr;
  plan.mask_words = static_cast<int>(div_up(work.averaged, kWarpSize));
  plan.pitch =
      static_cast<int>((div_up(std::max<int64_t>(p.rows, 1), kVectorLength<T>) | 1) * kVectorLength<T>);
  const int64_t parts = work.tiles ? std::min(parts_for_all(p.tasks), div_up(work.queries, 2 * kOwn)) : 1;
  int row_groups = static_cast<int>(std::clamp<int64_t>(div_up(p.rows, kOwn), 1, kMostRowGroups));
  for (int most_groups = kUsualThreads / row_groups;;) {
    const int64_t tiles = std::max<int64_t>({div_up(work.queries, most_groups * kOwn), parts, 1});
    const int groups = static_cast<int>(std::max<int64_t>(div_up(div_up(work.queries, tiles), kOwn), 1));
    plan.tile = groups * kOwn;
    plan.row_tile = row_groups * kOwn;
    const int64_t blocks = p.tasks * (work.tiles ? tiles : p.chunks);
    const int most_threads = blocks < 4 * multiprocessors() ? kMostThreads : kUsualThreads;
    plan.splits = 1;
    while (plan.splits < kMostSplits && groups * row_groups * plan.splits * 2 <= most_threads)
      plan.splits *= 2;
    plan.threads = div_up(groups * row_groups * plan.splits, kWarpSize) * kWarpSize;
    plan.lanes = 1;
    while (plan.lanes < kWarpSize && plan.plane_rows() * plan.lanes * 2 <= plan.threads &&
           plan.lanes * 2 * kVectorLength<T> <= plan.pitch) {
      plan.lanes *= 2;
    }
    shared = share_memory(p, plan, work, M::kCosine);
    const std::size_t limit = max_shared_bytes();
    if (shared.bytes <= limit) return plan;
    if (row_groups > kFewRowGroups) {
      row_groups /= 2;
    } else if (most_groups > 1) {
      most_groups /= 2;
    } else {
      throw std::invalid_argument("metafast: class probabilities on CUDA: " + std::to_string(p.rows) +
                                  " rows and " + std::to_string(p.way) + " classes need " +
                                  std::to_string(shared.bytes) + " bytes of shared memory; this GPU has " +
                                  std::to_string(limit));
    }
  }
}

}  // namespace

}  // namespace metafast::cuda
