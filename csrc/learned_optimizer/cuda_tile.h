// Small networks in float on the tensor cores: a warp to a tile of 32 coordinates. Part of cuda.cu.
//
// The four gates of a layer are products of the coordinates' inputs with the weights, and a product of 16
// coordinates' 8 inputs with 8 gates' weights is one instruction of a warp (common/ptx.h). Units and
// coordinates are dealt to its lanes so that every product leaves its results where the next one takes them:
// lane 4 g + t has units t, 4 + t, 8 + t, ... of the coordinates 4 g to 4 g + 3, before and behind every
// layer, forward and back. So the numbers of a tile stay in registers, without a barrier or a shuffle between
// the layers.
//
// The instruction's own order serves for that: rows g and g + 8 of its two sums of 16 are the coordinates 4
// g, 4 g + 1 and 4 g + 2, 4 g + 3; columns 2 t and 2 t + 1 are two gates of one unit.
#pragma once

#include <limits>

#include "learned_optimizer/cuda_quad.h"
#include "learned_optimizer/math.h"
#include "learned_optimizer/params.h"

namespace metafast::cuda {
namespace {

constexpr int kGroups = 5;  // of four units: 20, what people use; fewer are filled up with zeros
constexpr int kGroup = 4;
constexpr int kTileUnits = kGroups * kGroup;
constexpr int kTile = kWarpSize;  // coordinates
constexpr int kTilesOfBlock = static_cast<int>(kStateBlock) / kTile;
constexpr int kTileWarps = 4;  // of a block of threads
constexpr int kTileThreads = kTileWarps * kWarpSize;
static_assert(kGroups % 2 == 1, "a layer's inputs and its own units are whole pairs of groups");

__device__ __forceinline__ int lane_group() { return fresh_thread_index() % kWarpSize / kGroup; }
__device__ __forceinline__ int lane_member() { return fresh_thread_index() % kGroup; }
__device__ __forceinline__ int lane_index() { return fresh_thread_index() % kWarpSize; }
__device__ __forceinline__ int warp_index() { return fresh_thread_index() / kWarpSize; }

// A lane's units 4 j + t of its four coordinates.
struct TileUnits {
  Quad<float> groups[kGroups];
};

// A lane's gates, as two sums of 16 coordinates leave them.
struct TileGates {
  float sums[2][2 * kGroups][kQuad];

  // Gate q of unit 4 j + t, of the lane's coordinate e.
  __device__ __forceinline__ float& at(int j, int q, int e) {
    return sums[e / 2][2 * j + q / 2][e % 2 * 2 + q % 2];
  }
  __device__ __forceinline__ Quad<float> gate(int j, int q) {
    return {at(j, q, 0), at(j, q, 1), at(j, q, 2), at(j, q, 3)};
  }
};

// A lane's units in memory of its own, beside those of the warp's other lanes.
__device__ __forceinline__ TileUnits load_kept(const Quad<float>* from) {
  TileUnits units;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) units.groups[j] = load_quad<float>(from[j * kWarpSize].values);
  return units;
}
__device__ __forceinline__ void store_kept(Quad<float>* to, const TileUnits& units) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j) store_quad(to[j * kWarpSize].values, units.groups[j]);
}

// What each lane has of its coordinate, its own number in the warp, as quads, and back.
__device__ __forceinline__ Quad<float> quad_of_lanes(float value) {
  const int first = lane_index() - lane_member();
  Quad<float> quad;
#pragma unroll
  for (int e = 0; e < kQuad; ++e) quad.values[e] = __shfl_sync(kFullWarp, value, first + e);
  return quad;
}
// Member `member` of the group of four has the quad.
__device__ __forceinline__ float lane_of_quad(const Quad<float>& quad, int member) {
  const int from = lane_index() - lane_member() + member;
  float value = 0;
#pragma unroll
  for (int e = 0; e < kQuad; ++e) {
    const float one = __shfl_sync(kFullWarp, quad.values[e], from);
    if (e == lane_member()) value = one;
  }
  return value;
}

// ---- weights ----

