// What the kernels of norm, activation and pooling share: which pixels and channels are a thread's, sums over
// pixels, windows. Part of cuda.cu.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/ptx.h"
#include "convolutional/cuda_maps.h"
#include "convolutional/params.h"

namespace metafast::cuda {
namespace {

constexpr int kMapThreads = 128;

// Neighbouring channels: a thread's.
template <typename T>
constexpr int kChannels = kVectorLength<T>;
template <typename T>
using Channels = Vector<T, kChannels<T>>;

// Neighbouring threads take the vectors of up to 64 (doubles: 32) channels of a pixel, the next ones those of
// the next pixel. The numbers of vectors is a power of two: some threads may have none.
template <typename T>
struct Share {
  int vectors, groups;  // of a pixel: which a block takes at once, and how many such groups there are

  __host__ __device__ explicit Share(int64_t pitch) : vectors(4) {
    constexpr int kMostVectors = 16;
    while (vectors < kMostVectors && vectors * kChannels<T> < pitch) vectors *= 2;
    groups = static_cast<int>(div_up(pitch, vectors * kChannels<T>));
  }
  __host__ __device__ int channels() const { return vectors * kChannels<T>; }
  __host__ __device__ int lanes() const { return kMapThreads / vectors; }  // pixels at once
};

// A block's group of channels of a task, and its share of the items, which are pixels or windows; of these
// a thread has begin, begin + step, ...
template <typename T>
struct Place {
  unsigned task, slice;
  int channels;  // of the group
  int group;     // its first channel
  int channel;   // the thread's first
  bool inside;   // whether it has channels
  int lane, step;
  int first, begin, end;

  // Of `slices` in which `items` are dealt out.
  __device__ __forceinline__ Place(int64_t pitch, int64_t items, unsigned slices) {
    const Share<T> share(pitch);
    const auto block = static_cast<unsigned>(block_index());
    const unsigned owner = block / share.groups;
    task = owner / slices;
    slice = owner % slices;
    channels = share.channels();
    group = static_cast<int>(block % share.groups) * channels;
    channel = group + static_cast<int>(threadIdx.x) % share.vectors * kChannels<T>;
    inside = channel < pitch;
    lane = threadIdx.x / share.vectors;
    step = share.lanes();
    const int size = size_of(items, slices);
    first = min(static_cast<int>(slice) * size, static_cast<int>(items));
    end = min(first + size, static_cast<int>(items));
    begin = inside ? first + lane : end;
  }
  // Whether the thread writes what there is once for channel group + threadIdx.x.
  __device__ __forceinline__ bool reports(const BlockShape& s) const {
    const int i = threadIdx.x;
    return slice == 0 && i < channels && group + i < s.pitch;
  }
  static __host__ __device__ int size_of(int64_t items, int64_t slices) {
    return static_cast<int>(div_up(items, slices));
  }
};

template <typename T>
dim3 grid_of_slices(const BlockShape& shape, int64_t slices) {
  return grid_of(shape.tasks * Share<T>(shape.pitch).groups * slices);
}

// Into how many slices results are dealt out, which has no influence on them: a thread may have kMostItems.
template <typename T>
int64_t slices_of(const BlockShape& shape, int64_t items) {
  constexpr int64_t kMostItems = 16, kBlocks = 2048;
  const Share<T> share(shape.pitch);
  const int64_t wanted = div_up(kBlocks, std::max<int64_t>(shape.tasks * share.groups, 1));
  const int64_t most = div_up<int64_t>(items, share.lanes());
  return std::max(div_up(most, kMostItems), std::min(wanted, most));
}

// ---- sums over pixels, of up to kCount statistics: first of the parts of a task's pixels, then of all ----

template <typename T, int kCount>
struct SumShared {
  T threads[kCount][kMapThreads * kChannels<T>];
  T totals[kCount][kMapThreads];
};

template <typename T>
__device__ __forceinline__ T* workspace_at(T* workspace, const BlockShape& s, int64_t task, int64_t part,
                                           int statistic) {
  return workspace + ((task * s.parts() + part) * s.kStatistics + statistic) * s.pitch;
}

// Every thread has put its channels' values in shared.threads, those of its lane at lane * channels. For each
// channel a thread calls sum(k, value), where value(lane) is that of statistic k, and writes what it returns.
template <typename T, int kCount, class Sum>
__device__ __forceinline__ void reduce_lanes(SumShared<T, kCount>& shared, const Place<T>& at,
                                             const BlockShape& s, T* workspace, const Sum& sum) {
  __syncthreads();
  const int i = threadIdx.x;
  if (i >= at.channels || at.group + i >= s.pitch) return;
  T totals[kCount];
  sum([&](int k, int lane) { return shared.threads[k][lane * at.channels + i]; }, totals);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    workspace_at(workspace, s, at.task, at.slice, k)[at.group + i] = totals[k];
  }
}

// The sum over a task's parts of term(part, totals), for channel at.group + threadIdx.x % at.channels: each
// thread gets all of it.
template <int kCount, typename T, int kShared, class Term>
__device__ __forceinline__ void sum_parts(SumShared<T, kShared>& shared, const Place<T>& at, int parts,
                                          const Term& term, T (&totals)[kCount]) {
  const int i = threadIdx.x % at.channels, slice = threadIdx.x / at.channels;
  const int slices = kMapThreads / at.channels;
#pragma unroll
  for (T& total : totals) total = 0;
  for (int part = slice; part < parts; part += slices) term(part, totals);
  __syncthreads();  // the readers of an earlier sum are done
#pragma unroll
  for (int k = 0; k < kCount; ++k) shared.totals[k][threadIdx.x] = totals[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    totals[k] = 0;
    for (int j = 0; j < slices; ++j) totals[k] += shared.totals[k][j * at.channels + i];
  }
}

// Of what each thread has for channel at.group + threadIdx.x % at.channels, those of its own channels.
template <int kCount, typename T, int kShared>
__device__ __forceinline__ void deal_out(SumShared<T, kShared>& shared, const Place<T>& at,
                                         const T (&values)[kCount], Channels<T> (&mine)[kCount]) {
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) shared.totals[k][threadIdx.x] = values[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    mine[k] = load_vector<kChannels<T>>(shared.totals[k] + (at.channel - at.group));
  }
}

