// Chunks of coordinates through all steps and back. Part of cuda.cu.
//
// The way there keeps the state before every interval-th step, and before each step of the last interval; the
// way back runs one interval after the other again. A step back computes the gates once more, turns them
// into the gradients before their nonlinearities (deltas), sends those through the weights to the h of the
// step before, and adds the products of deltas and inputs to the gradient of the weights.
#pragma once

#include "learned_optimizer/cuda_chunk.h"

namespace metafast::cuda {
namespace {

template <Memory kMemory, typename T>
class UnrollBackward {
 public:
  __device__ __forceinline__ UnrollBackward(const LstmUnrollBackward<T>& p, const Plan<T>& plan,
                                            unsigned char* shared)
      : p_(p),
        plan_(plan),
        at_(plan.at),
        snapshots_(p.workspace + block_index() * plan.workspace),
        chunk_(p.forward, plan, shared, snapshots_ + plan.snapshots * plan.snapshot_rows * plan.at.width) {
    if (p_.sums == nullptr) return;
    row_of_sums_ = p_.sums + block_index() * p_.columns();
    sums_ = kMemory == Memory::all ? chunk_.behind() : row_of_sums_;
  }

  __device__ __forceinline__ void run() {
    chunk_.copy_weights();
    const int columns = sums_ == nullptr ? 0 : static_cast<int>(p_.columns());
    chunk_.for_each(columns, [&](int i) { sums_[i] = 0; });
    chunk_.for_each(at_.width, [&](int c) { chunk_.row(at_.ones)[c] = 1; });
    for (int64_t i = block_index(); i < plan_.chunks; i += plan_.grid) {
      chunk_.begin(i);
      run_chunk();
      __syncthreads();  // the next chunk overwrites all this
    }
    if constexpr (kMemory == Memory::all) {
      chunk_.for_each(columns, [&](int i) { row_of_sums_[i] = sums_[i]; });
    }
  }

 private:
  using Place = typename Chunk<kMemory, T>::Place;

  const LstmUnrollBackward<T>& p_;
  const Plan<T>& plan_;
  const Layout<T>& at_;
  T* snapshots_;  // [snapshots, snapshot_rows, width]
  T *row_of_sums_ = nullptr, *sums_ = nullptr;
  Chunk<kMemory, T> chunk_;

  __device__ __forceinline__ const Lstm<T>& lstm() const { return p_.forward.lstm; }
  __device__ __forceinline__ bool has_gates() const { return lstm().head == Head::gates; }

  __device__ __forceinline__ void run_chunk() const {
    load_start();
    if (p_.forward.steps > 0) run_steps();
    store_end();
  }

  __device__ __forceinline__ void run_steps() const {
    int64_t begin = 0, end = p_.forward.steps;
    advance(begin, end - 1);
    begin = (plan_.intervals - 1) * plan_.interval;
    while (true) {
      for (int64_t k = end; k-- > begin;) step_back(k);
      if (begin == 0) break;
      end = begin;
      begin -= plan_.interval;
      advance(begin, end - 1);
    }
  }

  // ---- states on the way ----

  // The kept state before step k; those within an interval share their places with the other intervals'.
  __device__ __forceinline__ T* snapshot(int64_t k, int64_t row) const {
    const int64_t within = k % plan_.interval;
    const int64_t slot = within == 0 ? k / plan_.interval : plan_.intervals + within - 1;
    return snapshots_ + (slot * plan_.snapshot_rows + row) * at_.width;
  }
  __device__ __forceinline__ int64_t theta_row() const { return lstm().state_rows(); }

  // Gate r of coordinate c in a packed state.
  __device__ __forceinline__ int64_t gate_index(int r, int c) const {
    return chunk_.place(c).first + (lstm().gate_row() + r) * kStateBlock;
  }

  // The state before the first step, and the gradients of what the last one leaves.
  __device__ __forceinline__ void load_start() const {
    chunk_.for_each_unit([&](int l, int unit, int c) {
      const Place place = chunk_.place(c);
      const int64_t rows[2] = {lstm().h_row(l) + unit, lstm().c_row(l) + unit};
      T* const grads[2] = {grad_h(l, unit), grad_c(l, unit)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        store_quad(snapshot(0, rows[i]) + c, chunk_.load_state(rows[i], place));
        Quad<T> grad{};
        if (p_.grad_new_state != nullptr) grad = chunk_.load_packed(p_.grad_new_state, rows[i], place);
        store_quad(grads[i] + c, grad);
      }
    });
    chunk_.for_each(at_.width, [&](int c) {
      chunk_.row(at_.grad_theta)[c] = 0;
      if (!has_gates()) return;
      chunk_.fill_head(c);
      keep_head(0, c);
      const bool given = p_.grad_new_state != nullptr && chunk_.coordinate(c).inside;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        chunk_.row(at_.grad_gates, r)[c] = given ? p_.grad_new_state[gate_index(r, c)] : T(0);
      }
    });
    __syncthreads();
  }

