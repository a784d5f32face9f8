// Tiles of coordinates through all steps. Part of cuda.cu.
#pragma once

#include <algorithm>
#include <cmath>

#include "learned_optimizer/cuda_tile.h"

namespace metafast::cuda {
namespace {

// What a tile's kernel must know besides the problem.
struct TilePlan {
  float exp_p;
  int tiles, grid;
  int64_t bytes;  // of shared memory

  // Small networks, whose packed states begin at multiples of 16 bytes. cuda_chunk.h takes the others.
  static bool fits(const LstmUnroll<float>& p) {
    constexpr int64_t kMost = 1 << 30;  // steps and tiles are counted in 32 bits
    return p.lstm.layers > 0 && p.lstm.hidden <= kTileUnits && p.steps > 0 && p.steps < kMost &&
           p.blocks() * kTilesOfBlock < kMost && is_aligned(p.state) && is_aligned(p.new_state);
  }

  explicit TilePlan(const LstmUnroll<float>& p)
      : exp_p(static_cast<float>(std::exp(static_cast<double>(p.lstm.p)))),
        tiles(static_cast<int>(p.blocks()) * kTilesOfBlock) {
    int64_t elements = TileWeights::elements(p.lstm.layers);
    if (p.steps > 1) elements += kTileThreads * kept_quads(p.lstm.layers) * kQuad;
    use(elements, kForwardBlocks, tiles);
  }

  // Of a multiprocessor, with the registers that they need.
  static constexpr int kForwardBlocks = 2;

  static __host__ __device__ int kept_quads(int layers) { return 2 * layers * kGroups; }

 protected:
  void use(int64_t elements, int most_blocks, int work) {
    constexpr int64_t kReservedBytes = 1 << 10;  // for each block
    bytes = elements * static_cast<int64_t>(sizeof(float));
    const int64_t limit = static_cast<int64_t>(max_shared_bytes());
    const int64_t resident = std::clamp<int64_t>(limit / (bytes + kReservedBytes), 1, most_blocks);
    grid = std::min(work, multiprocessors() * static_cast<int>(resident));
  }
  static bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }
};

class TileUnroll {
 public:
  __device__ __forceinline__ TileUnroll(const LstmUnroll<float>& p, const TilePlan& plan, float* shared)
      : p_(p),
        plan_(plan),
        weights_(p.lstm, shared),
        kept_(reinterpret_cast<Quad<float>*>(shared + TileWeights::elements(p.lstm.layers)) +
              warp_index() * TilePlan::kept_quads(p.lstm.layers) * kWarpSize + lane_index()) {}

  __device__ __forceinline__ void run() {
    weights_.fill();
    __syncthreads();
    // Neighbours go to different multiprocessors, so that few tiles have the memory of many.
    const int begin = static_cast<int>(blockIdx.x) + warp_index() * plan_.grid;
    for (int i = begin; i < plan_.tiles; i += kTileWarps * plan_.grid) {
      const Tile tile = Tile::find(p_, i);
      run_tile(TileMemory(p_, plan_.exp_p, tile));
    }
  }

 private:
  const LstmUnroll<float>& p_;
  const TilePlan& plan_;
  TileWeights weights_;
  Quad<float>* kept_;  // [layer, h and c, group], of every thread, between the steps

  __device__ __forceinline__ void run_tile(const TileMemory& tile) const {
    const Lstm<float>& lstm = p_.lstm;
    const bool has_gates = lstm.head == Head::gates;
    float theta = tile.theta(), gates[2] = {};
    if (has_gates) {
#pragma unroll
      for (int r = 0; r < 2; ++r) gates[r] = tile.load_lane_state(lstm.gate_row() + r);
    }
#pragma unroll 1
    for (int k = 0; k < p_.steps; ++k) {
      const float gradient = tile.gradient(k);
      TileUnits inputs;  // of the layer; behind it its h
      inputs.groups[kGroups - 1] = tile.inputs(gradient, k);
#pragma unroll 1
      for (int l = 0; l < lstm.layers; ++l) run_layer(tile, l, k, inputs);
      const auto sum = [&](int r) { return lstm.head_bias[r] + weights_.head_sum(r, inputs); };
      float out;
      if (!has_gates) {
        out = theta + lstm.scale * sum(0);
        if (tile.has_params()) theta = out;
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* const own = lstm.head_weight + r * lstm.head_columns() + lstm.hidden;
          gates[r] = sigmoid(sum(r) + own[0] * theta + own[1] * gates[r]);
        }
        out = theta = gates[1] * theta - gates[0] * gradient;
      }
      float* const to = p_.list[tile.item()].out;
      if (to != nullptr && tile.inside()) to[tile.place(k)] = out;
    }
    if (!has_gates || p_.new_state == nullptr) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) tile.store_lane_state(lstm.gate_row() + r, gates[r]);
  }

  __device__ __forceinline__ void run_layer(const TileMemory& tile, int l, int k, TileUnits& inputs) const {
    const int64_t h_row = p_.lstm.h_row(l), c_row = p_.lstm.c_row(l);
    Quad<float>*const kept = kept_ + 2 * l * kGroups * kWarpSize, *const kept_c = kept + kGroups * kWarpSize;
    const auto load = [&](int64_t row, const Quad<float>* from) {
      return k == 0 ? tile.load_state(row) : load_kept(from);
    };
    const TileUnits before = load(h_row, kept);
    TileUnits c = load(c_row, kept_c);
    TileGates gates;
    weights_.gates(l, inputs, before, gates);
    inputs = finish_units(gates, c);
    if (k + 1 < p_.steps) {
      store_kept(kept, inputs);
      store_kept(kept_c, c);
    } else if (p_.new_state != nullptr) {
      tile.store_state(h_row, inputs);
      tile.store_state(c_row, c);
    }
  }
};

}  // namespace

}  // namespace metafast::cuda