// In shared memory, zeros where there are no units. The inputs of a layer, then its own h before, are taken
// in pairs of groups of four: a product's eight. The first layer has one group of inputs, every other
// kGroups. A piece of 8 x 8 weights is kept so that a lane finds its two in one load, and its two of the
// transposed piece in two, of different banks than any other lane's.
class TileWeights {
 public:
  static constexpr int kPiece = 64;
  static constexpr int kPieces = 2 * kGroups;          // two gates of four units
  static constexpr int kRow = kPieces * kPiece;        // of a pair of input groups
  static constexpr int kLastRows = (kGroups + 1) / 2;  // with the last group of inputs, and h before
  static constexpr int kMoreRows = (kGroups - 1) / 2;  // with the other inputs of all layers but the first
  static constexpr int kBias = kGates * kTileUnits;

  static __host__ __device__ int rows(int layers) { return layers * (kLastRows + kMoreRows) - kMoreRows; }
  static __host__ __device__ std::int64_t elements(int layers) {
    return rows(layers) * kRow + layers * kBias + 2 * kTileUnits;
  }

  __device__ __forceinline__ TileWeights(const Lstm<float>& lstm, float* shared)
      : lstm_(lstm),
        products_(shared),
        bias_(products_ + rows(lstm.layers) * kRow),
        head_(bias_ + lstm.layers * kBias) {}

  // By all threads of the block. The caller waits.
  __device__ __forceinline__ void fill() const {
    const int H = static_cast<int>(lstm_.hidden), count = rows(lstm_.layers) * kRow;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kTileThreads) products_[i] = weight(i, H);
    for (int i = threadIdx.x; i < lstm_.layers * kBias; i += kTileThreads) {
      const int l = i / kBias, unit = i % kBias / 8 / 2 * kGroup + i % 8 / 2, gate = i / 8 % 2 * 2 + i % 2;
      bias_[i] = unit < H ? lstm_.layer[l].bias[gate * H + unit] : 0.0f;
    }
    for (int i = threadIdx.x; i < 2 * kTileUnits; i += kTileThreads) {
      const int row = i / kTileUnits, unit = i % kTileUnits;
      const bool inside = row < lstm_.head_rows() && unit < H;
      head_[i] = inside ? lstm_.head_weight[row * lstm_.head_columns() + unit] : 0.0f;
    }
  }

  // The gates of layer l before their nonlinearities. The first layer's inputs are the last group alone.
  __device__ __forceinline__ void gates(int l, const TileUnits& inputs, const TileUnits& before,
                                        TileGates& gates) const {
    const float* const bias = bias_ + l * kBias + lane_member() * 2;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const Vector<float, 2> two = load_vector<2>(bias + n * 8);
#pragma unroll
      for (int i = 0; i < 2 * kQuad; ++i) gates.sums[i / kQuad][n][i % kQuad] = two.values[i % 2];
    }
    if (l > 0) {
#pragma unroll
      for (int i = 0; i < kMoreRows; ++i) {
        multiply(inputs.groups[2 * i], inputs.groups[2 * i + 1], more_rows(l) + i * kRow, gates);
      }
    }
    const float* const last = last_rows(l);
    multiply(inputs.groups[kGroups - 1], before.groups[0], last, gates);
