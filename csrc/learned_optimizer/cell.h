// One step of the LSTM for a group of coordinates, and how it is kept for the backward.
#pragma once

#include <cmath>
#include <limits>

#include "learned_optimizer/group.h"
#include "learned_optimizer/nonlinear.h"

namespace metafast::METAFAST_ISA {

#if defined(__AVX512F__)
constexpr int kUnits = 3;  // units of a register tile: 4 gates x kUnits x kVecs sums
#else
constexpr int kUnits = 1;
#endif

// The LSTM's weights, the four gates of a unit side by side: layer l is [H, I + H, 4], its bias [H, 4], of
// the first layer perhaps for every step.
template <typename T>
struct Weights {
  const Lstm<T>& lstm;
  T exp_p;
  T* layer[kMaxLstmLayers];
  T* bias[kMaxLstmLayers];

  Weights(Arena<T>& arena, const Lstm<T>& lstm, int64_t steps) : lstm(lstm), exp_p(std::exp(lstm.p)) {
    const int64_t H = lstm.hidden;
    for (int l = 0; l < lstm.layers; ++l) {
      const int64_t biases = lstm.bias_size(4 * H, l == 0, steps), depth = lstm.layer_inputs(l) + H;
      layer[l] = arena.take(div_up(4 * H * depth, kLanes<T>));
      bias[l] = arena.take(div_up(biases, kLanes<T>));
      if (arena.counts()) continue;
      const LstmLayer<T>& given = lstm.layer[l];
      for (int64_t u = 0; u < H; ++u) {
        for (int64_t q = 0; q < 4; ++q) {
          const int64_t I = depth - H, row = q * H + u;
          T* out = layer[l] + u * depth * 4 + q;
          for (int64_t k = 0; k < I; ++k) out[k * 4] = given.weight_ih[row * I + k];
          for (int64_t k = 0; k < H; ++k) out[(I + k) * 4] = given.weight_hh[row * H + k];
        }
      }
      for (int64_t i = 0; i < biases; ++i) {
        const int64_t step = i / (4 * H), u = i / 4 % H, q = i % 4;
        bias[l][i] = given.bias[step * 4 * H + q * H + u];
      }
    }
  }

  const T* bias_of(int l, int64_t step) const {
    return bias[l] + (l == 0 && lstm.bias_per_step ? step * 4 * lstm.hidden : 0);
  }
  const T* head_bias(int64_t step) const {
    return lstm.head_bias + (lstm.layers == 0 && lstm.bias_per_step ? step * lstm.head_rows() : 0);
  }
};

// A step in memory, rows of a group: what was there before it (the packed state's rows, then theta), what
// came in, and the gates [H, 4] of each layer. The backward keeps steps one behind the other, so that what is
// there after a step is the next one's `before`.
template <typename T>
struct Slot {
  const Lstm<T>& lstm;

  int64_t theta() const { return lstm.state_rows(); }
  int64_t carried() const { return theta() + 1; }  // rows that go from step to step
  int64_t inputs() const { return carried(); }
  int64_t gradient() const { return inputs() + lstm.inputs(); }
  int64_t gates(int l) const { return gradient() + 1 + l * 4 * lstm.hidden; }
  int64_t rows() const { return gates(lstm.layers); }
  int64_t vectors() const { return rows() * kVecs; }
};

// kCount units of a layer: [x; h] [I + H] in, their h and c out.
template <int kCount, bool kRecord, typename T>
METAFAST_HD void lstm_units(const T* weights, const T* bias, int64_t inputs, int64_t hidden, const T* x,
                            const T* h, const T* c, T* new_h, T* new_c, T* gates) {
  const int64_t depth = inputs + hidden;
  Vec<T> sums[kCount][4][kVecs];
#pragma GCC unroll 4
  for (int u = 0; u < kCount; ++u) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[u][q][v] = broadcast(bias[u * 4 + q]);
    }
  }
  const auto add = [&](const T* in, int64_t count, const T* w) __attribute__((always_inline)) {
    for (int64_t k = 0; k < count; ++k) {
      Vec<T> values[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) values[v] = load(in + k * kGroup<T> + v * kLanes<T>);
#pragma GCC unroll 4
      for (int u = 0; u < kCount; ++u) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const Vec<T> weight = broadcast(w[(u * depth + k) * 4 + q]);
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) sums[u][q][v] += weight * values[v];
        }
      }
    }
  };
  add(x, inputs, weights);
  add(h, hidden, weights + inputs * 4);
#pragma GCC unroll 4
  for (int u = 0; u < kCount; ++u) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = u * kGroup<T> + v * kLanes<T>;
      const Unit<T> unit =
          lstm_unit<T>({sums[u][0][v], sums[u][1][v], sums[u][2][v], sums[u][3][v]}, load(c + at));
      store(new_h + at, unit.h);
      store(new_c + at, unit.c);
      if constexpr (kRecord) {
        T* out = gates + 4 * u * kGroup<T> + v * kLanes<T>;
        store(out, unit.gates.i);
        store(out + kGroup<T>, unit.gates.f);
        store(out + 2 * kGroup<T>, unit.gates.g);
        store(out + 3 * kGroup<T>, unit.gates.o);
      }
    }
  }
}

