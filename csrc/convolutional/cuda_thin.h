// The first block of a network on grey images, whose z is never written down (ThinInput in params.h): 3 x 3
// places of one channel, norm, windows of 2 x 2 for their largest. Part of cuda.cu.
//
// A window's z takes nine products a pixel, from 16 numbers. All else that norm asks of z, over all pixels,
// follows from the input's moments: with X = mean(x_k) and C = cov(x_k, x_j) of the numbers that places k and
// j meet, mean(z) = b + w.X and var(z) = w.C.w. What reaches y is 0 but at the windows' largest pixels, so
// that the gradient of the weights,
//
//   sum_p x_k(p) grad_z(p) = gamma rstd (A_k - G X_k - S rstd (C w)_k),
//
// takes sums over windows alone: G of what reaches y, S of that times n, A_k of that times x_k. The same goes
// for tangents. One launch a pass goes through the windows.
#pragma once

#include "common/ptx.h"
#include "convolutional/cuda_block.h"

namespace metafast::cuda {
namespace {

constexpr int kTaps = ThinMoments<float>::kTaps, kSide = 3;
constexpr int kMoments = ThinMoments<float>::kSums, kMomentParts = ThinMoments<float>::kParts;

// ---- moments of the input ----

struct MomentsShared {
  double warps[kMapThreads / kWarpSize][kMoments];
};

template <typename T>
__global__ void __launch_bounds__(kMapThreads) thin_moments(const __grid_constant__ ThinMoments<T> p) {
  auto& shared = shared_memory<MomentsShared>();
  const int64_t task = block_index() / kMomentParts;
  const int part = static_cast<int>(block_index() % kMomentParts);
  if (task >= p.tasks) return;
  const int pixels = static_cast<int>(p.images * p.height * p.width), size = div_up(pixels, kMomentParts);
  const int end = min((part + 1) * size, pixels);
  double sums[kMoments] = {};
  Raster pixel(p.height, p.width, part * size + static_cast<int>(threadIdx.x));
  for (int i = part * size + threadIdx.x; i < end; i += kMapThreads) {
    const T* const from = p.source.at(task, pixel.image, pixel.y, pixel.x);
    T x[kTaps];
#pragma unroll
    for (int k = 0; k < kTaps; ++k) x[k] = from[k / kSide * p.source.row + k % kSide];
    int next = kTaps;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      sums[k] += x[k];
#pragma unroll
      for (int j = 0; j <= k; ++j) sums[next++] += static_cast<double>(x[k]) * static_cast<double>(x[j]);
    }
    pixel.advance(kMapThreads);
  }
#pragma unroll
  for (int i = 0; i < kMoments; ++i) {
    const double sum = warp_sum(sums[i]);
    if (threadIdx.x % kWarpSize == 0) shared.warps[threadIdx.x / kWarpSize][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= kMoments) return;
  double sum = 0;
  for (const auto& warp : shared.warps) sum += warp[threadIdx.x];
  p.moments[block_index() * kMoments + threadIdx.x] = sum;
}

// ---- what follows from them for a channel ----

// What the kernels need of BlockForward's or BlockBackward's ThinInput.
template <typename T>
struct ThinSource {
  struct Weights {
    const T *weights, *bias;  // [9, pitch], [pitch] or null
    int64_t task, bias_task;

    explicit Weights(const Convolve<T>* z)
        : weights(z ? z->factors[0].weights : nullptr),
          bias(z ? z->bias : nullptr),
          task(z ? z->factors[0].weights_task : 0),
          bias_task(z ? z->bias_task : 0) {}
  };
  Maps<const T> x;  // that the first place meets
  Weights z, tangent;
  const double* moments;

  explicit ThinSource(const ThinInput<T>& thin)
      : x(thin.z->factors[0].source), z(thin.z), tangent(thin.z_tangent), moments(thin.moments) {}
};

// The mean of x_k over a task's pixels, and the covariances.
struct Moments {
  double values[kMoments];  // means of x_k, then of the products x_k x_j, j <= k

