// What the lanes of a vector hold. Three layouts serve the same code:
//
//   TasksInLanes     many small networks, one task per lane. An example is a row of vectors, a parameter one
//                    vector: every operation is lane by lane.
//   SamplesInLanes   one small network; its examples are in the lanes, kLanes to a row of vectors. A
//   parameter
//                    is a scalar, read into all lanes. Only the gradient of the parameters sums over
//                    examples, hence over lanes: it has features in the lanes instead, and reads the
//                    activations transposed.
//   FeaturesInLanes  one large network; an example is a row of scalars, padded to whole vectors. Rows are
//   long
//                    enough that sums over them, and so across lanes, cost little, and no lane waits for
//                    examples that a task has not got.
//
// Parameters of a layer are a matrix [O, I + 1], the bias its last column, rows padded to whole vectors. It
// meets activations with a last feature of constant 1, so that the bias needs no code of its own.
#pragma once

#include <algorithm>

#include "common/simd.h"

namespace metafast::METAFAST_ISA {

template <typename T>
struct TasksInLanes {
  static constexpr int kTasks = kLanes<T>, kSamples = 1;
  using Number = Vec<T>;  // of a row: one feature of an example (SamplesInLanes: of kSamples examples)
  // Vectors that `features` numbers of a row of activations take.
  static constexpr int64_t row(int64_t features) { return features; }
  // Vectors that `features` features of one row of parameters take.
  static constexpr int64_t columns(int64_t features) { return features; }
  static METAFAST_HD Vec<T> parameter(const T* p) { return load(p); }
  static METAFAST_HD Vec<T> activation(const T* a) { return load(a); }
  // The vector of elementwise values (learning rates) that all tasks share, for vector i of the parameters.
  static METAFAST_HD Vec<T> shared(const T* values, int64_t i) { return broadcast(values[i]); }
  // Feature o of sample s of an array [rows, pitch], as the outer product of parameter gradients reads it.
  static METAFAST_HD Vec<T> sample(const T* array, int64_t s, int64_t pitch, int64_t o) {
    return load(array + (s * pitch + o) * kLanes<T>);
  }
  static METAFAST_HD Number number(Vec<T> lanes) { return lanes; }
  static METAFAST_HD Vec<T> lanes(Number number) { return number; }
};

template <typename T>
struct SamplesInLanes {
  static constexpr int kTasks = 1, kSamples = kLanes<T>;
  using Number = Vec<T>;
  static constexpr int64_t row(int64_t features) { return features; }
  static constexpr int64_t columns(int64_t features) { return div_up(features, kLanes<T>); }
  static METAFAST_HD Vec<T> parameter(const T* p) { return broadcast(*p); }
  static METAFAST_HD Vec<T> activation(const T* a) { return load(a); }
  static METAFAST_HD Vec<T> shared(const T* values, int64_t i) { return load(values + i * kLanes<T>); }
  static METAFAST_HD Vec<T> sample(const T* array, int64_t s, int64_t pitch, int64_t o) {
    return broadcast(array[((s / kLanes<T>)*pitch + o) * kLanes<T> + s % kLanes<T>]);
  }
  static METAFAST_HD Number number(Vec<T> lanes) { return lanes; }
  static METAFAST_HD Vec<T> lanes(Number number) { return number; }
};

template <typename T>
struct FeaturesInLanes {
  static constexpr int kTasks = 1, kSamples = 1;
  using Number = T;
  static constexpr int64_t row(int64_t features) { return div_up(features, kLanes<T>); }
  static constexpr int64_t columns(int64_t features) { return div_up(features, kLanes<T>); }
  static METAFAST_HD Vec<T> parameter(const T* p) { return load(p); }
  static METAFAST_HD Vec<T> activation(const T* a) { return broadcast(*a); }
  static METAFAST_HD Vec<T> shared(const T* values, int64_t i) { return load(values + i * kLanes<T>); }
  static METAFAST_HD Vec<T> sample(const T* array, int64_t s, int64_t pitch, int64_t o) {
    return broadcast(array[s * pitch * kLanes<T> + o]);
  }
  static METAFAST_HD Number number(Vec<T> lanes) { return lanes[0]; }
  static METAFAST_HD Vec<T> lanes(Number number) {  // a sum over all lanes is the number
    Vec<T> lanes{};
    lanes[0] = number;
    return lanes;
  }
};

// Scalars from one number of a row to the next.
template <class Layout, typename T>
constexpr int kStep = sizeof(typename Layout::Number) / sizeof(T);

template <typename T>
METAFAST_HD T sum_of_lanes(Vec<T> v) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

// Where number i of row r of an array [rows, pitch] of vectors lies, in the lane of a task or example.
template <class Layout, typename T>
METAFAST_HD int64_t lane_offset(int64_t r, int64_t pitch, int64_t i, int lane) {
  return r * pitch * kLanes<T> + i * kStep<Layout, T> + lane;
}

// ---- transposes ----

// One step of transpose_lanes(): exchanges between a and b the lanes in which bit kHalf of the lane number
// differs from the vector (clear for a, set for b).
template <int kHalf, typename T, int... l>
METAFAST_HD void exchange_lanes(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, l...>) {
  constexpr int n = kLanes<T>;
  const Vec<T> first = a, second = b;
#if defined(__clang__) || __GNUC__ >= 12
  a = __builtin_shufflevector(first, second, (l & kHalf ? n + (l ^ kHalf) : l)...);
  b = __builtin_shufflevector(first, second, (l & kHalf ? n + l : (l ^ kHalf))...);
#else
  a = __builtin_shuffle(first, second, Mask<T>{(l & kHalf ? n + (l ^ kHalf) : l)...});
  b = __builtin_shuffle(first, second, Mask<T>{(l & kHalf ? n + l : (l ^ kHalf))...});
#endif
}

// The square of kLanes vectors: lane i of rows[l] and lane l of rows[i] change places.
template <typename T, int kHalf = kLanes<T> / 2>
METAFAST_HD void transpose_lanes(Vec<T>* rows) {
  if constexpr (kHalf > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i & kHalf) continue;
      exchange_lanes<kHalf, T>(rows[i], rows[i + kHalf], std::make_integer_sequence<int, kLanes<T>>{});
    }
    transpose_lanes<T, kHalf / 2>(rows);
  }
}

