// The backward of the steps that slots keep (step.h), for a group of coordinates, and the gradient of the
// weights. Sums over coordinates stay in vectors, a partial sum in each lane, until a work item is done.
#pragma once

#include "learned_optimizer/step.h"

namespace metafast::METAFAST_ISA {

#if defined(__AVX512F__)
constexpr int kInputRows = 10;     // of a register tile: kInputRows x kVecs sums
constexpr int kWeightColumns = 5;  // of another: 4 gates x kWeightColumns sums
#else
constexpr int kInputRows = 4;
constexpr int kWeightColumns = 2;
#endif

// The gradient of the weights, a vector for each, with a partial sum in each lane. A loss is another bias in
// every step (cell.h), so what it sees has a bias's gradient in every step, and I counts own inputs alone.
template <typename T>
struct WeightGradient {
  T* layer[kMaxLstmLayers];  // [I + H, H, 4]
  T* bias[kMaxLstmLayers];   // [H, 4], of a layer that sees the losses [K, H, 4]
  T* head;                   // [rows, columns], those of the losses unused
  T* head_bias;              // [rows], or [K, rows]

  WeightGradient(Arena<T>& arena, const Lstm<T>& lstm, int64_t steps)
      : blocks_(div_up(size(lstm, steps), kLanes<T>)),
        vectors_(arena.take(blocks_ * kLanes<T>)),
        totals_(arena.take(blocks_)) {
    if (arena.counts()) return;
    T* next = vectors_;
    const auto deal = [&next](int64_t count) {
      T* dealt = next;
      next += count * kLanes<T>;
      return dealt;
    };
    const int64_t H = lstm.hidden;
    for (int l = 0; l < lstm.layers; ++l) {
      layer[l] = deal(4 * H * (lstm.own_layer_inputs(l) + H));
      bias[l] = deal(4 * H * biases(lstm, l, steps));
    }
    head = deal(lstm.head_rows() * lstm.head_columns());
    head_bias = deal(lstm.head_rows() * biases(lstm, lstm.layers, steps));
  }

  void clear() { std::fill_n(vectors_, blocks_ * kLanes<T> * kLanes<T>, T(0)); }

  // The sums over the lanes, in the order of a row of sums (params.h).
  void finish(const Weights<T>& weights, int64_t steps, T* out) const {
    const Lstm<T>& lstm = weights.lstm;
    for (int64_t block = 0; block < blocks_; ++block) {
      Vec<T> lanes[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) lanes[i] = load(vectors_ + (block * kLanes<T> + i) * kLanes<T>);
      store(totals_ + block * kLanes<T>, sum_lanes<T>(lanes));
    }
    const int64_t H = lstm.hidden;
    const T* next = totals_;
    T* const losses = out + lstm.loss_column();
    for (int l = 0; l < lstm.layers; ++l) {
      const int64_t I = lstm.own_layer_inputs(l), all = lstm.layer_inputs(l), count = biases(lstm, l, steps);
      const auto at = [&](int64_t row) { return row % H * 4 + row / H; };  // row = q H + u
      const auto columns = [&](const T* from, int64_t first, int64_t count, int64_t width) {
        for (int64_t row = 0; row < 4 * H; ++row) {
          for (int64_t k = 0; k < count; ++k) out[row * width + first + k] = from[k * 4 * H + at(row)];
        }
      };
      columns(next, 0, I, all);
      columns(next + I * 4 * H, 4 * H * all, H, H);  // behind weight_ih
      T *const of_inputs = out, *const bias = out + 4 * H * (all + H);
      next += 4 * H * (I + H);
      if (!lstm.sees_losses(l)) {
        columns(next, 4 * H * (all + H), 1, 1);
      } else {
        for (int64_t row = 0; row < 4 * H; ++row) {
          finish_losses(weights, steps, next + at(row), 4 * H, lstm.layer[0].weight_ih + row * all + I,
                        bias + row, of_inputs + row * all + I, row == 0, losses);
        }
      }
      next += 4 * H * count;
      out = bias + 4 * H;
    }
    const int64_t rows = lstm.head_rows(), all = lstm.head_columns();
    std::copy_n(next, rows * all, out);
    next += rows * all;
    T* const bias = out + rows * all;
    if (!lstm.sees_losses(lstm.layers)) {
      std::copy_n(next, rows, bias);
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t column = row * all + lstm.own_inputs();
      finish_losses(weights, steps, next + row, rows, lstm.head_weight + column, bias + row, out + column,
                    row == 0, losses);
    }
  }