#pragma unroll
    for (int i = 1; i < kLastRows; ++i) {
      multiply(before.groups[2 * i - 1], before.groups[2 * i], last + i * kRow, gates);
    }
  }

  // Back from the gates' gradients to that of kRows pairs of groups, whose weights begin at `row`.
  template <int kRows>
  struct Inputs {
    float sums[2][kRows][kQuad];

    __device__ __forceinline__ Quad<float> group(int i) const {
      Quad<float> quad;
#pragma unroll
      for (int e = 0; e < kQuad; ++e) quad.values[e] = sums[e / 2][i / 2][e % 2 * 2 + i % 2];
      return quad;
    }
  };
  template <int kRows>
  static __device__ __forceinline__ Inputs<kRows> inputs_back(const TileGates& gates, const float* row) {
    const int t = lane_member(), first = 16 * t + lane_group(), upper = t / 2 * 8;
    const float *const even = row + first + upper, *const odd = row + first + (8 - upper);
    Inputs<kRows> inputs{};
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      Tf32Pair a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        constexpr int kOrder[4] = {0, 2, 1, 3};
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = split_tf32(gates.sums[m][n][kOrder[i]]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int piece = r * kRow + n * kPiece;
        const Tf32Pair b[2] = {split_tf32(even[piece]), split_tf32(odd[piece])};
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_add(inputs.sums[m][r], a[m], b);
      }
    }
    return inputs;
  }

  // The weights of the groups 0 to kGroups - 2 of a layer's inputs; and of the last one, with h before.
  __device__ __forceinline__ const float* more_rows(int l) const { return products_ + first_row(l) * kRow; }
  __device__ __forceinline__ const float* last_rows(int l) const {
    return products_ + (first_row(l) + (l > 0 ? kMoreRows : 0)) * kRow;
  }

  // Of the head's row r, for the lane's unit of group j.
  __device__ __forceinline__ float head(int r, int j) const {
    return head_[r * kTileUnits + j * kGroup + lane_member()];
  }
  // The head's row r in front of its nonlinearity, for the lane's own coordinate, without bias and the last
  // two columns of Head::gates.
  __device__ __forceinline__ float head_sum(int r, const TileUnits& h) const {
    float sums[kQuad] = {};
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const float weight = head(r, j);
#pragma unroll
      for (int e = 0; e < kQuad; ++e) sums[e] += weight * h.groups[j].values[e];
    }
    // Member t of four lanes gets the sum over all four of coordinate t.
    const bool odd = lane_member() % 2 == 1, upper = lane_member() / 2 == 1;
    float halves[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float given = odd ? sums[2 * i] : sums[2 * i + 1], kept = odd ? sums[2 * i + 1] : sums[2 * i];
      halves[i] = kept + __shfl_xor_sync(kFullWarp, given, 1);
    }
    const float given = upper ? halves[0] : halves[1], kept = upper ? halves[1] : halves[0];
    return kept + __shfl_xor_sync(kFullWarp, given, 2);
  }

 private:
  const Lstm<float>& lstm_;
  float *products_, *bias_, *head_;

  static __device__ __forceinline__ int first_row(int l) {
    return l == 0 ? 0 : kLastRows + (l - 1) * (kLastRows + kMoreRows);
  }

  // What lies at place i.
  __device__ __forceinline__ float weight(int i, int H) const {
    const int row = i / kRow, piece = i % kRow / kPiece, place = i % kPiece;
    const int l = row < kLastRows ? 0 : 1 + (row - kLastRows) / (kLastRows + kMoreRows);
    const int member = place / 16, gate = piece % 2 * 2 + (place / 8 % 2 ^ member / 2);
    const int unit = piece / 2 * kGroup + member, out = gate * H + unit;
    const int group = (row - first_row(l)) * 2 + place % 2, input = place % 8 / 2;
    const int inputs = static_cast<int>(lstm_.layer_inputs(l)), input_groups = l == 0 ? 1 : kGroups;
    if (unit >= H) return 0;
    if (group < input_groups) {
      const int column = group * kGroup + input;
      return column < inputs ? lstm_.layer[l].weight_ih[out * inputs + column] : 0.0f;
    }
    const int column = (group - input_groups) * kGroup + input;
    return column < H ? lstm_.layer[l].weight_hh[out * H + column] : 0.0f;
  }

  // Two groups of inputs with one row of pieces.
  static __device__ __forceinline__ void multiply(const Quad<float>& first, const Quad<float>& second,
                                                  const float* row, TileGates& gates) {
    const int g = lane_group();
    const float* const mine = row + (16 * (g / 2) + 8 * (g % 2 ^ g / 4) + 2 * lane_member());
    Tf32Pair a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[m][i] = split_tf32(first.values[2 * m + i]);
        a[m][2 + i] = split_tf32(second.values[2 * m + i]);
      }
    }
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const Vector<float, 2> two = load_vector<2>(mine + n * kPiece);
      const Tf32Pair b[2] = {split_tf32(two.values[0]), split_tf32(two.values[1])};