  __device__ __forceinline__ void keep_head(int64_t k, int c) const {
    snapshot(k, theta_row())[c] = chunk_.row(at_.theta)[c];
#pragma unroll
    for (int r = 0; r < 2; ++r) snapshot(k, lstm().gate_row() + r)[c] = chunk_.row(at_.gates, r)[c];
  }

  // What a step begins with: its h, theta and gates before, and its inputs.
  __device__ __forceinline__ void load_step(int64_t k) const {
    chunk_.for_each_unit([&](int l, int unit, int c) {
      store_quad(chunk_.h_before(l, 0) + unit * at_.pitch + c,
                 load_quad<T>(snapshot(k, lstm().h_row(l) + unit) + c));
    });
    chunk_.for_each(at_.width, [&](int c) {
      chunk_.fill_inputs(k, c);
      if (!has_gates()) return;
      chunk_.row(at_.theta)[c] = snapshot(k, theta_row())[c];
#pragma unroll
      for (int r = 0; r < 2; ++r) chunk_.row(at_.gates, r)[c] = snapshot(k, lstm().gate_row() + r)[c];
    });
    __syncthreads();
  }

  // The steps from the kept state before `begin` on; leaves those before the steps up to `end`.
  __device__ __forceinline__ void advance(int64_t begin, int64_t end) const {
    if (begin == end) return;
    load_step(begin);
    int shift = 0;
    for (int64_t k = begin; k < end; ++k) {
      for (int l = 0; l < at_.layers; ++l) {
        T *const h = chunk_.h_after(l, shift), *const next_h = snapshot(k + 1, lstm().h_row(l)),
                 *const next_c = snapshot(k + 1, lstm().c_row(l));
        run_layer(l, k, shift, [&](int unit, int c, const Place&, const Unit<T>& result) {
          store_quad(h + unit * at_.pitch + c, result.h);
          store_quad(next_h + unit * at_.width + c, result.h);
          store_quad(next_c + unit * at_.width + c, result.c);
        });
        __syncthreads();
      }
      chunk_.for_each(at_.width, [&](int c) {
        if (has_gates()) {
          chunk_.head(k, c, shift, chunk_.coordinate(c));
          keep_head(k + 1, c);
        }
        chunk_.fill_inputs(k + 1, c);
      });
      __syncthreads();
      shift = chunk_.next_shift(shift);
    }
  }

  template <class Consume>
  __device__ __forceinline__ void run_layer(int l, int64_t k, int shift, const Consume& consume) const {
    const T* const kept = snapshot(k, lstm().c_row(l));
    const auto cells = [&](int unit, int c, const Place&) {
      return load_quad<T>(kept + unit * at_.width + c);
    };
    chunk_.template layer<kBackwardUnits>(l, shift, cells, consume);
  }

  // ---- a step back ----

  __device__ __forceinline__ T* delta(int l, int unit, int gate) const {
    return chunk_.row(at_.deltas, (l * at_.hidden + unit) * kGates + gate);
  }

  __device__ __forceinline__ T* grad_h(int l, int unit) const {
    return chunk_.row(at_.grad_h, l * at_.hidden + unit);
  }
  __device__ __forceinline__ T* grad_c(int l, int unit) const {
    return chunk_.row(at_.grad_c, l * at_.hidden + unit);
  }

  __device__ __forceinline__ void step_back(int64_t k) const {
    load_step(k);
    for (int l = 0; l < at_.layers; ++l) {
      T* const h = chunk_.h_after(l, 0);
      run_layer(l, k, 0, [&](int unit, int c, const Place&, const Unit<T>& result) {
        store_quad(h + unit * at_.pitch + c, result.h);
#pragma unroll
        for (int q = 0; q < kGates; ++q) store_quad(delta(l, unit, q) + c, result.gates[q]);
      });
      __syncthreads();
    }
    chunk_.for_each(at_.width, [&](int c) { head_back(c, k); });
    __syncthreads();
    for (int l = at_.layers - 1; l >= 0; --l) {
      gates_back(l, k);
      __syncthreads();
      inputs_back(l);
      __syncthreads();
    }
    if (sums_ != nullptr) {
      add_layer_gradients();
      add_head_gradient();
      add_loss_gradient(k);
    }
    chunk_.for_each(at_.width, [&](int c) { store_grad_of_gradient(c, k); });
    __syncthreads();
  }

