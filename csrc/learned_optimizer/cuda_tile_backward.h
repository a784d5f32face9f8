// Tiles of coordinates through all steps and back. Part of cuda.cu.
//
// The way there keeps the state before every step, or of long unrolls before every interval-th; the way back
// runs one interval after the other again. A step back begins at the last layer: it computes the gates once
// more, turns them into the gradients before their nonlinearities (deltas), and sends these through the
// weights to h before and to the layer below. A warp does that alone, with its tile's states in memory that
// each lane reads as it wrote it. The gradient of the weights, deltas times inputs over all coordinates, is a
// product whose long side are the coordinates: the warps of a block lay their deltas and inputs open in
// shared memory and share its results among them.
#pragma once

#include <algorithm>

#include "learned_optimizer/cuda_tile_forward.h"

namespace metafast::cuda {
namespace {

// The gradient of the weights: 16 gates, those of a group of units, times 8 inputs at once.
constexpr int kGateRows = kGates * kGroup;
constexpr int kInputTiles = kGroups;  // of a layer; of the first kFirstTiles
constexpr int kFirstTiles = TileWeights::kLastRows;
constexpr int kDeltaRows = kGroups * kGateRows;
constexpr int kInputRows = kInputTiles * 8;

// How many products a layer has of a group's gates.
__host__ __device__ constexpr int input_tiles(int l) { return l == 0 ? kFirstTiles : kInputTiles; }

struct TileBackwardPlan : TilePlan {
  static constexpr int kBlocks = 2;  // of a multiprocessor, with the registers that they need

  int chunks;  // of kTileWarps tiles
  // The states before steps 0, interval, 2 interval, ..., the last one, and those within one interval.
  int interval, intervals, quads;  // quads of a lane's state
  int64_t workspace;               // elements of a warp

  static bool fits(const LstmUnrollBackward<float>& p) {
    return TilePlan::fits(p.forward) && is_aligned(p.grad_new_state) && is_aligned(p.grad_state);
  }

  explicit TileBackwardPlan(const LstmUnrollBackward<float>& p) : TilePlan(p.forward) {
    const Lstm<float>& lstm = p.forward.lstm;
    chunks = div_up(tiles, kTileWarps);
    use(shared_elements(lstm.layers), kBlocks, chunks);

    const int steps = static_cast<int>(p.forward.steps), carried = kept_quads(lstm.layers) + 2;
    quads = kept_quads(lstm.layers) + (lstm.head == Head::gates ? 1 : 0);
    constexpr int64_t kQuadElements = kQuad * kWarpSize;
    constexpr int64_t kMostBytes = 256
                                   << 10;  // of a warp, but for so many steps that it grows with their root
    for (interval = 1;; ++interval) {
      intervals = div_up(steps, interval);
      workspace = (int64_t{intervals + interval} * quads + carried) * kQuadElements;
      const int64_t size = workspace * static_cast<int64_t>(sizeof(float));
      if (size <= kMostBytes || int64_t{interval} * interval >= steps) break;
    }
  }

  // ---- shared memory, in elements: behind the weights ----

  static constexpr int kStagedRows = kDeltaRows + kInputRows;
  static constexpr int kStaged = kTileWarps * kStagedRows * kTile;
  static constexpr int kTotal = kQuad * kWarpSize;  // of a product's results
  static __host__ __device__ int totals(int layers) {
    return kGroups * (kFirstTiles + (layers - 1) * kInputTiles) * kTotal;
  }
  static constexpr int kHeadParts =
      kGroups + 3;  // of a row and lane: its units, the two last columns, the bias
  static constexpr int kHeadTotals = 2 * kHeadParts * kTileThreads;
  static __host__ __device__ std::int64_t shared_elements(int layers) {
    return TileWeights::elements(layers) + kStaged + totals(layers) + layers * kDeltaRows + kHeadTotals +
           2 * kTileWarps + kTileWarps * (sizeof(Tile) / sizeof(float));
  }
};

class TileUnrollBackward {
 public:
  __device__ __forceinline__ TileUnrollBackward(const LstmUnrollBackward<float>& p,
                                                const TileBackwardPlan& plan, float* shared)
      : p_(p),
        plan_(plan),
        weights_(p.forward.lstm, shared),
        staged_(shared + TileWeights::elements(p.forward.lstm.layers)),
        states_(reinterpret_cast<Quad<float>*>(p.workspace +
                                               (block_index() * kTileWarps + warp_index()) * plan.workspace) +
                lane_index()) {}

