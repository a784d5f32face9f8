// The gradients of convolutions' weights, matrix products [rows, pixels] [pixels, channels] of each task.
// Part of cuda.cu.
#pragma once

#include <algorithm>

#include "convolutional/cuda_convolve.h"
#include "convolutional/cuda_maps.h"

namespace metafast::cuda {
namespace {

// Of one pixel: its source for row 0, and the gradients of all channels.
template <typename T>
struct alignas(16) Seen {
  const T* source;
  const T* grad;
};

template <class Tile>
struct WeightsShared {
  Stage<Tile, false> stages[Tile::kStages];
  Seen<typename Tile::Scalar> seen[2][Tile::kInner];
};

// kLength: numbers of the source that are copied at once.
template <class Tile, int kLength, typename T>
__global__ void __launch_bounds__(Tile::kThreads)
    convolve_weights(const __grid_constant__ ConvolveWeights<T> p) {
  constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kInner = Tile::kInner, kThreads = Tile::kThreads;
  constexpr int kVector = kVectorLength<T>, kInNumber = Tile::kInNumber;
  static_assert(kThreads >= kCols, "a thread for each sum of a column");
  auto& shared = shared_memory<WeightsShared<Tile>>();
  const int pitch = static_cast<int>(p.pitch);
  // Of numbers, as are those of tiles; the result has kInNumber times as many.
  const int rows = static_cast<int>(p.taps_y * p.taps_x * p.depth), cols = pitch / kInNumber;
  const auto parts = static_cast<unsigned>(p.parts());
  const unsigned row_tiles = std::max(div_up(rows, kRows), 1), col_tiles = div_up(cols, kCols);
  const auto block = static_cast<unsigned>(block_index());
  const unsigned owner = block / (row_tiles * col_tiles), tile = block % (row_tiles * col_tiles);
  const unsigned task = owner / parts, part = owner % parts;
  if (task >= p.tasks) return;
  const int first_row = static_cast<int>(tile / col_tiles) * kRows;
  const int first_col = static_cast<int>(tile % col_tiles) * kCols;

  using Lefts = Copies<kThreads, kInner, kRows, kLength>;
  using Rights = Copies<kThreads, kInner, kCols, kVector>;
  const int i = Lefts::at(), row = first_row + i, col = Rights::at();
  const bool has_row = row < rows, has_col = first_col + col < cols;
  const int tap = has_row ? row / static_cast<int>(p.depth) : 0;
  const int tap_y = has_row ? tap / static_cast<int>(p.taps_x) : 0;
  const int64_t of_row =
      has_row ? tap_y * p.tap_row + (tap - tap_y * p.taps_x) * p.tap_pixel + row - tap * p.depth : 0;

  const int pixels = static_cast<int>(p.pixels()), size = div_up(pixels, static_cast<int>(parts));
  const int begin = min(static_cast<int>(part) * size, pixels), end = min(begin + size, pixels);
  const int stages = div_up(end - begin, kInner);  // of a factor
  // This thread's pixel, and which one of a factor's stages is next, here and for the copies.
  Raster pixel(p.height, p.width, begin + static_cast<int>(threadIdx.x));
  const Raster start = pixel;
  int factor = 0, located = 0, copied = 0;
  const auto locate = [&](int c) {
    if (threadIdx.x >= kInner) return;
    if (located == stages) {
      located = 0;
      ++factor;
      pixel = start;
    }
    ++located;
    const auto& f = p.factors[factor];
    shared.seen[c % 2][threadIdx.x] = {f.source.at(task, pixel.image, pixel.y, pixel.x),
                                       f.grad.at(task, pixel.image, pixel.y, pixel.x)};
    pixel.advance(kInner);
  };
  const auto copy = [&](int c, Stage<Tile, false>& stage) {
    const Seen<T>* const seen = shared.seen[c % 2];
    const int left = end - begin - copied * kInner;
    copied = copied + 1 == stages ? 0 : copied + 1;
    Lefts::each_line([&](int k) {
      copy_async_cached<kLength>(stage.left + stage.left_at(i, k), seen[k].source + of_row,
                                 k < left && has_row);
    });
    Rights::each_line([&](int k) {
      copy_async_cached<kVector>(stage.right + k * stage.kRightPitch + col, seen[k].grad + first_col + col,
                                 k < left && has_col);
    });
  };
  T bias[kInNumber] = {};
  const bool sums_bias = p.out_bias != nullptr && first_row == 0 && threadIdx.x < kCols;
  typename Tile::template Sums<false> sums;
  run_stages(shared.stages, p.count * stages, sums, locate, copy, [&](int c, const auto& stage) {
    if (!sums_bias || c >= stages) return;
#pragma unroll
    for (int k = 0; k < kInner; ++k) {
      const T number = stage.right[k * stage.kRightPitch + threadIdx.x];
      if constexpr (kInNumber == 1) {
        bias[0] += number;
      } else {
        bias[0] += __uint_as_float(__float_as_uint(number) << 16);
        bias[1] += __uint_as_float(__float_as_uint(number) & 0xffff0000u);
      }
    }
  });

  T* out = p.out + task * p.out_task;
  T* out_bias = p.out_bias + task * p.out_task;
  if (parts > 1) {
    out = p.workspace + static_cast<int64_t>(owner) * (rows * kInNumber + 1) * pitch;
    out_bias = out + static_cast<int64_t>(rows * kInNumber) * pitch;
  }
  if (sums_bias && first_col + static_cast<int>(threadIdx.x) < cols) {
#pragma unroll
    for (int e = 0; e < kInNumber; ++e) out_bias[(first_col + threadIdx.x) * kInNumber + e] = bias[e];
  }
  sums.each([&]<int kCount>(int of_row, int of_col, const Vector<T, kCount>& vector) {
    const int row = first_row * kInNumber + of_row, col = first_col * kInNumber + of_col;
    if (row >= rows * kInNumber || col >= pitch) return;
    store_vector(out + static_cast<int64_t>(row) * pitch + col, vector);
  });
}

constexpr int kSumThreads = 128;

// Adds the parts of a task in order; a thread to a vector of the gradient.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_weights(const __grid_constant__ ConvolveWeights<T> p) {
  constexpr int kVector = kVectorLength<T>;
  const int64_t size = p.rows() * p.pitch, of_task = size + p.pitch;
  const int64_t index = (block_index() * kSumThreads + threadIdx.x) * kVector;
  const int64_t task = index / of_task, i = index % of_task;
  if (task >= p.tasks || (i >= size && p.out_bias == nullptr)) return;
  const T* from = p.workspace + task * p.parts() * of_task + i;
  Vector<T, kVector> sum = load_vector<kVector>(from);
#pragma unroll 4
  for (int64_t part = 1; part < p.parts(); ++part) {
    const Vector<T, kVector> more = load_vector<kVector>(from + part * of_task);
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum.values[e] += more.values[e];
  }
  store_vector((i < size ? p.out + i : p.out_bias + (i - size)) + task * p.out_task, sum);
}

template <class Tile, int kLength, typename T>
void launch_weights(const ConvolveWeights<T>& p, Stream stream) {
  const int64_t tiles = std::max<int64_t>(div_up<int64_t>(p.rows(), Tile::kRows * Tile::kInNumber), 1) *
                        div_up<int64_t>(p.pitch, Tile::kCols * Tile::kInNumber);
  launch_kernel({"convolve_weights", grid_of(p.tasks * p.parts() * tiles), Tile::kThreads,
                 sizeof(WeightsShared<Tile>), stream},
                convolve_weights<Tile, kLength, T>, p);
  if (p.parts() == 1) return;
  const int64_t elements = p.tasks * (p.rows() + 1) * p.pitch;
  launch_kernel({"sum_weights", grid_of(div_up<int64_t>(elements, kSumThreads * kVectorLength<T>)),
                 kSumThreads, 0, stream},
                sum_weights<T>, p);
}

template <class Format>
void launch_on_tensor_cores(const ConvolveWeights<float>& p, Stream stream) {
  constexpr int kVector = kVectorLength<float>;
  if (p.pitch <= kFewChannels) return launch_weights<TensorTile<Format, 64, 32, 32, 32>, kVector>(p, stream);
  launch_weights<TensorTile<Format, 128, 64, 64, 64>, kVector>(p, stream);
}

}  // namespace