  // By the whole block.
  __device__ __forceinline__ void load(const double* parts, int64_t task, const BlockShape& s) {
    for (int i = threadIdx.x; i < kMoments; i += blockDim.x) {
      double sum = 0;
#pragma unroll
      for (int part = 0; part < kMomentParts; ++part)
        sum += parts[(task * kMomentParts + part) * kMoments + i];
      values[i] = sum / static_cast<double>(s.pixels());
    }
  }
  __device__ __forceinline__ double mean(int k) const { return values[k]; }
  __device__ __forceinline__ double covariance(int k, int j) const {
    const int high = k > j ? k : j, low = k > j ? j : k;
    return values[kTaps + high * (high + 1) / 2 + low] - values[k] * values[j];
  }
};

// Of a channel, without its bias: the mean of z, its variance, and (C w)_k; the mean of its tangent, that of
// n times it, and (C dw)_k.
template <bool kTangent>
struct ThinStatistics {
  double centre = 0, var = 0, rstd, spread[kTaps];
  double centre_tangent = 0, scale_tangent = 0, spread_tangent[kTangent ? kTaps : 1];

  // `weights` and `tangents` of neighbouring places are `pitch` apart.
  template <typename T>
  __device__ __forceinline__ ThinStatistics(const Moments& moments, const T* weights, const T* tangents,
                                            int64_t pitch, double eps) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      spread[k] = 0;
      if constexpr (kTangent) spread_tangent[k] = 0;
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        const double covariance = moments.covariance(k, j);
        spread[k] += covariance * static_cast<double>(weights[j * pitch]);
        if constexpr (kTangent) spread_tangent[k] += covariance * static_cast<double>(tangents[j * pitch]);
      }
      const auto weight = static_cast<double>(weights[k * pitch]);
      centre += weight * moments.mean(k);
      var += weight * spread[k];
      if constexpr (kTangent) {
        const auto tangent = static_cast<double>(tangents[k * pitch]);
        centre_tangent += tangent * moments.mean(k);
        scale_tangent += tangent * spread[k];
      }
    }
    if (var < 0) var = 0;  // rounded
    rstd = 1 / ::sqrt(var + eps);
    scale_tangent *= rstd;
  }
};

// Of a block's channels.
template <bool kTangent, typename T>
struct ThinShared {
  static constexpr int kMost = 16 * kChannels<T>;
  Moments moments;
  alignas(16) T weights[kTaps][kMost], tangents[kTangent ? kTaps : 1][kMost];
  // The norm's vectors, of z without its bias, as Affine has them; and y = scale z + shift.
  alignas(16) T mean[kMost], rstd[kMost], gamma[kMost], beta[kMost], scale[kMost], shift[kMost];
  alignas(16) T mean_tangent[kMost], scale_tangent[kMost], gamma_tangent[kMost], beta_tangent[kMost];

  __device__ __forceinline__ Affine<kTangent, T> affine(int channel) const {
    const auto load = [channel](const T* from) { return load_vector<kChannels<T>>(from + channel); };
    Affine<kTangent, T> affine;
    affine.mean = load(mean);
    affine.rstd = load(rstd);
    affine.gamma = load(gamma);
    affine.beta = load(beta);
    if constexpr (kTangent) {
      affine.mean_tangent = load(mean_tangent);
      affine.scale_tangent = load(scale_tangent);
      affine.gamma_tangent = load(gamma_tangent);
      affine.beta_tangent = load(beta_tangent);
    }
    return affine;
  }
};

