// The register-tiled products of the inner loop. Their operands are whole vectors (lanes.h), so no tile has a
// part of one, and all but dots() are lane by lane.
//
// Why not the library's: small networks (40 x 40) are over before its GEMM has packed the operands, and large
// ones meet few examples. A batched sgemm of 32 x [5, 256] x [256, 128] and its two gradients reach 51 to 62
// GFLOP/s on a core whose sgemm peaks at 190 (MKL, AVX-512), though nothing is updated on the way; these
// tiles reach 70 to 160 there, with the update of the parameters.
#pragma once

#include <algorithm>

#include "inner_loop/finish.h"
#include "inner_loop/lanes.h"

namespace metafast::METAFAST_ISA {

#if defined(__AVX512F__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// ---- parameters times activations ----

// One product of a sum of products: parameters [cols, depth] with the strides of the call, activations [rows,
// depth].
template <typename T>
struct Factor {
  const T* parameters;
  const T* activations;
  int64_t pitch, depth;  // of the activations: vectors between rows, and numbers of a row
};

struct Strides {
  int64_t col, depth;  // of the parameters, in scalars
};

template <class Layout, int kRows, int kCols, int kFactors, bool kAdds = false, typename T>
METAFAST_HD void multiply_tile(const Factor<T>* factors, Strides strides, int64_t row, int64_t col, T* out,
                               int64_t out_pitch, const Finish<T>& finish) {
  Vec<T> sums[kRows][kCols] = {};
  if constexpr (kAdds) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) sums[r][c] = load(out + ((row + r) * out_pitch + col + c) * kLanes<T>);
    }
  }
#pragma GCC unroll 2
  for (int f = 0; f < kFactors; ++f) {
    const T* w = factors[f].parameters + col * strides.col;
    const T* a = factors[f].activations + row * factors[f].pitch * kLanes<T>;
    const int64_t pitch = factors[f].pitch * kLanes<T>, depth = factors[f].depth;
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k, w += strides.depth, a += kStep<Layout, T>) {
      Vec<T> parameters[kCols];
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) parameters[c] = Layout::parameter(w + c * strides.col);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> activation = Layout::activation(a + r * pitch);
#pragma GCC unroll 8
        for (int c = 0; c < kCols; ++c) sums[r][c] += parameters[c] * activation;
      }
    }
  }
  finish.store_tile(sums, row, col, out, out_pitch);
}

// Whether the activations of a factor stay in the first-level cache beside a tile of parameters.
template <typename T>
bool stays_near(const Factor<T>& factor, int64_t rows) {
  constexpr int64_t kCacheBytes = 28 << 10;
  return rows * factor.pitch * kLanes<T> * static_cast<int64_t>(sizeof(T)) <= kCacheBytes;
}

// multiply() for several tiles of rows whose activations stay near: the parameters, one factor after the
// other, come from the second-level cache once instead of once for each tile of rows.
template <class Layout, int kFactors, typename T>
void multiply_near(const Factor<T>* factors, Strides strides, int64_t rows, int64_t cols, T* out,
                   int64_t out_pitch, const Finish<T>& finish) {
  const Finish<T> as_it_is;
  const auto tile = [&]<int kCols, bool kAdds>(const Factor<T>* factor, int64_t col)
                        __attribute__((always_inline)) {
                          const bool last = factor + 1 == factors + kFactors;
                          for (int64_t row = 0; row < rows; row += 5) {
                            multiply_tile<Layout, 5, kCols, 1, kAdds>(factor, strides, row, col, out,
                                                                      out_pitch, last ? finish : as_it_is);
                          }
                        };
  const auto pass = [&]<bool kAdds>(const Factor<T>* factor) __attribute__((always_inline)) {
    int64_t col = 0;
    for (; col + 4 <= cols; col += 4) tile.template operator()<4, kAdds>(factor, col);
    for (; col < cols; ++col) tile.template operator()<1, kAdds>(factor, col);
  };
  pass.template operator()<false>(factors);
  for (int f = 1; f < kFactors; ++f) pass.template operator()<true>(factors + f);
}