// ---- the functions of a channel ----

// Neighbours of a vector of [T, pitch], tasks `stride` apart; all `otherwise` where there is none.
template <typename T>
__device__ __forceinline__ Channels<T> load_channels(const T* from, int64_t stride, const Place<T>& at,
                                                     double otherwise) {
  if (from != nullptr && at.inside) return load_vector<kChannels<T>>(from + at.task * stride + at.channel);
  Channels<T> all;
#pragma unroll
  for (T& value : all.values) value = static_cast<T>(otherwise);
  return all;
}

// y = gamma n + beta with n = (z - mean) rstd, and its tangent. Without norm n is z.
template <bool kTangent, typename T>
struct Affine {
  Channels<T> mean, rstd, gamma, beta;
  Channels<T> mean_tangent, scale_tangent, gamma_tangent, beta_tangent;

  Affine() = default;
  // From BlockForward or BlockBackward. The statistics may not be there yet.
  template <class Params>
  __device__ __forceinline__ Affine(const Params& p, const Place<T>& at, bool knows_statistics = true) {
    const int64_t pitch = p.shape.pitch;
    const bool norm = p.shape.norm && knows_statistics;
    gamma = load_channels(p.gamma, p.affine_task, at, 1);
    beta = load_channels(p.beta, p.affine_task, at, 0);
    mean = load_channels<T>(norm ? p.mean : nullptr, pitch, at, 0);
    rstd = load_channels<T>(norm ? p.rstd : nullptr, pitch, at, 1);
    if constexpr (kTangent) {
      gamma_tangent = load_channels(p.gamma_tangent, p.tangent_task, at, 0);
      beta_tangent = load_channels(p.beta_tangent, p.tangent_task, at, 0);
      mean_tangent = load_channels<T>(norm ? p.mean_tangent : nullptr, pitch, at, 0);
      scale_tangent = load_channels<T>(norm ? p.scale_tangent : nullptr, pitch, at, 0);
    }
  }

