// Tiles of matrix products, whose operands come through shared memory in stages: on the CUDA cores, or for
// float32 that may be rounded on the tensor cores. Part of cuda.cu.
#pragma once

#include "common/cuda.h"
#include "common/ptx.h"

namespace metafast::cuda {
namespace {

// ---- stages: some k's of the left operand's kRows lines and the right one's kCols ----

// kAlong: line i of the left operand is contiguous, element k at left[i * kLeftPitch + k]; else at
// left[k * kLeftPitch + i]. The right one lies across k always. Pitches keep what a warp reads at once in
// different banks.
template <class Tile, bool kAlong>
struct alignas(16) Stage {
  using T = typename Tile::Scalar;
  static constexpr int kLeftPitch = kAlong ? Tile::kInner + Tile::kPadAlong : Tile::kRows + Tile::kPadAcross;
  static constexpr int kRightPitch = Tile::kCols + Tile::kPadAcross;

  T left[(kAlong ? Tile::kRows : Tile::kInner) * kLeftPitch];
  T right[Tile::kInner * kRightPitch];

  static __device__ __forceinline__ int left_at(int row, int k) {
    return kAlong ? row * kLeftPitch + k : k * kLeftPitch + row;
  }
};

// ---- CUDA cores: a thread has kThreadRows x kThreadCols sums ----

template <typename T, int kTileRows, int kTileCols, int kThreadRows, int kThreadCols>
struct FmaTile {
  using Scalar = T;
  static constexpr int kInNumber = 1;
  static constexpr int kRows = kTileRows, kCols = kTileCols, kInner = 16, kStages = 2;
  static constexpr int kPadAlong = kVectorLength<T>, kPadAcross = 0;
  static constexpr int kRowThreads = kRows / kThreadRows, kColThreads = kCols / kThreadCols;
  static constexpr int kThreads = kRowThreads * kColThreads;
  static_assert(kRowThreads % 4 == 0 && kColThreads % 8 == 0, "a warp is 4 x 8 threads");

  template <bool kAlong>
  class Sums {
   public:
    // The lanes of a warp are dealt out so that either i and i ^ 1 or i and i ^ 2 read the same address of an
    // operand: then shared memory serves half a warp's vectors at once.
    __device__ __forceinline__ Sums() {
      constexpr int kWarpCols = kColThreads / 8;
      const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
      row_ = warp / kWarpCols * 4 + lane / 2 % 2 + lane / 8 % 2 * 2;
      col_ = warp % kWarpCols * 8 + lane % 2 + lane / 4 % 2 * 2 + lane / 16 * 4;
    }

    __device__ __forceinline__ void add(const Stage<FmaTile, kAlong>& stage) {
      constexpr int kStep = kAlong ? kVectorLength<T> : 1;
#pragma unroll
      for (int k = 0; k < kInner; k += kStep) {
        T left[kStep][kThreadRows];
        if constexpr (kAlong) {
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
            const Vector<T, kStep> vector = load_vector<kStep>(stage.left + stage.left_at(row(i), k));
#pragma unroll
            for (int e = 0; e < kStep; ++e) left[e][i] = vector.values[e];
          }
        } else {
          load<kRowLength>(stage.left + stage.left_at(0, k), [this](int i) { return row(i); }, left[0]);
        }
#pragma unroll
        for (int e = 0; e < kStep; ++e) {
          T right[kThreadCols];
          load<kColLength>(
              stage.right + (k + e) * stage.kRightPitch, [this](int j) { return col(j); }, right);
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
            for (int j = 0; j < kThreadCols; ++j) sums_[i][j] += left[e][i] * right[j];
          }
        }
      }
    }

    // Calls f(row, col, vector) for all sums of the thread; the vector's are neighbours in a row.
    template <class F>
    __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadCols; j += kColLength) {
          Vector<T, kColLength> vector;
#pragma unroll
          for (int e = 0; e < kColLength; ++e) vector.values[e] = sums_[i][j + e];
          f(row(i), col(j), vector);
        }
      }
    }

   private:
    static constexpr int kRowLength = kThreadRows < kVectorLength<T> ? kThreadRows : kVectorLength<T>;
    static constexpr int kColLength = kThreadCols < kVectorLength<T> ? kThreadCols : kVectorLength<T>;
    T sums_[kThreadRows][kThreadCols] = {};
    int row_, col_;  // of the thread

    __device__ __forceinline__ int row(int i) const {
      return kAlong ? i * kRowThreads + row_
                    : i / kRowLength * kRowThreads * kRowLength + row_ * kRowLength + i % kRowLength;
    }
    __device__ __forceinline__ int col(int j) const {
      return j / kColLength * kColThreads * kColLength + col_ * kColLength + j % kColLength;
    }
    template <int kLength, int kCount, class Place>
    static __device__ __forceinline__ void load(const T* from, const Place& place, T (&values)[kCount]) {
#pragma unroll
      for (int i = 0; i < kCount; i += kLength) {
        const Vector<T, kLength> vector = load_vector<kLength>(from + place(i));
#pragma unroll
        for (int e = 0; e < kLength; ++e) values[i + e] = vector.values[e];
      }
    }
  };
};

