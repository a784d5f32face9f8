// What the lanes of a vector hold. Two layouts serve the same code.
//
// TasksInLanes, for small networks: examples of kTasks tasks, kSamples of each; lane l holds example l /
// kTasks of task l % kTasks. That is one example of as many tasks as there are lanes, or two of half as many,
// or many of one task. A parameter is kTasks numbers, read into the lanes of all examples, so every operation
// is lane by lane. Only the gradient of the parameters sums over examples, hence, with several in the lanes,
// over lanes. The fewer tasks, the less a group of them keeps in the cache; but examples that do not fill a
// row leave lanes empty.
//
// FeaturesInLanes, for one large network: an example is a row of scalars, padded to whole vectors. Rows are
// long enough that sums over them, and so across lanes, cost little, and no lane waits for examples that a
// task has not got.
//
// Parameters of a layer are a matrix [O, I + 1], the bias its last column, rows padded to whole vectors. It
// meets activations with a last feature of constant 1, so that the bias needs no code of its own.
#pragma once

#include <algorithm>

#include "common/simd.h"

namespace metafast::METAFAST_ISA {

// ---- transposes ----

// A vector of kCount numbers.
template <typename T, int kCount>
struct BlockOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

// One step of transpose(): exchanges between a and b the lanes in which bit kHalf of the lane number differs
// from the vector (clear for a, set for b).
template <int kHalf, class V, int... l>
METAFAST_HD void exchange_lanes(V& a, V& b, std::integer_sequence<int, l...>) {
  constexpr int n = sizeof...(l);
  const V first = a, second = b;
  a = pick_lanes<(l & kHalf ? n + (l ^ kHalf) : l)...>(first, second);
  b = pick_lanes<(l & kHalf ? n + l : (l ^ kHalf))...>(first, second);
}

// The square of as many vectors as a vector has blocks of kBlock lanes: block i of rows[k] and block k of
// rows[i] change places.
template <int kBlock, class V, int kHalf = sizeof(V) / sizeof(V{}[0]) / 2>
METAFAST_HD void transpose(V* rows) {
  constexpr int n = sizeof(V) / sizeof(V{}[0]), kApart = kHalf / kBlock;
  if constexpr (kApart > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < n / kBlock; ++i) {
      if (i & kApart) continue;
      exchange_lanes<kHalf>(rows[i], rows[i + kApart], std::make_integer_sequence<int, n>{});
    }
    transpose<kBlock, V, kHalf / 2>(rows);
  }
}

// ---- layouts ----

// kBlock numbers, repeated in all lanes.
template <int kBlock, typename T>
METAFAST_HD Vec<T> repeat(const T* block) {
  if constexpr (kBlock == kLanes<T>) return load(block);
  if constexpr (kBlock == 1) return broadcast(*block);
#if defined(__AVX512F__)
  // g++ 12 warns about the plain ones
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_broadcast_f32x8(0xffff, _mm256_loadu_ps(block));
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_broadcast_f64x4(0xff, _mm256_loadu_pd(block));
#endif
}

