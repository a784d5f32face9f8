// Matrix products of one task, and of their tangents, in register tiles. Part of cuda.cu.
//
// A thread computes 4 x 4 elements of the result. Operands are read in vectors of 16 bytes, where they lie
// (shared memory) or, for networks that do not fit there, through blocks of them staged in shared memory.
#pragma once

#include <type_traits>

#include "common/cuda.h"
#include "inner_loop/cuda_team.h"

namespace metafast::cuda {
namespace {

constexpr int kTile = 4;         // rows and columns of a thread's tile
constexpr int kStageInner = 16;  // of the products' inner dimension, staged at once

// One operand of a product over k. A line is a row of the left or a column of the right operand:
//   kAlong  line i is contiguous, element k at data[i * pitch + k]; zero behind the last k, to a multiple of
//           kVectorLength
//   else    data[k * pitch + i]
// Rows begin at multiples of 16 bytes.
template <typename T, bool kAlongInner>
struct Operand {
  static constexpr bool kAlong = kAlongInner;
  using Scalar = T;
  const T* data;
  const T* tangent;  // of the same shape, or null: zero
  int64_t pitch;
};

// C = A B, and along the tangents of the operands dC = dA B + A dB.
template <class LeftOperand, class RightOperand>
struct Factors {
  using Left = LeftOperand;
  using Right = RightOperand;
  using Scalar = typename Left::Scalar;
  Left a;
  Right b;
  // How many k's a thread takes at once.
  static constexpr int kStep = Left::kAlong || Right::kAlong ? kVectorLength<Scalar> : 1;
};

// Which kTile lines a tile has, of `tiles` that share all lines: along k `tiles` apart, so that neighbouring
// threads read neighbouring lines, in different banks of shared memory; else neighbours, which are a vector.
template <bool kAlong>
struct Place {
  int tile, tiles;
  __device__ __forceinline__ int line(int i) const { return kAlong ? tile + i * tiles : tile * kTile + i; }
};

// Where the lines of a tile begin in an operand and its tangent.
template <typename T, bool kAlong>
struct Lines {
  int offsets[kAlong ? kTile : 1];
  int pitch;

  // The last of `count` lines stands in for those behind it.
  __device__ __forceinline__ Lines(const Operand<T, kAlong>& operand, Place<kAlong> place, int count)
      : pitch(static_cast<int>(operand.pitch)) {
    if constexpr (kAlong) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) offsets[i] = min(place.line(i), count - 1) * pitch;
    } else {
      offsets[0] = place.line(0);
    }
  }

  // values[e][i] becomes element k + e of line i.
  template <int kStep>
  __device__ __forceinline__ void load(const T* data, int k, T (&values)[kStep][kTile]) const {
    constexpr int kLength = kVectorLength<T>;
    if constexpr (kAlong) {
      static_assert(kStep == kLength);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const Vector<T, kLength> vector = load_vector<kLength>(data + (offsets[i] + k));
#pragma unroll
        for (int e = 0; e < kStep; ++e) values[e][i] = vector.values[e];
      }
    } else {
#pragma unroll
      for (int e = 0; e < kStep; ++e) {
#pragma unroll
        for (int i = 0; i < kTile; i += kLength) {
          const Vector<T, kLength> vector = load_vector<kLength>(data + (offsets[0] + (k + e) * pitch + i));
#pragma unroll
          for (int v = 0; v < kLength; ++v) values[e][i + v] = vector.values[v];
        }
      }
    }
  }
};

// A thread's tile of C and of dC.
template <typename T>
struct Sums {
  T value[kTile][kTile] = {}, tangent[kTile][kTile] = {};
};

// For products whose sums are the result.
struct AsItIs {
  template <typename T, class RowAt, class ColAt>
  __device__ __forceinline__ void operator()(Sums<T>&, const RowAt&, const ColAt&) const {}
};

template <int kStep, typename T>
__device__ __forceinline__ void add_products(const T (&a)[kStep][kTile], const T (&b)[kStep][kTile],
                                             T (&sums)[kTile][kTile]) {
#pragma unroll
  for (int e = 0; e < kStep; ++e) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) sums[i][j] += a[e][i] * b[e][j];
    }
  }
}

// Adds the products over k < inner to C, to dC, or to both. The operands lie in shared memory.
template <bool kValue, bool kTangent, class F, typename T>
__device__ __forceinline__ void accumulate(const F& f, Place<F::Left::kAlong> row, int rows,
                                           Place<F::Right::kAlong> col, int cols, int inner, Sums<T>& sums) {
  constexpr int kStep = F::kStep;
  const Lines<T, F::Left::kAlong> left(f.a, row, rows);
  const Lines<T, F::Right::kAlong> right(f.b, col, cols);
#pragma unroll 1
  for (int k = 0; k < inner; k += kStep) {
    T a[kStep][kTile], b[kStep][kTile];
    left.template load<kStep>(f.a.data, k, a);
    right.template load<kStep>(f.b.data, k, b);
    if constexpr (kValue) add_products(a, b, sums.value);
    if (kTangent && f.b.tangent != nullptr) {
      T tangent[kStep][kTile];
      right.template load<kStep>(f.b.tangent, k, tangent);
      add_products(a, tangent, sums.tangent);
    }
    if (kTangent && f.a.tangent != nullptr) {
      left.template load<kStep>(f.a.tangent, k, a);
      add_products(a, b, sums.tangent);
    }
  }
}

// consume(row, col, value, tangent) for the elements of a tile within the result.
template <bool kRowAlong, bool kColAlong, typename T, class Consume>
__device__ __forceinline__ void consume_tile(const Sums<T>& sums, Place<kRowAlong> row, int rows,
                                             Place<kColAlong> col, int cols, const Consume& consume) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const int r = row.line(i);
    if (r >= rows) continue;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const int c = col.line(j);
      if (c < cols) consume(r, c, sums.value[i][j], sums.tangent[i][j]);
    }
  }
}