  __device__ __forceinline__ void run() {
    weights_.fill();
    if (wants_sums()) {
      const int layers = lstm().layers;
      for (int i = threadIdx.x; i < TileBackwardPlan::totals(layers); i += kTileThreads) totals()[i] = 0;
      for (int i = threadIdx.x; i < layers * kDeltaRows; i += kTileThreads) bias_totals(0)[i] = 0;
      for (int i = threadIdx.x; i < TileBackwardPlan::kHeadTotals; i += kTileThreads) head_totals()[i] = 0;
      if (lstm().has_losses) {
        for (int64_t k = threadIdx.x; k < p_.forward.steps; k += kTileThreads) {
          row_of_sums()[lstm().loss_column() + k] = 0;
        }
      }
    }
    __syncthreads();
    for (int i = static_cast<int>(blockIdx.x); i < plan_.chunks; i += plan_.grid) {
      // In shared memory: registers are scarce.
      Tile& tile = tiles()[warp_index()];
      if (lane_index() == 0) tile = Tile::find(p_.forward, i * kTileWarps + warp_index());
      __syncwarp();
      run_tile(TileMemory(p_.forward, plan_.exp_p, tile));
      __syncwarp();
    }
    if (wants_sums()) {
      __syncthreads();
      write_totals();
    }
  }

 private:
  const LstmUnrollBackward<float>& p_;
  const TileBackwardPlan& plan_;
  TileWeights weights_;
  float* staged_;        // behind the weights
  Quad<float>* states_;  // [slots, quads] of every lane, then the gradients carried from step to step

  __device__ __forceinline__ const Lstm<float>& lstm() const { return p_.forward.lstm; }
  __device__ __forceinline__ bool has_gates() const { return lstm().head == Head::gates; }
  __device__ __forceinline__ bool wants_sums() const { return p_.sums != nullptr; }
  __device__ __forceinline__ float* head_totals() const { return staged_ + TileBackwardPlan::kStaged; }
  __device__ __forceinline__ float* loss_parts() const {
    return head_totals() + TileBackwardPlan::kHeadTotals;
  }
  __device__ __forceinline__ float* bias_totals(int l) const {
    return loss_parts() + 2 * kTileWarps + l * kDeltaRows;
  }
  __device__ __forceinline__ float* totals() const { return bias_totals(lstm().layers); }
  __device__ __forceinline__ Tile* tiles() const {
    return reinterpret_cast<Tile*>(totals() + TileBackwardPlan::totals(lstm().layers));
  }
  __device__ __forceinline__ float* row_of_sums() const { return p_.sums + block_index() * p_.columns(); }

  // ---- the steps ----

  __device__ __forceinline__ void run_tile(const TileMemory& tile) {
    load_start(tile);
    const int layers = lstm().layers;
    const int steps = static_cast<int>(p_.forward.steps);
    bool back = false;
    int part = plan_.intervals - 1, k = 0;  // the interval on the way back
    while (true) {
      Quad<float>*const now = slot(k), *const next = slot(k + 1);
      if (back) head_back(tile, k, now, next);
      TileUnits inputs;
#pragma unroll 1
      for (int i = 0; i < layers; ++i) {
        const int l = back ? layers - 1 - i : i;
        if (l == 0) {
          inputs.groups[kGroups - 1] = tile.inputs(tile.gradient(k), k);
        } else if (back) {
          inputs = load_kept(units(next, l - 1, 0));
        }
        const TileUnits before = load_kept(units(now, l, 0));
        if (back && wants_sums()) {
          __syncthreads();  // all are done with what is laid open
          lay_open(l, inputs, before);
        }
        TileGates gates;
        weights_.gates(l, inputs, before, gates);
        if (back) {
          const TileUnits c = load_kept(units(now, l, 1));
          layer_back(tile, l, k, gates, c);
        } else {
          TileUnits c = load_kept(units(now, l, 1));
          inputs = finish_units(gates, c);
          store_kept(units(next, l, 0), inputs);
          store_kept(units(next, l, 1), c);
        }
      }
      if (!back) {
        if (has_gates()) run_head(tile.gradient(k), inputs, now, next);
        // Run again, an interval ends where the next one's first state is there already.
        const bool is_last = part + 1 == plan_.intervals;
        const int end = is_last ? steps : (part + 1) * plan_.interval - 1;
        if (++k < end) continue;
        back = true;
        if (is_last) --k;
      } else if (k > part * plan_.interval) {
        --k;
      } else {
        if (part == 0) break;
        k = --part * plan_.interval;
        back = plan_.interval == 1;
      }
    }
    store_end(tile);
  }

