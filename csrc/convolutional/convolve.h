// Convolutions on the CPU: tiles of pixels times channels in registers, lanes over channels. The channels of
// the result are loaded as vectors of weights, the pixels of the source as broadcast numbers, so neither is
// ever rearranged.
//
// Why not the library's: with parameters of each task's own it convolves groups, or one task after the other,
// and a 28 x 28 map of five images is over before it has chosen and packed.
#pragma once

#include <algorithm>

#include "common/simd.h"
#include "convolutional/params.h"

namespace metafast::METAFAST_ISA {

#if defined(__AVX512F__)
constexpr int kTilePixels = 14, kTileRows = 12;  // with 2 vectors each: sums in 28 and 24 of 32 registers
#else
constexpr int kTilePixels = 6, kTileRows = 6;  // of 16
#endif
constexpr int kTileVectors = 2;

// Calls f.operator()<n>() with the least even n that is not below `count`, or kMost.
template <int kMost, class F>
METAFAST_HD void with_size(int64_t count, const F& f) {
  if constexpr (kMost > 2) {
    if (count <= kMost - 2) return with_size<kMost - 2>(count, f);
  }
  f.template operator()<kMost>();
}

// ---- forward, and backward to the input ----

template <typename T>
struct TileOfPixels {
  int64_t source[kTilePixels], out[kTilePixels];  // offsets of its pixels; the last one may stand repeatedly
};

template <int kPixels, int kVectors, typename T>
METAFAST_HD void convolve_tile(const Convolve<T>& p, int64_t task, const TileOfPixels<T>& tile,
                               int64_t channel) {
  Vec<T> sums[kPixels][kVectors];
  T* const out = p.out.data + task * p.out.task + channel;
#pragma GCC unroll 16
  for (int r = 0; r < kPixels; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kVectors; ++c) {
      sums[r][c] = p.adds ? load(out + tile.out[r] + c * kLanes<T>) : Vec<T>{};
      if (p.bias != nullptr) sums[r][c] += load(p.bias + task * p.bias_task + channel + c * kLanes<T>);
    }
  }
  for (int f = 0; f < p.count; ++f) {
    const T* const source = p.factors[f].source.data + task * p.factors[f].source.task;
    const T* const weights = p.factors[f].weights + task * p.factors[f].weights_task + channel;
    for (int64_t i = 0; i < p.taps_y; ++i) {
      for (int64_t j = 0; j < p.taps_x; ++j) {
        const T* w = weights + i * p.weights_row + j * p.weights_pixel;
        const T* pixels[kPixels];
#pragma GCC unroll 16
        for (int r = 0; r < kPixels; ++r)
          pixels[r] = source + i * p.tap_row + j * p.tap_pixel + tile.source[r];
#pragma GCC unroll 4
        for (int64_t d = 0; d < p.depth; ++d, w += p.pitch) {
          Vec<T> weight[kVectors];
#pragma GCC unroll 2
          for (int c = 0; c < kVectors; ++c) weight[c] = load(w + c * kLanes<T>);
#pragma GCC unroll 16
          for (int r = 0; r < kPixels; ++r) {
            const Vec<T> number = broadcast(pixels[r][d]);
#pragma GCC unroll 2
            for (int c = 0; c < kVectors; ++c) sums[r][c] += weight[c] * number;
          }
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kPixels; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kVectors; ++c) store(out + tile.out[r] + c * kLanes<T>, sums[r][c]);
  }
}

template <typename T>
void run(const Convolve<T>& p, int64_t begin, int64_t end) {
  const Maps<const T>& source = p.factors[0].source;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t task = item / p.chunks(), chunk = item % p.chunks();
    const int64_t first = p.pixels() * chunk / p.chunks(), last = p.pixels() * (chunk + 1) / p.chunks();
    const int64_t tiles = div_up(last - first, kTilePixels);
    int64_t x = first % p.width, y = first / p.width % p.height, image = first / p.width / p.height;
    for (int64_t i = 0; i < tiles; ++i) {  // as even as can be
      const int64_t size = (last - first) * (i + 1) / tiles - (last - first) * i / tiles;
      TileOfPixels<T> tile;
      int64_t from = 0, to = 0;
      for (int64_t r = 0; r < kTilePixels; ++r) {
        if (r < size) {
          from = image * source.image + y * source.row + x * source.pixel;
          to = image * p.out.image + y * p.out.row + x * p.out.pixel;
          if (++x == p.width) x = 0, ++y;
          if (y == p.height) y = 0, ++image;
        }
        tile.source[r] = from;
        tile.out[r] = to;
      }
      with_size<kTilePixels>(size, [&]<int kPixels>() {
        int64_t channel = 0;
        for (; channel + kTileVectors * kLanes<T> <= p.pitch; channel += kTileVectors * kLanes<T>)
          convolve_tile<kPixels, kTileVectors>(p, task, tile, channel);
        if (channel < p.pitch) convolve_tile<kPixels, 1>(p, task, tile, channel);
      });
    }
  }
}

// Pixels [x, width) of a row of an image for a vector of channels, in tiles of at most kPixels, whose source
// moves on by kStep numbers from pixel to pixel, then all offsets within a tile are known here; 0: by `step`.
template <int kPixels, int kStep, typename T>
METAFAST_HD void convolve_row(const T* source, int64_t step, const int64_t* source_offsets, const T* weights,
                              const int64_t* weight_offsets, int64_t terms, Vec<T> bias, int64_t x,
                              int64_t width, T* out) {
  if constexpr (kStep > 0) step = kStep;
  for (; x + kPixels <= width; x += kPixels) {
    Vec<T> sums[kPixels];
#pragma GCC unroll 16
    for (int r = 0; r < kPixels; ++r) sums[r] = bias;
    for (int64_t t = 0; t < terms; ++t) {
      const Vec<T> weight = load(weights + weight_offsets[t]);
      const T* const numbers = source + x * step + source_offsets[t];
#pragma GCC unroll 16
      for (int r = 0; r < kPixels; ++r) sums[r] += weight * broadcast(numbers[r * step]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kPixels; ++r) store(out + (x + r) * kLanes<T>, sums[r]);
  }
  if constexpr (kPixels > 1)
    convolve_row<kPixels / 2, kStep>(source, step, source_offsets, weights, weight_offsets, terms, bias, x,
                                     width, out);
}

// Where the terms of a sum lie, few as they are: from a pixel of the source, and from the weights of the
// first.
struct Terms {
  int64_t source[kFewTerms], weights[kFewTerms], count = 0;

  template <typename T>
  explicit Terms(const Convolve<T>& p) {
    for (int64_t i = 0; i < p.taps_y; ++i) {
      for (int64_t j = 0; j < p.taps_x; ++j) {
        for (int64_t d = 0; d < p.depth; ++d, ++count) {
          source[count] = i * p.tap_row + j * p.tap_pixel + d;
          weights[count] = i * p.weights_row + j * p.weights_pixel + d * p.pitch;
        }
      }
    }
  }
};

// A vector of channels of one image, [height, width] vectors, for sums of few terms.
template <typename T>
void convolve_image(const Convolve<T>& p, int64_t task, int64_t image, int64_t channel, T* out) {
  const Maps<const T>& maps = p.factors[0].source;
  const T* const weights = p.factors[0].weights + task * p.factors[0].weights_task + channel;
  const Terms terms(p);
  const Vec<T> bias = p.bias ? load(p.bias + task * p.bias_task + channel) : Vec<T>{};
  const auto rows = [&]<int kPixels, int kStep>() {
    for (int64_t y = 0; y < p.height; ++y) {
      convolve_row<kPixels, kStep>(maps.at(task, image, y, 0), maps.pixel, terms.source, weights,
                                   terms.weights, terms.count, bias, 0, p.width,
                                   out + y * p.width * kLanes<T>);
    }
  };
  // The steps of gray and of coloured images; with another there are registers for few pixels' places.
  if (maps.pixel == 1) return rows.template operator()<kTilePixels, 1>();
  if (maps.pixel == 3) return rows.template operator()<kTilePixels, 3>();
  rows.template operator()<4, 0>();
}

// ---- backward to the weights ----

// Adds what the pixels of `lines` rows of the maps give to kRows rows of the gradient.
template <int kRows, int kVectors, typename T>
METAFAST_HD void weights_tile(const ConvolveWeights<T>& p, const T* source, const T* grad,
                              const int64_t* offsets, int64_t first_line, int64_t lines, T* out) {
  Vec<T> sums[kRows][kVectors];
  const T* rows[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    rows[r] = source + offsets[r];
#pragma GCC unroll 2
    for (int c = 0; c < kVectors; ++c) sums[r][c] = Vec<T>{};
  }
  const Maps<const T>&from = p.factors[0].source, &to = p.factors[0].grad;
  int64_t y = first_line % p.height, image = first_line / p.height;
  for (int64_t line = 0; line < lines; ++line) {
    int64_t at = image * from.image + y * from.row;
    const T* g = grad + image * to.image + y * to.row;
    for (int64_t x = 0; x < p.width; ++x, at += from.pixel, g += to.pixel) {
      Vec<T> gradient[kVectors];
#pragma GCC unroll 2
      for (int c = 0; c < kVectors; ++c) gradient[c] = load(g + c * kLanes<T>);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> number = broadcast(rows[r][at]);
#pragma GCC unroll 2
        for (int c = 0; c < kVectors; ++c) sums[r][c] += gradient[c] * number;
      }
    }
    if (++y == p.height) y = 0, ++image;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kVectors; ++c) {
      T* const to_row = out + r * p.pitch + c * kLanes<T>;
      store(to_row, load(to_row) + sums[r][c]);
    }
  }
}

