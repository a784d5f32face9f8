// Matrix products of one task, and of their tangents, in register tiles. Part of cuda.cu.
//
// Operands are read in vectors of 16 bytes, where they lie (shared memory) or, for networks that do not fit
// there, through blocks of them staged in shared memory. For the compiler to load from shared memory as such
// (LDS, not LD), it must see where a pointer comes from: hence offsets rather than pointers that may be null.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/cuda.h"
#include "inner_loop/cuda_team.h"

namespace metafast::cuda {
namespace {

// One operand of a product over k. A line is a row of the left or a column of the right operand:
//   kAlong  line i is contiguous, element k at data[i * pitch + k]; zero behind the last k, to a multiple of
//           kVectorLength
//   else    data[k * pitch + i]
// Rows begin at multiples of 16 bytes.
template <typename T, bool kAlongInner, bool kMayBeConstant = false>
struct Operand {
  static constexpr bool kAlong = kAlongInner, kMayLackTangent = kMayBeConstant;
  using Scalar = T;
  const T* data;
  int64_t tangent;  // its tangent, of the same shape, begins so far from data; 0: it has none
  int pitch;
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

// ---- tiles ----

constexpr int kGradientCols = 4;  // of the tiles of products with both operands across k

// What a thread computes of a product at once.
template <int kTileRows, int kTileCols>
struct Tile {
  static constexpr int kRows = kTileRows, kCols = kTileCols;
  // Cycles that it takes a k, in some unit: of its multiply-adds and of its loads, which four schedulers
  // share.
  static constexpr int kCost = kRows * kCols + 2 * (kRows + kCols);

  static __device__ __forceinline__ int row_tiles(int rows) { return div_up(rows, kRows); }
  static __device__ __forceinline__ int col_tiles(int cols) { return div_up(cols, kCols); }
  // Of a team that shares out all tiles of a result.
  template <class Team>
  static __device__ __forceinline__ int cost(int rows, int cols) {
    return div_up(row_tiles(rows) * col_tiles(cols), Team::kThreads) * kCost;
  }
};

// Which kCount lines a tile has, of `tiles` that share all lines: along k `tiles` apart, so that neighbouring
// threads read neighbouring lines, in different banks of shared memory; else neighbours, which are a vector.
template <bool kAlong, int kCount>
struct Place {
  int tile, tiles;
  __device__ __forceinline__ int line(int i) const { return kAlong ? tile + i * tiles : tile * kCount + i; }
};

// The lines of a tile in an operand or its tangent, from a k that advances. Pointers, since the compiler
// would compute every address anew for each k.
template <typename T, bool kAlong, int kCount>
struct Lines {
  const T* lines[kAlong ? kCount : 1];
  int pitch;

  // The last of `count` lines stands in for those behind it.
  __device__ __forceinline__ Lines(const T* data, int pitch, Place<kAlong, kCount> place, int count)
      : pitch(pitch) {
    if constexpr (kAlong) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) lines[i] = data + min(place.line(i), count - 1) * pitch;
    } else {
      lines[0] = data + place.line(0);
    }
  }

  // values[e][i] becomes element k + e of line i, and k advances.
  template <int kStep>
  __device__ __forceinline__ void load(T (&values)[kStep][kCount]) {
    if constexpr (kAlong) {
      static_assert(kStep == kVectorLength<T>);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const Vector<T, kStep> vector = load_vector<kStep>(lines[i]);
        lines[i] += kStep;
#pragma unroll
        for (int e = 0; e < kStep; ++e) values[e][i] = vector.values[e];
      }
    } else {
      constexpr int kLength = kCount < kVectorLength<T> ? kCount : kVectorLength<T>;
#pragma unroll
      for (int e = 0; e < kStep; ++e) {
#pragma unroll
        for (int i = 0; i < kCount; i += kLength) {
          const Vector<T, kLength> vector = load_vector<kLength>(lines[0] + i);
#pragma unroll
          for (int v = 0; v < kLength; ++v) values[e][i + v] = vector.values[v];
        }
        lines[0] += pitch;
      }
    }
  }
};