 private:
  static int64_t biases(const Lstm<T>& lstm, int l, int64_t steps) { return lstm.sees_losses(l) ? steps : 1; }
  static int64_t size(const Lstm<T>& lstm, int64_t steps) {
    int64_t sum = lstm.head_rows() * (lstm.head_columns() + biases(lstm, lstm.layers, steps));
    for (int l = 0; l < lstm.layers; ++l) {
      sum += 4 * lstm.hidden * (lstm.own_layer_inputs(l) + lstm.hidden + biases(lstm, l, steps));
    }
    return sum;
  }

  // From the gradient of a row's bias in every step to that of the bias, of the row's two columns `w` for the
  // losses, and of the losses, to which it adds unless the row is the first.
  static void finish_losses(const Weights<T>& weights, int64_t steps, const T* of_steps, int64_t stride,
                            const T* w, T* bias, T* columns, bool is_first, T* losses) {
    *bias = columns[0] = columns[1] = 0;
    for (int64_t step = 0; step < steps; ++step) {
      const T grad = of_steps[step * stride];
      const LogSign<T> inputs = weights.loss_inputs(step);
      *bias += grad;
      columns[0] += grad * inputs.size;
      columns[1] += grad * inputs.sign;
      losses[step] = (is_first ? T(0) : losses[step]) +
                     log_sign_backward<T>({grad * w[0], grad * w[1]}, weights.lstm.losses[step],
                                          weights.lstm.p, weights.exp_p, std::numeric_limits<T>::max());
    }
  }

  int64_t blocks_;  // of kLanes vectors
  T* vectors_;
  T* totals_;
};

template <typename T>
METAFAST_HD void add_to(T* p, Vec<T> v) {
  store(p, load(p) + v);
}

// kRows rows of W^T dgates. `weights` is at the first's column of a unit's `depth`; dgates is [H, 4].
template <int kRows, typename T>
METAFAST_HD void input_rows(const T* weights, int64_t depth, int64_t hidden, const T* dgates, T* out) {
  Vec<T> sums[kRows][kVecs] = {};
  for (int64_t u = 0; u < hidden; ++u) {
    const T* w = weights + u * depth * 4;
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      Vec<T> d[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) d[v] = load(dgates + (u * 4 + q) * kGroup<T> + v * kLanes<T>);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> weight = broadcast(w[r * 4 + q]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sums[r][v] += weight * d[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(out + r * kGroup<T> + v * kLanes<T>, sums[r][v]);
  }
}

// Runs of slots: `runs` of them, `run_stride` apart, `steps` slots in each.
template <typename T>
struct SlotRuns {
  const T* slots;
  int64_t runs, run_stride, steps, slot_stride;
};

// A unit's 4 gates against kColumns inputs, over all slots: dgates x inputs^T.
template <int kColumns, typename T>
METAFAST_HD void weight_tile(const SlotRuns<T>& over, int64_t dgates, int64_t inputs, int64_t hidden,
                             T* out) {
  Vec<T> sums[4][kColumns] = {};
  for (int64_t run = 0; run < over.runs; ++run) {
    const T* d = over.slots + run * over.run_stride + dgates;
    const T* in = over.slots + run * over.run_stride + inputs;
    for (int64_t t = 0; t < over.steps; ++t, d += over.slot_stride, in += over.slot_stride) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        Vec<T> x[kColumns];
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) x[c] = load(in + c * kGroup<T> + v * kLanes<T>);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const Vec<T> gate = load(d + q * kGroup<T> + v * kLanes<T>);
#pragma GCC unroll 8
          for (int c = 0; c < kColumns; ++c) sums[q][c] += gate * x[c];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) add_to(out + (c * hidden * 4 + q) * kLanes<T>, sums[q][c]);
  }
}

// The gradient of a layer's columns [column, column + count), whose inputs are at row `inputs` of each slot.
template <typename T>
void weight_columns(const SlotRuns<T>& over, int64_t dgates, int64_t inputs, int64_t count, int64_t hidden,
                    T* out) {
  for_tiles<kWeightColumns>(0, count, [&]<int kColumns>(int64_t k) __attribute__((always_inline)) {
    for (int64_t u = 0; u < hidden; ++u) {
      weight_tile<kColumns>(over, (dgates + u * 4) * kGroup<T>, (inputs + k) * kGroup<T>, hidden,
                            out + (k * hidden + u) * 4 * kLanes<T>);
    }
  });
}

// All layers' weights, when the slots' gates have become their gradients.
template <typename T>
void layer_weights(const Lstm<T>& lstm, const SlotRuns<T>& over, WeightGradient<T>& sums) {
  const Slot<T> rows{lstm};
  const int64_t next = rows.rows();  // what comes after a step is the next slot's
  for (int l = 0; l < lstm.layers; ++l) {
    const int64_t I = lstm.own_layer_inputs(l), H = lstm.hidden;
    const int64_t inputs = l == 0 ? rows.inputs() : next + lstm.h_row(l - 1);
    weight_columns(over, rows.gates(l), inputs, I, H, sums.layer[l]);
    weight_columns(over, rows.gates(l), lstm.h_row(l), H, H, sums.layer[l] + I * 4 * H * kLanes<T>);
  }
}

// The gradients on their way back through the steps of one group, rows of a group.
template <typename T>
struct Adjoint {
  T* carried;   // of what goes from step to step (Slot); of theta with params, else of the update
  T* top;       // [H or I] of the head's own inputs
  T* inputs;    // [I] of a layer's inputs
  T* gradient;  // [1] of the given gradient

