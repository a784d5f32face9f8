// The LSTM for a group of coordinates: its weights, a layer, the head.
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

// The LSTM's weights, the four gates of a unit side by side: layer l is [H, I + H, 4], its bias [H, 4]. The
// inputs of a loss are alike for all coordinates: with losses they are no more than another bias of the first
// layer (without layers, of the head) in every step, and I counts a coordinate's own inputs alone.
template <typename T>
struct Weights {
  const Lstm<T>& lstm;
  T exp_p;
  T* layer[kMaxLstmLayers];
  T* bias[kMaxLstmLayers];
  T* head_biases;

  Weights(Arena<T>& arena, const Lstm<T>& lstm, int64_t steps) : lstm(lstm), exp_p(std::exp(lstm.p)) {
    const int64_t H = lstm.hidden;
    for (int l = 0; l < lstm.layers; ++l) {
      const int64_t columns = lstm.layer_inputs(l), I = lstm.own_layer_inputs(l), depth = I + H;
      const int64_t biases = lstm.sees_losses(l) ? steps : 1;
      layer[l] = arena.take(div_up(4 * H * depth, kLanes<T>));
      bias[l] = arena.take(div_up(biases * 4 * H, kLanes<T>));
      if (arena.counts()) continue;
      const LstmLayer<T>& given = lstm.layer[l];
      for (int64_t u = 0; u < H; ++u) {
        for (int64_t q = 0; q < 4; ++q) {
          const int64_t row = q * H + u;
          T* out = layer[l] + u * depth * 4 + q;
          for (int64_t k = 0; k < I; ++k) out[k * 4] = given.weight_ih[row * columns + k];
          for (int64_t k = 0; k < H; ++k) out[(I + k) * 4] = given.weight_hh[row * H + k];
          for (int64_t step = 0; step < biases; ++step) {
            bias[l][step * 4 * H + u * 4 + q] =
                given.bias[row] + of_loss(l, step, given.weight_ih + row * columns + I);
          }
        }
      }
    }
    const int64_t rows = lstm.head_rows(), biases = lstm.sees_losses(lstm.layers) ? steps : 1;
    head_biases = arena.take(div_up(biases * rows, kLanes<T>));
    if (arena.counts()) return;
    for (int64_t step = 0; step < biases; ++step) {
      for (int64_t row = 0; row < rows; ++row) {
        head_biases[step * rows + row] =
            lstm.head_bias[row] +
            of_loss(lstm.layers, step, lstm.head_weight + row * lstm.head_columns() + lstm.own_inputs());
      }
    }
  }

  LogSign<T> loss_inputs(int64_t step) const {
    return log_sign(lstm.losses[step], lstm.p, exp_p, std::numeric_limits<T>::max());
  }

  const T* bias_of(int l, int64_t step) const {
    return bias[l] + (lstm.sees_losses(l) ? step * 4 * lstm.hidden : 0);
  }
  const T* head_bias(int64_t step) const {
    return head_biases + (lstm.sees_losses(lstm.layers) ? step * lstm.head_rows() : 0);
  }

 private:
  // What a step's loss adds to a bias, `w` its two columns of the weights.
  T of_loss(int l, int64_t step, const T* w) const {
    if (!lstm.sees_losses(l)) return 0;
    const LogSign<T> inputs = loss_inputs(step);
    return w[0] * inputs.size + w[1] * inputs.sign;
  }
};

// Rows of a group, `stride` elements apart.
template <typename E>
struct Rows {
  E* first;
  int64_t stride;

  METAFAST_HD E* operator[](int64_t row) const { return first + row * stride; }
  METAFAST_HD Rows from(int64_t row) const { return {first + row * stride, stride}; }
  operator Rows<const E>() const { return {first, stride}; }
};

// Where a layer finds and leaves its rows. What units read again and again, x and old_h, is packed, [I] and
// [H] rows of a group, and so is new_h, the next layer's x. c, and new_h once more, are where State keeps
// them.
template <class State, typename T>
struct LayerRows {
  using Kept = typename State::Element;

  const T *x, *old_h;
  Rows<const Kept> old_c;
  Rows<Kept> new_c;
  Rows<Kept> kept_h;  // not with kRecord, whose rows are packed
  T* new_h;
  T* gates;  // [H, 4], with kRecord alone
};