// Calls f.operator()<kRows>(rows of the gradient from the first on) for tiles of at most kTileRows rows.
template <class F>
METAFAST_HD void for_row_tiles(int64_t rows, const F& f) {
  int64_t row = 0;
  const auto tiles = [&]<int kRows>() __attribute__((always_inline)) {
    for (; rows - row >= kRows; row += kRows) f.template operator()<kRows>(row);
  };
  if constexpr (kTileRows > 6) tiles.template operator()<kTileRows>();
  if constexpr (kTileRows > 6) tiles.template operator()<9>();
  tiles.template operator()<6>();
  tiles.template operator()<3>();
  tiles.template operator()<1>();
}

// Where rows of the gradient, one after the other, find their source, from that of row 0. Divisions for each
// of them took a sixth of the time.
class RowPlaces {
 public:
  template <typename T>
  METAFAST_HD RowPlaces(const ConvolveWeights<T>& p, int64_t row)
      : depth_(p.depth),
        taps_x_(p.taps_x),
        tap_row_(p.tap_row),
        tap_pixel_(p.tap_pixel),
        at_(row % p.depth),
        tap_(row / p.depth % p.taps_x),
        line_(row / p.depth / p.taps_x) {}

  METAFAST_HD int64_t next() {
    const int64_t place = line_ * tap_row_ + tap_ * tap_pixel_ + at_;
    if (++at_ == depth_) {
      at_ = 0;
      if (++tap_ == taps_x_) tap_ = 0, ++line_;
    }
    return place;
  }