template <typename T, int kTasksInLanes>
struct TasksInLanes {
  static constexpr int kTasks = kTasksInLanes, kSamples = kLanes<T> / kTasks;
  static_assert(kTasks == 1 || kSamples <= 2);
  // How the gradient of the parameters sums over the samples in the lanes: of two it adds up the halves of
  // its vectors. More would cost more than to transpose the activations, to features in place of samples.
  static constexpr bool kFolds = kSamples == 2, kTransposes = kSamples > 2;
  using Number = Vec<T>;  // of a row: one feature of kSamples examples of kTasks tasks
  // Vectors that `features` numbers of a row of activations take.
  static constexpr int64_t row(int64_t features) { return features; }
  // Vectors that `features` features of one row of parameters take.
  static constexpr int64_t columns(int64_t features) { return div_up(features, kSamples); }
  static METAFAST_HD Vec<T> parameter(const T* p) { return repeat<kTasks>(p); }
  static METAFAST_HD Vec<T> activation(const T* a) { return load(a); }
  // The vector of elementwise values (learning rates) that all tasks share, for vector i of the parameters.
  static METAFAST_HD Vec<T> shared(const T* values, int64_t i) {
    if constexpr (kTasks == 1) return load(values + i * kLanes<T>);
    if constexpr (kSamples == 1) return broadcast(values[i]);
    Vec<T> first = broadcast(values[2 * i]), second = broadcast(values[2 * i + 1]);
    exchange_lanes<kTasks>(first, second, std::make_integer_sequence<int, kLanes<T>>{});
    return first;
  }
  // Feature o of sample s (row s, unless they are transposed) of an array [rows, pitch], as the outer product
  // of parameter gradients reads it.
  static METAFAST_HD Vec<T> sample(const T* array, int64_t s, int64_t pitch, int64_t o) {
    if constexpr (!kTransposes) return load(array + (s * pitch + o) * kLanes<T>);
    return repeat<kTasks>(array + ((s / kSamples) * pitch + o) * kLanes<T> + s % kSamples * kTasks);
  }
  // Of kTasks vectors of parameters, which it overwrites, the sums over tasks in the order of the parameters.
  static METAFAST_HD Vec<T> sums_over_tasks(Vec<T>* parameters) {
    return interleave(sum_lanes<T, kTasks>(parameters), std::make_integer_sequence<int, kLanes<T>>{});
  }
  static METAFAST_HD Number number(Vec<T> lanes) { return lanes; }
  static METAFAST_HD Vec<T> lanes(Number number) { return number; }

 private:
  // Blocks of kTasks lanes, number by number.
  template <int... l>
  static METAFAST_HD Vec<T> interleave(Vec<T> v, std::integer_sequence<int, l...>) {
    return pick_lanes<(l % kSamples * kTasks + l / kSamples)...>(v, v);
  }
};

template <typename T>
struct FeaturesInLanes {
  static constexpr int kTasks = 1, kSamples = 1;
  static constexpr bool kFolds = false, kTransposes = false;
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

// ---- to lanes and back ----

// From tasks to lanes: n numbers of each of `tasks` arrays, task_stride apart, into n blocks of kTasks. Those
// of no task become 0.
template <int kTasks, typename T>
void gather_lanes(const T* in, int64_t task_stride, int tasks, int64_t n, T* out) {
  using Block = typename BlockOf<T, kTasks>::type;
  int64_t i = 0;
  if (tasks == kTasks) {
    for (; i + kTasks <= n; i += kTasks) {
      Block block[kTasks];
      for (int t = 0; t < kTasks; ++t) __builtin_memcpy(block + t, in + t * task_stride + i, sizeof(Block));
      transpose<1>(block);
      __builtin_memcpy(out + i * kTasks, block, sizeof block);
    }
  }
  for (; i < n; ++i) {
    for (int t = 0; t < kTasks; ++t) out[i * kTasks + t] = t < tasks ? in[t * task_stride + i] : T(0);
  }
}

// The way back; lanes without a task are left out.
template <int kTasks, typename T>
void scatter_lanes(const T* in, int64_t task_stride, int tasks, int64_t n, T* out) {
  using Block = typename BlockOf<T, kTasks>::type;
  int64_t i = 0;
  if (tasks == kTasks) {
    for (; i + kTasks <= n; i += kTasks) {
      Block block[kTasks];
      __builtin_memcpy(block, in + i * kTasks, sizeof block);
      transpose<1>(block);
      for (int t = 0; t < kTasks; ++t) __builtin_memcpy(out + t * task_stride + i, block + t, sizeof(Block));
    }
  }
  for (; i < n; ++i) {
    for (int t = 0; t < tasks; ++t) out[t * task_stride + i] = in[i * kTasks + t];
  }
}

}  // namespace metafast::METAFAST_ISA