  // Of channel e of the thread's.
  __device__ __forceinline__ T n(int e, T z) const { return (z - mean.values[e]) * rstd.values[e]; }
  __device__ __forceinline__ T y(int e, T n) const { return gamma.values[e] * n + beta.values[e]; }
  __device__ __forceinline__ T n_tangent(int e, T n, T z_tangent) const {
    return rstd.values[e] * (z_tangent - mean_tangent.values[e] - n * scale_tangent.values[e]);
  }
  __device__ __forceinline__ T y_tangent(int e, T n, T n_tangent) const {
    return gamma.values[e] * n_tangent + gamma_tangent.values[e] * n + beta_tangent.values[e];
  }
};

// Numbers of a thread's channels, and their tangents.
template <typename T>
struct Duals {
  T value[kChannels<T>], tangent[kChannels<T>];
};

// The gradient of a result, from BlockBackward.
template <bool kTangent, class Params, typename T>
__device__ __forceinline__ Duals<T> load_gradient(const Params& p, const Place<T>& at, int image, int y,
                                                  int x) {
  Duals<T> grad = {};
  const Channels<T> value = load_vector<kChannels<T>>(p.grad.at(at.task, image, y, x) + at.channel);
#pragma unroll
  for (int e = 0; e < kChannels<T>; ++e) grad.value[e] = value.values[e];
  if constexpr (kTangent) {
    const Channels<T> tangent =
        load_vector<kChannels<T>>(p.grad_tangent.at(at.task, image, y, x) + at.channel);
#pragma unroll
    for (int e = 0; e < kChannels<T>; ++e) grad.tangent[e] = tangent.values[e];
  }
  return grad;
}

// The activation of y, in its place. NaN stays.
template <bool kTangent, typename T>
__device__ __forceinline__ void activate(MapActivation activation, Duals<T>& y) {
  if (activation == MapActivation::relu) {
#pragma unroll
    for (int e = 0; e < kChannels<T>; ++e) {
      const bool off = y.value[e] <= T(0);
      y.value[e] = off ? T(0) : y.value[e];
      if constexpr (kTangent) y.tangent[e] = off ? T(0) : y.tangent[e];
    }
  } else if (activation == MapActivation::tanh) {
#pragma unroll
    for (int e = 0; e < kChannels<T>; ++e) {
      y.value[e] = Math<T>::tanh(y.value[e]);
      if constexpr (kTangent) y.tangent[e] *= 1 - y.value[e] * y.value[e];
    }
  }
}

// A gradient back through the activation at y, in its place.
template <bool kTangent, typename T>
__device__ __forceinline__ void pass_through(MapActivation activation, const Duals<T>& y, Duals<T>& grad) {
  if (activation == MapActivation::relu) {
#pragma unroll
    for (int e = 0; e < kChannels<T>; ++e) {
      const bool off = y.value[e] <= T(0);
      grad.value[e] = off ? T(0) : grad.value[e];
      if constexpr (kTangent) grad.tangent[e] = off ? T(0) : grad.tangent[e];
    }
  } else if (activation == MapActivation::tanh) {
#pragma unroll
    for (int e = 0; e < kChannels<T>; ++e) {
      const T a = Math<T>::tanh(y.value[e]), slope = 1 - a * a;
      if constexpr (kTangent) {
        grad.tangent[e] = slope * (grad.tangent[e] - 2 * a * y.tangent[e] * grad.value[e]);
      }
      grad.value[e] *= slope;
    }
  }
}

// ---- windows ----