  // ---- what is kept ----

  // The lane's state before step k: h and c of each layer, then theta and gates with Head::gates.
  __device__ __forceinline__ Quad<float>* slot(int k) const {
    const int interval = k / plan_.interval, within = k - interval * plan_.interval;
    return slot_of(k == p_.forward.steps ? plan_.intervals
                   : within == 0         ? interval
                                         : plan_.intervals + within);
  }
  __device__ __forceinline__ Quad<float>* slot_of(int number) const {
    return states_ + static_cast<int64_t>(number) * plan_.quads * kWarpSize;
  }
  // Its h and c (`which`) of layer l.
  static __device__ __forceinline__ Quad<float>* units(Quad<float>* slot, int l, int which) {
    return slot + (2 * l + which) * kGroups * kWarpSize;
  }
  __device__ __forceinline__ float* head_state(Quad<float>* slot) const {
    return slot[(plan_.quads - 1) * kWarpSize].values;
  }
  // Those of theta and of the two gates; and, within a step, of the head's two rows before their
  // nonlinearities and of the given gradient but for the inputs.
  __device__ __forceinline__ float* grad_lane() const { return grad_state(lstm().layers, 0)->values; }
  __device__ __forceinline__ float* grad_head() const {
    return grad_state(lstm().layers, 0)[kWarpSize].values;
  }
  // The gradients of h and c.
  __device__ __forceinline__ Quad<float>* grad_state(int l, int which) const {
    return units(slot_of(plan_.intervals + plan_.interval), l, which);
  }

  // The state before the first step, and the gradients of what the last one leaves.
  __device__ __forceinline__ void load_start(const TileMemory& tile) {
#pragma unroll 1
    for (int l = 0; l < lstm().layers; ++l) {
#pragma unroll 1
      for (int which = 0; which < 2; ++which) {
        const int64_t row = which == 0 ? lstm().h_row(l) : lstm().c_row(l);
        store_kept(units(slot(0), l, which), tile.load_state(row));
        store_kept(grad_state(l, which),
                   p_.grad_new_state == nullptr ? TileUnits{} : tile.load(p_.grad_new_state, row));
      }
    }
    Quad<float> grad{};
    if (has_gates()) {
      Quad<float> head{tile.theta()};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = lstm().gate_row() + r;
        head.values[1 + r] = tile.load_lane_state(row);
        grad.values[1 + r] = p_.grad_new_state == nullptr ? 0.0f : tile.load_lane(p_.grad_new_state, row);
      }
      store_quad(head_state(slot(0)), head);
    }
    store_quad(grad_lane(), grad);
  }

  __device__ __forceinline__ void store_end(const TileMemory& tile) const {
    const Quad<float> grad = load_quad<float>(grad_lane());
    if (p_.grad_state != nullptr) {
#pragma unroll 1
      for (int l = 0; l < lstm().layers; ++l) {
        tile.store(p_.grad_state, lstm().h_row(l), load_kept(grad_state(l, 0)));
        tile.store(p_.grad_state, lstm().c_row(l), load_kept(grad_state(l, 1)));
      }
      if (has_gates()) {
#pragma unroll
        for (int r = 0; r < 2; ++r) tile.store_lane(p_.grad_state, lstm().gate_row() + r, grad.values[1 + r]);
      }
    }
    float* const to = p_.list[tile.item()].grad_params;
    if (to != nullptr && tile.inside()) to[tile.place()] = grad.values[0];
  }