// From tasks to lanes: n elements of each of `tasks` arrays, task_stride apart, into n vectors. Lanes without
// a task become 0.
template <typename T>
void gather_lanes(const T* in, int64_t task_stride, int tasks, int64_t n, T* out) {
  int64_t i = 0;
  if (tasks == kLanes<T>) {
    for (; i + kLanes<T> <= n; i += kLanes<T>) {
      Vec<T> block[kLanes<T>];
      for (int t = 0; t < kLanes<T>; ++t) block[t] = load(in + t * task_stride + i);
      transpose_lanes<T>(block);
      for (int k = 0; k < kLanes<T>; ++k) store(out + (i + k) * kLanes<T>, block[k]);
    }
  }
  for (; i < n; ++i) {
    Vec<T> v{};
    for (int t = 0; t < tasks; ++t) v[t] = in[t * task_stride + i];
    store(out + i * kLanes<T>, v);
  }
}

// The way back; lanes without a task are left out.
template <typename T>
void scatter_lanes(const T* in, int64_t task_stride, int tasks, int64_t n, T* out) {
  int64_t i = 0;
  if (tasks == kLanes<T>) {
    for (; i + kLanes<T> <= n; i += kLanes<T>) {
      Vec<T> block[kLanes<T>];
      for (int k = 0; k < kLanes<T>; ++k) block[k] = load(in + (i + k) * kLanes<T>);
      transpose_lanes<T>(block);
      for (int t = 0; t < kLanes<T>; ++t) store(out + t * task_stride + i, block[t]);
    }
  }
  for (; i < n; ++i) {
    for (int t = 0; t < tasks; ++t) out[t * task_stride + i] = in[i * kLanes<T> + t];
  }
}

}  // namespace metafast::METAFAST_ISA
