// The learned-optimizer kernels: one struct each. An LSTM that all coordinates (elements of parameters) share
// proposes what happens to each: P coordinates of a list of tensors, K steps, L LSTM layers of H hidden
// units, R rows of state. Scalars T are float or double.
#pragma once

#include <algorithm>

#include "common/kernel.h"
#include "common/math.h"

namespace metafast {

// What the LSTM's hidden units h (without layers: the inputs) are turned into.
//   update  a step: theta_k = theta_{k-1} + scale (w_out h + b_out)            (Andrychowicz et al. 2016)
//   gates   theta_k = f theta_{k-1} - i gradient, with i and f the sigmoid of
//           w h + w' theta_{k-1} + w'' (the gate itself in step k - 1) + b     (Ravi & Larochelle 2017)
enum class Head { update, gates };

// The LSTM's inputs: the gradient itself, or two numbers for its size and sign (math.h).
enum class Preprocess { none, log_sign };

constexpr int kMaxLstmLayers = 3;

// Torch's order of an LSTM's gates, i f g o: row q H + u of weights is gate q of unit u.
template <typename T>
struct LstmLayer {
  const T* weight_ih;  // [4H, I], I = H or, of the first layer, the number of inputs
  const T* weight_hh;  // [4H, H]
  const T* bias;       // [4H]
};

template <typename T>
struct Lstm {
  int layers;      // 0 to kMaxLstmLayers; 0 with Head::gates alone
  int64_t hidden;  // H
  LstmLayer<T> layer[kMaxLstmLayers];
  // update: [1, H], [1]. gates: [2, H + 2] (without layers [2, I + 2]), rows i and f, the last two columns of
  // theta and of the gate in the step before; and [2].
  const T *head_weight, *head_bias;
  Head head;
  Preprocess preprocess;
  T p, scale;
  bool has_losses;  // a loss's log-sign inputs follow those of the gradient, alike for all coordinates
  const T* losses;  // [K]

  METAFAST_HD int64_t own_inputs() const { return preprocess == Preprocess::log_sign ? 2 : 1; }
  METAFAST_HD int64_t inputs() const { return own_inputs() + (has_losses ? 2 : 0); }
  METAFAST_HD int64_t layer_inputs(int l) const { return l == 0 ? inputs() : hidden; }
  // Of these, those that differ from coordinate to coordinate; l = layers is the head.
  METAFAST_HD int64_t own_layer_inputs(int l) const { return l == 0 ? own_inputs() : hidden; }
  METAFAST_HD bool sees_losses(int l) const { return l == 0 && has_losses; }
  METAFAST_HD int64_t top() const { return layers == 0 ? inputs() : hidden; }  // the head's inputs
  METAFAST_HD int64_t head_rows() const { return head == Head::gates ? 2 : 1; }
  METAFAST_HD int64_t head_columns() const { return top() + (head == Head::gates ? 2 : 0); }

  // Rows of a coordinate's state: h and c [H] of each layer, and with Head::gates i and f.
  METAFAST_HD int64_t h_row(int l) const { return 2 * l * hidden; }
  METAFAST_HD int64_t c_row(int l) const { return (2 * l + 1) * hidden; }
  METAFAST_HD int64_t gate_row() const { return 2 * layers * hidden; }
  METAFAST_HD int64_t state_rows() const { return gate_row() + (head == Head::gates ? 2 : 0); }