  // Gradients of the head's rows before their nonlinearities, and of theta and gates before.
  __device__ __forceinline__ void head_back(int c, int64_t k) const {
    const Coordinate where = chunk_.coordinate(c);
    const T* const given = where.inside ? p_.list[where.item].grad_out : nullptr;
    T grad = given == nullptr ? T(0) : given[k * p_.forward.list[where.item].size + where.index];
    T& grad_theta = chunk_.row(at_.grad_theta)[c];
    grad += grad_theta;
    T* const grad_head = chunk_.row(at_.grad_head) + c;
    if (!has_gates()) {
      grad_theta = chunk_.has_params(where) ? grad : T(0);
      grad_head[0] = lstm().scale * grad;
      chunk_.row(at_.grad_direct)[c] = 0;
    } else {
      T sums[2];
      chunk_.head_sums(c, 0, sums);
      const T in = sigmoid(sums[0]), forget = sigmoid(sums[1]);
      const T grads[2] = {chunk_.row(at_.grad_gates, 0)[c] - grad * chunk_.gradient(where, k),
                          chunk_.row(at_.grad_gates, 1)[c] + grad * chunk_.row(at_.theta)[c]};
      const T deltas[2] = {grads[0] * in * (1 - in), grads[1] * forget * (1 - forget)};
      T sum = forget * grad;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const T* const own = lstm().head_weight + r * lstm().head_columns() + at_.top;
        grad_head[r * at_.pitch] = deltas[r];
        sum += own[0] * deltas[r];
        chunk_.row(at_.grad_gates, r)[c] = own[1] * deltas[r];
      }
      grad_theta = sum;
      chunk_.row(at_.grad_direct)[c] = -in * grad;
    }
    if (at_.layers > 0) return;
    for (int j = 0; j < at_.inputs; ++j) chunk_.row(at_.grad_x, j)[c] = from_head(j, grad_head);
  }

  // The gradient of the head's input j, `grad_head` that of its rows.
  __device__ __forceinline__ T from_head(int j, const T* grad_head) const {
    T sum = lstm().head_weight[j] * grad_head[0];
    if (has_gates()) sum += lstm().head_weight[lstm().head_columns() + j] * grad_head[at_.pitch];
    return sum;
  }

