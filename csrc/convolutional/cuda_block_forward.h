// Norm, activation and pooling, and their tangents. Two launches with norm: sums over parts of the pixels,
// then the results. Part of cuda.cu.
#pragma once

#include "convolutional/cuda_block.h"
#include "convolutional/cuda_thin.h"

namespace metafast::cuda {
namespace {

// How many of `size` items a lane has.
__device__ __forceinline__ int items_of(int size, int lane, int lanes) {
  return lane < size ? (size - lane + lanes - 1) / lanes : 0;
}

// Of a task's part: mean and sum of squares around it, of z - z of the task's first pixel. Numbers far from 0
// are near to each other then. The squares are summed around the mean of a few pixels each, which are put
// together as Chan, Golub and LeVeque (1983).
template <typename T>
__device__ __forceinline__ void measure(const BlockForward<T>& p, const Place<T>& at,
                                        SumShared<T, 2>& shared) {
  constexpr int kAtOnce = 8, kLength = kChannels<T>;
  const BlockShape& s = p.shape;
  Channels<T> shift{};
  if (at.inside) shift = load_vector<kLength>(p.z.at(at.task, 0, 0, 0) + at.channel);
  T mean[kLength] = {}, squares[kLength] = {}, count = 0;
  Raster pixel(s.height, s.width, at.begin);
  for (int first = at.begin; first < at.end; first += kAtOnce * at.step) {
    const int more = min(kAtOnce, (at.end - first + at.step - 1) / at.step);
    Channels<T> z[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      z[i] = shift;
      if (i < more) z[i] = load_vector<kLength>(p.z.at(at.task, pixel.image, pixel.y, pixel.x) + at.channel);
      pixel.advance(at.step);
    }
    const T inverse = T(1) / static_cast<T>(more);
    const T share = static_cast<T>(more) / (count + static_cast<T>(more));
#pragma unroll
    for (int e = 0; e < kLength; ++e) {
      T sum = 0, of_squares = 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += z[i].values[e] - shift.values[e];
      const T centre = sum * inverse;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const T centred = z[i].values[e] - shift.values[e] - centre;
        of_squares += i < more ? centred * centred : T(0);
      }
      const T apart = centre - mean[e];
      mean[e] += apart * share;
      squares[e] += of_squares + apart * apart * share * count;
    }
    count += static_cast<T>(more);
  }
#pragma unroll
  for (int e = 0; e < kLength; ++e) {
    const int i = threadIdx.x * kLength + e;  // the lane's vectors lie one behind the other
    shared.threads[0][i] = mean[e];
    shared.threads[1][i] = squares[e];
  }
  const int size = at.end - at.first;
  reduce_lanes(shared, at, s, p.workspace, [&](const auto& value, T(&totals)[2]) {
    T sum = 0, of_squares = 0;
    for (int lane = 0; lane < at.step; ++lane) {
      sum += static_cast<T>(items_of(size, lane, at.step)) * value(0, lane);
    }
    const T centre = size > 0 ? sum / static_cast<T>(size) : T(0);
    for (int lane = 0; lane < at.step; ++lane) {
      const T apart = value(0, lane) - centre;
      of_squares += value(1, lane) + static_cast<T>(items_of(size, lane, at.step)) * apart * apart;
    }
    totals[0] = centre;
    totals[1] = of_squares;
  });
}

// Of a task's part: the sums of dz and n dz.
template <typename T>
__device__ __forceinline__ void measure_tangent(const BlockForward<T>& p, const Place<T>& at,
                                                SumShared<T, 2>& shared) {
  constexpr int kLength = kChannels<T>;
  const BlockShape& s = p.shape;
  const Channels<T> mean = load_channels<T>(p.mean, s.pitch, at, 0);
  const Channels<T> rstd = load_channels<T>(p.rstd, s.pitch, at, 0);
  T sum[kLength] = {}, scale[kLength] = {};
  Raster pixel(s.height, s.width, at.begin);
#pragma unroll 4
  for (int i = at.begin; i < at.end; i += at.step) {
    const Channels<T> z = load_vector<kLength>(p.z.at(at.task, pixel.image, pixel.y, pixel.x) + at.channel);
    const Channels<T> tangent =
        load_vector<kLength>(p.z_tangent.at(at.task, pixel.image, pixel.y, pixel.x) + at.channel);
    pixel.advance(at.step);
#pragma unroll
    for (int e = 0; e < kLength; ++e) {
      sum[e] += tangent.values[e];
      scale[e] += (z.values[e] - mean.values[e]) * rstd.values[e] * tangent.values[e];
    }
  }
#pragma unroll
  for (int e = 0; e < kLength; ++e) {
    shared.threads[0][threadIdx.x * kLength + e] = sum[e];
    shared.threads[1][threadIdx.x * kLength + e] = scale[e];
  }
  reduce_lanes(shared, at, s, p.workspace, [&](const auto& value, T(&totals)[2]) {
    totals[0] = totals[1] = 0;
    for (int lane = 0; lane < at.step; ++lane) {
      totals[0] += value(0, lane);
      totals[1] += value(1, lane);
    }
  });
}

template <bool kTangent, typename T>
__global__ void __launch_bounds__(kMapThreads) block_statistics(const __grid_constant__ BlockForward<T> p) {
  auto& shared = shared_memory<SumShared<T, 2>>();
  const Place<T> at(p.shape.pitch, p.shape.pixels(), static_cast<unsigned>(p.shape.parts()));
  if (at.task >= p.shape.tasks) return;
  if constexpr (kTangent) {
    measure_tangent(p, at, shared);
  } else {
    measure(p, at, shared);
  }
}

// Puts the parts together, in `affine` and, by the first slice, in memory.
template <typename T>
__device__ __forceinline__ void find_statistics(const BlockForward<T>& p, const Place<T>& at,
                                                SumShared<T, 2>& shared, Affine<false, T>& affine) {
  const BlockShape& s = p.shape;
  const int parts = static_cast<int>(s.parts()), pixels = static_cast<int>(s.pixels());
  const int size = Place<T>::size_of(pixels, parts);
  const int channel =
      min(at.group + static_cast<int>(threadIdx.x) % at.channels, static_cast<int>(s.pitch) - 1);
  const auto count = [&](int part) {
    return static_cast<T>(min((part + 1) * size, pixels) - min(part * size, pixels));
  };
  const auto statistic = [&](int part, int k) {
    return workspace_at(p.workspace, s, at.task, part, k)[channel];
  };
  T sum[1], squares[1];
  sum_parts(
      shared, at, parts, [&](int part, T(&total)[1]) { total[0] += count(part) * statistic(part, 0); }, sum);
  const T centre = sum[0] / static_cast<T>(pixels);
  sum_parts(
      shared, at, parts,
      [&](int part, T(&total)[1]) {
        const T apart = statistic(part, 0) - centre;
        total[0] += statistic(part, 1) + count(part) * apart * apart;
      },
      squares);
  const T mean = p.z.at(at.task, 0, 0, 0)[channel] + centre, var = squares[0] / static_cast<T>(pixels);
  const T values[2] = {mean, 1 / Math<T>::sqrt(var + static_cast<T>(s.eps))};
  Channels<T> mine[2];
  deal_out(shared, at, values, mine);
  affine.mean = mine[0];
  affine.rstd = mine[1];
  if (!at.reports(s)) return;
  const int64_t to = at.task * s.pitch + channel;
  p.mean[to] = mean;
  p.rstd[to] = values[1];
  p.var[to] = var;
}

template <typename T>
__device__ __forceinline__ void find_statistics(const BlockForward<T>& p, const Place<T>& at,
                                                SumShared<T, 2>& shared, Affine<true, T>& affine) {
  const BlockShape& s = p.shape;
  const int channel =
      min(at.group + static_cast<int>(threadIdx.x) % at.channels, static_cast<int>(s.pitch) - 1);
  T sums[2];
  sum_parts(
      shared, at, static_cast<int>(s.parts()),
      [&](int part, T(&total)[2]) {
        for (int k = 0; k < 2; ++k) total[k] += workspace_at(p.workspace, s, at.task, part, k)[channel];
      },
      sums);
  for (T& sum : sums) sum /= static_cast<T>(s.pixels());
  Channels<T> mine[2];
  deal_out(shared, at, sums, mine);
  affine.mean_tangent = mine[0];
  affine.scale_tangent = mine[1];
  affine.mean = load_channels<T>(p.mean, s.pitch, at, 0);
  affine.rstd = load_channels<T>(p.rstd, s.pitch, at, 1);
  if (!at.reports(s)) return;
  p.mean_tangent[at.task * s.pitch + channel] = sums[0];
  p.scale_tangent[at.task * s.pitch + channel] = sums[1];
}

template <typename T>
struct SlicedForward {
  BlockForward<T> p;
  unsigned slices;
};

template <int kSide, bool kTangent, typename T>
__global__ void __launch_bounds__(kMapThreads)
    block_forward(const __grid_constant__ SlicedForward<T> sliced) {
  const BlockForward<T>& p = sliced.p;
  const BlockShape& s = p.shape;
  auto& shared = shared_memory<SumShared<T, 2>>();
  const Place<T> at(s.pitch, s.images * s.out_height * s.out_width, sliced.slices);
  if (at.task >= s.tasks) return;
  Affine<kTangent, T> affine(p, at, false);
  if (s.norm) find_statistics(p, at, shared, affine);
  const Maps<T>& out = kTangent ? p.out_tangent : p.out;
  Raster to(s.out_height, s.out_width, at.begin);
  for (int i = at.begin; i < at.end; i += at.step) {
    Look<kTangent, T> look(s, affine);
    if constexpr (kSide > 0) {
      Square<kSide, kTangent, T> square;
      square.load(p, at, to);
      square.look(look);
    } else {
      look_at(p, at, to.image, Window(s, to.y, to.x), look);
    }
    look.finish();
    if (pools_first(s)) activate<kTangent>(s.activation, look.y);
    store_channels(out, p.pairs, at, to.image, to.y, to.x, kTangent ? look.y.tangent : look.y.value);
    to.advance(at.step);
  }
}

template <bool kTangent, typename T>
void launch_forward(BlockForward<T> p, Stream stream) {
  p.shape = with_windows(p.shape);
  if (p.shape.norm) {
    launch_kernel({"block_statistics", grid_of_slices<T>(p.shape, p.shape.parts()), kMapThreads,
                   sizeof(SumShared<T, 2>), stream},
                  block_statistics<kTangent, T>, p);
  }
  const int64_t slices = slices_of<T>(p.shape, p.shape.images * p.shape.out_height * p.shape.out_width);
  with_side<T>(p.shape, [&]<int kSide>() {
    launch_kernel(
        {"block_forward", grid_of_slices<T>(p.shape, slices), kMapThreads, sizeof(SumShared<T, 2>), stream},
        block_forward<kSide, kTangent, T>, SlicedForward<T>{p, static_cast<unsigned>(slices)});
  });
}

}  // namespace

template <typename T>
void launch(const BlockForward<T>& p, Stream stream) {
  if (p.thin.z != nullptr) return p.tangent() ? launch_thin<true>(p, stream) : launch_thin<false>(p, stream);
  if (p.tangent()) return launch_forward<true>(p, stream);
  launch_forward<false>(p, stream);
}

}  // namespace metafast::cuda