// Units [unit, unit + kCount) of a layer.
template <int kCount, bool kRecord, class State, typename T>
METAFAST_HD void lstm_units(const T* weights, const T* bias, int64_t inputs, int64_t hidden, int64_t unit,
                            const LayerRows<State, T>& rows) {
  const int64_t depth = inputs + hidden;
  Vec<T> sums[kCount][4][kVecs];
#pragma GCC unroll 4
  for (int u = 0; u < kCount; ++u) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[u][q][v] = broadcast(bias[(unit + u) * 4 + q]);
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
  weights += unit * depth * 4;
  add(rows.x, inputs, weights);
  add(rows.old_h, hidden, weights + inputs * 4);
#pragma GCC unroll 4
  for (int u = 0; u < kCount; ++u) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const int64_t lane = v * kLanes<T>;
      const Unit<T> result = lstm_unit<T>({sums[u][0][v], sums[u][1][v], sums[u][2][v], sums[u][3][v]},
                                          State::read(rows.old_c[unit + u] + lane));
      State::write(rows.new_c[unit + u] + lane, result.c);
      store(rows.new_h + (unit + u) * kGroup<T> + lane, result.h);
      if constexpr (!kRecord) {
        State::write(rows.kept_h[unit + u] + lane, result.h);
      } else {
        T* out = rows.gates + (unit + u) * 4 * kGroup<T> + lane;
        store(out, result.gates.i);
        store(out + kGroup<T>, result.gates.f);
        store(out + 2 * kGroup<T>, result.gates.g);
        store(out + 3 * kGroup<T>, result.gates.o);
      }
    }
  }
}

// One layer. `before_units(u, count)` is called before the units [u, u + count).
template <bool kRecord, class State, typename T, class F>
METAFAST_HD void lstm_layer(const Weights<T>& weights, int l, int64_t step, const LayerRows<State, T>& rows,
                            F&& before_units) {
  const Lstm<T>& lstm = weights.lstm;
  const T* bias = weights.bias_of(l, step);
  for_tiles<kUnits>(0, lstm.hidden, [&]<int kCount>(int64_t u) __attribute__((always_inline)) {
    before_units(u, kCount);
    lstm_units<kCount, kRecord>(weights.layer[l], bias, lstm.own_layer_inputs(l), lstm.hidden, u, rows);
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
  for (int64_t k = 0; k < lstm.own_layer_inputs(lstm.layers); ++k)
    sum += w[k] * load(top + k * kGroup<T> + at);
  return sum;
}

// theta after the step and, where the update itself is wanted, that as well. `before` and `after` are rows of
// the state.
template <class State, typename T>
METAFAST_HD void apply_head(const Weights<T>& weights, int64_t step, const T* top, const T* gradient,
                            Rows<const typename State::Element> before, Rows<typename State::Element> after,
                            const T* theta, T* new_theta, T* update) {
  const Lstm<T>& lstm = weights.lstm;
  for (int v = 0; v < kVecs; ++v) {
    const int64_t lane = v * kLanes<T>;
    const Vec<T> old = load(theta + lane);
    if (lstm.head == Head::update) {
      const Vec<T> change = lstm.scale * head_sum(weights, 0, step, top, lane);
      if (update != nullptr) store(update + lane, change);
      store(new_theta + lane, old + change);
      continue;
    }
    Vec<T> gate[2];
    for (int row = 0; row < 2; ++row) {
      const T* w = lstm.head_weight + row * lstm.head_columns() + lstm.top();
      const int64_t own = lstm.gate_row() + row;
      const Vec<T> sum =
          head_sum(weights, row, step, top, lane) + w[0] * old + w[1] * State::read(before[own] + lane);
      // Exact, unlike the LSTM's own: a forget gate of 1 must not let theta fade.
      gate[row] = 1 / (1 + Math<Vec<T>>::exp(-sum));
      State::write(after[own] + lane, gate[row]);
    }
    store(new_theta + lane, gate[1] * old - gate[0] * load(gradient + lane));
  }
}

}  // namespace metafast::METAFAST_ISA