// ---- operands in shared memory ----

struct Resident {
  // multiply(): finish(sums, row_at, col_at) may change a tile, of which element [i][j] lies in row row_at(i)
  // and column col_at(j), or outside the result; then consume(row, col, value, tangent) takes each element
  // within.
  template <class Team, bool kValue, bool kTangent, class F, class Finish, class Consume>
  static __device__ __forceinline__ void multiply(const F& f, int rows, int cols, int inner,
                                                  typename F::Scalar*, const Finish& finish,
                                                  const Consume& consume) {
    const int row_tiles = div_up(rows, kTile), col_tiles = div_up(cols, kTile);
    for (int tile = Team::rank(); tile < row_tiles * col_tiles; tile += Team::kThreads) {
      const Place<F::Left::kAlong> row{tile / col_tiles, row_tiles};
      const Place<F::Right::kAlong> col{tile % col_tiles, col_tiles};
      Sums<typename F::Scalar> sums;
      accumulate<kValue, kTangent>(f, row, rows, col, cols, inner, sums);
      finish(sums, [&](int i) { return row.line(i); }, [&](int j) { return col.line(j); });
      consume_tile(sums, row, rows, col, cols, consume);
    }
  }
};

// ---- operands in global memory ----

constexpr int kStageThreads = 256, kFewRows = 4 * kTile, kMostCols = kStageThreads / 4 * kTile;
template <typename T>
constexpr int kStagePitch = kStageInner + kVectorLength<T>;  // an odd number of vectors
// Scratch elements: blocks of both operands and of their tangents.
template <typename T>
constexpr int kStageSize = 2 * (kFewRows + kMostCols) * kStagePitch<T>;

struct Staged {
  // Copies lines [first, first + lines) of those below `count`, and k's [begin, begin + kStageInner) of those
  // below `inner`; zeros elsewhere.
  template <class Team, bool kAlong, typename T>
  static __device__ __forceinline__ void copy(const T* from, int64_t pitch, int first, int lines, int count,
                                              int begin, int inner, T* to) {
    constexpr int kLength = kVectorLength<T>;
    const int rows = kAlong ? lines : kStageInner, cols = (kAlong ? kStageInner : lines) / kLength;
    Team::for_each(rows, cols, [&](int row, int col) {
      const int line = first + (kAlong ? row : col * kLength), k = begin + (kAlong ? col * kLength : row);
      Vector<T, kLength> vector{};
      if (line < count && k < inner) {
        vector = load_vector<kLength>(from + (kAlong ? line * pitch + k : k * pitch + line));
      }
      store_vector(to + row * (kAlong ? kStagePitch<T> : lines) + col * kLength, vector);
    });
  }

  // The same of an operand and, behind it, its tangent.
  template <class Team, bool kTangent, typename T, bool kAlong>
  static __device__ __forceinline__ Operand<T, kAlong> stage(const Operand<T, kAlong>& from, int first,
                                                             int lines, int count, int begin, int inner,
                                                             T* to) {
    T* tangent = nullptr;
    copy<Team, kAlong>(from.data, from.pitch, first, lines, count, begin, inner, to);
    if (kTangent && from.tangent != nullptr) {
      tangent = to + lines * kStagePitch<T>;
      copy<Team, kAlong>(from.tangent, from.pitch, first, lines, count, begin, inner, tangent);
    }
    return {to, tangent, kAlong ? kStagePitch<T> : lines};
  }

  // As Resident::multiply(). The team goes through blocks of the result: 4 x 64 tiles where there are few
  // rows (examples), else 16 x 16.
  template <class Team, bool kValue, bool kTangent, class F, class Finish, class Consume>
  static __device__ __forceinline__ void multiply(const F& f, int rows, int cols, int inner,
                                                  typename F::Scalar* scratch, const Finish& finish,
                                                  const Consume& consume) {
    using T = typename F::Scalar;
    static_assert(Team::kThreads == kStageThreads);
    const int row_tiles = rows <= kFewRows ? 4 : 16, col_tiles = kStageThreads / row_tiles;
    const int block_rows = row_tiles * kTile, block_cols = col_tiles * kTile;
    const Place<F::Left::kAlong> row{Team::rank() / col_tiles, row_tiles};
    const Place<F::Right::kAlong> col{Team::rank() % col_tiles, col_tiles};
    for (int first_row = 0; first_row < rows; first_row += block_rows) {
      for (int first_col = 0; first_col < cols; first_col += block_cols) {
        const bool works = first_row + row.line(0) < rows && first_col + col.line(0) < cols;
        Sums<T> sums;
        for (int k = 0; k < inner; k += kStageInner) {
          Team::sync();  // the readers of the operands before are done
          const F staged{stage<Team, kTangent>(f.a, first_row, block_rows, rows, k, inner, scratch),
                         stage<Team, kTangent>(f.b, first_col, block_cols, cols, k, inner,
                                               scratch + 2 * block_rows * kStagePitch<T>)};
          Team::sync();
          if (!works) continue;
          accumulate<kValue, kTangent>(staged, row, block_rows, col, block_cols, min(kStageInner, inner - k),
                                       sums);
        }
        if (!works) continue;
        finish(
            sums, [&](int i) { return first_row + row.line(i); },
            [&](int j) { return first_col + col.line(j); });
        consume_tile(
            sums, row, rows - first_row, col, cols - first_col,
            [&](int r, int c, T value, T tangent) { consume(first_row + r, first_col + c, value, tangent); });
      }
    }
  }
};

}  // namespace

}  // namespace metafast::cuda
