// A chunk of coordinates: their numbers in memory, and one step of the LSTM on them. Part of cuda.cu.
#pragma once

#include <limits>
#include <type_traits>

#include "learned_optimizer/cuda_plan.h"
#include "learned_optimizer/math.h"

namespace metafast::cuda {
namespace {

// ---- a unit ----

// A unit of four coordinates: its gates, its cell, and what comes out.
template <typename T>
struct Unit {
  Quad<T> gates[kGates], c, h;
};

template <typename T>
__device__ __forceinline__ Unit<T> finish_unit(const T (&sums)[kGates][kQuad], const Quad<T>& c_before) {
  Unit<T> unit;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const T in = sigmoid(sums[0][i]), forget = sigmoid(sums[1][i]);
    const T cell = Math<T>::tanh(sums[2][i]), out = sigmoid(sums[3][i]);
    unit.gates[0].values[i] = in;
    unit.gates[1].values[i] = forget;
    unit.gates[2].values[i] = cell;
    unit.gates[3].values[i] = out;
    unit.c.values[i] = forget * c_before.values[i] + in * cell;
    unit.h.values[i] = out * Math<T>::tanh(unit.c.values[i]);
  }
  return unit;
}

// ---- weights ----

// Columns of a weight matrix, each of which gives a unit's four gates. Columns and units are counted from the
// ones that it was made for; units behind the last give anything.
template <typename T>
struct SharedColumns {
  const T* first;
  int pitch;

  __device__ __forceinline__ Quad<T> gates(int column, int unit) const {
    return load_quad<T>(first + column * pitch + unit * kGates);
  }
  __device__ __forceinline__ void skip(int columns) { first += columns * pitch; }
};

template <typename T>
struct GivenColumns {
  const T* first;  // of [4H, columns]
  int hidden, columns, first_unit;

  __device__ __forceinline__ Quad<T> gates(int column, int unit) const {
    const int row = min(first_unit + unit, hidden - 1);
    Quad<T> quad;
#pragma unroll
    for (int q = 0; q < kGates; ++q) {
      quad.values[q] = first[(static_cast<int64_t>(q) * hidden + row) * columns + column];
    }
    return quad;
  }
  __device__ __forceinline__ void skip(int count) { first += count; }
};

// Adds the products of `count` rows with the weights of kUnits units.
template <int kUnits, class Columns, typename T>
__device__ __forceinline__ void add_products(const T* rows, int pitch, int count, Columns columns,
                                             T (&sums)[kUnits][kGates][kQuad]) {
#pragma unroll 1
  for (const T* const end = rows + count * pitch; rows != end; rows += pitch, columns.skip(1)) {
    const Quad<T> row = load_quad<T>(rows);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const Quad<T> weights = columns.gates(0, u);
#pragma unroll
      for (int q = 0; q < kGates; ++q) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) sums[u][q][i] += weights.values[q] * row.values[i];
      }
    }
  }
}

// ---- the chunk ----

// What the head gives for a coordinate: theta, or the step where there are no parameters; and its gates.
template <typename T>
struct HeadValues {
  T theta, gates[2];
};

struct Coordinate {
  bool inside;
  int item;
  int64_t index;  // in its tensor
};

template <Memory kMemory, typename T>
class Chunk {
 public:
  static constexpr int kBlock = kStateBlock;  // in 32 bits
  using Columns = std::conditional_t<kMemory == Memory::all, SharedColumns<T>, GivenColumns<T>>;

  // `workspace`: of the rows, with Memory::none.
  __device__ __forceinline__ Chunk(const LstmUnroll<T>& p, const Plan<T>& plan, unsigned char* shared,
                                   T* workspace)
      : p_(p), plan_(plan), at_(plan.at), slots_(reinterpret_cast<Slot*>(shared)) {
    T* const behind = reinterpret_cast<T*>(shared + kSlotBytes);
    weights_ = behind;
    if constexpr (kMemory == Memory::none) {
      rows_ = workspace;
    } else {
      rows_ = behind + (kMemory == Memory::all ? at_.weight_elements : 0);
    }
  }