  // ---- the head ----

  // Its two last columns' weights of row r.
  __device__ __forceinline__ const float* own_weights(int r) const {
    return lstm().head_weight + r * lstm().head_columns() + lstm().hidden;
  }

  __device__ __forceinline__ void run_head(float gradient, const TileUnits& h, Quad<float>* now,
                                           Quad<float>* next) const {
    Quad<float> head = load_quad<float>(head_state(now));
    const float theta = head.values[0];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* const own = own_weights(r);
      head.values[1 + r] = sigmoid(lstm().head_bias[r] + weights_.head_sum(r, h) + own[0] * theta +
                                   own[1] * head.values[1 + r]);
    }
    head.values[0] = head.values[2] * theta - head.values[1] * gradient;
    store_quad(head_state(next), head);
  }

  // The gradients of the head's rows before their nonlinearities, and of theta and gates before.
  __device__ __forceinline__ void head_back(const TileMemory& tile, int k, Quad<float>* now,
                                            Quad<float>* next) const {
    Quad<float> carried = load_quad<float>(grad_lane()), of_head{};
    const float* const given = p_.list[tile.item()].grad_out;
    const float grad = carried.values[0] + (given != nullptr && tile.inside() ? given[tile.place(k)] : 0.0f);
    if (!has_gates()) {
      carried.values[0] = tile.has_params() ? grad : 0.0f;
      of_head.values[0] = lstm().scale * grad;
      store_quad(grad_lane(), carried);
      store_quad(grad_head(), of_head);
      if (wants_sums()) head_total(0, kGroups + 2) += of_head.values[0];
      return;
    }
    const Quad<float> before = load_quad<float>(head_state(now)), after = load_quad<float>(head_state(next));
    const float gradient = tile.gradient(k);
    const float theta = before.values[0];
    carried.values[0] = after.values[2] * grad;
    of_head.values[2] = -after.values[1] * grad;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float gate = after.values[1 + r],
                  of_gate = carried.values[1 + r] + (r == 0 ? -gradient : theta) * grad;
      const float delta = of_gate * gate * (1 - gate);
      const float* const own = own_weights(r);
      carried.values[0] += own[0] * delta;
      carried.values[1 + r] = own[1] * delta;
      of_head.values[r] = delta;
      if (!wants_sums()) continue;
      head_total(r, kGroups) += delta * theta;
      head_total(r, kGroups + 1) += delta * before.values[1 + r];
      head_total(r, kGroups + 2) += delta;
    }
    store_quad(grad_lane(), carried);
    store_quad(grad_head(), of_head);
  }

  // ---- a layer ----

  // From its gates before their nonlinearities to the gradients of h and c before, and of its inputs.
  __device__ __forceinline__ void layer_back(const TileMemory& tile, int l, int k, TileGates& gates,
                                             const TileUnits& c) const {
    const bool is_top = l + 1 == lstm().layers;
    Quad<float> of_head[2] = {};
    if (is_top) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (r < lstm().head_rows()) of_head[r] = quad_of_lanes(grad_head()[r]);
      }
    }
    Quad<float>*const to_h = grad_state(l, 0), *const to_c = grad_state(l, 1);
    Quad<float> next_h = load_quad<float>(to_h->values), next_c = load_quad<float>(to_c->values);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      Quad<float> of_h = next_h, of_c = next_c, h;
      if (j + 1 < kGroups) {  // all at once would take too many registers
        next_h = load_quad<float>(to_h[(j + 1) * kWarpSize].values);
        next_c = load_quad<float>(to_c[(j + 1) * kWarpSize].values);
      }
      if (is_top) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float weight = weights_.head(r, j);
#pragma unroll
          for (int e = 0; e < kQuad; ++e) of_h.values[e] += weight * of_head[r].values[e];
        }
      }
