// Where a block of threads keeps what it works on, and how many blocks run a problem. Part of cuda.cu.
//
// A block takes one chunk of coordinates after the other through all steps. A chunk's numbers lie in rows, a
// place for each of its coordinates, so that neighbouring threads read neighbouring places. The weights lie
// in shared memory as [inputs, then hidden][units][4 gates]: one load gives the four gates of a unit.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "learned_optimizer/cuda_quad.h"
#include "learned_optimizer/params.h"

namespace metafast::cuda {
namespace {

constexpr int kMostWidth = 128;  // coordinates of a chunk
constexpr int kMostSlots = kMostWidth / kStateBlock;
// Of a block. 320 are the tiles of 128 coordinates and 20 units, 2 x 4 of them each.
template <typename T>
constexpr int kMostThreads = sizeof(T) == 4 ? 320 : 256;

// A block of state that a chunk has a part of.
struct Slot {
  int64_t first;    // coordinate of the tensor at its place 0
  int item;         // of the list; -1 behind the last block
  int coordinates;  // that are not padding
};

// What lies in shared memory. Rows that do not fit there lie in the workspace.
enum class Memory {
  all,   // weights, their gradient and rows
  rows,  // rows
  none,
};

// How a thread's tile of units and coordinates grows: registers hold kUnits x 4 gates x 4 sums.
template <typename T>
constexpr int kForwardUnits = sizeof(T) == 4 ? 4 : 2;
constexpr int kBackwardUnits = 2;

// Offsets in elements: of weights from where those begin, of rows from where these begin.
template <typename T>
struct Layout {
  int width, pitch;      // coordinates of a chunk, and elements of a row
  int quads, quad_bits;  // width / kQuad = 2^quad_bits
  int hidden, inputs, layers, head_rows, top;
  int padded_units;  // in shared memory
  int weights[kMaxLstmLayers];
  int64_t weight_elements, row_elements;

  // Rows of h: the new ones of layer l are written to a buffer that no layer reads from any more. With
  // `shift` of the step, the old ones of layer l lie in buffer (l + shift) % buffers, the new ones `layers`
  // behind, and the next step's shift is `layers` more: L + 1 buffers turn, 2L change places.
  int buffers;
  int x, theta, gates, h, c;  // c: of a forward of several steps
  // Of the backward. deltas: [l, unit, gate], the gates and then the gradients before their nonlinearities.
  int deltas, grad_h, grad_c, grad_theta, grad_gates, grad_head, grad_x, grad_direct, ones;

  Layout(const LstmUnroll<T>& p, bool backward, int chunk_width)
      : width(chunk_width),
        pitch(chunk_width + (backward ? kQuad : 0)),
        quads(chunk_width / kQuad),
        quad_bits(0) {
    while (1 << quad_bits < quads) ++quad_bits;
    const Lstm<T>& lstm = p.lstm;
    constexpr int64_t kMostHidden = 1 << 13;  // keeps counts of weights within 32 bits
    if (lstm.hidden > kMostHidden) {
      throw std::invalid_argument("metafast: learned optimizer on CUDA: expected at most " +
                                  std::to_string(kMostHidden) + " hidden units, got " +
                                  std::to_string(lstm.hidden));
    }
    hidden = static_cast<int>(lstm.hidden);
    inputs = static_cast<int>(lstm.inputs());
    layers = lstm.layers;
    head_rows = static_cast<int>(lstm.head_rows());
    top = static_cast<int>(lstm.top());
    padded_units = div_up(hidden, kQuad) * kQuad;
    weight_elements = 0;
    for (int l = 0; l < layers; ++l) {
      weights[l] = static_cast<int>(weight_elements);
      // Too many elements to be counted in an int do not fit shared memory, and are never read from there.
      weight_elements += (lstm.layer_inputs(l) + hidden) * padded_units * kGates;
    }
    row_elements = 0;
    const auto take = [&](int64_t rows) {
      const int64_t at = row_elements;
      row_elements += rows * pitch;
      return static_cast<int>(at);
    };
    const bool has_gates = lstm.head == Head::gates;
    const int64_t units = static_cast<int64_t>(layers) * hidden;
    buffers = backward && layers > 0 ? 2 * layers : layers + 1;
    x = take(inputs);
    theta = take(1);
    gates = take(has_gates ? 2 : 0);
    h = take(static_cast<int64_t>(buffers) * hidden);
    c = take(!backward && p.steps > 1 ? units : 0);
    if (backward) {
      deltas = take(kGates * units);
      grad_h = take(units);
      grad_c = take(units);
      grad_theta = take(1);
      grad_gates = take(has_gates ? 2 : 0);
      grad_head = take(head_rows);
      grad_x = take(inputs);
      grad_direct = take(1);
      ones = take(1);
    }
  }

