// Convolutions of tasks with weights of their own, as matrix products [pixels, k] [k, channels] of which the
// left operand is never written down. Part of cuda.cu.
#pragma once

#include <algorithm>
#include <type_traits>

#include "convolutional/cuda_maps.h"
#include "convolutional/cuda_product.h"
#include "convolutional/params.h"

namespace metafast::cuda {
namespace {

// Of one k: what pixel 0 of the task multiplies it with, and the weights of all channels.
template <typename T>
struct alignas(16) Term {
  const T* source;
  const T* weights;
};

template <class Tile>
struct ConvolveShared {
  Stage<Tile, true> stages[Tile::kStages];
  Term<typename Tile::Scalar> terms[2][Tile::kInner];
  int64_t source[Tile::kRows], out[Tile::kRows];  // of the tile's pixels, from those of pixel 0
};

// A thread's k in each stage. They go through the factors, of each through the taps, of each through its
// depth; or, kTapsFirst, where that is a multiple of what a stage holds, first through the taps: these find
// in the cache what others before them have copied.
template <typename T, int kInner, bool kTapsFirst>
class Terms {
 public:
  __device__ __forceinline__ Terms(const Convolve<T>& p, int64_t task, int lane)
      : p_(p), task_(task), depth_(static_cast<int>(p.depth)), at_(lane) {
    if constexpr (!kTapsFirst) settle();
  }

  __device__ __forceinline__ Term<T> get() const {
    const int factor = min(factor_, p_.count - 1);  // of those behind the last, which are not read, any
    const auto& f = p_.factors[factor];
    return {
        f.source.data + task_ * f.source.task + i_ * p_.tap_row + j_ * p_.tap_pixel + at_,
        f.weights + task_ * f.weights_task + i_ * p_.weights_row + j_ * p_.weights_pixel + at_ * p_.pitch};
  }

  __device__ __forceinline__ void advance() {
    if constexpr (!kTapsFirst) {
      at_ += kInner;
      settle();
    } else if (next_tap()) {
      at_ += kInner;
      if (at_ >= depth_) {
        at_ %= kInner;
        ++factor_;
      }
    }
  }

 private:
  const Convolve<T>& p_;
  const int64_t task_;
  const int depth_;
  int factor_ = 0, i_ = 0, j_ = 0, at_;

