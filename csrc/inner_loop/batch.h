// The examples of a group of tasks, in the lanes of one layout (lanes.h).
#pragma once

#include <limits>

#include "inner_loop/arena.h"
#include "inner_loop/lanes.h"
#include "inner_loop/params.h"

namespace metafast::METAFAST_ISA {

// Features in the lanes: [rows, pitch] of samples in lanes becomes [samples, cols], zero behind the last
// feature.
template <typename T>
void transpose_samples(const T* in, int64_t pitch, int64_t samples, int64_t cols, T* out) {
  constexpr int n = kLanes<T>;
  for (int64_t s = 0; s < samples; s += n) {
    for (int64_t c = 0; c < cols; ++c) {
      Vec<T> block[n];
      for (int i = 0; i < n; ++i) {
        block[i] = c * n + i < pitch ? load(in + (s / n * pitch + c * n + i) * n) : Vec<T>{};
      }
      transpose_lanes<T>(block);
      for (int64_t i = 0; i < n && s + i < samples; ++i) store(out + ((s + i) * cols + c) * n, block[i]);
    }
  }
}

template <class Layout, typename T>
struct Batch {
  int64_t samples, rows, features, outputs;
  T* x;              // [rows, features + 1], the last feature 1
  T* x_transposed;   // with SamplesInLanes: [samples, ...]; else x
  T* y;              // [rows, outputs], one-hot for labels
  T* share;          // [rows]: share of the example in its task's mean, 0: left out
  T* grad_x;         // [rows, features] or null
  T* grad_y;         // [rows, outputs] or null
  Vec<T> undefined;  // NaN for tasks without any example, to be added to their loss

  Batch(Arena<T>& arena, const Mlp<T>& mlp, const Examples<T>& examples)
      : samples(examples.count),
        rows(div_up(samples, Layout::kSamples)),
        features(mlp.widths[0]),
        outputs(mlp.widths[mlp.layers]),
        x(arena.take(rows * (features + 1))),
        x_transposed((Layout::kSamples > 1) ? arena.take(samples * Layout::columns(features + 1)) : x),
        y(arena.take(rows * outputs)),
        share(arena.take(rows)),
        grad_x(arena.take_if(examples.grad_x != nullptr, rows * features)),
        grad_y(arena.take_if(examples.grad_y != nullptr, rows * outputs)) {}

  static int64_t row_of(int64_t sample) { return sample / Layout::kSamples; }
  static int lane_of(int task, int64_t sample) { return task * Layout::kSamples + sample % Layout::kSamples; }

  void load_tasks(const Examples<T>& examples, int64_t first, int tasks) {
    clear(x, rows * (features + 1));
    clear(y, rows * outputs);
    clear(share, rows);
    if (grad_x) clear(grad_x, rows * features);
    if (grad_y) clear(grad_y, rows * outputs);
    undefined = Vec<T>{};
    for (int64_t r = 0; r < rows; ++r) store(x + (r * (features + 1) + features) * kLanes<T>, Vec<T>{} + 1);
    for (int t = 0; t < tasks; ++t) {
      const int64_t begin = (first + t) * samples;
      int64_t valid = 0;
      for (int64_t s = 0; s < samples; ++s) {
        const int64_t row = row_of(s);
        const int lane = lane_of(t, s);
        const T* from = examples.x + (begin + s) * features;
        for (int64_t i = 0; i < features; ++i) x[lane_offset<T>(row, features + 1, i, lane)] = from[i];
        if (examples.labels != nullptr) {
          const int64_t label = examples.labels[begin + s];
          if (label == kIgnoreLabel) continue;
          y[lane_offset<T>(row, outputs, label, lane)] = 1;
        } else {
          const T* target = examples.y + (begin + s) * outputs;
          for (int64_t o = 0; o < outputs; ++o) y[lane_offset<T>(row, outputs, o, lane)] = target[o];
        }
        share[lane_offset<T>(row, 1, 0, lane)] = 1;
        ++valid;
      }
      if (valid == 0) undefined[lane_of(t, 0)] = std::numeric_limits<T>::quiet_NaN();
      const T mean = T(1) / static_cast<T>(valid * (examples.labels != nullptr ? 1 : outputs));
      for (int64_t s = 0; s < samples && valid > 0; ++s)
        share[lane_offset<T>(row_of(s), 1, 0, lane_of(t, s))] *= mean;
    }
    if (Layout::kSamples > 1) {
      transpose_samples(x, features + 1, samples, Layout::columns(features + 1), x_transposed);
    }
  }

  // Writes [rows, width] back to [T, samples, width].
  void store_tasks(const T* array, int64_t width, int64_t first, int tasks, T* out) const {
    for (int t = 0; t < tasks; ++t) {
      for (int64_t s = 0; s < samples; ++s) {
        T* to = out + ((first + t) * samples + s) * width;
        for (int64_t i = 0; i < width; ++i) to[i] = array[lane_offset<T>(row_of(s), width, i, lane_of(t, s))];
      }
    }
  }

  static void clear(T* array, int64_t vectors) { std::fill_n(array, vectors * kLanes<T>, T(0)); }
};

}  // namespace metafast::METAFAST_ISA