// Fills it. report(channel, statistics) for each of the block's channels.
template <bool kTangent, class Params, typename T, class Report>
__device__ __forceinline__ void prepare(ThinShared<kTangent, T>& shared, const Params& p,
                                        const ThinSource<T>& source, const Place<T>& at,
                                        const Report& report) {
  const BlockShape& s = p.shape;
  shared.moments.load(source.moments, at.task, s);
  for (int i = threadIdx.x; i < kTaps * at.channels; i += kMapThreads) {
    const int k = i / at.channels, c = i % at.channels;
    const int64_t from = k * s.pitch + at.group + c;
    const bool inside = at.group + c < s.pitch;
    shared.weights[k][c] = inside ? source.z.weights[at.task * source.z.task + from] : T(0);
    if constexpr (kTangent) {
      shared.tangents[k][c] = inside ? source.tangent.weights[at.task * source.tangent.task + from] : T(0);
    }
  }
  __syncthreads();
  const int c = threadIdx.x;
  if (c < at.channels) {
    const ThinStatistics<kTangent> of(shared.moments, &shared.weights[0][c], &shared.tangents[0][c],
                                      shared.kMost, s.eps);
    const bool inside = at.group + c < s.pitch;
    const auto vector = [&](const T* from, int64_t stride, double otherwise) {
      return from != nullptr && inside ? from[at.task * stride + at.group + c] : static_cast<T>(otherwise);
    };
    const T gamma = vector(p.gamma, p.affine_task, 1), beta = vector(p.beta, p.affine_task, 0);
    const double scale = static_cast<double>(gamma) * of.rstd;
    shared.mean[c] = static_cast<T>(of.centre);
    shared.rstd[c] = static_cast<T>(of.rstd);
    shared.gamma[c] = gamma;
    shared.beta[c] = beta;
    shared.scale[c] = static_cast<T>(scale);
    shared.shift[c] = static_cast<T>(static_cast<double>(beta) - scale * of.centre);
    if constexpr (kTangent) {
      shared.mean_tangent[c] = static_cast<T>(of.centre_tangent);
      shared.scale_tangent[c] = static_cast<T>(of.scale_tangent);
      shared.gamma_tangent[c] = vector(p.gamma_tangent, p.tangent_task, 0);
      shared.beta_tangent[c] = vector(p.beta_tangent, p.tangent_task, 0);
    }
    if (at.reports(s)) report(at.group + c, of);
  }
  __syncthreads();
}

// ---- a window ----

// What a window sees of the input, and its largest y.
template <bool kTangent, typename T>
class ThinWindow {
 public:
  Duals<T> y, n;  // of a thread's channels

  __device__ __forceinline__ ThinWindow(const Maps<const T>& source, const ThinShared<kTangent, T>& shared,
                                        const Place<T>& at, const Raster& window)
      : channels_(at.channels) {
    const T* const from = source.at(at.task, window.image, 2 * window.y, 2 * window.x);
#pragma unroll
    for (int i = 0; i <= kSide; ++i) {
#pragma unroll
      for (int j = 0; j <= kSide; ++j) x_[i][j] = from[i * source.row + j];
    }
    const Channels<T> scale = load_vector<kChannels<T>>(shared.scale + channel()),
                      shift = load_vector<kChannels<T>>(shared.shift + channel());
    Pixel<kTangent, T> largest = {};
    T most[kChannels<T>];
#pragma unroll
    for (T& value : most) value = -std::numeric_limits<T>::infinity();
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const Pixel<kTangent, T> pixel = find_pixel(shared, q);
#pragma unroll
      for (int e = 0; e < kChannels<T>; ++e) {
        const T value = scale.values[e] * pixel.z.values[e] + shift.values[e];
        if (value > most[e] || value != value) {
          most[e] = value;
          number_[e] = q;
          largest.z.values[e] = pixel.z.values[e];
          if constexpr (kTangent) largest.tangent.values[e] = pixel.tangent.values[e];
        }
      }
    }
    find(shared.affine(channel()), largest, n, y);
#pragma unroll
    for (int e = 0; e < kChannels<T>; ++e) y.value[e] = most[e];
  }

  // What the places meet at the largest pixel of channel e.
  __device__ __forceinline__ void seen(int e, T (&x)[kTaps]) const {
    const bool lower = number_[e] / 2 != 0, right = number_[e] % 2 != 0;
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      T row[kSide + 1];
#pragma unroll
      for (int j = 0; j <= kSide; ++j) row[j] = lower ? x_[i + 1][j] : x_[i][j];
#pragma unroll
      for (int j = 0; j < kSide; ++j) x[i * kSide + j] = right ? row[j + 1] : row[j];
    }
  }

 private:
  const int channels_;
  T x_[kSide + 1][kSide + 1];
  int number_[kChannels<T>] = {};

  // The thread's first, in shared memory. Where registers are short, what is read there is not kept in them.
  __device__ __forceinline__ int channel() const {
    const int thread = kTangent ? fresh_thread_index() : static_cast<int>(threadIdx.x);
    return thread * kChannels<T> & (channels_ - 1);
  }
  // z of pixel q, without its bias.
  __device__ __forceinline__ Pixel<kTangent, T> find_pixel(const ThinShared<kTangent, T>& shared,
                                                           int q) const {
    Pixel<kTangent, T> pixel = {};
    const int from = channel();
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      const T x = x_[q / 2 + k / kSide][q % 2 + k % kSide];
      add(x, shared.weights[k] + from, pixel.z);
      if constexpr (kTangent) add(x, shared.tangents[k] + from, pixel.tangent);
    }
    return pixel;
  }
  static __device__ __forceinline__ void add(T x, const T* weights, Channels<T>& z) {
    const Channels<T> of_place = load_vector<kChannels<T>>(weights);
#pragma unroll
    for (int e = 0; e < kChannels<T>; ++e) z.values[e] += x * of_place.values[e];
  }
};