  int64_t row_bytes() const { return row_elements * static_cast<int64_t>(sizeof(T)); }
  int64_t weight_bytes() const { return weight_elements * static_cast<int64_t>(sizeof(T)); }
};

constexpr int64_t kSlotBytes = (kMostSlots * sizeof(Slot) + 15) / 16 * 16;

constexpr int64_t kThreadsOfMultiprocessor = 640;  // with the registers that they need
constexpr int64_t kReservedBytes = 1 << 10;        // of shared memory, for each block

template <typename T>
bool is_aligned(const T* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

// How a problem is run: it follows from the shapes and from the shared memory that a block of this device
// can have.
template <typename T>
struct Plan {
  Layout<T> at;
  Memory memory;
  bool aligned;  // all packed states begin at multiples of 16 bytes
  T exp_p;
  int threads;
  int64_t chunks, grid;
  int64_t bytes;  // of shared memory

  // Of the backward: the states before steps 0, interval, 2 interval, ... and those within one interval.
  // A state is kept as rows [width], numbered as in a packed state, and theta with Head::gates behind.
  int64_t interval, intervals, snapshot_rows, snapshots;
  int64_t workspace;                    // elements of a block
  int64_t columns[kMaxLstmLayers + 1];  // where the gradients of a layer's weights, or the head's, begin
  bool wants_inputs;                    // the gradients of the inputs

  // `sums`: elements of the gradient of the weights; backward alone.
  Plan(const LstmUnroll<T>& p, bool backward, int64_t sums)
      : at(p, backward, starting_width(p)), exp_p(static_cast<T>(std::exp(static_cast<double>(p.lstm.p)))) {
    const int64_t limit = static_cast<int64_t>(max_shared_bytes());
    const int64_t sum_bytes = sums * static_cast<int64_t>(sizeof(T));
    const auto fit = [&](int64_t other_bytes, int least_width) {
      for (int width = starting_width(p); width >= least_width; width /= 2) {
        at = Layout<T>(p, backward, width);
        bytes = kSlotBytes + other_bytes + at.row_bytes();
        if (bytes <= limit) return true;
      }
      return false;
    };
    constexpr int kWideEnough = 32;
    if (fit(at.weight_bytes() + sum_bytes, kWideEnough)) {
      memory = Memory::all;
    } else if (fit(0, kQuad)) {
      memory = Memory::rows;
    } else if (backward) {
      memory = Memory::none;
      at = Layout<T>(p, backward, static_cast<int>(kStateBlock));
      bytes = kSlotBytes;
    } else {
      throw std::invalid_argument("metafast: learned optimizer on CUDA: " + std::to_string(p.lstm.layers) +
                                  " layers of " + std::to_string(p.lstm.hidden) +
                                  " hidden units are too many for this GPU's shared memory");
    }
    if (at.row_elements > std::numeric_limits<int>::max()) {
      throw std::invalid_argument("metafast: learned optimizer on CUDA: hidden is too large");
    }

    const int units = backward ? kBackwardUnits : kForwardUnits<T>;
    const int tiles = at.layers == 0 ? at.width : std::max(1, at.quads * div_up(at.hidden, units));
    const int rounds = div_up(tiles, kMostThreads<T>);
    threads = div_up(div_up(tiles, rounds), kWarpSize) * kWarpSize;
    chunks = div_up(p.blocks() * kStateBlock, static_cast<int64_t>(at.width));
    const int64_t resident = std::clamp<int64_t>(limit / (bytes + kReservedBytes), 1,
                                                 std::max<int64_t>(1, kThreadsOfMultiprocessor / threads));
    grid = std::min(chunks, multiprocessors() * resident);
    aligned = is_aligned(static_cast<const T*>(p.state)) && is_aligned(static_cast<const T*>(p.new_state));

    interval = intervals = snapshot_rows = snapshots = workspace = 0;
    wants_inputs = p.lstm.has_losses;
    for (int l = 0; l <= at.layers; ++l) columns[l] = p.lstm.layer_column(l);
    if (!backward) return;
    interval = 1;
    while (interval * interval < p.steps) ++interval;
    intervals = std::max<int64_t>(1, div_up(p.steps, interval));
    snapshot_rows = p.lstm.state_rows() + (p.lstm.head == Head::gates ? 1 : 0);
    snapshots = intervals + interval - 1;
    workspace = snapshots * snapshot_rows * at.width + (memory == Memory::none ? at.row_elements : 0);
  }

 private:
  // Wide chunks where they are enough to fill the GPU.
  static int starting_width(const LstmUnroll<T>& p) {
    const int64_t wide = div_up(p.blocks() * kStateBlock, static_cast<int64_t>(kMostWidth));
    return wide >= multiprocessors() ? kMostWidth : static_cast<int>(kStateBlock);
  }
};

}  // namespace

}  // namespace metafast::cuda