  Adjoint(Arena<T>& arena, const Lstm<T>& lstm)
      : carried(arena.take(Slot<T>{lstm}.carried() * kVecs)),
        top(arena.take(lstm.own_layer_inputs(lstm.layers) * kVecs)),
        inputs(arena.take(std::max(lstm.own_inputs(), lstm.hidden) * kVecs)),
        gradient(arena.take(kVecs)) {}
};

// Through the head: `carried` has the gradient of what is there after the step; theta's and the gates' become
// those of before, and `top` and, with Head::gates, `gradient` are set.
template <typename T>
void head_backward(const Weights<T>& weights, int64_t step, const T* slot, const T* after, const T* top,
                   Adjoint<T>& adjoint, WeightGradient<T>* sums) {
  const Lstm<T>& lstm = weights.lstm;
  const int64_t columns = lstm.head_columns(), inputs = lstm.top(), own = lstm.own_layer_inputs(lstm.layers);
  const int64_t theta = lstm.state_rows() * kGroup<T>;
  const Slot<T> rows{lstm};
  const int64_t bias = lstm.sees_losses(lstm.layers) ? step * lstm.head_rows() : 0;
  for (int v = 0; v < kVecs; ++v) {
    const int64_t at = v * kLanes<T>;
    Vec<T> d[2] = {};  // of the head's sums
    const Vec<T> grad_theta = load(adjoint.carried + theta + at), old = load(slot + theta + at);
    if (lstm.head == Head::update) {
      d[0] = lstm.scale * grad_theta;
      store(adjoint.gradient + at, Vec<T>{});
    } else {
      const Vec<T> g = load(slot + rows.gradient() * kGroup<T> + at);
      Vec<T> before = Vec<T>{};
      for (int row = 0; row < 2; ++row) {
        const T* w = lstm.head_weight + row * columns + inputs;
        const int64_t gate_at = (lstm.gate_row() + row) * kGroup<T> + at;
        const Vec<T> gate = load(after + gate_at);
        const Vec<T> grad = load(adjoint.carried + gate_at) + (row == 0 ? -g : old) * grad_theta;
        d[row] = grad * gate * (1 - gate);
        before += w[0] * d[row];
        if (row == 0) {
          store(adjoint.gradient + at, -gate * grad_theta);
        } else {
          before += gate * grad_theta;
        }
        store(adjoint.carried + gate_at, w[1] * d[row]);
        if (sums == nullptr) continue;
        T* total = sums->head + (row * columns + inputs) * kLanes<T>;
        add_to(total, d[row] * old);
        add_to(total + kLanes<T>, d[row] * load(slot + gate_at));
      }
      store(adjoint.carried + theta + at, before);
    }
    for (int64_t k = 0; k < own; ++k) {
      const Vec<T> x = load(top + k * kGroup<T> + at);
      Vec<T> grad = Vec<T>{};
      for (int row = 0; row < lstm.head_rows(); ++row) {
        grad += lstm.head_weight[row * columns + k] * d[row];
        if (sums != nullptr) add_to(sums->head + (row * columns + k) * kLanes<T>, d[row] * x);
      }
      store(adjoint.top + k * kGroup<T> + at, grad);
    }
    if (sums == nullptr) continue;
    for (int row = 0; row < lstm.head_rows(); ++row)
      add_to(sums->head_bias + (bias + row) * kLanes<T>, d[row]);
  }
}

// Through layer l: the gates become their gradients; `carried` has the gradient of h and c after the step and
// gets that of before, that of h only if wanted; `above` is the gradient that h gets from above in the same
// step; `inputs` is set, of the first layer only if wanted.
template <typename T>
void layer_backward(const Weights<T>& weights, int l, int64_t step, T* slot, const T* after, const T* above,
                    Adjoint<T>& adjoint, bool wants_h, bool wants_inputs, WeightGradient<T>* sums) {
  const Lstm<T>& lstm = weights.lstm;
  const int64_t H = lstm.hidden, I = lstm.own_layer_inputs(l);
  T* gates = slot + Slot<T>{lstm}.gates(l) * kGroup<T>;
  T* grad_h = adjoint.carried + lstm.h_row(l) * kGroup<T>;
  T* grad_c = adjoint.carried + lstm.c_row(l) * kGroup<T>;
  T* bias = sums == nullptr ? nullptr : sums->bias[l] + (lstm.sees_losses(l) ? step * 4 * H : 0) * kLanes<T>;
  for (int64_t u = 0; u < H; ++u) {
    Vec<T> totals[4] = {};
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = u * kGroup<T> + v * kLanes<T>;
      T* gate = gates + u * 4 * kGroup<T> + v * kLanes<T>;
      const LstmGates<Vec<T>> values{load(gate), load(gate + kGroup<T>), load(gate + 2 * kGroup<T>),
                                     load(gate + 3 * kGroup<T>)};
      const Vec<T> c = load(after + lstm.c_row(l) * kGroup<T> + at);
      const auto [d, c_before] =
          lstm_backward<Vec<T>>(load(grad_h + at) + load(above + at), load(grad_c + at), values,
                                load(slot + lstm.c_row(l) * kGroup<T> + at), Nonlinear<T>::tanh(c));
      store(gate, d.i);
      store(gate + kGroup<T>, d.f);
      store(gate + 2 * kGroup<T>, d.g);
      store(gate + 3 * kGroup<T>, d.o);
      store(grad_c + at, c_before);
      totals[0] += d.i;
      totals[1] += d.f;
      totals[2] += d.g;
      totals[3] += d.o;
    }
    if (bias == nullptr) continue;
    for (int q = 0; q < 4; ++q) add_to(bias + (u * 4 + q) * kLanes<T>, totals[q]);
  }
  const auto products = [&](int64_t first, int64_t count, T* out) __attribute__((always_inline)) {
    for_tiles<kInputRows>(0, count, [&]<int kRows>(int64_t k) __attribute__((always_inline)) {
      input_rows<kRows>(weights.layer[l] + (first + k) * 4, I + H, H, gates, out + k * kGroup<T>);
    });
  };
  if (wants_inputs) products(0, I, adjoint.inputs);
  if (wants_h) products(I, H, grad_h);
}