#pragma unroll
      for (int e = 0; e < kQuad; ++e) {
        const LstmGates<float> values{sigmoid(gates.at(j, 0, e)), sigmoid(gates.at(j, 1, e)),
                                      Math<float>::tanh(gates.at(j, 2, e)), sigmoid(gates.at(j, 3, e))};
        const float cell = c.groups[j].values[e];
        const float tanh_c = Math<float>::tanh(values.f * cell + values.i * values.g);
        h.values[e] = values.o * tanh_c;
        const LstmGatesBackward<float> back =
            lstm_backward(of_h.values[e], of_c.values[e], values, cell, tanh_c);
        gates.at(j, 0, e) = back.gates.i;
        gates.at(j, 1, e) = back.gates.f;
        gates.at(j, 2, e) = back.gates.g;
        gates.at(j, 3, e) = back.gates.o;
        of_c.values[e] = back.c_before;
      }
      store_quad(to_c[j * kWarpSize].values, of_c);
      if (is_top && wants_sums()) add_head(j, h, of_head);
    }
    if (wants_sums()) lay_open(gates);
    if (l > 0) {
      const auto more = TileWeights::inputs_back<TileWeights::kMoreRows>(gates, weights_.more_rows(l));
#pragma unroll
      for (int j = 0; j < kGroups - 1; ++j) add(grad_state(l - 1, 0) + j * kWarpSize, more.group(j));
    }
    const auto last = TileWeights::inputs_back<TileWeights::kLastRows>(gates, weights_.last_rows(l));
    TileUnits before;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) before.groups[j] = last.group(1 + j);
    store_kept(grad_state(l, 0), before);
    if (l > 0) {
      add(grad_state(l - 1, 0) + (kGroups - 1) * kWarpSize, last.group(0));
    } else {
      inputs_end(tile, k, last.group(0));
    }
    if (!wants_sums()) return;
    __syncthreads();
    add_totals(l);
    if (l == 0 && lstm().has_losses && threadIdx.x == 0) add_loss(tile, k);
  }

  // To the gradient of the head's weights of the lane's unit of group j.
  __device__ __forceinline__ void add_head(int j, const Quad<float>& h,
                                           const Quad<float> (&of_head)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r >= lstm().head_rows()) break;
      float sum = 0;
