// The examples of a group of tasks, in the lanes of one layout (lanes.h).
#pragma once

#include <limits>

#include "common/arena.h"
#include "inner_loop/gemm.h"
#include "inner_loop/lanes.h"
#include "inner_loop/params.h"

namespace metafast::METAFAST_ISA {

// Features in place of samples: [rows, pitch] becomes [samples, cols], zero behind the last feature.
template <class Layout, typename T>
void transpose_samples(const T* in, int64_t pitch, int64_t samples, int64_t cols, T* out) {
  constexpr int n = Layout::kSamples;
  for (int64_t s = 0; s < samples; s += n) {
    for (int64_t c = 0; c < cols; ++c) {
      Vec<T> block[n];
      for (int i = 0; i < n; ++i) {
        block[i] = c * n + i < pitch ? load(in + (s / n * pitch + c * n + i) * kLanes<T>) : Vec<T>{};
      }
      transpose<Layout::kTasks>(block);
      for (int64_t i = 0; i < n && s + i < samples; ++i) {
        store(out + ((s + i) * cols + c) * kLanes<T>, block[i]);
      }
    }
  }
}

// What the dual form of the first layer (params.h) knows of a batch. The layer's parameters are coordinates,
// a matrix [E, H] over the task's E = S + Q examples, support first.
template <typename T>
struct Dual {
  int64_t support = 0, examples = 0;  // S, E
  int64_t first = 0;                  // of the task's examples, the batch's own
  int64_t hidden = 0;                 // H
  int64_t pitch = 0;                  // of gram, in vectors
  T* start = nullptr;                 // [rows, H]: outputs of the layer at theta_0. Null: direct form
  T* gram = nullptr;  // [rows, E]: inner products with the task's examples, and 1 for the bias
};

template <class Layout, typename T>
struct Batch {
  int64_t samples, rows, features, outputs;
  int64_t pitch, out_pitch;  // of x, y, in vectors
  T* x;                      // [rows, features + 1], the last feature 1
  T* x_transposed;           // of a layout that transposes: [samples, ...]; else x
  T* y;                      // [rows, outputs], one-hot for labels
  T* share;                  // [rows]: share of the example in its task's mean, 0: left out
  T* grad_x;                 // [rows, features] or null
  T* grad_y;                 // [rows, outputs] or null
  T* grad_share;             // [rows] or null
  Dual<T> dual;
  Vec<T> undefined;  // NaN for tasks without any example, to be added to their loss

  Batch(Arena<T>& arena, const Mlp<T>& mlp, const Examples<T>& examples)
      : samples(examples.count),
        rows(div_up(samples, Layout::kSamples)),
        features(mlp.widths[0]),
        outputs(mlp.widths[mlp.layers]),
        pitch(Layout::row(features + 1)),
        out_pitch(Layout::row(outputs)),
        x(arena.take(rows * pitch)),
        x_transposed(Layout::kTransposes ? arena.take(samples * Layout::columns(features + 1)) : x),
        y(arena.take(rows * out_pitch)),
        share(arena.take(rows)),
        grad_x(arena.take_if(examples.grad_x != nullptr, rows * Layout::row(features))),
        grad_y(arena.take_if(examples.grad_y != nullptr, rows * out_pitch)),
        grad_share(arena.take_if(examples.grad_weights != nullptr, rows)) {}

  // The dual form of the first layer, for the examples from `first` on of the S + Q of a task.
  void take_dual(Arena<T>& arena, const InnerLoop<T>& p, int64_t first) {
    dual.first = first;
    dual.support = p.support.count;
    dual.examples = p.support.count + p.query.count;
    dual.pitch = Layout::row(dual.examples);
    dual.hidden = p.mlp.widths[1];
    dual.start = arena.take(rows * Layout::row(dual.hidden));
    dual.gram = arena.take(rows * dual.pitch);
  }

  static int64_t row_of(int64_t sample) { return sample / Layout::kSamples; }
  static int lane_of(int task, int64_t sample) { return sample % Layout::kSamples * Layout::kTasks + task; }