// Back through the step of `slot`, `after` it what the next slot has. Where `wants_state`, `carried` becomes
// the gradient of all that was there before, else of theta alone; where `wants_gradient`, adjoint.gradient
// becomes the gradient of the given gradient.
template <typename T>
void step_backward(const Weights<T>& weights, int64_t step, T* slot, const T* after, Adjoint<T>& adjoint,
                   bool wants_state, bool wants_gradient, WeightGradient<T>* sums) {
  const Lstm<T>& lstm = weights.lstm;
  const Slot<T> rows{lstm};
  const T* top =
      lstm.layers == 0 ? slot + rows.inputs() * kGroup<T> : after + lstm.h_row(lstm.layers - 1) * kGroup<T>;
  head_backward(weights, step, slot, after, top, adjoint, sums);
  const T* above = adjoint.top;
  for (int l = lstm.layers - 1; l >= 0; --l) {
    layer_backward(weights, l, step, slot, after, above, adjoint, wants_state, l > 0 || wants_gradient, sums);
    above = adjoint.inputs;
  }
  if (!wants_gradient) return;
  for (int v = 0; v < kVecs; ++v) {
    const int64_t at = v * kLanes<T>;
    Vec<T> grad = load(above + at);
    if (lstm.preprocess == Preprocess::log_sign) {
      const Vec<T> g = load(slot + rows.gradient() * kGroup<T> + at);
      grad = log_sign_backward<Vec<T>>({grad, load(above + kGroup<T> + at)}, g, lstm.p, weights.exp_p,
                                       std::numeric_limits<T>::max());
    }
    add_to(adjoint.gradient + at, grad);
  }
}

}  // namespace metafast::METAFAST_ISA