  // Whether that was the last one: then it is at the first again.
  __device__ __forceinline__ bool next_tap() {
    if (++j_ < p_.taps_x) return false;
    j_ = 0;
    if (++i_ < p_.taps_y) return false;
    i_ = 0;
    return true;
  }
  __device__ __forceinline__ void settle() {
    while (at_ >= depth_ && factor_ < p_.count) {
      at_ -= depth_;
      factor_ += next_tap();
    }
  }
};

// kLength: numbers of the source that are copied at once. More than one: the depth is a multiple of what a
// stage holds.
template <class Tile, int kLength, typename T>
__global__ void __launch_bounds__(Tile::kThreads) convolve(const __grid_constant__ Convolve<T> p) {
  constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kInner = Tile::kInner, kThreads = Tile::kThreads;
  constexpr int kVector = kVectorLength<T>;
  static_assert(kChannelBlock % kInner == 0);
  auto& shared = shared_memory<ConvolveShared<Tile>>();
  const int pixels = static_cast<int>(p.pixels()), pitch = static_cast<int>(p.pitch);
  const auto block = static_cast<unsigned>(block_index());
  const unsigned row_tiles = div_up(pixels, kRows), col_tiles = div_up(pitch, kCols);
  const unsigned task = block / (row_tiles * col_tiles), tile = block % (row_tiles * col_tiles);
  if (task >= p.tasks) return;
  const int first_row = static_cast<int>(tile / col_tiles) * kRows;
  const int first_col = static_cast<int>(tile % col_tiles) * kCols;

  for (int row = threadIdx.x; row < kRows; row += kThreads) {
    const Raster pixel(p.height, p.width, min(first_row + row, pixels - 1));
    const auto& source = p.factors[0].source;
    shared.source[row] = pixel.image * source.image + pixel.y * source.row + pixel.x * source.pixel;
    shared.out[row] = pixel.image * p.out.image + pixel.y * p.out.row + pixel.x * p.out.pixel;
  }

  const int terms = static_cast<int>(p.count * p.taps_y * p.taps_x * p.depth);
  Terms<T, kInner, (kLength > 1)> mine(p, task, threadIdx.x % kInner);
  const auto locate = [&](int c) {
    if (threadIdx.x >= kInner) return;
    shared.terms[c % 2][threadIdx.x] = mine.get();
    mine.advance();
  };
  const auto copy = [&](int c, Stage<Tile, true>& stage) {
    const Term<T>* const located = shared.terms[c % 2];
    const int left = terms - c * kInner;
    using Lefts = Copies<kThreads, kRows, kInner, kLength>;
    using Rights = Copies<kThreads, kInner, kCols, kVector>;
    const int k = Lefts::at(), col = Rights::at();
    const T* const source = located[k].source;
    Lefts::each_line([&](int row) {
      copy_async_cached<kLength>(stage.left + stage.left_at(row, k), source + shared.source[row], k < left);
    });
    const bool inside = first_col + col < pitch;
    Rights::each_line([&](int k) {
      copy_async_cached<kVector>(stage.right + k * stage.kRightPitch + col,
                                 located[k].weights + first_col + col, k < left && inside);
    });
  };
  typename Tile::template Sums<true> sums;
  run_stages(shared.stages, div_up(terms, kInner), sums, locate, copy, [](int, const auto&) {});

  const T* const bias = p.bias != nullptr ? p.bias + task * p.bias_task : nullptr;
  T* const out = p.out.data + task * p.out.task;
  sums.each([&]<int kCount>(int row, int col, Vector<T, kCount> vector) {
    if (first_row + row >= pixels || first_col + col >= pitch) return;
    T* const to = out + shared.out[row] + first_col + col;
    if (bias != nullptr) {
      const Vector<T, kCount> more = load_vector<kCount>(bias + first_col + col);
#pragma unroll
      for (int e = 0; e < kCount; ++e) vector.values[e] += more.values[e];
    }
    if (p.adds) {
      const Vector<T, kCount> more = load_vector<kCount>(to);
#pragma unroll
      for (int e = 0; e < kCount; ++e) vector.values[e] += more.values[e];
    }
    store_vector(to, vector);
  });
}

template <class Tile, int kLength, typename T>
void launch_convolve(const Convolve<T>& p, Stream stream) {
  const int64_t tiles = div_up<int64_t>(p.pixels(), Tile::kRows) * div_up<int64_t>(p.pitch, Tile::kCols);
  launch_kernel({"convolve", grid_of(p.tasks * tiles), Tile::kThreads, sizeof(ConvolveShared<Tile>), stream},
                convolve<Tile, kLength, T>, p);
}

// Whether the sources of all factors can be copied in vectors.
template <class Params>
bool in_vectors(const Params& p) {
  return std::all_of(p.factors, p.factors + p.count, [&p](const auto& factor) {
    using T = std::remove_cvref_t<decltype(*factor.source.data)>;
    const auto& maps = factor.source;
    const int64_t strides =
        maps.task | maps.image | maps.row | maps.pixel | p.tap_row | p.tap_pixel | p.depth;
    return is_vectorizable<T>(maps.data, kVectorLength<T>, strides);
  });
}

// Results of no more channels go into narrower tiles.
constexpr int64_t kFewChannels = 32;
// Where there are fewer large tiles than a device takes at once, small ones.
constexpr int64_t kManyTiles = 256, kLargeRows = 128, kLargeCols = 64;

template <class Format>
void launch_on_tensor_cores(const Convolve<float>& p, bool many, Stream stream) {
  constexpr int kVector = kVectorLength<float>;
  if (p.pitch <= kFewChannels) return launch_convolve<TensorTile<Format, 64, 32, 32, 32>, kVector>(p, stream);
  if (many) return launch_convolve<TensorTile<Format, kLargeRows, kLargeCols, 64, 64>, kVector>(p, stream);
  launch_convolve<TensorTile<Format, 64, 64, 32, 32>, kVector>(p, stream);
}

template <typename T>
void launch_in_vectors(const Convolve<T>& p, Stream stream) {
  constexpr int kVector = kVectorLength<T>;
  if constexpr (sizeof(T) == sizeof(double)) {
    launch_convolve<FmaTile<T, 64, 32, 4, 4>, kVector>(p, stream);
  } else {
    const bool many = p.tasks * (p.pixels() / kLargeRows) * div_up(p.pitch, kLargeCols) >= kManyTiles;
    if (p.rounding == Rounding::tf32) return launch_on_tensor_cores<Tf32>(p, many, stream);
    if (p.rounding == Rounding::bfloat16) return launch_on_tensor_cores<Bfloat16>(p, many, stream);
    if (p.rounding == Rounding::pairs) return launch_on_tensor_cores<Paired>(p, many, stream);
    if (p.pitch <= kFewChannels) {
      launch_convolve<FmaTile<T, 64, 32, 8, 4>, kVector>(p, stream);
    } else if (many) {
      launch_convolve<FmaTile<T, kLargeRows, kLargeCols, 8, 8>, kVector>(p, stream);
    } else {
      launch_convolve<FmaTile<T, 64, 64, 8, 4>, kVector>(p, stream);
    }
  }
}

}  // namespace

template <typename T>
void launch(const Convolve<T>& p, Stream stream) {
  if (in_vectors(p) && p.depth % kChannelBlock == 0) return launch_in_vectors(p, stream);
  // Images of few channels, hence few products, which take less time than the result takes to be written.
  using Tile =
      std::conditional_t<sizeof(T) == sizeof(float), FmaTile<T, 64, 64, 8, 8>, FmaTile<T, 64, 32, 4, 4>>;
  launch_convolve<Tile, 1>(p, stream);
}

}  // namespace metafast::cuda