template <typename T>
void launch(const ConvolveWeights<T>& p, Stream stream) {
  constexpr int kVector = kVectorLength<T>;
  const bool vectors = in_vectors(p);
  if constexpr (sizeof(T) == sizeof(double)) {
    if (vectors) return launch_weights<FmaTile<T, 64, 32, 4, 4>, kVector>(p, stream);
    launch_weights<FmaTile<T, 16, 32, 2, 4>, 1>(p, stream);
  } else {
    // What is not in vectors are images of few channels, hence few rows.
    if (!vectors) return launch_weights<FmaTile<T, 16, 64, 4, 4>, 1>(p, stream);
    if (p.rounding == Rounding::tf32) return launch_on_tensor_cores<Tf32>(p, stream);
    if (p.rounding == Rounding::bfloat16) return launch_on_tensor_cores<Bfloat16>(p, stream);
    if (p.rounding == Rounding::pairs) {
      if (p.pitch <= kFewChannels) return launch_weights<PairedTile<64, 32, 32, 32>, kVector>(p, stream);
      return launch_weights<PairedTile<128, 64, 64, 64>, kVector>(p, stream);
    }
    if (p.pitch <= kFewChannels) return launch_weights<FmaTile<T, 64, 32, 8, 4>, kVector>(p, stream);
    launch_weights<FmaTile<T, 64, 64, 8, 8>, kVector>(p, stream);
  }
}

}  // namespace metafast::cuda