  void load_tasks(const Examples<T>& examples, int64_t first, int tasks) {
    clear(x, rows * pitch);
    clear(y, rows * out_pitch);
    clear(share, rows);
    if (grad_x) clear(grad_x, rows * Layout::row(features));
    if (grad_y) clear(grad_y, rows * out_pitch);
    if (grad_share) clear(grad_share, rows);
    undefined = Vec<T>{};
    for (int64_t r = 0; r < rows; ++r) {
      T* one = x + lane_offset<Layout, T>(r, pitch, features, 0);
      std::fill_n(one, kStep<Layout, T>, T(1));
    }
    for (int t = 0; t < tasks; ++t) {
      const int64_t begin = (first + t) * samples;
      T total = 0;
      for (int64_t s = 0; s < samples; ++s) {
        const int64_t row = row_of(s);
        const int lane = lane_of(t, s);
        const T* from = examples.x + (begin + s) * features;
        T* to = x + lane_offset<Layout, T>(row, pitch, 0, lane);
        for (int64_t i = 0; i < features; ++i) to[i * kStep<Layout, T>] = from[i];
        if (examples.labels != nullptr) {
          const int64_t label = examples.labels[begin + s];
          if (label == kIgnoreLabel) continue;
          y[lane_offset<Layout, T>(row, out_pitch, label, lane)] = 1;
        } else {
          const T* target = examples.y + (begin + s) * outputs;
          for (int64_t o = 0; o < outputs; ++o) {
            y[lane_offset<Layout, T>(row, out_pitch, o, lane)] = target[o];
          }
        }
        const T weight = examples.weights != nullptr ? examples.weights[begin + s] : T(1);
        share[share_of(t, s)] = weight;
        total += weight;
      }
      if (total == 0) undefined[lane_of(t, 0)] = std::numeric_limits<T>::quiet_NaN();
      const T mean = total == 0 ? T(0) : T(1) / (total * terms(examples));
      for (int64_t s = 0; s < samples; ++s) share[share_of(t, s)] *= mean;
    }
    if (Layout::kTransposes) {
      transpose_samples<Layout>(x, features + 1, samples, Layout::columns(features + 1), x_transposed);
    }
  }

  // Where the share of a task's sample lies.
  static int64_t share_of(int task, int64_t sample) {
    return lane_offset<Layout, T>(row_of(sample), 1, 0, lane_of(task, sample));
  }
  // Of which the loss of an example is the mean.
  T terms(const Examples<T>& examples) const {
    return static_cast<T>(examples.labels != nullptr ? 1 : outputs);
  }

  // After load_tasks of both batches. start: [T, samples, H]. Of the inner products with queries, those of
  // the support alone are ever needed.
  void load_dual(const T* start, const Batch& support, const Batch& query, int64_t task) {
    const int64_t row = Layout::row(dual.hidden);
    clear(dual.start, rows * row);
    for (int64_t s = 0; s < samples; ++s) {
      std::copy_n(start + (task * samples + s) * dual.hidden, dual.hidden, dual.start + s * row * kLanes<T>);
    }
    const Factor<T> with_support{support.x, x, pitch, pitch}, with_query{query.x, x, pitch, pitch};
    dots<1>(&with_support, rows, support.samples, dual.gram, dual.pitch);
    if (dual.first == 0) dots<1>(&with_query, rows, query.samples, dual.gram + support.samples, dual.pitch);
  }

  // Writes [rows, width] back to [T, samples, width].
  void store_tasks(const T* array, int64_t width, int64_t first, int tasks, T* out) const {
    for (int t = 0; t < tasks; ++t) {
      for (int64_t s = 0; s < samples; ++s) {
        const T* from = array + lane_offset<Layout, T>(row_of(s), Layout::row(width), 0, lane_of(t, s));
        T* to = out + ((first + t) * samples + s) * width;
        for (int64_t i = 0; i < width; ++i) to[i] = from[i * kStep<Layout, T>];
      }
    }
  }

  // The gradients of the weights w, from those of the shares w_s / (terms sum w). What is left out has none.
  void store_weights(const Examples<T>& examples, int64_t first, int tasks) const {
    for (int t = 0; t < tasks; ++t) {
      const int64_t begin = (first + t) * samples;
      T total = 0, mean = 0;
      for (int64_t s = 0; s < samples; ++s) {
        const int64_t i = share_of(t, s);
        if (share[i] == 0) continue;
        total += examples.weights[begin + s];
        mean += share[i] * grad_share[i];
      }
      for (int64_t s = 0; s < samples; ++s) {
        const int64_t i = share_of(t, s);
        const T grad = (grad_share[i] / terms(examples) - mean) / total;
        examples.grad_weights[begin + s] = share[i] != 0 ? grad : T(0);
      }
    }
  }

  static void clear(T* array, int64_t vectors) { std::fill_n(array, vectors * kLanes<T>, T(0)); }
};

}  // namespace metafast::METAFAST_ISA