#pragma unroll
      for (int m = 0; m < 2; ++m) multiply_add(gates.sums[m][n], a[m], b);
    }
  }
};

// From the gates before their nonlinearities and c before to h, and c in its place.
__device__ __forceinline__ TileUnits finish_units(TileGates& gates, TileUnits& c) {
  TileUnits h;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      float& cell = c.groups[j].values[e];
      cell = sigmoid(gates.at(j, 1, e)) * cell +
             sigmoid(gates.at(j, 0, e)) * Math<float>::tanh(gates.at(j, 2, e));
      h.groups[j].values[e] = sigmoid(gates.at(j, 3, e)) * Math<float>::tanh(cell);
    }
  }
  return h;
}

// ---- where a tile lies ----

struct Tile {
  int index = -1;       // among the tiles of all tensors; -1 behind the last one
  int item = 0;         // of the list
  int coordinates = 0;  // of its tensor, the others are padding

  static __device__ __forceinline__ Tile find(const LstmUnroll<float>& p, int index) {
    const int block = index / kTilesOfBlock;
    if (block >= p.blocks()) return {};
    int low = 0, high = p.count;  // the tensor is in [low, high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (p.first_block[middle] <= block ? low : high) = middle;
    }
    const int64_t left = p.list[low].size - (index - p.first_block[low] * kTilesOfBlock) * kTile;
    return {index, low, static_cast<int>(left < 0 ? 0 : left < kTile ? left : kTile)};
  }
};

// What reads and writes the tensors and states of one tile.
class TileMemory {
 public:
  __device__ __forceinline__ TileMemory(const LstmUnroll<float>& p, float exp_p, const Tile& tile)
      : p_(p), exp_p_(exp_p), tile_(tile) {}

  __device__ __forceinline__ int item() const { return tile_.item; }
  // Whether there is a coordinate for this lane, and where in a tensor [K, size].
  __device__ __forceinline__ bool inside() const { return lane_index() < tile_.coordinates; }
  __device__ __forceinline__ int64_t place(int64_t k = 0) const {
    return k * p_.list[tile_.item].size + first() + lane_index();
  }
  __device__ __forceinline__ bool has_params() const {
    return inside() && p_.list[tile_.item].params != nullptr;
  }

  __device__ __forceinline__ float theta() const {
    return has_params() ? p_.list[tile_.item].params[place()] : 0.0f;
  }
  __device__ __forceinline__ float gradient(int64_t k) const {
    return inside() ? p_.list[tile_.item].grads[place(k)] : 0.0f;
  }

  // The inputs of the first layer in step k: input t of the lane's four coordinates.
  __device__ __forceinline__ Quad<float> inputs(float gradient, int64_t k) const {
    const Lstm<float>& lstm = p_.lstm;
    const int t = lane_member(), own = static_cast<int>(lstm.own_inputs());
    Quad<float> quad{};
    if (lstm.preprocess == Preprocess::none) {
      // An infinite number times one half of a weight may be no number.
      const Quad<float> given = quad_of_lanes(bounded(gradient));
      if (t == 0) quad = given;
    } else {
      const LogSign<float> found = log_sign(gradient, lstm.p, exp_p_, largest());
      const Quad<float> size = quad_of_lanes(found.size), sign = quad_of_lanes(found.sign);
      if (t == 0) quad = size;
      if (t == 1) quad = sign;
    }
    if (!lstm.has_losses || t < own || t > own + 1) return quad;
    const LogSign<float> found = log_sign(lstm.losses[k], lstm.p, exp_p_, largest());
    const float value = t == own ? found.size : found.sign;
    return {value, value, value, value};
  }
  // The gradient of a given number from that of its inputs.
  __device__ __forceinline__ float log_sign_back(float grad_size, float grad_sign, float of) const {
    return log_sign_backward<float>({grad_size, grad_sign}, of, p_.lstm.p, exp_p_, largest());
  }

  // ---- packed states ----

