// Copies between layouts on the CPU: rows where the last dimension is dense on both sides, transposed tiles
// where another one is dense in `in`, element by element else.
#pragma once

#include <algorithm>

#include "common/simd.h"
#include "convolutional/params.h"

namespace metafast::METAFAST_ISA {

// ---- tiles: a vector of lines, of which each has a vector's elements ----

// Element (i, j) of the tile goes to (j, i): each stage interleaves the lanes of lines that lie half the tile
// apart.
template <typename T, int... l>
METAFAST_HD void interleave(Vec<T>* lines, std::integer_sequence<int, l...>) {
  constexpr int n = kLanes<T>;
  Vec<T> mixed[n];
#pragma GCC unroll 16
  for (int i = 0; i < n / 2; ++i) {
    mixed[2 * i] = pick_lanes<(l / 2 + l % 2 * n)...>(lines[i], lines[i + n / 2]);
    mixed[2 * i + 1] = pick_lanes<(n / 2 + l / 2 + l % 2 * n)...>(lines[i], lines[i + n / 2]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) lines[i] = mixed[i];
}

// From `lines` lines of `length` elements to `length` lines of `out_lines`, what lies behind the given ones
// zero; all at most kLanes.
template <typename T>
void transpose_tile(const T* in, int64_t in_stride, int lines, int length, T* out, int64_t out_stride,
                    int out_lines) {
  constexpr int n = kLanes<T>;
  Vec<T> tile[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    const T* const line = in + i * in_stride;
    if (i >= lines) {
      tile[i] = Vec<T>{};
    } else {
      tile[i] = length == n ? load(line) : load_partial(line, length);
    }
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) interleave<T>(tile, std::make_integer_sequence<int, n>{});
#pragma GCC unroll 16
  for (int j = 0; j < n; ++j) {
    if (j >= length) break;
    T* const line = out + j * out_stride;
    if (out_lines == n) {
      store(line, tile[j]);
    } else {
      store_partial(line, tile[j], out_lines);
    }
  }
}

// The last two dimensions of p, of which the one before the last is dense in `in`.
template <typename T>
void transpose(const Permute<T>& p, const T* in, T* out) {
  constexpr int64_t n = kLanes<T>;
  const int64_t columns = std::max(p.size[4], p.pad);
  for (int64_t i = 0; i < columns; i += n) {
    const auto lines = static_cast<int>(std::clamp<int64_t>(p.size[4] - i, 0, n));
    const auto out_lines = static_cast<int>(std::min(n, columns - i));
    for (int64_t j = 0; j < p.size[3]; j += n) {
      transpose_tile(in + i * p.in_stride[4] + j, p.in_stride[4], lines,
                     static_cast<int>(std::min(n, p.size[3] - j)), out + j * p.out_stride[3] + i,
                     p.out_stride[3], out_lines);
    }
  }
}

template <typename T>
void copy_lines(const Permute<T>& p, const T* in, T* out) {
  const int64_t columns = std::max(p.size[4], p.pad);
  const bool dense = p.in_stride[4] == 1 && p.out_stride[4] == 1;
  for (int64_t i = 0; i < p.size[3]; ++i, in += p.in_stride[3], out += p.out_stride[3]) {
    if (dense) {
      std::copy_n(in, p.size[4], out);
      std::fill(out + p.size[4], out + columns, T(0));
      continue;
    }
    for (int64_t j = 0; j < p.size[4]; ++j) out[j * p.out_stride[4]] = in[j * p.in_stride[4]];
    for (int64_t j = p.size[4]; j < columns; ++j) out[j * p.out_stride[4]] = 0;
  }
}

template <typename T>
void run(const Permute<T>& p, int64_t begin, int64_t end) {
  const bool transposes = p.in_stride[3] == 1 && p.out_stride[4] == 1 && p.in_stride[4] != 1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t i0 = item / p.size[1], i1 = item % p.size[1];
    for (int64_t i2 = 0; i2 < p.size[2]; ++i2) {
      const int64_t index[3] = {i0, i1, i2};
      const T* in = p.in;
      T* out = p.out;
      for (int d = 0; d < 3; ++d) {
        in += index[d] * p.in_stride[d];
        out += index[d] * p.out_stride[d];
      }
      if (transposes) {
        transpose(p, in, out);
      } else {
        copy_lines(p, in, out);
      }
    }
  }
}

}  // namespace metafast::METAFAST_ISA