// A thread's tile of C and of dC.
template <typename T, class TileShape>
struct Sums {
  using Shape = TileShape;
  T value[Shape::kRows][Shape::kCols] = {}, tangent[Shape::kRows][Shape::kCols] = {};
};

// For products whose sums are the result.
struct AsItIs {
  template <class AnySums, class RowAt, class ColAt>
  __device__ __forceinline__ void operator()(AnySums&, const RowAt&, const ColAt&) const {}
};

template <int kStep, int kRows, int kCols, typename T>
__device__ __forceinline__ void add_products(const T (&a)[kStep][kRows], const T (&b)[kStep][kCols],
                                             T (&sums)[kRows][kCols]) {
#pragma unroll
  for (int e = 0; e < kStep; ++e) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) sums[i][j] += a[e][i] * b[e][j];
    }
  }
}

// Adds the products over k < inner to C, to dC, or to both. The operands lie in shared memory; `row` and
// `col` are the tile's places among `rows` and `cols`.
template <bool kValue, bool kTangentA, bool kTangentB, class F, class RowPlace, class ColPlace, class AnySums>
__device__ __forceinline__ void accumulate_all(const F& f, RowPlace row, int rows, ColPlace col, int cols,
                                               int inner, AnySums& sums) {
  using T = typename F::Scalar;
  constexpr int kStep = F::kStep, kRows = AnySums::Shape::kRows, kCols = AnySums::Shape::kCols;
  using Left = Lines<T, F::Left::kAlong, kRows>;
  using Right = Lines<T, F::Right::kAlong, kCols>;
  Left left(f.a.data, f.a.pitch, row, rows), left_tangent(f.a.data + f.a.tangent, f.a.pitch, row, rows);
  Right right(f.b.data, f.b.pitch, col, cols), right_tangent(f.b.data + f.b.tangent, f.b.pitch, col, cols);
  // The loads of a small tile would wait for one another; a large one has enough to do meanwhile.
  [[maybe_unused]] constexpr int kUnrolled = kStep * kRows * kCols * sizeof(T) <= 32 ? 4 : 1;
#pragma unroll kUnrolled
  for (int k = 0; k < inner; k += kStep) {
    T a[kStep][kRows], b[kStep][kCols], tangent_a[kStep][kRows], tangent_b[kStep][kCols];
    left.load(a);
    right.load(b);
    if constexpr (kTangentA) left_tangent.load(tangent_a);
    if constexpr (kTangentB) right_tangent.load(tangent_b);
    if constexpr (kValue) add_products(a, b, sums.value);
    if constexpr (kTangentB) add_products(a, tangent_b, sums.tangent);
    if constexpr (kTangentA) add_products(tangent_a, b, sums.tangent);
  }
}

template <bool kValue, bool kTangent, class F, class RowPlace, class ColPlace, class AnySums>
__device__ __forceinline__ void accumulate(const F& f, RowPlace row, int rows, ColPlace col, int cols,
                                           int inner, AnySums& sums) {
  const auto along = [&]<bool kTangentA, bool kTangentB>() {
    accumulate_all<kValue, kTangentA, kTangentB>(f, row, rows, col, cols, inner, sums);
  };
  if constexpr (!kTangent) {
    along.template operator()<false, false>();
  } else if (F::Left::kMayLackTangent && f.a.tangent == 0) {
    if constexpr (F::Left::kMayLackTangent) along.template operator()<false, true>();
  } else if (F::Right::kMayLackTangent && f.b.tangent == 0) {
    if constexpr (F::Right::kMayLackTangent) along.template operator()<true, false>();
  } else {
    along.template operator()<true, true>();
  }
}

// What becomes of the rows of a tile. load(row, col_at) is called for all of them before the first store(row,
// col_at, value, tangent, loaded), so that what a result is added to arrives for all rows at once.
template <class Load, class Store>
struct Consumer {
  Load load;
  Store store;
};
template <class Load, class Store>
Consumer(Load, Store) -> Consumer<Load, Store>;