// Without pooling a window is a pixel.
inline BlockShape with_windows(BlockShape s) {
  if (s.pool != Pool::none) return s;
  s.pool = Pool::max;
  s.pools_first = true;
  s.pool_height = s.pool_width = s.pool_stride_y = s.pool_stride_x = 1;
  s.pool_padding_y = s.pool_padding_x = 0;
  s.out_height = s.height;
  s.out_width = s.width;
  return s;
}

// Whether the activation gets what a window gives. It is monotone, so it may as well come behind a maximum.
__device__ __forceinline__ bool pools_first(const BlockShape& s) {
  return s.pools_first || s.pool == Pool::max;
}

struct Window {
  int y0, y1, x0, x1;  // what of it lies in the map

  __device__ __forceinline__ Window(const BlockShape& s, int out_y, int out_x) {
    const int y = out_y * static_cast<int>(s.pool_stride_y) - static_cast<int>(s.pool_padding_y);
    const int x = out_x * static_cast<int>(s.pool_stride_x) - static_cast<int>(s.pool_padding_x);
    y0 = max(y, 0);
    x0 = max(x, 0);
    y1 = min(y + static_cast<int>(s.pool_height), static_cast<int>(s.height));
    x1 = min(x + static_cast<int>(s.pool_width), static_cast<int>(s.width));
  }
  __device__ __forceinline__ bool has(int y, int x) const { return y >= y0 && y < y1 && x >= x0 && x < x1; }
  // Which one of the window's pixels.
  __device__ __forceinline__ int number(int y, int x) const { return (y - y0) * (x1 - x0) + x - x0; }
};

// z of a thread's channels in a pixel, and its tangent.
template <bool kTangent, typename T>
struct Pixel {
  Channels<T> z, tangent;

  template <class Params>
  __device__ __forceinline__ void load(const Params& p, const Place<T>& at, int image, int y, int x) {
    z = load_vector<kChannels<T>>(p.z.at(at.task, image, y, x) + at.channel);
    if constexpr (kTangent) {
      tangent = load_vector<kChannels<T>>(p.z_tangent.at(at.task, image, y, x) + at.channel);
    }
  }
};

// n of a pixel, and y.
template <bool kTangent, typename T>
__device__ __forceinline__ void find(const Affine<kTangent, T>& affine, const Pixel<kTangent, T>& pixel,
                                     Duals<T>& n, Duals<T>& y) {
#pragma unroll
  for (int e = 0; e < kChannels<T>; ++e) {
    n.value[e] = affine.n(e, pixel.z.values[e]);
    y.value[e] = affine.y(e, n.value[e]);
    if constexpr (kTangent) {
      n.tangent[e] = affine.n_tangent(e, n.value[e], pixel.tangent.values[e]);
      y.tangent[e] = affine.y_tangent(e, n.value[e], n.tangent[e]);
    }
  }
}

// What a window gives of a thread's channels, from its pixels in rows: the first largest y and its number, or
// the mean of y, or of the activations.
template <bool kTangent, typename T>
class Look {
 public:
  Duals<T> y = {};
  int number[kChannels<T>] = {};

  __device__ __forceinline__ Look(const BlockShape& s, const Affine<kTangent, T>& affine)
      : s_(s), affine_(affine) {
    if (s_.pool != Pool::max) return;
#pragma unroll
    for (T& value : y.value) value = -std::numeric_limits<T>::infinity();
  }

  __device__ __forceinline__ void add(const Pixel<kTangent, T>& pixel) {
    if (s_.pool == Pool::max) {
#pragma unroll
      for (int e = 0; e < kChannels<T>; ++e) {
        const T n = affine_.n(e, pixel.z.values[e]), value = affine_.y(e, n);
        if (value > y.value[e] || value != value) {
          y.value[e] = value;
          number[e] = count_;
          if constexpr (kTangent) largest_.z.values[e] = pixel.z.values[e];
          if constexpr (kTangent) largest_.tangent.values[e] = pixel.tangent.values[e];
        }
      }
      ++count_;
      return;
    }
    Duals<T> n, one;
    find(affine_, pixel, n, one);
    if (!pools_first(s_)) activate<kTangent>(s_.activation, one);
#pragma unroll
    for (int e = 0; e < kChannels<T>; ++e) {
      y.value[e] += one.value[e];
      if constexpr (kTangent) y.tangent[e] += one.tangent[e];
    }
  }