// out[r][c] = what `finish` makes of the sum over factors and k of parameters[c][k] * activations[r][k].
// FeaturesInLanes: c counts vectors.
template <class Layout, int kFactors, typename T>
void multiply(const Factor<T>* factors, Strides strides, int64_t rows, int64_t cols, T* out,
              int64_t out_pitch, const Finish<T>& finish) {
  // Enough sums in flight to hide the latency of the multiply-add, few enough for the registers.
  constexpr bool kMany = kRegisters == 32;
  const auto tiles = [&]<int kRows, int kCols>(int64_t row) __attribute__((always_inline)) {
    int64_t col = 0;
    for (; col + kCols <= cols; col += kCols) {
      multiply_tile<Layout, kRows, kCols, kFactors>(factors, strides, row, col, out, out_pitch, finish);
    }
    for (; col < cols; ++col)
      multiply_tile<Layout, kRows, 1, kFactors>(factors, strides, row, col, out, out_pitch, finish);
  };
  int64_t row = 0;
  if constexpr (kMany) {
    if (rows >= 10 && stays_near(factors[0], rows)) {
      row = rows / 5 * 5;
      multiply_near<Layout, kFactors>(factors, strides, row, cols, out, out_pitch, finish);
    }
    for (; row + 5 <= rows; row += 5) {
      cols % 5 == 0 ? tiles.template operator()<5, 5>(row) : tiles.template operator()<5, 4>(row);
    }
    if (rows - row >= 3) {
      tiles.template operator()<3, 8>(row);
      row += 3;
    }
  }
  for (; row + 2 <= rows; row += 2) tiles.template operator()<2, kMany ? 8 : 5>(row);
  if (row < rows) tiles.template operator()<1, 8>(row);
}

// ---- parameters times activations, summed across the lanes ----

// Else the compiler loads it again for each product, and two loads a cycle are all there are.
template <typename T>
METAFAST_HD Vec<T> in_register(Vec<T> v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#endif
  return v;
}

template <int kRows, int kCols, int kFactors, typename T>
METAFAST_HD void dot_tile(const Factor<T>* factors, int64_t row, int64_t col, T* out, int64_t out_pitch) {
  constexpr int kSums = kRows * kCols, kTrees = (kSums + kLanes<T> - 1) / kLanes<T>;
  Vec<T> sums[kTrees * kLanes<T>] = {};
#pragma GCC unroll 2
  for (int f = 0; f < kFactors; ++f) {
    const int64_t length = factors[f].depth * kLanes<T>, pitch = factors[f].pitch * kLanes<T>;
    const T* w = factors[f].parameters + col * pitch;
    const T* a = factors[f].activations + row * pitch;
    for (int64_t k = 0; k < length; k += kLanes<T>) {
      Vec<T> activations[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) activations[r] = in_register<T>(load(a + r * pitch + k));
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) {
        const Vec<T> parameter = load(w + c * pitch + k);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r * kCols + c] += parameter * activations[r];
      }
    }
  }
  alignas(kVectorBytes) T numbers[kTrees * kLanes<T>];
#pragma GCC unroll 8
  for (int i = 0; i < kTrees; ++i) store(numbers + i * kLanes<T>, sum_lanes<T>(sums + i * kLanes<T>));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    __builtin_memcpy(out + (row + r) * out_pitch * kLanes<T> + col, numbers + r * kCols, kCols * sizeof(T));
  }
}

// FeaturesInLanes: number c of row r of out = sum over factors and k of parameters[c][k] * activations[r][k],
// both with rows of `depth` vectors, `pitch` apart.
template <int kFactors, typename T>
void dots(const Factor<T>* factors, int64_t rows, int64_t cols, T* out, int64_t out_pitch) {
  constexpr int kSums = kRegisters / 2, kMaxRows = kRegisters == 32 ? 5 : 4;
  const auto column = [&]<int kRows, int kCols>(int64_t row, int64_t col) __attribute__((always_inline)) {
    dot_tile<kRows, kCols, kFactors>(factors, row, col, out, out_pitch);
  };
  const auto block = [&]<int kRows>(int64_t row) __attribute__((always_inline)) {
    constexpr int kCols = std::min(8, kSums / kRows);
    if (cols < kCols) {
      for (int64_t col = 0; col < cols; ++col) column.template operator()<kRows, 1>(row, col);
      return;
    }
    for (int64_t col = 0; col < cols; col += kCols) {  // the last tile may overlap the one before
      column.template operator()<kRows, kCols>(row, std::min(col, cols - kCols));
    }
  };
  const int64_t blocks = div_up(rows, kMaxRows);  // of rows as even as can be
  for (int64_t b = 0, row = 0; b < blocks; ++b) {
    const int64_t count = rows / blocks + (b < rows % blocks);
    if (count == 1) block.template operator()<1>(row);
    if (count == 2) block.template operator()<2>(row);
    if (count == 3) block.template operator()<3>(row);
    if (count == 4) block.template operator()<4>(row);
    if constexpr (kMaxRows > 4) {
      if (count == 5) block.template operator()<5>(row);
    }
    row += count;
  }
}