// ---- forward ----

template <typename T>
struct ThinForward {
  BlockForward<T> p;
  ThinSource<T> source;
  unsigned slices;
};

template <bool kTangent, typename T>
__global__ void __launch_bounds__(kMapThreads) thin_forward(const __grid_constant__ ThinForward<T> thin) {
  const BlockForward<T>& p = thin.p;
  const BlockShape& s = p.shape;
  auto& shared = shared_memory<ThinShared<kTangent, T>>();
  const Place<T> at(s.pitch, s.images * s.out_height * s.out_width, thin.slices);
  if (at.task >= s.tasks) return;
  prepare(shared, p, thin.source, at, [&](int channel, const ThinStatistics<kTangent>& of) {
    const auto& from = kTangent ? thin.source.tangent : thin.source.z;
    const auto bias =
        from.bias != nullptr ? static_cast<double>(from.bias[at.task * from.bias_task + channel]) : 0.0;
    const int64_t to = at.task * s.pitch + channel;
    if constexpr (kTangent) {
      p.mean_tangent[to] = static_cast<T>(of.centre_tangent + bias);
      p.scale_tangent[to] = static_cast<T>(of.scale_tangent);
    } else {
      p.mean[to] = static_cast<T>(of.centre + bias);
      p.rstd[to] = static_cast<T>(of.rstd);
      p.var[to] = static_cast<T>(of.var);
    }
  });
  const Maps<T>& out = kTangent ? p.out_tangent : p.out;
  Raster to(s.out_height, s.out_width, at.begin);
  for (int i = at.begin; i < at.end; i += at.step) {
    ThinWindow<kTangent, T> window(thin.source.x, shared, at, to);
    activate<kTangent>(s.activation, window.y);
    store_channels(out, p.pairs, at, to.image, to.y, to.x, kTangent ? window.y.tangent : window.y.value);
    to.advance(at.step);
  }
}

template <bool kTangent, typename T>
void launch_thin(const BlockForward<T>& p, Stream stream) {
  const int64_t slices = slices_of<T>(p.shape, p.shape.images * p.shape.out_height * p.shape.out_width);
  launch_kernel({"thin_forward", grid_of_slices<T>(p.shape, slices), kMapThreads,
                 sizeof(ThinShared<kTangent, T>), stream},
                thin_forward<kTangent, T>,
                ThinForward<T>{p, ThinSource<T>(p.thin), static_cast<unsigned>(slices)});
}

// ---- backward ----

