// A group of coordinates, one in each lane of kVecs vectors: its rows in the kernels' memory, [rows, kGroup],
// and on the way to and from tensors and the packed state.
#pragma once

#include <algorithm>

#include "common/arena.h"
#include "learned_optimizer/params.h"

namespace metafast::METAFAST_ISA {

constexpr int kVecs = 2;
template <typename T>
constexpr int64_t kGroup = kVecs * kLanes<T>;  // divides kStateBlock

// Where a group lies: in the tensor `item` the coordinates from `first` on, `count` of them, the other lanes
// are empty; in the block of state the places from `place` on.
struct Span {
  int item;
  int64_t first;
  int count;
  int64_t block, place;
};

// Calls f(span) for every group of the blocks [begin, end); those without a coordinate have count <= 0.
template <typename T, class F>
void for_groups(const LstmUnroll<T>& p, int64_t begin, int64_t end, F&& f) {
  int item = 0;
  for (int64_t block = begin; block < end; ++block) {
    while (block >= p.first_block[item + 1]) ++item;
    for (int64_t place = 0; place < kStateBlock; place += kGroup<T>) {
      const int64_t first = (block - p.first_block[item]) * kStateBlock + place;
      const int64_t count = std::min<int64_t>(kGroup<T>, p.list[item].size - first);
      f(Span{item, first, static_cast<int>(std::max<int64_t>(count, 0)), block, place});
    }
  }
}

inline int lanes_of(const Span& span, int vec, int lanes) {
  return std::clamp(span.count - vec * lanes, 0, lanes);
}

// Calls f.template operator()<n>(i) for pieces [i, i + n) of [begin, end): kSize at a time, then what is left
// in ever smaller ones.
template <int kSize, class F>
METAFAST_HD void for_tiles(int64_t begin, int64_t end, F&& f) {
  for (; begin + kSize <= end; begin += kSize) f.template operator()<kSize>(begin);
  if constexpr (kSize > 1) for_tiles<(kSize + 1) / 2>(begin, end, f);
}

// A row of a tensor's elements; empty lanes are 0.
template <typename T>
METAFAST_HD void load_row(const T* tensor, const Span& span, T* row) {
  for (int v = 0; v < kVecs; ++v) {
    const T* p = tensor + span.first + v * kLanes<T>;
    store(row + v * kLanes<T>,
          span.count == kGroup<T> ? load(p) : load_partial(p, lanes_of(span, v, kLanes<T>)));
  }
}

// Row k of a tensor [K, size]; `next` is the one that is read after it. Rows are far apart, so that no
// processor guesses it.
template <typename T>
METAFAST_HD void load_step(const T* tensor, int64_t size, int64_t k, int64_t next, const Span& span, T* row) {
  for (int v = 0; v < kVecs; ++v) __builtin_prefetch(tensor + next * size + span.first + v * kLanes<T>);
  load_row(tensor + k * size, span, row);
}

template <typename T>
METAFAST_HD void store_row(const T* row, const Span& span, T* tensor) {
  for (int v = 0; v < kVecs; ++v) {
    T* p = tensor + span.first + v * kLanes<T>;
    const Vec<T> value = load(row + v * kLanes<T>);
    if (span.count == kGroup<T>) {
      store(p, value);
    } else {
      store_partial(p, value, lanes_of(span, v, kLanes<T>));
    }
  }
}

// Elements of a packed state, as numbers of T.
template <typename T>
struct StateOf {
  using Element = T;
  static METAFAST_HD Vec<T> read(const T* p) { return load(p); }
  static METAFAST_HD void write(T* p, Vec<T> v) { store(p, v); }
};

struct BFloat16 {
  uint16_t bits;
};

struct BFloat16State {
  using Element = BFloat16;
  using Bits = Vec<uint32_t>;
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));

  static METAFAST_HD Vec<float> read(const BFloat16* p) {
    Half half;
    __builtin_memcpy(&half, p, sizeof half);
    return (Vec<float>)(__builtin_convertvector(half, Bits) << 16);
  }
  // To the nearest, ties to even.
  static METAFAST_HD void write(BFloat16* p, Vec<float> v) {
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Half half = __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, Half);
    __builtin_memcpy(p, &half, sizeof half);
  }
};

// Rows of a group between the kernel and the packed state [blocks, R, kStateBlock]. Empty lanes are 0 on
// either side.
template <class State, typename T>
void load_state(const typename State::Element* state, int64_t rows, const Span& span, T* out) {
  const auto* p = state + span.block * rows * kStateBlock + span.place;
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      store(out + r * kGroup<T> + v * kLanes<T>, State::read(p + r * kStateBlock + v * kLanes<T>));
    }
  }
  if (span.count == kGroup<T>) return;
  for (int64_t r = 0; r < rows; ++r)
    std::fill(out + r * kGroup<T> + span.count, out + (r + 1) * kGroup<T>, T(0));
}

template <class State, typename T>
void store_state(const T* in, int64_t rows, const Span& span, typename State::Element* state) {
  auto* p = state + span.block * rows * kStateBlock + span.place;
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      State::write(p + r * kStateBlock + v * kLanes<T>, load(in + r * kGroup<T> + v * kLanes<T>));
    }
  }
  if (span.count == kGroup<T>) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = span.count; i < kGroup<T>; ++i) p[r * kStateBlock + i] = typename State::Element{};
  }
}

// Either way, by what the state's elements are.
template <typename T>
void load_state(const LstmUnroll<T>& p, const void* state, const Span& span, T* out) {
  const int64_t rows = p.lstm.state_rows();
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.bfloat16_state) {
      return load_state<BFloat16State>(static_cast<const BFloat16*>(state), rows, span, out);
    }
  }
  load_state<StateOf<T>>(static_cast<const T*>(state), rows, span, out);
}

template <typename T>
void store_state(const LstmUnroll<T>& p, const T* in, const Span& span, void* state) {
  const int64_t rows = p.lstm.state_rows();
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.bfloat16_state) return store_state<BFloat16State>(in, rows, span, static_cast<BFloat16*>(state));
  }
  store_state<StateOf<T>>(in, rows, span, static_cast<T*>(state));
}

}  // namespace metafast::METAFAST_ISA