// ---- tensor cores: a warp has kWarpRows x kWarpCols sums ----

// How they take numbers: in words of neighbours along k. An instruction takes 8 words of a line, a lane two.
struct Tf32 {
  static constexpr int kInWord = 1;
  static __device__ __forceinline__ float word(const float* numbers) { return before_tf32(numbers[0]); }
};
struct Bfloat16 {
  static constexpr int kInWord = 2;
  static __device__ __forceinline__ unsigned word(const float* numbers) {
    return bfloat16_pair(numbers[0], numbers[1]);
  }
};

// Numbers that are pairs.
struct Paired {
  static constexpr int kInWord = 1;
  static __device__ __forceinline__ unsigned word(const float* pair) { return __float_as_uint(*pair); }
};

template <class Format, int kTileRows, int kTileCols, int kWarpRows, int kWarpCols>
struct TensorTile {
  using Scalar = float;
  static constexpr int kInNumber = 1;
  static constexpr int kRows = kTileRows, kCols = kTileCols, kInner = 16, kStages = 3;
  static constexpr int kPadAlong = 8, kPadAcross = 4;
  static constexpr int kThreads = kRows / kWarpRows * (kCols / kWarpCols) * kWarpSize;

  template <bool kAlong>
  class Sums {
   public:
    __device__ __forceinline__ Sums() {
      const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
      row_ = warp / (kCols / kWarpCols) * kWarpRows + lane / 4;
      col_ = warp % (kCols / kWarpCols) * kWarpCols;
      member_ = lane % 4;
    }

    // Of 8 k's a lane takes 2 t and 2 t + 1, which along k are one load: a word of bfloat16, and of TF32 two,
    // which the instruction knows as those of t and t + 4.
    __device__ __forceinline__ void add(const Stage<TensorTile, kAlong>& stage) {
      const int group = threadIdx.x % kWarpSize / 4;
      const float* const left = stage.left + stage.left_at(row_, member_ * 2);
      const float* const right = stage.right + member_ * 2 * stage.kRightPitch + col_ + group;
#pragma unroll
      for (int k = 0; k < kInner; k += 8 * Format::kInWord) {
        Word a[kRowTiles][4], b[kColTiles][2];
#pragma unroll
        for (int i = 0; i < kRowTiles * 2; ++i) {
          const auto words = load([&](int of) {
            const float* const line = left + stage.left_at(i * 8, k + of);
            if constexpr (kAlong) {
              return load_vector<2>(line);
            } else {
              return Vector<float, 2>{{line[0], line[stage.kLeftPitch]}};
            }
          });
#pragma unroll
          for (int e = 0; e < 2; ++e) a[i / 2][i % 2 + e * 2] = words.values[e];
        }
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
          const auto words = load([&](int of) {
            const float* const line = right + (k + of) * stage.kRightPitch + j * 8;
            return Vector<float, 2>{{line[0], line[stage.kRightPitch]}};
          });
#pragma unroll
          for (int e = 0; e < 2; ++e) b[j][e] = words.values[e];
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int j = 0; j < kColTiles; ++j) multiply_add(sums_[i][j], a[i], b[j]);
        }
      }
    }

    // As FmaTile's.
    template <class F>
    __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
      for (int i = 0; i < kRowTiles * 2; ++i) {
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
          const auto& sums = sums_[i / 2][j];
          f(row_ + i * 8, col_ + j * 8 + member_ * 2,
            Vector<float, 2>{{sums[i % 2 * 2], sums[i % 2 * 2 + 1]}});
        }
      }
    }

   private:
    using Word = decltype(Format::word(nullptr));
    static constexpr int kRowTiles = kWarpRows / 16, kColTiles = kWarpCols / 8;
    float sums_[kRowTiles][kColTiles][4] = {};
    int row_, col_, member_;

    // A lane's words of a line; two(k) are its numbers of the 8 k's from k on.
    template <class Two>
    static __device__ __forceinline__ Vector<Word, 2> load(const Two& two) {
      float numbers[2 * Format::kInWord];
#pragma unroll
      for (int i = 0; i < Format::kInWord; ++i) {
        const Vector<float, 2> some = two(i * 8);
#pragma unroll
        for (int e = 0; e < 2; ++e) numbers[i * 2 + e] = some.values[e];
      }
      return {{Format::word(numbers), Format::word(numbers + Format::kInWord)}};
    }
  };
};