#pragma unroll
      for (int e = 0; e < kQuad; ++e) sum += of_head[r].values[e] * h.values[e];
      head_total(r, j) += sum;
    }
  }
  __device__ __forceinline__ float& head_total(int r, int part) const {
    return head_totals()[(r * TileBackwardPlan::kHeadParts + part) * kTileThreads + threadIdx.x];
  }

  static __device__ __forceinline__ void add(Quad<float>* to, const Quad<float>& quad) {
    Quad<float> sum = load_quad<float>(to->values);
#pragma unroll
    for (int e = 0; e < kQuad; ++e) sum.values[e] += quad.values[e];
    store_quad(to->values, sum);
  }

  // ---- the first layer's inputs ----

  // `grad`: of input t of the lane's four coordinates.
  __device__ __forceinline__ void inputs_end(const TileMemory& tile, int k, const Quad<float>& grad) const {
    const int own = static_cast<int>(lstm().own_inputs());
    float* const to = p_.list[tile.item()].grad_grads;
    if (to != nullptr) {
      float of_gradient = lane_of_quad(grad, 0);
      if (lstm().preprocess == Preprocess::log_sign) {
        of_gradient = tile.log_sign_back(of_gradient, lane_of_quad(grad, 1), tile.gradient(k));
      }
      if (tile.inside()) to[tile.place(k)] = of_gradient + grad_head()[2];
    }
    if (!lstm().has_losses || !wants_sums()) return;
    float sum = (grad.values[0] + grad.values[1]) + (grad.values[2] + grad.values[3]);
#pragma unroll
    for (int offset = kGroup; offset < kWarpSize; offset *= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
    const int place = lane_index() - own;
    if (place == 0 || place == 1) loss_parts()[warp_index() * 2 + place] = sum;
  }

  __device__ __forceinline__ void add_loss(const TileMemory& tile, int k) const {
    float sums[2] = {};
#pragma unroll
    for (int warp = 0; warp < kTileWarps; ++warp) {
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[i] += loss_parts()[warp * 2 + i];
    }
    row_of_sums()[lstm().loss_column() + k] += tile.log_sign_back(sums[0], sums[1], lstm().losses[k]);
  }

  // ---- the gradient of the weights ----

  // Rows of a warp's 32 coordinates, each of eight quads. Their order is another in every row, so that
  // neither the lanes that write, four rows at a time, nor those that read, eight rows at a time, meet in a
  // bank.
  static __device__ __forceinline__ int quad_place(int row, int quad) {
    return row * kTile + (quad ^ ((row & 1) << 2 | (row & 2))) * kQuad;
  }
  __device__ __forceinline__ float* deltas(int warp) const {
    return staged_ + warp * TileBackwardPlan::kStagedRows * kTile;
  }
  __device__ __forceinline__ float* laid_inputs(int warp) const { return deltas(warp) + kDeltaRows * kTile; }

  // The rows of a layer's inputs, in the order of its weights' groups.
  __device__ __forceinline__ void lay_open(int l, const TileUnits& inputs, const TileUnits& before) const {
    float* const rows = laid_inputs(warp_index());
    const auto put = [&](int group, const Quad<float>& quad) {
      store_quad(rows + quad_place(group * kGroup + lane_member(), lane_group()), quad);
    };
    const int last = l == 0 ? 0 : kGroups - 1;
    if (l > 0) {
#pragma unroll
      for (int j = 0; j < kGroups - 1; ++j) put(j, inputs.groups[j]);
    }
    put(last, inputs.groups[kGroups - 1]);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) put(last + 1 + j, before.groups[j]);
  }
  __device__ __forceinline__ void lay_open(TileGates& gates) const {
    float* const rows = deltas(warp_index());
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int q = 0; q < kGates; ++q) {
        const int row = j * kGateRows + q * kGroup + lane_member();
        store_quad(rows + quad_place(row, lane_group()), gates.gate(j, q));
      }
    }
  }

  // f(j, first, last) for the group j of gates and the products [first, last) with its inputs that are this
  // warp's: whole groups, one for each warp, then of what is left over a part.
  template <class F>
  static __device__ __forceinline__ void for_own_products(int l, const F& f) {
    constexpr int kWhole = kGroups / kTileWarps, kRest = kGroups % kTileWarps;
    const int tiles = input_tiles(l), warp = warp_index();
#pragma unroll 1
    for (int i = 0; i < kWhole + kRest; ++i) {
      const bool whole = i < kWhole;
      const int first = whole ? 0 : warp * tiles / kTileWarps;
      const int last = whole ? tiles : (warp + 1) * tiles / kTileWarps;
      f(whole ? i * kTileWarps + warp : i - kWhole + kWhole * kTileWarps, first, last);
    }
  }
  __device__ __forceinline__ float* total(int l, int j, int tile) const {
    const int first = l == 0 ? 0 : kGroups * (kFirstTiles + (l - 1) * kInputTiles);
    return totals() + (first + j * input_tiles(l) + tile) * TileBackwardPlan::kTotal + lane_index() * kQuad;
  }

  // Adds what layer l has laid open. The sums of a chunk begin at 0: of long ones tensor cores lose digits.
  __device__ __forceinline__ void add_totals(int l) const {
    for_own_products(l, [&](int j, int first, int last) {
      const int g = lane_group(), t = lane_member();
      float sums[kInputTiles][kQuad] = {}, of_bias[2] = {};
#pragma unroll 1
      for (int warp = 0; warp < kTileWarps; ++warp) {
        const float *const rows = deltas(warp) + j * kGateRows * kTile, *const inputs = laid_inputs(warp);
        // Gates g and 8 + g of coordinates 4 t to 4 t + 3, and 16 further on: one quad is four products'
        // share.
        Tf32Pair a[kQuad][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Quad<float> quad = load_quad<float>(rows + quad_place(g + i % 2 * 8, t + i / 2 * 4));
#pragma unroll
          for (int e = 0; e < kQuad; ++e) {
            a[e][i] = split_tf32(quad.values[e]);
            of_bias[i % 2] += quad.values[e];
          }
        }
#pragma unroll
        for (int tile = 0; tile < kInputTiles; ++tile) {
          if (tile < first || tile >= last) continue;
          const Quad<float> near = load_quad<float>(inputs + quad_place(tile * 8 + g, t));
          const Quad<float> far = load_quad<float>(inputs + quad_place(tile * 8 + g, t + 4));
#pragma unroll
          for (int e = 0; e < kQuad; ++e) {
            const Tf32Pair b[2] = {split_tf32(near.values[e]), split_tf32(far.values[e])};
            multiply_add(sums[tile], a[e], b);
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < kInputTiles; ++tile) {
        if (tile < first || tile >= last) continue;
        add(reinterpret_cast<Quad<float>*>(total(l, j, tile)),
            {sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]});
      }
      if (last < input_tiles(l)) return;  // the one with the last product has the bias
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        of_bias[i] += __shfl_xor_sync(kFullWarp, of_bias[i], 1);
        of_bias[i] += __shfl_xor_sync(kFullWarp, of_bias[i], 2);
        if (t == 0) bias_totals(l)[j * kGateRows + i * 8 + g] += of_bias[i];
      }
    });
  }

  // To the row of sums (params.h). All are done with what is laid open.
  __device__ __forceinline__ void write_totals() const {
    const int H = static_cast<int>(lstm().hidden);
#pragma unroll 1
    for (int l = 0; l < lstm().layers; ++l) {
      const int inputs = static_cast<int>(lstm().layer_inputs(l)), input_groups = l == 0 ? 1 : kGroups;
      float* const of_inputs = row_of_sums() + lstm().layer_column(l);
      float *const of_before = of_inputs + kGates * H * inputs, *const of_bias = of_before + kGates * H * H;
      for_own_products(l, [&](int j, int first, int last) {
#pragma unroll 1
        for (int tile = first; tile < last; ++tile) {
          const Quad<float> found = load_quad<float>(total(l, j, tile));
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            const int gate = lane_group() + i / 2 * 8, unit = j * kGroup + gate % kGroup;
            const int input = tile * 8 + lane_member() * 2 + i % 2;
            const int out = gate / kGroup * H + unit, column = input - input_groups * kGroup;
            if (unit >= H) continue;
            if (column >= 0) {
              if (column < H) of_before[out * H + column] = found.values[i];
            } else if (input < inputs) {
              of_inputs[out * inputs + input] = found.values[i];
            }
          }
        }
      });
      for (int i = threadIdx.x; i < kDeltaRows; i += kTileThreads) {
        const int unit = i / kGateRows * kGroup + i % kGroup;
        if (unit < H) of_bias[i % kGateRows / kGroup * H + unit] = bias_totals(l)[i];
      }
    }
    write_head();
  }

  // Each warp's part lies in shared memory, [rows, 20 units, then two further columns and the bias].
  __device__ __forceinline__ void write_head() const {
    constexpr int kColumns = kTileUnits + 3;
    float* const mine = staged_ + warp_index() * 2 * kColumns;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        float sum = head_total(r, j);
#pragma unroll
        for (int offset = kGroup; offset < kWarpSize; offset *= 2)
          sum += __shfl_xor_sync(kFullWarp, sum, offset);
        if (lane_group() == 0) mine[r * kColumns + j * kGroup + lane_member()] = sum;
      }
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const float sum = warp_sum(head_total(r, kGroups + i));
        if (lane_index() == 0) mine[r * kColumns + kTileUnits + i] = sum;
      }
    }
    __syncthreads();
    const int H = static_cast<int>(lstm().hidden), columns = static_cast<int>(lstm().head_columns());
    float* const to = row_of_sums() + lstm().layer_column(lstm().layers);
    const int rows = static_cast<int>(lstm().head_rows());
    for (int i = threadIdx.x; i < rows * (columns + 1); i += kTileThreads) {
      const int r = i / (columns + 1), column = i % (columns + 1);
      const int from = r * kColumns + (column < H          ? column
                                       : column == columns ? kTileUnits + 2
                                                           : kTileUnits + column - H);
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kTileWarps; ++warp) sum += staged_[warp * 2 * kColumns + from];
      to[column < columns ? r * columns + column : rows * columns + r] = sum;
    }
  }
};

}  // namespace

}  // namespace metafast::cuda
