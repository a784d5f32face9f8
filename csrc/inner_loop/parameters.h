// Where the parameters of a group of tasks lie in memory, and their ways from and to the caller's tensors.
#pragma once

#include <algorithm>

#include "inner_loop/lanes.h"
#include "inner_loop/params.h"

namespace metafast::METAFAST_ISA {

template <class Layout, typename T>
class Parameters {
 public:
  // dual_examples: E with the dual form of the first layer (params.h), else 0.
  Parameters(const Mlp<T>& mlp, int64_t dual_examples) : mlp_(mlp), first_layer_(dual_examples > 0) {
    offsets_[0] = 0;
    for (int l = 0; l < mlp.layers; ++l) {
      const int64_t rows = l < first_layer_ ? dual_examples : mlp.widths[l + 1];
      offsets_[l + 1] = offsets_[l] + rows * cols(l);
    }
  }

  // Layer l is a matrix [widths[l + 1], cols(l)] of vectors, from vector offset(l) on. In the dual form the
  // first is [E, cols(0)], coordinates in place of parameters: whoever brings or takes parameters leaves it
  // out.
  int64_t cols(int l) const {
    return Layout::columns(l < first_layer_ ? mlp_.widths[1] : mlp_.widths[l] + 1);
  }
  int64_t offset(int l) const { return offsets_[l]; }
  int64_t vectors() const { return offsets_[mlp_.layers]; }

  // What pads the rows: 0 it stays, unless a gradient is not finite.
  void clear_padding(T* theta) const {
    for (int l = first_layer_; l < mlp_.layers; ++l) {
      const int64_t numbers = (mlp_.widths[l] + 1) * Layout::kTasks, row = cols(l) * kLanes<T>;
      for (int64_t o = 0; o < mlp_.widths[l + 1] && numbers < row; ++o) {
        std::fill_n(theta + offsets_[l] * kLanes<T> + o * row + numbers, row - numbers, T(0));
      }
    }
  }

  // One set of parameters for all tasks.
  void load_shared(const T* const* params, T* theta) const {
    for_each_run(params, [&](const T* in, int, int64_t begin, int64_t n, int64_t place) {
      if constexpr (Layout::kTasks == 1) {
        std::copy_n(in + begin, n, theta + place);
      } else {
        using Block = typename BlockOf<T, Layout::kTasks>::type;
        for (int64_t i = 0; i < n; ++i) {
          const Block block = in[begin + i] - Block{};
          __builtin_memcpy(theta + place + i * Layout::kTasks, &block, sizeof block);
        }
      }
    });
  }

  // Numbers that all tasks share, as Layout::shared() reads them.
  void load_elements(const T* const* values, T* elements) const {
    for_each_run(values, [&](const T* in, int, int64_t begin, int64_t n, int64_t place) {
      std::copy_n(in + begin, n, elements + place / Layout::kTasks);
    });
  }

  // Parameters [T, ...] of tasks [first, first + tasks).
  void load_tasks(const T* const* params, int64_t first, int tasks, T* theta) const {
    for_each_run(params, [&](const T* in, int i, int64_t begin, int64_t n, int64_t place) {
      const int64_t size = mlp_.size(i);
      if constexpr (Layout::kTasks == 1) {
        std::copy_n(in + first * size + begin, n, theta + place);
      } else {
        gather_lanes<Layout::kTasks>(in + first * size + begin, size, tasks, n, theta + place);
      }
    });
  }

  void store_tasks(const T* theta, int64_t first, int tasks, T* const* params) const {
    for_each_run(params, [&](T* out, int i, int64_t begin, int64_t n, int64_t place) {
      const int64_t size = mlp_.size(i);
      if constexpr (Layout::kTasks == 1) {
        std::copy_n(theta + place, n, out + first * size + begin);
      } else {
        scatter_lanes<Layout::kTasks>(theta + place, size, tasks, n, out + first * size + begin);
      }
    });
  }

  // The sum over the tasks in lanes, all parameters (but those of a dual layer) one after the other.
  // Overwrites `theta`.
  void store_sum(T* theta, T* out) const {
    if constexpr (Layout::kTasks > 1) {
      const auto sum_block = [&](int64_t first, int64_t count) __attribute__((always_inline)) {
        Vec<T> block[Layout::kTasks] = {};
        for (int64_t i = 0; i < count; ++i) block[i] = load(theta + (first + i) * kLanes<T>);
        store(theta + first * Layout::kSamples, Layout::sums_over_tasks(block));  // which have been read
      };
      int64_t i = 0;
      for (; i + Layout::kTasks <= vectors(); i += Layout::kTasks) sum_block(i, Layout::kTasks);
      if (i < vectors()) sum_block(i, vectors() - i);
    }
    T* outs[2 * kMaxLayers];
    for (int i = 2 * first_layer_; i < 2 * mlp_.layers; ++i) {
      outs[i] = out;
      out += mlp_.size(i);
    }
    for_each_run(outs, [&](T* to, int, int64_t begin, int64_t n, int64_t place) {
      std::copy_n(theta + place / Layout::kTasks, n, to + begin);
    });
  }

 private:
  const Mlp<T>& mlp_;
  const int first_layer_;  // that has parameters: 1 behind a dual layer
  int64_t offsets_[kMaxLayers + 1];

  // f(arrays[i], i, first element, number of elements, their place in theta) for all elements of every
  // parameter i, in runs of neighbours.
  template <class Pointer, class F>
  void for_each_run(Pointer* arrays, const F& f) const {
    for (int l = first_layer_; l < mlp_.layers; ++l) {
      const int64_t inputs = mlp_.widths[l];
      for (int64_t o = 0; o < mlp_.widths[l + 1]; ++o) {
        const int64_t row = (offsets_[l] + o * cols(l)) * kLanes<T>;
        f(arrays[2 * l], 2 * l, o * inputs, inputs, row);
        f(arrays[2 * l + 1], 2 * l + 1, o, int64_t{1}, row + inputs * Layout::kTasks);
      }
    }
  }
};

}  // namespace metafast::METAFAST_ISA