// ---- gradient of the parameters ----

// One product of a sum: gradients [samples, outputs] in the lanes of the layout, activations [samples,
// features]; with pairs of samples in the lanes, rows of them. A layout that transposes has done so to the
// activations, and features are lanes, as with FeaturesInLanes; else features are vectors.
template <typename T>
struct OuterFactor {
  const T* gradients;
  const T* activations;
};

// Two samples in the lanes: what belongs to features 2i and 2i + 1, summed over them.
template <typename T>
METAFAST_HD Vec<T> fold(Vec<T> a, Vec<T> b) {
  exchange_lanes<kLanes<T> / 2>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
  return a + b;
}

struct OuterPitch {
  int64_t gradients, activations;  // in vectors
};

template <class Layout, int kOutputs, int kCols, int kFactors, typename T, class Consume>
METAFAST_HD void outer_tile(const OuterFactor<T>* factors, OuterPitch pitch, int64_t samples, int64_t output,
                            int64_t col, int64_t first, int64_t cols, Consume consume) {
  Vec<T> sums[kOutputs][kCols] = {};
#pragma GCC unroll 2
  for (int64_t s = 0; s < samples; ++s) {
#pragma GCC unroll 2
    for (int f = 0; f < kFactors; ++f) {
      const T* a = factors[f].activations + (s * pitch.activations + col) * kLanes<T>;
      Vec<T> activations[kCols];
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) activations[c] = load(a + c * kLanes<T>);
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o) {
        const Vec<T> gradient = Layout::sample(factors[f].gradients, s, pitch.gradients, output + o);
#pragma GCC unroll 8
        for (int c = 0; c < kCols; ++c) sums[o][c] += gradient * activations[c];
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o) {
    const int64_t row = first + (output + o) * cols;
    if constexpr (Layout::kFolds) {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; c += 2) {
        consume(row + (col + c) / 2, fold<T>(sums[o][c], c + 1 < kCols ? sums[o][c + 1] : Vec<T>{}));
      }
    } else {
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) consume(row + col + c, sums[o][c]);
    }
  }
}

// consume(first + i, v) for every vector i of the gradient [outputs, cols]: the sum over factors and samples
// (or rows of pairs of them) of gradients[s][o] * activations[s][c].
template <class Layout, int kFactors, typename T, class Consume>
void outer(const OuterFactor<T>* factors, OuterPitch pitch, int64_t samples, int64_t outputs, int64_t cols,
           int64_t first, Consume consume) {
  constexpr int kOutputs = kRegisters == 32 ? 4 : 2, kMoreOutputs = 2 * kOutputs;
  constexpr int kCols = Layout::kFolds ? 4 : 5, kLastCols = Layout::kFolds ? kCols : kCols + 1;
  const int64_t width = Layout::kFolds ? pitch.activations : cols;
  const auto tile = [&]<int kTileOutputs, int kTileCols>(int64_t output, int64_t col)
                        __attribute__((always_inline)) {
                          outer_tile<Layout, kTileOutputs, kTileCols, kFactors>(
                              factors, pitch, samples, output, col, first, cols, consume);
                        };
  const auto tiles = [&]<int kTileOutputs>(int64_t output) __attribute__((always_inline)) {
    int64_t col = 0;
    const auto next = [&]<int kTileCols>() __attribute__((always_inline)) {
      tile.template operator()<kTileOutputs, kTileCols>(output, col);
      col += kTileCols;
    };
    while (width - col > kLastCols || width - col == kCols) next.template operator()<kCols>();
    if constexpr (kLastCols > kCols) {
      if (width - col == kLastCols) next.template operator()<kLastCols>();
      if (width - col == 3) next.template operator()<3>();
    }
    while (width - col >= 2) next.template operator()<2>();
    if (col < width) next.template operator()<1>();
  };
  int64_t output = 0;
  for (; width <= 2 && output + kMoreOutputs <= outputs; output += kMoreOutputs) {
    if (width == 2) tile.template operator()<kMoreOutputs, 2>(output, 0);
    if (width == 1) tile.template operator()<kMoreOutputs, 1>(output, 0);
  }
  for (; output + kOutputs <= outputs; output += kOutputs) tiles.template operator()<kOutputs>(output);
  for (; output < outputs; ++output) tiles.template operator()<1>(output);
}

}  // namespace metafast::METAFAST_ISA