// One layer. `before` and `after` are rows of the state.
template <bool kRecord, typename T>
void lstm_layer(const Weights<T>& weights, int l, int64_t step, const T* x, const T* before, T* after,
                T* gates) {
  const Lstm<T>& lstm = weights.lstm;
  const int64_t H = lstm.hidden, inputs = lstm.layer_inputs(l), h = lstm.h_row(l), c = lstm.c_row(l);
  const T* bias = weights.bias_of(l, step);
  for_tiles<kUnits>(0, H, [&]<int kCount>(int64_t u) __attribute__((always_inline)) {
    lstm_units<kCount, kRecord>(weights.layer[l] + u * (inputs + H) * 4, bias + u * 4, inputs, H, x,
                                before + h * kGroup<T>, before + (c + u) * kGroup<T>,
                                after + (h + u) * kGroup<T>, after + (c + u) * kGroup<T>,
                                gates + u * 4 * kGroup<T>);
  });
}

// The LSTM's inputs for a row of gradients.
template <typename T>
METAFAST_HD void find_inputs(const Weights<T>& weights, const T* gradient, T* inputs) {
  for (int v = 0; v < kVecs; ++v) {
    const int64_t at = v * kLanes<T>;
    const Vec<T> g = load(gradient + at);
    if (weights.lstm.preprocess == Preprocess::none) {
      store(inputs + at, g);
    } else {
      const auto [size, sign] = log_sign(g, weights.lstm.p, weights.exp_p, std::numeric_limits<T>::max());
      store(inputs + at, size);
      store(inputs + kGroup<T> + at, sign);
    }
  }
}

// A row of the head in front of its nonlinearity, without the last two columns of Head::gates.
template <typename T>
METAFAST_HD Vec<T> head_sum(const Weights<T>& weights, int row, int64_t step, const T* top, int64_t at) {
  const Lstm<T>& lstm = weights.lstm;
  const T* w = lstm.head_weight + row * lstm.head_columns();
  Vec<T> sum = broadcast(weights.head_bias(step)[row]);
  for (int64_t k = 0; k < lstm.top(); ++k) sum += w[k] * load(top + k * kGroup<T> + at);
  return sum;
}

// theta after the step and, where the update itself is wanted, that as well.
template <typename T>
METAFAST_HD void apply_head(const Weights<T>& weights, int64_t step, const T* top, const T* gradient,
                            const T* before, T* after, T* update) {
  const Lstm<T>& lstm = weights.lstm;
  const int64_t theta = lstm.state_rows() * kGroup<T>;
  for (int v = 0; v < kVecs; ++v) {
    const int64_t at = v * kLanes<T>;
    const Vec<T> old = load(before + theta + at);
    if (lstm.head == Head::update) {
      const Vec<T> change = lstm.scale * head_sum(weights, 0, step, top, at);
      if (update != nullptr) store(update + at, change);
      store(after + theta + at, old + change);
      continue;
    }
    Vec<T> gate[2];
    for (int row = 0; row < 2; ++row) {
      const T* w = lstm.head_weight + row * lstm.head_columns() + lstm.top();
      const int64_t own = (lstm.gate_row() + row) * kGroup<T> + at;
      const Vec<T> sum = head_sum(weights, row, step, top, at) + w[0] * old + w[1] * load(before + own);
      // Exact, unlike the LSTM's own: a forget gate of 1 must not let theta fade.
      gate[row] = 1 / (1 + Math<Vec<T>>::exp(-sum));
      store(after + own, gate[row]);
    }
    store(after + theta + at, gate[1] * old - gate[0] * load(gradient + at));
  }
}

// A whole step of a slot: its `gradient` row is there, and `before`; `after` has the rows that go on.
template <bool kRecord, typename T>
void lstm_step(const Weights<T>& weights, int64_t step, T* slot, T* after, T* update) {
  const Lstm<T>& lstm = weights.lstm;
  const Slot<T> rows{lstm};
  const auto row = [&](int64_t r) { return slot + r * kGroup<T>; };
  find_inputs(weights, row(rows.gradient()), row(rows.inputs()));
  const T* x = row(rows.inputs());
  for (int l = 0; l < lstm.layers; ++l) {
    lstm_layer<kRecord>(weights, l, step, x, slot, after, kRecord ? row(rows.gates(l)) : nullptr);
    x = after + lstm.h_row(l) * kGroup<T>;
  }
  // Back through a sum, nobody asks what theta was.
  if (kRecord && lstm.head == Head::update) return;
  apply_head(weights, step, x, row(rows.gradient()), slot, after, update);
}

}  // namespace metafast::METAFAST_ISA