// The same for results that are added to nothing: store(row, col_at, value, tangent) is all there is.
struct Nothing {};
template <class Store>
struct Writer {
  Store write;
  template <class ColAt>
  __device__ __forceinline__ Nothing load(int, const ColAt&) const {
    return {};
  }
  template <class ColAt, class Row>
  __device__ __forceinline__ void store(int row, const ColAt& col_at, const Row& value, const Row& tangent,
                                        Nothing) const {
    write(row, col_at, value, tangent);
  }
};
template <class Store>
Writer(Store) -> Writer<Store>;

template <class RowAt, class ColAt, class AnySums, class AnyConsumer>
__device__ __forceinline__ void consume_tile(const AnySums& sums, const RowAt& row_at, int rows,
                                             const ColAt& col_at, const AnyConsumer& consumer) {
  constexpr int kRows = AnySums::Shape::kRows;
  decltype(consumer.load(0, col_at)) loaded[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (row_at(i) < rows) loaded[i] = consumer.load(row_at(i), col_at);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (row_at(i) < rows) consumer.store(row_at(i), col_at, sums.value[i], sums.tangent[i], loaded[i]);
  }
}

// kCount neighbouring numbers, in vectors, at which they begin.
template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load_row(const T* from) {
  constexpr int kLength = kCount < kVectorLength<T> ? kCount : kVectorLength<T>;
  Vector<T, kCount> row;
#pragma unroll
  for (int j = 0; j < kCount; j += kLength) {
    const Vector<T, kLength> vector = load_vector<kLength>(from + j);
#pragma unroll
    for (int e = 0; e < kLength; ++e) row.values[j + e] = vector.values[e];
  }
  return row;
}

template <int kCount, typename T>
__device__ __forceinline__ void store_row(T* to, const Vector<T, kCount>& row) {
  constexpr int kLength = kCount < kVectorLength<T> ? kCount : kVectorLength<T>;
#pragma unroll
  for (int j = 0; j < kCount; j += kLength) {
    Vector<T, kLength> vector;
#pragma unroll
    for (int e = 0; e < kLength; ++e) vector.values[e] = row.values[j + e];
    store_vector(to + j, vector);
  }
}

// ---- operands in shared memory ----

struct Resident {
  // multiply(): finish(sums, row_at, col_at) may change a tile, of which element [i][j] lies in row row_at(i)
  // and column col_at(j), or outside the result; then the consumer takes each row within, of which columns
  // may lie outside.
  template <class Team, bool kValue, bool kTangent, class F, class Finish, class AnyConsumer>
  static __device__ __forceinline__ void multiply(const F& f, int rows, int cols, int inner,
                                                  typename F::Scalar*, const Finish& finish,
                                                  const AnyConsumer& consumer) {
    const auto in_tiles = [&]<class Shape>(Shape) {
      share_out<Team, Shape, kValue, kTangent>(f, rows, cols, inner, finish, consumer);
    };
    constexpr bool kFloat = sizeof(typename F::Scalar) == sizeof(float);  // a double takes two registers
    if constexpr (!F::Left::kAlong) {  // a gradient of parameters, a sum over few examples
      using Large = Tile<kFloat ? 8 : 4, kGradientCols>;
      using Small = Tile<2, kGradientCols>;
      if (Large::template cost<Team>(rows, cols) < Small::template cost<Team>(rows, cols)) {
        in_tiles(Large{});
      } else {
        in_tiles(Small{});
      }
    } else {  // examples times parameters: many of either, few examples, or few outputs
      using Large = Tile<4, kFloat ? 4 : 2>;
      using Flat = Tile<2, 4>;
      using Small = Tile<2, 1>;
      const int large = Large::template cost<Team>(rows, cols), flat = Flat::template cost<Team>(rows, cols),
                small = Small::template cost<Team>(rows, cols);
      if (small <= min(large, flat)) {
        in_tiles(Small{});
      } else if (flat < large) {
        in_tiles(Flat{});
      } else {
        in_tiles(Large{});
      }
    }
  }