  // Shared memory behind the weights and rows.
  __device__ __forceinline__ T* behind() const { return rows_ + at_.row_elements; }

  // f(i) for i < count, by the threads of the block in turn.
  template <class F>
  static __device__ __forceinline__ void for_each(int count, const F& f) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) f(i);
  }

  // Before the first chunk. The caller waits.
  __device__ __forceinline__ void copy_weights() const {
    if constexpr (kMemory == Memory::all) {
      for (int l = 0; l < at_.layers; ++l) {
        const int inputs = layer_inputs(l), pitch = at_.padded_units * kGates;
        const auto copy = [&](const T* from, int columns, int first_column) {
          for_each(kGates * at_.hidden * columns, [&](int i) {
            const int row = i / columns, column = first_column + i % columns;
            weights_[at_.weights[l] + column * pitch + row % at_.hidden * kGates + row / at_.hidden] =
                from[i];
          });
        };
        copy(p_.lstm.layer[l].weight_ih, inputs, 0);
        copy(p_.lstm.layer[l].weight_hh, at_.hidden, inputs);
      }
    }
  }

  // Every thread calls it when all are done with the chunk before.
  __device__ __forceinline__ void begin(int64_t chunk) {
    const int64_t first = chunk * at_.width;
    first_block_ = first / kStateBlock;
    offset_ = static_cast<int>(first % kStateBlock);
    for_each(kMostSlots, [&](int s) {
      const int64_t block = first_block_ + s;
      Slot slot{0, -1, 0};
      if (block < p_.blocks()) {
        int low = 0, high = p_.count;  // the tensor is in [low, high)
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          (p_.first_block[middle] <= block ? low : high) = middle;
        }
        slot.item = low;
        slot.first = (block - p_.first_block[low]) * kStateBlock;
        slot.coordinates = static_cast<int>(min(kStateBlock, p_.list[low].size - slot.first));
      }
      slots_[s] = slot;
    });
    __syncthreads();
  }

  // ---- where things are ----

  __device__ __forceinline__ int layer_inputs(int l) const { return l == 0 ? at_.inputs : at_.hidden; }
  // A layer's weights of its inputs, or of its h before, for units from first_unit on.
  __device__ __forceinline__ Columns weights(int l, bool of_h, int first_unit) const {
    if constexpr (kMemory == Memory::all) {
      const int pitch = at_.padded_units * kGates, skipped = of_h ? layer_inputs(l) * pitch : 0;
      return {weights_ + (at_.weights[l] + skipped + first_unit * kGates), pitch};
    } else {
      const LstmLayer<T>& layer = p_.lstm.layer[l];
      return of_h ? Columns{layer.weight_hh, at_.hidden, at_.hidden, first_unit}
                  : Columns{layer.weight_ih, at_.hidden, layer_inputs(l), first_unit};
    }
  }

  __device__ __forceinline__ T* row(int first, int index = 0) const {
    return rows_ + first + index * at_.pitch;
  }
  __device__ __forceinline__ T* h_before(int l, int shift) const {
    return row(at_.h, (l + shift) % at_.buffers * at_.hidden);
  }
  __device__ __forceinline__ T* h_after(int l, int shift) const { return h_before(l, shift + at_.layers); }
  __device__ __forceinline__ int next_shift(int shift) const { return (shift + at_.layers) % at_.buffers; }
  // The rows that layer l or, for l = layers, the head takes.
  __device__ __forceinline__ T* inputs_of(int l, int shift) const {
    return l == 0 ? row(at_.x) : h_after(l - 1, shift);
  }

  __device__ __forceinline__ Coordinate coordinate(int c) const {
    const Slot& slot = slots_[(offset_ + c) / kBlock];
    const int within = (offset_ + c) % kBlock;
    return {within < slot.coordinates, slot.item, slot.first + within};
  }

  // ---- packed states ----

  // Where coordinates c and behind it lie in row 0 of a packed state.
  struct Place {
    int64_t first;    // -1: nowhere, behind the last block
    int coordinates;  // that are no padding; negative numbers are none
  };
  __device__ __forceinline__ Place place(int c) const {
    const int block = (offset_ + c) / kBlock, within = (offset_ + c) % kBlock;
    const Slot& slot = slots_[block];
    const int64_t first = (first_block_ + block) * p_.lstm.state_rows() * kStateBlock + within;
    return {slot.item < 0 ? -1 : first, slot.coordinates - within};
  }

  // Four coordinates of a row; 0 for padding.
  template <typename S>
  __device__ __forceinline__ Quad<T> load_packed(const S* state, int64_t row, const Place& place) const {
    if (place.coordinates <= 0) return {};
    Quad<T> quad = load_quad<T>(state + (place.first + row * kStateBlock), plan_.aligned);
#pragma unroll
    for (int i = 1; i < kQuad; ++i) {
      if (i >= place.coordinates) quad.values[i] = 0;
    }
    return quad;
  }
  __device__ __forceinline__ Quad<T> load_state(int64_t row, const Place& place) const {
    if (p_.bfloat16_state) return load_packed(static_cast<const __nv_bfloat16*>(p_.state), row, place);
    return load_packed(static_cast<const T*>(p_.state), row, place);
  }

  template <typename S>
  __device__ __forceinline__ void store_packed(S* state, int64_t row, const Place& place,
                                               Quad<T> quad) const {
    if (place.first < 0) return;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i >= place.coordinates) quad.values[i] = 0;
    }
    store_quad(state + (place.first + row * kStateBlock), quad, plan_.aligned);
  }

  // f(l, unit, c) for every unit, four coordinates at a time.
  template <class F>
  __device__ __forceinline__ void for_each_unit(const F& f) const {
    for (int l = 0; l < at_.layers; ++l) {
      for_each(at_.hidden << at_.quad_bits, [&](int i) { f(l, i >> at_.quad_bits, quad_of(i)); });
    }
  }
  // The first of the four coordinates of tile i; the quads of a chunk turn fastest.
  __device__ __forceinline__ int quad_of(int i) const { return (i & (at_.quads - 1)) * kQuad; }

  // ---- a step ----

  // The inputs that stand for the gradient of a coordinate.
  __device__ __forceinline__ void fill_inputs(int64_t k, int c) const {
    const T g = gradient(coordinate(c), k);
    T* const x = row(at_.x) + c;
    if (p_.lstm.preprocess == Preprocess::none) {
      x[0] = g;
    } else {
      store_log_sign(g, x);
    }
    if (p_.lstm.has_losses) store_log_sign(p_.lstm.losses[k], x + p_.lstm.own_inputs() * at_.pitch);
  }
  __device__ __forceinline__ void store_log_sign(T value, T* x) const {
    const LogSign<T> inputs = log_sign(value, p_.lstm.p, plan_.exp_p, std::numeric_limits<T>::max());
    x[0] = inputs.size;
    x[at_.pitch] = inputs.sign;
  }

  __device__ __forceinline__ T gradient(const Coordinate& coordinate, int64_t k) const {
    if (!coordinate.inside) return 0;
    const auto& item = p_.list[coordinate.item];
    return item.grads[k * item.size + coordinate.index];
  }

  // Layer l of a step. cells(unit, c, place) gives c before; consume(unit, c, place, Unit) takes what it
  // becomes.
  template <int kUnits, class Cells, class Consume>
  __device__ __forceinline__ void layer(int l, int shift, const Cells& cells, const Consume& consume) const {
    const T* const bias = p_.lstm.layer[l].bias;
    const T *const inputs = inputs_of(l, shift), *const before = h_before(l, shift);
    for_each(div_up(at_.hidden, kUnits) << at_.quad_bits, [&](int tile) {
      const int c = quad_of(tile), first = (tile >> at_.quad_bits) * kUnits;
      T sums[kUnits][kGates][kQuad];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = min(first + u, at_.hidden - 1);
#pragma unroll
        for (int q = 0; q < kGates; ++q) {
          const T value = bias[q * at_.hidden + unit];
#pragma unroll
          for (int i = 0; i < kQuad; ++i) sums[u][q][i] = value;
        }
      }
      add_products(inputs + c, at_.pitch, layer_inputs(l), weights(l, false, first), sums);
      add_products(before + c, at_.pitch, at_.hidden, weights(l, true, first), sums);
      const Place place = this->place(c);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = first + u;
        if (unit < at_.hidden) consume(unit, c, place, finish_unit(sums[u], cells(unit, c, place)));
      }
    });
  }

  // What the head's rows say of a coordinate, before their nonlinearities: the product with `inputs`, from
  // theta and gates before.
  __device__ __forceinline__ void head_sums(int c, int shift, T (&sums)[2]) const {
    const Lstm<T>& lstm = p_.lstm;
    const T* const inputs = inputs_of(at_.layers, shift) + c;
    const int columns = static_cast<int>(lstm.head_columns());
    const bool has_gates = lstm.head == Head::gates;
    sums[0] = lstm.head_bias[0];
    sums[1] = has_gates ? lstm.head_bias[1] : T(0);
    for (int u = 0; u < at_.top; ++u) {
      const T input = inputs[u * at_.pitch];
      sums[0] += lstm.head_weight[u] * input;
      if (has_gates) sums[1] += lstm.head_weight[columns + u] * input;
    }
    if (!has_gates) return;
    const T theta = row(at_.theta)[c];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const T* const own = lstm.head_weight + r * columns + at_.top;
      sums[r] += own[0] * theta + own[1] * row(at_.gates, r)[c];
    }
  }

  // Step k of a coordinate behind the layers: theta and gates become what they are after it.
  __device__ __forceinline__ HeadValues<T> head(int64_t k, int c, int shift, const Coordinate& where) const {
    T sums[2];
    head_sums(c, shift, sums);
    HeadValues<T> values{};
    const T before = row(at_.theta)[c];
    if (p_.lstm.head == Head::update) {
      values.theta = before + p_.lstm.scale * sums[0];
      if (has_params(where)) row(at_.theta)[c] = values.theta;
      return values;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) row(at_.gates, r)[c] = values.gates[r] = sigmoid(sums[r]);
    values.theta = values.gates[1] * before - values.gates[0] * gradient(where, k);
    row(at_.theta)[c] = values.theta;
    return values;
  }

  __device__ __forceinline__ bool has_params(const Coordinate& where) const {
    return where.inside && p_.list[where.item].params != nullptr;
  }

  // theta_0, and the gates of the state, of a coordinate.
  __device__ __forceinline__ void fill_head(int c) const {
    const Coordinate where = coordinate(c);
    row(at_.theta)[c] = has_params(where) ? p_.list[where.item].params[where.index] : T(0);
    if (p_.lstm.head != Head::gates) return;
    const Place place = this->place(c);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t index = place.first + (p_.lstm.gate_row() + r) * kStateBlock;
      T value = 0;
      if (where.inside) {
        value = p_.bfloat16_state ? converted<T>(static_cast<const __nv_bfloat16*>(p_.state)[index])
                                  : static_cast<const T*>(p_.state)[index];
      }
      row(at_.gates, r)[c] = value;
    }
  }

 private:
  const LstmUnroll<T>& p_;
  const Plan<T>& plan_;
  const Layout<T>& at_;
  Slot* slots_;
  T *weights_, *rows_;
  int64_t first_block_ = 0;
  int offset_ = 0;  // of the chunk in its first block of state
};

}  // namespace

}  // namespace metafast::cuda