  // Turns the gates of layer l into deltas, by the threads that made them.
  __device__ __forceinline__ void gates_back(int l, int64_t k) const {
    const T* const kept = snapshot(k, lstm().c_row(l));
    chunk_.for_each(at_.hidden << at_.quad_bits, [&](int i) {
      const int unit = i >> at_.quad_bits, c = chunk_.quad_of(i);
      Quad<T> gates[kGates];
#pragma unroll
      for (int q = 0; q < kGates; ++q) gates[q] = load_quad<T>(delta(l, unit, q) + c);
      const Quad<T> before = load_quad<T>(kept + unit * at_.width + c);
      const Quad<T> of_h = load_quad<T>(grad_h(l, unit) + c);
      Quad<T> of_c = load_quad<T>(grad_c(l, unit) + c);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        T grad = of_h.values[j];
        if (l + 1 == at_.layers) grad += from_head(unit, chunk_.row(at_.grad_head) + c + j);
        const LstmGates<T> values{gates[0].values[j], gates[1].values[j], gates[2].values[j],
                                  gates[3].values[j]};
        const T tanh_c = Math<T>::tanh(values.f * before.values[j] + values.i * values.g);
        const LstmGatesBackward<T> back =
            lstm_backward(grad, of_c.values[j], values, before.values[j], tanh_c);
        gates[0].values[j] = back.gates.i;
        gates[1].values[j] = back.gates.f;
        gates[2].values[j] = back.gates.g;
        gates[3].values[j] = back.gates.o;
        of_c.values[j] = back.c_before;
      }
#pragma unroll
      for (int q = 0; q < kGates; ++q) store_quad(delta(l, unit, q) + c, gates[q]);
      store_quad(grad_c(l, unit) + c, of_c);
    });
  }

  // From the deltas of layer l to its inputs (x, or h of the layer below, whose gradient from the step behind
  // is there already) and to its own h before. A thread to a tile of 4 x 4 columns and coordinates.
  __device__ __forceinline__ void inputs_back(int l) const {
    constexpr int kColumns = 4;
    const int inputs = l == 0 && !plan_.wants_inputs ? 0 : chunk_.layer_inputs(l);
    const int input_tiles = div_up(inputs, kColumns), tiles = input_tiles + div_up(at_.hidden, kColumns);
    chunk_.for_each(tiles << at_.quad_bits, [&](int i) {
      const int c = chunk_.quad_of(i), tile = i >> at_.quad_bits;
      const bool recurrent = tile >= input_tiles;
      const int first = (recurrent ? tile - input_tiles : tile) * kColumns;
      const int columns = recurrent ? at_.hidden : inputs;
      auto weights = chunk_.weights(l, recurrent, 0);
      weights.skip(first);
      T sums[kColumns][kQuad] = {};
      for (int unit = 0; unit < at_.hidden; ++unit) {
        Quad<T> deltas[kGates];
#pragma unroll
        for (int q = 0; q < kGates; ++q) deltas[q] = load_quad<T>(delta(l, unit, q) + c);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const Quad<T> weight = weights.gates(min(j, columns - 1 - first), unit);
#pragma unroll
          for (int q = 0; q < kGates; ++q) {
#pragma unroll
            for (int e = 0; e < kQuad; ++e) sums[j][e] += weight.values[q] * deltas[q].values[e];
          }
        }
      }
      const bool adds = !recurrent && l > 0;
      T* const to = recurrent ? grad_h(l, 0) : l == 0 ? chunk_.row(at_.grad_x) : grad_h(l - 1, 0);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (first + j >= columns) continue;
        T* const row = to + (first + j) * at_.pitch + c;
        Quad<T> result = adds ? load_quad<T>(row) : Quad<T>{};
#pragma unroll
        for (int e = 0; e < kQuad; ++e) result.values[e] += sums[j][e];
        store_quad(row, result);
      }
    });
  }

  // ---- gradients of the weights ----

  // The columns of a layer's weights: its inputs, its h before, and the bias.
  __device__ __forceinline__ const T* input_row(int l, int column) const {
    const int inputs = chunk_.layer_inputs(l);
    if (column < inputs) return chunk_.inputs_of(l, 0) + column * at_.pitch;
    if (column < inputs + at_.hidden) return chunk_.h_before(l, 0) + (column - inputs) * at_.pitch;
    return chunk_.row(at_.ones);
  }

  // Where the gradient of a weight lies in a row of sums.
  __device__ __forceinline__ int64_t place_of(int l, int unit, int gate, int column) const {
    const int inputs = chunk_.layer_inputs(l), row = gate * at_.hidden + unit, rows = kGates * at_.hidden;
    const int64_t first = plan_.columns[l];
    if (column < inputs) return first + static_cast<int64_t>(row) * inputs + column;
    const int64_t hidden_first = first + static_cast<int64_t>(rows) * inputs;
    if (column < inputs + at_.hidden) {
      return hidden_first + static_cast<int64_t>(row) * at_.hidden + column - inputs;
    }
    return hidden_first + static_cast<int64_t>(rows) * at_.hidden + row;
  }

  // A thread to a tile of the 4 gates of a unit and 5 columns, for all coordinates: with two layers of 20
  // units these are 280 tiles.
  __device__ __forceinline__ void add_layer_gradients() const {
    constexpr int kColumns = 5;
    int first_tile = 0;
    for (int l = 0; l < at_.layers; ++l) {
      const int columns = chunk_.layer_inputs(l) + at_.hidden + 1, column_tiles = div_up(columns, kColumns);
      const int tiles = at_.hidden * column_tiles;
      // The tiles of all layers are dealt out to the threads in turn.
      const int threads = static_cast<int>(blockDim.x);
      int tile = (static_cast<int>(threadIdx.x) - first_tile % threads + threads) % threads;
      first_tile += tiles;
      for (; tile < tiles; tile += threads) {
        const int unit = tile / column_tiles, first = tile % column_tiles * kColumns;
        const T* deltas = delta(l, unit, 0);
        const T* inputs[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) inputs[j] = input_row(l, min(first + j, columns - 1));
        T sums[kGates][kColumns] = {};
#pragma unroll 1
        for (int c = 0; c < at_.width; c += kQuad) {
          Quad<T> gates[kGates];
#pragma unroll
          for (int q = 0; q < kGates; ++q) gates[q] = load_quad<T>(deltas + q * at_.pitch + c);
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            const Quad<T> input = load_quad<T>(inputs[j] + c);
#pragma unroll
            for (int q = 0; q < kGates; ++q) {
#pragma unroll
              for (int e = 0; e < kQuad; ++e) sums[q][j] += gates[q].values[e] * input.values[e];
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (first + j >= columns) continue;
#pragma unroll
          for (int q = 0; q < kGates; ++q) sums_[place_of(l, unit, q, first + j)] += sums[q][j];
        }
      }
    }
  }

  // A warp to a weight.
  __device__ __forceinline__ void add_head_gradient() const {
    const int columns = static_cast<int>(lstm().head_columns()), lane = threadIdx.x % kWarpSize;
    for (int i = threadIdx.x / kWarpSize; i < at_.head_rows * (columns + 1); i += blockDim.x / kWarpSize) {
      const int r = i / (columns + 1), column = i % (columns + 1);
      const T* inputs = chunk_.row(at_.ones);
      if (column < at_.top) {
        inputs = chunk_.inputs_of(at_.layers, 0) + column * at_.pitch;
      } else if (column < columns) {
        inputs = column == at_.top ? chunk_.row(at_.theta) : chunk_.row(at_.gates, r);
      }
      T sum = 0;
      for (int c = lane; c < at_.width; c += kWarpSize) {
        sum += chunk_.row(at_.grad_head, r)[c] * inputs[c];
      }
      sum = warp_sum(sum);
      if (lane != 0) continue;
      const int64_t weights = static_cast<int64_t>(at_.head_rows) * columns;
      sums_[plan_.columns[at_.layers] +
            (column < columns ? static_cast<int64_t>(r) * columns + column : weights + r)] += sum;
    }
  }

  // From the gradients of the inputs that step k's loss gives to all coordinates; by the first warp.
  __device__ __forceinline__ void add_loss_gradient(int64_t k) const {
    if (!lstm().has_losses || threadIdx.x >= kWarpSize) return;
    T sums[2] = {};
    for (int c = threadIdx.x; c < at_.width; c += kWarpSize) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sums[j] += chunk_.row(at_.grad_x, at_.inputs - 2 + j)[c];
      }
    }
    const LogSign<T> grad{warp_sum(sums[0]), warp_sum(sums[1])};
    if (threadIdx.x != 0) return;
    sums_[lstm().loss_column() + k] +=
        log_sign_backward(grad, lstm().losses[k], lstm().p, plan_.exp_p, std::numeric_limits<T>::max());
  }

  // ---- results ----

  __device__ __forceinline__ void store_grad_of_gradient(int c, int64_t k) const {
    const Coordinate where = chunk_.coordinate(c);
    T* const to = where.inside ? p_.list[where.item].grad_grads : nullptr;
    if (to == nullptr) return;
    const T* const grad_x = chunk_.row(at_.grad_x) + c;
    T grad = grad_x[0];
    if (lstm().preprocess == Preprocess::log_sign) {
      grad = log_sign_backward<T>({grad_x[0], grad_x[at_.pitch]}, chunk_.gradient(where, k), lstm().p,
                                  plan_.exp_p, std::numeric_limits<T>::max());
    }
    to[k * p_.forward.list[where.item].size + where.index] = grad + chunk_.row(at_.grad_direct)[c];
  }

  __device__ __forceinline__ void store_end() const {
    if (p_.grad_state != nullptr) {
      chunk_.for_each_unit([&](int l, int unit, int c) {
        const Place place = chunk_.place(c);
        chunk_.store_packed(p_.grad_state, lstm().h_row(l) + unit, place, load_quad<T>(grad_h(l, unit) + c));
        chunk_.store_packed(p_.grad_state, lstm().c_row(l) + unit, place, load_quad<T>(grad_c(l, unit) + c));
      });
    }
    chunk_.for_each(at_.width, [&](int c) {
      const Coordinate where = chunk_.coordinate(c);
      if (p_.grad_state != nullptr && has_gates() && chunk_.place(c).first >= 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          p_.grad_state[gate_index(r, c)] = where.inside ? chunk_.row(at_.grad_gates, r)[c] : T(0);
        }
      }
      if (!where.inside) return;
      T* const to = p_.list[where.item].grad_params;
      if (to != nullptr) to[where.index] = chunk_.row(at_.grad_theta)[c];
    });
  }
};

}  // namespace

}  // namespace metafast::cuda