// Sums over windows: of what reaches y, of that times n, of that times x_k; then of their tangents.
template <bool kTangent>
constexpr int kThinSums = (kTangent ? 2 : 1) * (2 + kTaps);

template <typename T>
struct ThinBackward {
  BlockBackward<T> p;
  ThinSource<T> source;
  T *weights, *bias;  // their gradients, tasks p.grad_task apart; bias may be null
};

template <bool kTangent, typename T>
struct ThinSumsShared {
  ThinShared<kTangent, T> of_block;
  T threads[kMapThreads * kChannels<T>];
};

template <bool kTangent, typename T>
__device__ __forceinline__ T* thin_sums_of(const BlockBackward<T>& p, int64_t task, int64_t part) {
  return p.workspace + (task * p.shape.parts() + part) * kThinSums<kTangent> * p.shape.pitch;
}

// The sums of a part of a task's windows.
template <bool kTangent, typename T>
__global__ void __launch_bounds__(kMapThreads, 2)
    thin_gradient_sums(const __grid_constant__ ThinBackward<T> thin) {
  constexpr int kLength = kChannels<T>, kSums = kThinSums<kTangent>, kOfTangents = 2 + kTaps;
  const BlockBackward<T>& p = thin.p;
  const BlockShape& s = p.shape;
  auto& shared = shared_memory<ThinSumsShared<kTangent, T>>();
  const Place<T> at(s.pitch, s.images * s.out_height * s.out_width, static_cast<unsigned>(s.parts()));
  if (at.task >= s.tasks) return;
  prepare(shared.of_block, p, thin.source, at, [](int, const auto&) {});
  T sums[kSums][kLength] = {};
  Raster from(s.out_height, s.out_width, at.begin);
  for (int i = at.begin; i < at.end; i += at.step) {
    const ThinWindow<kTangent, T> window(thin.source.x, shared.of_block, at, from);
    Duals<T> grad = load_gradient<kTangent>(p, at, from.image, from.y, from.x);
    pass_through<kTangent>(s.activation, window.y, grad);
#pragma unroll
    for (int e = 0; e < kLength; ++e) {
      T x[kTaps];
      window.seen(e, x);
      sums[0][e] += grad.value[e];
      sums[1][e] += grad.value[e] * window.n.value[e];
#pragma unroll
      for (int k = 0; k < kTaps; ++k) sums[2 + k][e] += grad.value[e] * x[k];
      if constexpr (kTangent) {
        sums[kOfTangents][e] += grad.tangent[e];
        sums[kOfTangents + 1][e] += grad.tangent[e] * window.n.value[e] + grad.value[e] * window.n.tangent[e];
#pragma unroll
        for (int k = 0; k < kTaps; ++k) sums[kOfTangents + 2 + k][e] += grad.tangent[e] * x[k];
      }
    }
    from.advance(at.step);
  }
  T* const to = thin_sums_of<kTangent>(p, at.task, at.slice);
  const int c = threadIdx.x;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    __syncthreads();  // the readers of the one before are done
#pragma unroll
    for (int e = 0; e < kLength; ++e) shared.threads[threadIdx.x * kLength + e] = sums[k][e];
    __syncthreads();
    if (c >= at.channels || at.group + c >= s.pitch) continue;
    T total = 0;
    for (int lane = 0; lane < at.step; ++lane) total += shared.threads[lane * at.channels + c];
    to[k * s.pitch + at.group + c] = total;
  }
}

constexpr int kThinThreads = 512, kThinChannels = 16;  // of a task, that a block finishes

template <bool kTangent, typename T>
struct ThinGradientShared {
  Moments moments;
  T sums[kThinSums<kTangent>][kThinChannels];
};