 private:
  template <class Team, class Shape, bool kValue, bool kTangent, class F, class Finish, class AnyConsumer>
  static __device__ __forceinline__ void share_out(const F& f, int rows, int cols, int inner,
                                                   const Finish& finish, const AnyConsumer& consumer) {
    using T = typename F::Scalar;
    using Left = typename F::Left;
    using Right = typename F::Right;
    const int row_tiles = Shape::row_tiles(rows), col_tiles = Shape::col_tiles(cols);
    for (int tile = Team::rank(); tile < row_tiles * col_tiles; tile += Team::kThreads) {
      const int row_tile = small_quotient(tile, col_tiles);
      const Place<Left::kAlong, Shape::kRows> row{row_tile, row_tiles};
      const Place<Right::kAlong, Shape::kCols> col{tile - row_tile * col_tiles, col_tiles};
      Sums<T, Shape> sums;
      accumulate<kValue, kTangent>(f, row, rows, col, cols, inner, sums);
      const auto row_at = [&](int i) { return row.line(i); };
      const auto col_at = [&](int j) { return col.line(j); };
      finish(sums, row_at, col_at);
      consume_tile(sums, row_at, rows, col_at, consumer);
    }
  }
};

// ---- operands in global memory ----

constexpr int kStageThreads = 256;
constexpr int kStages = 2;  // one is on its way while another is read
template <typename T>
constexpr int kStageInner = 4 * kVectorLength<T>;  // of the products' inner dimension, staged at once
template <typename T>
constexpr int kStagePitch = kStageInner<T> + kVectorLength<T>;  // an odd number of vectors

// A block of the result: the team's threads have a tile each.
template <int kThreadRows, class TileShape>
struct StageBlock {
  using Shape = TileShape;
  static constexpr int kRowTiles = kThreadRows, kColTiles = kStageThreads / kThreadRows;
  static constexpr int kRows = kRowTiles * Shape::kRows, kCols = kColTiles * Shape::kCols;
  // Scratch elements: of both operands and of their tangents, a stage.
  template <typename T>
  static constexpr int size() {
    return 2 * (kRows + kCols) * kStagePitch<T>;
  }
};
// A double takes two registers.
template <typename T>
using FewRows = StageBlock<4, Tile<2, sizeof(T) == sizeof(float) ? 4 : 2>>;  // examples of a small batch
template <typename T>
using ManyRows = StageBlock<16, Tile<sizeof(T) == sizeof(float) ? 4 : 2, 4>>;

template <typename T>
constexpr int kStageSize =
    kStages * std::max(FewRows<T>::template size<T>(), ManyRows<T>::template size<T>());

struct Staged {
  // As Resident::multiply(). The team goes through blocks of the result.
  template <class Team, bool kValue, bool kTangent, class F, class Finish, class AnyConsumer>
  static __device__ __forceinline__ void multiply(const F& f, int rows, int cols, int inner,
                                                  typename F::Scalar* scratch, const Finish& finish,
                                                  const AnyConsumer& consumer) {
    if (F::Left::kAlong && rows <= FewRows<typename F::Scalar>::kRows) {
      if constexpr (F::Left::kAlong)
        in_blocks<Team, FewRows<typename F::Scalar>, kValue, kTangent>(f, rows, cols, inner, scratch, finish,
                                                                       consumer);
    } else {
      in_blocks<Team, ManyRows<typename F::Scalar>, kValue, kTangent>(f, rows, cols, inner, scratch, finish,
                                                                      consumer);
    }
  }