  // Where the gradient of each weight begins in a row of sums, which has them in the order of `layer`, then
  // of the head, then of the losses: weight_ih, weight_hh, bias, ..., head_weight, head_bias, losses.
  METAFAST_HD int64_t layer_column(int l) const {
    int64_t sum = 0;
    for (int k = 0; k < l; ++k) sum += 4 * hidden * (layer_inputs(k) + hidden + 1);
    return sum;
  }
  METAFAST_HD int64_t loss_column() const {
    return layer_column(layers) + head_rows() * (head_columns() + 1);
  }
  METAFAST_HD int64_t columns(int64_t steps) const { return loss_column() + (has_losses ? steps : 0); }
  METAFAST_HD int64_t multiply_adds() const {  // of a coordinate and step
    int64_t sum = head_rows() * head_columns();
    for (int l = 0; l < layers; ++l) sum += 4 * hidden * (layer_inputs(l) + hidden);
    return sum;
  }
};

// The state of all coordinates is packed in blocks [R, kStateBlock], so that one block is one piece of
// memory: coordinate i of a tensor is place i % kStateBlock of the tensor's block i / kStateBlock, and each
// tensor begins a block of its own. Places behind a tensor's last coordinate are 0.
constexpr int64_t kStateBlock = 64;
inline int64_t state_blocks(int64_t coordinates) { return (coordinates + kStateBlock - 1) / kStateBlock; }

// K steps of every coordinate of up to kMaxTensors tensors, whose gradients in every step are given. Memory
// may be updated in place: new_state = state, and with K = 1 out = params.
template <typename T>
struct LstmUnroll {
  static constexpr int kMaxTensors = 32;

  struct Item {
    int64_t size;     // coordinates
    const T* grads;   // [K, size]
    const T* params;  // theta_0 [size]; or null with Head::update
    T* out;           // [K, size]: theta_1 to theta_K, or without params the steps; or null, not wanted
  };

  Lstm<T> lstm;
  int64_t steps;
  Item list[kMaxTensors];
  int64_t first_block[kMaxTensors + 1];  // blocks of tensor i: first_block[i] to first_block[i + 1]
  int count;
  bool bfloat16_state;  // of state and new_state, which else are T; arithmetic is in T either way
  const void* state;    // [blocks, R, kStateBlock]
  void* new_state;      // or null, not wanted

  void add(const Item& item) {
    list[count] = item;
    first_block[count + 1] = first_block[count] + state_blocks(item.size);
    ++count;
  }
  METAFAST_HD int64_t blocks() const { return first_block[count]; }
  int64_t items() const { return blocks(); }
  int64_t item_cost() const { return kStateBlock * steps * 2 * lstm.multiply_adds(); }
};

// The gradient of sum <grad_out, out> + <grad_new_state, new_state>, from the given gradients and the first
// state alone: the steps are run again, and of long unrolls again in parts, from states kept every few steps.
template <typename T>
struct LstmUnrollBackward {
  static constexpr int kMaxTensors = LstmUnroll<T>::kMaxTensors;

  struct Item {
    const T* grad_out;  // [K, size] or null: 0
    T* grad_params;     // [size] or null, not wanted
    T* grad_grads;      // [K, size] or null, not wanted
  };

  LstmUnroll<T> forward;  // its out and new_state are not used
  Item list[kMaxTensors];
  const T* grad_new_state;  // [blocks, R, kStateBlock] or null: 0; float for a bfloat16 state
  T* grad_state;            // or null, not wanted
  // The gradient of the weights and losses: each work item leaves its partial sum in a row of its own, so
  // that they are always added in the same order.
  T* sums;       // [items, columns], or null, not wanted
  T* workspace;  // scratch memory of the CUDA kernel (cuda::needs below)

  METAFAST_HD int64_t columns() const { return forward.lstm.columns(forward.steps); }

  // What follows holds for the CPU kernel; it follows from the shapes alone, never from the number of
  // threads.
  // Each item costs a row of sums: as many as keep the threads busy, then one for every 64 blocks.
  int64_t items() const {
    constexpr int64_t kFewItems = 32, kBlocksPerItem = 64;
    return std::min(forward.blocks(), std::max(kFewItems, forward.blocks() / kBlocksPerItem));
  }
  int64_t item_block(int64_t item) const { return item * forward.blocks() / items(); }  // its first
  int64_t item_cost() const {
    return items() == 0 ? 0 : forward.blocks() / items() * 4 * forward.item_cost();
  }
};

METAFAST_DECLARE_KERNEL(LstmUnroll)
METAFAST_DECLARE_KERNEL(LstmUnrollBackward)

namespace cuda {

// What the CUDA kernel asks of its caller: how many rows of sums, and how many elements of workspace. It
// follows from all but the addresses, and from the current device.
struct LstmNeeds {
  int64_t rows, workspace;
};
template <typename T>
LstmNeeds needs(const LstmUnrollBackward<T>& params);

}  // namespace cuda

}  // namespace metafast