  // Behind the last pixel.
  __device__ __forceinline__ void finish() {
    if (s_.pool == Pool::max) {
      if constexpr (kTangent) {
        Duals<T> n;
        find(affine_, largest_, n, y);
      }
      return;
    }
    const T share = T(1) / static_cast<T>(s_.pool_height * s_.pool_width);
#pragma unroll
    for (int e = 0; e < kChannels<T>; ++e) {
      y.value[e] *= share;
      if constexpr (kTangent) y.tangent[e] *= share;
    }
  }

 private:
  const BlockShape& s_;
  const Affine<kTangent, T>& affine_;
  Pixel<kTangent, T> largest_ = {};
  int count_ = 0;
};

template <bool kTangent, class Params, typename T>
__device__ __forceinline__ void look_at(const Params& p, const Place<T>& at, int image, const Window& window,
                                        Look<kTangent, T>& look) {
  for (int y = window.y0; y < window.y1; ++y) {
    for (int x = window.x0; x < window.x1; ++x) {
      Pixel<kTangent, T> pixel;
      pixel.load(p, at, image, y, x);
      look.add(pixel);
    }
  }
}

// Windows that are squares of kSide pixels, do not overlap and leave none between them are what most networks
// have. Their pixels are loaded together.
template <int kSide, bool kTangent, typename T>
struct Square {
  static constexpr int kPixels = kSide * kSide;
  Pixel<kTangent, T> pixels[kPixels];

  // At the map's edge some of them may be missing.
  template <class Params>
  __device__ __forceinline__ void load(const Params& p, const Place<T>& at, const Raster& cell) {
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      if (has(p.shape, cell, k)) pixels[k].load(p, at, cell.image, y(cell, k), x(cell, k));
    }
  }
  __device__ __forceinline__ void look(Look<kTangent, T>& look) const {
#pragma unroll
    for (const auto& pixel : pixels) look.add(pixel);
  }

  static __device__ __forceinline__ int y(const Raster& cell, int k) { return cell.y * kSide + k / kSide; }
  static __device__ __forceinline__ int x(const Raster& cell, int k) { return cell.x * kSide + k % kSide; }
  static __device__ __forceinline__ bool has(const BlockShape& s, const Raster& cell, int k) {
    return y(cell, k) < s.height && x(cell, k) < s.width;
  }
};

// Calls f.template operator()<kSide>(), 0 for windows of other kinds.
template <typename T, class F>
void with_side(const BlockShape& s, const F& f) {
  const auto is_square = [&s](int64_t side) {
    return s.pool_height == side && s.pool_width == side && s.pool_stride_y == side &&
           s.pool_stride_x == side && s.pool_padding_y == 0 && s.pool_padding_x == 0;
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    if (is_square(1)) return f.template operator()<1>();
    if (is_square(2)) return f.template operator()<2>();
  }
  f.template operator()<0>();
}

template <typename T>
__device__ __forceinline__ void store_channels(const Maps<T>& maps, bool pairs, const Place<T>& at, int image,
                                               int y, int x, const T (&values)[kChannels<T>]) {
  T* const pixel = maps.at(at.task, image, y, x);
  if constexpr (std::is_same_v<T, float>) {
    if (pairs) {
      Vector<float, kChannels<T> / 2> vector;
#pragma unroll
      for (int e = 0; e < kChannels<T>; e += 2) {
        vector.values[e / 2] = __uint_as_float(bfloat16_pair(values[e], values[e + 1]));
      }
      return store_vector(pixel + at.channel / 2, vector);
    }
  }
  Channels<T> vector;
#pragma unroll
  for (int e = 0; e < kChannels<T>; ++e) vector.values[e] = values[e];
  store_vector(pixel + at.channel, vector);
}

}  // namespace

}  // namespace metafast::cuda