  // Rows from `row` on, the units of a layer; 0 for padding and where there are no units.
  __device__ __forceinline__ TileUnits load_state(int64_t row) const {
    if (p_.bfloat16_state) return load(static_cast<const __nv_bfloat16*>(p_.state), row);
    return load(static_cast<const float*>(p_.state), row);
  }
  template <typename S>
  __device__ __forceinline__ TileUnits load(const S* state, int64_t row) const {
    TileUnits units;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int unit = j * kGroup + lane_member();
      const bool any = unit < p_.lstm.hidden && quad_coordinates() > 0;
      units.groups[j] = any ? load_quad<float>(state + quad_place(row + unit)) : Quad<float>{};
    }
    clear_padding(units);
    return units;
  }

  __device__ __forceinline__ void store_state(int64_t row, const TileUnits& units) const {
    if (p_.bfloat16_state) {
      store(static_cast<__nv_bfloat16*>(p_.new_state), row, units);
    } else {
      store(static_cast<float*>(p_.new_state), row, units);
    }
  }
  template <typename S>
  __device__ __forceinline__ void store(S* state, int64_t row, TileUnits units) const {
    if (tile_.index < 0) return;
    clear_padding(units);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int unit = j * kGroup + lane_member();
      if (unit < p_.lstm.hidden) store_quad(state + quad_place(row + unit), units.groups[j]);
    }
  }

  // Row `row` of the lane's own coordinate.
  __device__ __forceinline__ float load_lane_state(int64_t row) const {
    if (!inside()) return 0;
    const int64_t at = lane_place(row);
    return p_.bfloat16_state ? converted<float>(static_cast<const __nv_bfloat16*>(p_.state)[at])
                             : static_cast<const float*>(p_.state)[at];
  }
  __device__ __forceinline__ float load_lane(const float* state, int64_t row) const {
    return inside() ? state[lane_place(row)] : 0.0f;
  }
  __device__ __forceinline__ void store_lane_state(int64_t row, float value) const {
    if (p_.bfloat16_state) {
      store_lane(static_cast<__nv_bfloat16*>(p_.new_state), row, value);
    } else {
      store_lane(static_cast<float*>(p_.new_state), row, value);
    }
  }
  template <typename S>
  __device__ __forceinline__ void store_lane(S* state, int64_t row, float value) const {
    if (tile_.index >= 0) convert(inside() ? value : 0.0f, state[lane_place(row)]);
  }

 private:
  const LstmUnroll<float>& p_;
  float exp_p_;
  const Tile& tile_;

  static __device__ __forceinline__ float largest() { return std::numeric_limits<float>::max(); }
  // To what two numbers of TF32 can hold. NaN stays.
  static __device__ __forceinline__ float bounded(float x) {
    constexpr float kEnd = 3.4e38f;
    return x > kEnd ? kEnd : x < -kEnd ? -kEnd : x;
  }
  // The first coordinate of the tensor, and where row 0 of a packed state begins.
  __device__ __forceinline__ int64_t first() const {
    return (tile_.index - p_.first_block[tile_.item] * kTilesOfBlock) * kTile;
  }
  __device__ __forceinline__ int64_t state_place() const {
    const int block = tile_.index / kTilesOfBlock, offset = tile_.index % kTilesOfBlock * kTile;
    return block * (p_.lstm.state_rows() * kStateBlock) + offset;
  }
  __device__ __forceinline__ int quad_coordinates() const { return tile_.coordinates - lane_group() * kQuad; }
  __device__ __forceinline__ int64_t quad_place(int64_t row) const {
    return state_place() + row * kStateBlock + lane_group() * kQuad;
  }
  __device__ __forceinline__ int64_t lane_place(int64_t row) const {
    return state_place() + row * kStateBlock + lane_index();
  }
  __device__ __forceinline__ void clear_padding(TileUnits& units) const {
    if (tile_.coordinates == kTile) return;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        if (e >= quad_coordinates()) units.groups[j].values[e] = 0;
      }
    }
  }
};

}  // namespace

}  // namespace metafast::cuda