 private:
  // Begins to copy kLines lines, from `first` on, of those below `count`, and kStageInner k's, from `begin`
  // on, of those below `inner`; zeros elsewhere.
  template <class Team, bool kAlong, int kLines, typename T>
  static __device__ __forceinline__ void copy(const T* from, int64_t pitch, int first, int count, int begin,
                                              int inner, T* to) {
    constexpr int kLength = kVectorLength<T>;
    constexpr int kRows = kAlong ? kLines : kStageInner<T>;
    constexpr int kCols = (kAlong ? kStageInner<T> : kLines) / kLength;
#pragma unroll
    for (int i = 0; i < div_up(kRows * kCols, Team::kThreads); ++i) {
      const int index = Team::rank() + i * Team::kThreads, row = index / kCols, col = index % kCols;
      if (kRows * kCols % Team::kThreads != 0 && row >= kRows) break;
      const int line = first + (kAlong ? row : col * kLength), k = begin + (kAlong ? col * kLength : row);
      copy_async<kLength>(to + row * (kAlong ? kStagePitch<T> : kLines) + col * kLength,
                          from + (kAlong ? line * pitch + k : k * pitch + line), line < count && k < inner);
    }
  }

  // The same of an operand and, behind it, its tangent; what will lie there.
  template <class Team, bool kTangent, int kLines, class AnyOperand, typename T>
  static __device__ __forceinline__ AnyOperand stage(const AnyOperand& from, int first, int count, int begin,
                                                     int inner, T* to) {
    constexpr bool kAlong = AnyOperand::kAlong;
    const int tangent = kTangent && from.tangent != 0 ? kLines * kStagePitch<T> : 0;
    if (begin < inner) {
      copy<Team, kAlong, kLines>(from.data, from.pitch, first, count, begin, inner, to);
      if (tangent != 0) {
        copy<Team, kAlong, kLines>(from.data + from.tangent, from.pitch, first, count, begin, inner,
                                   to + tangent);
      }
    }
    return {to, tangent, kAlong ? kStagePitch<T> : kLines};
  }

  template <class Team, class Block, bool kValue, bool kTangent, class F, class Finish, class AnyConsumer>
  static __device__ __forceinline__ void in_blocks(const F& f, int rows, int cols, int inner,
                                                   typename F::Scalar* scratch, const Finish& finish,
                                                   const AnyConsumer& consumer) {
    using T = typename F::Scalar;
    using Shape = typename Block::Shape;
    static_assert(Team::kThreads == kStageThreads);
    const Place<F::Left::kAlong, Shape::kRows> row{Team::rank() / Block::kColTiles, Block::kRowTiles};
    const Place<F::Right::kAlong, Shape::kCols> col{Team::rank() % Block::kColTiles, Block::kColTiles};
    for (int first_row = 0; first_row < rows; first_row += Block::kRows) {
      for (int first_col = 0; first_col < cols; first_col += Block::kCols) {
        const auto row_at = [&](int i) { return first_row + row.line(i); };
        const auto col_at = [&](int j) { return first_col + col.line(j); };
        const auto begin_stage = [&](int k) {
          T* const to = scratch + k / kStageInner<T> % kStages * Block::template size<T>();
          const F staged{stage<Team, kTangent, Block::kRows>(f.a, first_row, rows, k, inner, to),
                         stage<Team, kTangent, Block::kCols>(f.b, first_col, cols, k, inner,
                                                             to + 2 * Block::kRows * kStagePitch<T>)};
          commit_copies();
          return staged;
        };
        const bool works = row_at(0) < rows && col_at(0) < cols;
        Sums<T, Shape> sums;
        Team::sync();  // the readers of the block before are done
        F staged = begin_stage(0);
        for (int k = 0; k < inner; k += kStageInner<T>) {
          wait_for_copies<0>();
          Team::sync();  // all have arrived, and the readers of the stage before are done
          const F next = begin_stage(k + kStageInner<T>);
          if (works) {
            accumulate<kValue, kTangent>(staged, row, Block::kRows, col, Block::kCols,
                                         min(kStageInner<T>, inner - k), sums);
          }
          staged = next;
        }
        if (!works) continue;
        finish(sums, row_at, col_at);
        consume_tile(sums, row_at, rows, col_at, consumer);
      }
    }
  }
};

}  // namespace

}  // namespace metafast::cuda