 private:
  const int64_t depth_, taps_x_, tap_row_, tap_pixel_;
  int64_t at_, tap_, line_;
};

// Adds what one image gives to a vector of all rows, `sums`, from its gradient, [height, width] vectors.
template <typename T>
void add_image_weights(const ConvolveWeights<T>& p, int64_t task, int64_t image, const T* grad, T* sums) {
  constexpr int64_t step = kLanes<T>;
  ConvolveWeights<T> of_vector = p;
  of_vector.factors[0].grad = {grad, 0, 0, p.width * step, step};
  of_vector.pitch = step;
  const T* const source = p.factors[0].source.at(task, image, 0, 0);
  RowPlaces places(p, 0);
  for_row_tiles(p.rows(), [&]<int kRows>(int64_t row) {
    int64_t offsets[kRows];
    for (int64_t& offset : offsets) offset = places.next();
    weights_tile<kRows, 1>(of_vector, source, grad, offsets, 0, p.height, sums + row * step);
  });
}

template <typename T>
void add_bias_gradient(const ConvolveWeights<T>& p, int64_t task) {
  const Maps<const T>& grad = p.factors[0].grad;
  T* const out = p.out_bias + task * p.out_task;
  for (int64_t c = 0; c < p.pitch; c += kLanes<T>) {
    Vec<T> sum{};
    for (int64_t image = 0; image < p.images; ++image) {
      Vec<T> of_image{};
      for (int64_t y = 0; y < p.height; ++y) {
        for (int64_t x = 0; x < p.width; ++x) of_image += load(grad.at(task, image, y, x) + c);
      }
      sum += of_image;
    }
    store(out + c, sum);
  }
}

template <typename T>
void run(const ConvolveWeights<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t kBlockPixels = 56;  // of which source and gradient stay in the first-level cache
  const int64_t block = std::max<int64_t>(1, kBlockPixels / std::max<int64_t>(1, p.width));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t task = item / p.chunks(), chunk = item % p.chunks();
    const int64_t first = p.rows() * chunk / p.chunks(), last = p.rows() * (chunk + 1) / p.chunks();
    T* const out = p.out + task * p.out_task;
    std::fill(out + first * p.pitch, out + last * p.pitch, T(0));
    if (chunk == 0 && p.out_bias != nullptr) add_bias_gradient(p, task);
    const int64_t lines = p.images * p.height;
    for (int64_t line = 0; line < lines; line += block) {
      for (int f = 0; f < p.count; ++f) {
        const T* const source = p.factors[f].source.data + task * p.factors[f].source.task;
        const T* const grad = p.factors[f].grad.data + task * p.factors[f].grad.task;
        RowPlaces places(p, first);
        for_row_tiles(last - first, [&]<int kRows>(int64_t row) __attribute__((always_inline)) {
          int64_t offsets[kRows], channel = 0;
          for (int64_t& offset : offsets) offset = places.next();
          const auto channels = [&]<int kVectors>() __attribute__((always_inline)) {
            weights_tile<kRows, kVectors>(p, source, grad + channel, offsets, line,
                                          std::min(block, lines - line),
                                          out + (first + row) * p.pitch + channel);
            channel += kVectors * kLanes<T>;
          };
          while (channel + kTileVectors * kLanes<T> <= p.pitch) channels.template operator()<kTileVectors>();
          if (channel < p.pitch) channels.template operator()<1>();
        });
      }
    }
  }
}

}  // namespace metafast::METAFAST_ISA