// The same where lines of both operands are pairs across k, so that what the tensor cores take is made of
// those of two k's: its row i is line 2 i, and i + 8 line 2 i + 1; so are the columns of two of its products.
template <int kTileRows, int kTileCols, int kWarpRows, int kWarpCols>
struct PairedTile {
  using Scalar = float;
  static constexpr int kInNumber = 2;  // lines, each a row or column of the result
  static constexpr int kRows = kTileRows / 2, kCols = kTileCols / 2, kInner = 16, kStages = 3;
  static constexpr int kPadAlong = 0, kPadAcross = 4;
  static constexpr int kThreads = kTileRows / kWarpRows * (kTileCols / kWarpCols) * kWarpSize;

  template <bool kAlong>
  class Sums {
   public:
    static_assert(!kAlong);

    __device__ __forceinline__ Sums() {
      const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
      row_ = warp / (kTileCols / kWarpCols) * (kWarpRows / 2) + lane / 4;
      col_ = warp % (kTileCols / kWarpCols) * (kWarpCols / 2);
      member_ = lane % 4;
    }

    __device__ __forceinline__ void add(const Stage<PairedTile, false>& stage) {
      const int group = threadIdx.x % kWarpSize / 4;
      const float* const left = stage.left + stage.left_at(row_, member_ * 2);
      const float* const right = stage.right + member_ * 2 * stage.kRightPitch + col_ + group;
      unsigned a[kRowTiles][4], b[kColTiles][2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load(left + i * 8, stage.kLeftPitch,
             [&](int line, int half) -> auto& { return a[i][line + half * 2]; });
      }
#pragma unroll
      for (int j = 0; j < kColTiles; j += 2) {
        load(right + j * 4, stage.kRightPitch,
             [&](int line, int half) -> auto& { return b[j + line][half]; });
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) multiply_add(sums_[i][j], a[i], b[j]);
      }
    }

    // As FmaTile's.
    template <class F>
    __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
      for (int i = 0; i < kRowTiles * 2; ++i) {
#pragma unroll
        for (int j = 0; j < kColTiles; j += 2) {
          const auto &even = sums_[i / 2][j], &odd = sums_[i / 2][j + 1];
          const int of = i % 2 * 2;
          f((row_ + i / 2 * 8) * 2 + i % 2, (col_ + j * 4 + member_ * 2) * 2,
            Vector<float, 4>{{even[of], odd[of], even[of + 1], odd[of + 1]}});
        }
      }
    }

   private:
    static constexpr int kRowTiles = kWarpRows / 16, kColTiles = kWarpCols / 8;
    float sums_[kRowTiles][kColTiles][4] = {};
    int row_, col_, member_;

    // The words of two lines: to(line, half) is that of the lane's two k's of 8, of the first 8 or the
    // others.
    template <class To>
    static __device__ __forceinline__ void load(const float* pairs, int pitch, const To& to) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned first = __float_as_uint(pairs[half * 8 * pitch]);
        const unsigned second = __float_as_uint(pairs[(half * 8 + 1) * pitch]);
        to(0, half) = (first & 0xffffu) | second << 16;
        to(1, half) = first >> 16 | (second & 0xffff0000u);
      }
    }
  };
};

// ---- copies into a stage ----

// How a block's threads copy kLines lines of kCount numbers, kLength at once: a thread the same numbers of
// every line that it copies.
template <int kThreads, int kLines, int kCount, int kLength>
struct Copies {
  static constexpr int kVectors = kCount / kLength, kStep = kThreads / kVectors;
  static_assert(kThreads % kVectors == 0);

  static __device__ __forceinline__ int at() { return threadIdx.x % kVectors * kLength; }
  // Calls copy(line) for the thread's lines.
  template <class Copy>
  static __device__ __forceinline__ void each_line(const Copy& copy) {
    const int first = threadIdx.x / kVectors;
#pragma unroll
    for (int line = 0; line < kLines; line += kStep) {
      if (kLines % kStep == 0 || line + first < kLines) copy(line + first);
    }
  }
};

// Runs a product whose k's come in `count` stages. locate(c) writes where the k's of stage c lie to shared
// memory, into one of two places, for copy(c) to read behind a barrier, by which the copies begin.
template <class Sums, class StageOf, int kStages, class Locate, class Copy, class Use>
__device__ __forceinline__ void run_stages(StageOf (&stages)[kStages], int count, Sums& sums,
                                           const Locate& locate, const Copy& copy, const Use& use) {
#pragma unroll
  for (int c = 0; c < kStages - 1; ++c) {
    if (c < count) locate(c);
    __syncthreads();
    if (c < count) copy(c, stages[c]);
    commit_copies();
  }
  if (kStages - 1 < count) locate(kStages - 1);
  int now = 0, next = kStages - 1;
  for (int c = 0; c < count; ++c) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // all have arrived, and the readers of the stage that is filled next are done
    if (c + kStages - 1 < count) copy(c + kStages - 1, stages[next]);
    commit_copies();
    if (c + kStages < count) locate(c + kStages);
    sums.add(stages[now]);
    use(c, stages[now]);
    now = now + 1 == kStages ? 0 : now + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
}

}  // namespace

}  // namespace metafast::cuda