// The gradients, from the sums of all parts.
template <bool kTangent, typename T>
__global__ void __launch_bounds__(kThinThreads) thin_gradient(const __grid_constant__ ThinBackward<T> thin) {
  static_assert(kChannelBlock == kThinChannels);
  constexpr int kSums = kThinSums<kTangent>, kOfTangents = 2 + kTaps;
  const BlockBackward<T>& p = thin.p;
  const BlockShape& s = p.shape;
  auto& shared = shared_memory<ThinGradientShared<kTangent, T>>();
  const int64_t task = block_index() / s.blocks(), first = block_index() % s.blocks() * kThinChannels;
  if (task >= s.tasks) return;
  shared.moments.load(thin.source.moments, task, s);
  for (int i = threadIdx.x; i < kSums * kThinChannels; i += kThinThreads) {
    const int k = i / kThinChannels, c = i % kThinChannels;
    T sum = 0;
#pragma unroll 8
    for (int64_t part = 0; part < s.parts(); ++part) {
      sum += thin_sums_of<kTangent>(p, task, part)[k * s.pitch + first + c];
    }
    shared.sums[k][c] = sum;
  }
  __syncthreads();
  const int c = threadIdx.x;
  if (c >= kThinChannels) return;
  const int64_t channel = first + c, to = task * p.grad_task + channel;
  const auto& source = thin.source;
  const T* const tangents =
      kTangent ? source.tangent.weights + task * source.tangent.task + channel : nullptr;
  const ThinStatistics<kTangent> of(shared.moments, source.z.weights + task * source.z.task + channel,
                                    tangents, s.pitch, s.eps);
  const auto vector = [&](const T* from, int64_t stride, double otherwise) {
    return from != nullptr ? static_cast<double>(from[task * stride + channel]) : otherwise;
  };
  const double gamma = vector(p.gamma, p.affine_task, 1), factor = gamma * of.rstd;
  const auto sum = [&](int k) { return static_cast<double>(shared.sums[k][c]); };
  if (p.grad_beta != nullptr) p.grad_beta[to] = static_cast<T>(sum(kTangent ? kOfTangents : 0));
  if (p.grad_gamma != nullptr) p.grad_gamma[to] = static_cast<T>(sum(kTangent ? kOfTangents + 1 : 1));
  if (thin.bias != nullptr) thin.bias[to] = 0;  // norm takes away what a bias adds
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    const double mean = shared.moments.mean(k), scaled = of.rstd * of.spread[k];
    const double inner = sum(2 + k) - sum(0) * mean - sum(1) * scaled;
    double result = factor * inner;
    if constexpr (kTangent) {
      const double factor_tangent =
          vector(p.gamma_tangent, p.tangent_task, 0) * of.rstd - factor * of.rstd * of.scale_tangent;
      const double scaled_tangent = of.rstd * (of.spread_tangent[k] - scaled * of.scale_tangent);
      const double inner_tangent = sum(kOfTangents + 2 + k) - sum(kOfTangents) * mean -
                                   sum(1) * scaled_tangent - sum(kOfTangents + 1) * scaled;
      result = factor_tangent * inner + factor * inner_tangent;
    }
    thin.weights[to + k * s.pitch] = static_cast<T>(result);
  }
}

template <bool kTangent, typename T>
void launch_thin(const BlockBackward<T>& p, Stream stream) {
  const ThinBackward<T> thin{p, ThinSource<T>(p.thin), p.weights->out, p.weights->out_bias};
  launch_kernel({"thin_gradient_sums", grid_of_slices<T>(p.shape, p.shape.parts()), kMapThreads,
                 sizeof(ThinSumsShared<kTangent, T>), stream},
                thin_gradient_sums<kTangent, T>, thin);
  launch_kernel({"thin_gradient", grid_of(p.shape.tasks * p.shape.blocks()), kThinThreads,
                 sizeof(ThinGradientShared<kTangent, T>), stream},
                thin_gradient<kTangent, T>, thin);
}

}  // namespace

template <typename T>
void launch(const ThinMoments<T>& p, Stream stream) {
  launch_kernel({"thin_moments", grid_of(p.tasks * kMomentParts), kMapThreads, sizeof(MomentsShared), stream},
                thin_moments<T>, p);
}

}  // namespace metafast::cuda
