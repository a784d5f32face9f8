// Where the arrays of a task lie, and which kernel they make the right one. Part of cuda.cu.
//
// Rows of all matrices are padded with zeros to an odd number of vectors of 16 bytes, so that threads that
// read neighbouring rows meet different banks of shared memory. The parameters of a layer are a matrix
// [O, I + 1], the bias its last column; it meets activations with a last feature of constant 1. A first layer
// in dual form (params.h) is [H, E], the coordinates of its change, and meets rows of X X^T.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "common/cuda.h"
#include "inner_loop/cuda_product.h"
#include "inner_loop/params.h"

namespace metafast::cuda {
namespace {

template <typename T>
constexpr int64_t padded(int64_t count) {
  return div_up(count, kVectorLength<T>) * kVectorLength<T>;
}

// Offsets of a team's arrays: of those of the task in `home`, shared memory or, if that is too small, the
// workspace; of those of its steps in the workspace behind it. Activations l = 0, ..., L: the inputs, hidden
// units, outputs.
template <typename T>
struct Layout {
  int width[kMaxLayers + 1];
  int columns[kMaxLayers + 1];      // of the parameters of layer l
  int inner[kMaxLayers + 1];        // of these, columns that outputs are products over; the bias may be apart
  bool dual;                        // the first layer
  int64_t pitch[kMaxLayers + 1];    // of activations l, and of the parameters of layer l
  int64_t weights[kMaxLayers + 1];  // of layer l in a set of parameters; [L]: the size of the set
  int64_t flat[kMaxLayers + 1];     // the same in one that is not padded, as in the rows of sums
  int support, samples;             // examples: of the support, of the larger batch
  int step_count;

  // in home; -1: not needed
  int64_t theta, v, m, buffer, support_x, query_x;
  int64_t out[kMaxLayers + 1], grad[kMaxLayers + 1];
  int64_t out_tangent[kMaxLayers + 1], grad_tangent[kMaxLayers + 1];
  int64_t home;

  // in the workspace; -1: not needed
  int64_t slots;    // theta_0, ..., theta_{K-1} and, where home lies in the workspace, theta_K
  int64_t buffers;  // m_1, ..., m_K
  int64_t rates;    // learning rates of elements, a set
  int64_t steps;    // elements of all

  Layout(const InnerLoop<T>& p, bool resident) {
    const auto narrow = [](int64_t n) {
      if (n >= std::numeric_limits<int>::max() / 2) {
        throw std::invalid_argument(
            "metafast: inner loop on CUDA: expected fewer than 2^30 examples, units and steps");
      }
      return static_cast<int>(n);
    };
    const int layers = p.mlp.layers;
    weights[0] = flat[0] = 0;
    dual = p.dual.support != nullptr;
    for (int l = 0; l <= layers; ++l) {
      width[l] = narrow(p.mlp.widths[l]);
      columns[l] = l == 0 && dual ? narrow(p.support.count + p.query.count) : width[l] + 1;
      // A bias that would begin a new vector is added by itself.
      const bool apart = !(l == 0 && dual) && width[l] % kVectorLength<T> == 0;
      inner[l] = columns[l] - apart;
      // Whole tiles of 4 columns, in an odd number of vectors.
      const int64_t vectors = div_up(columns[l], 4) * 4 / kVectorLength<T>;
      pitch[l] = (vectors | 1) * kVectorLength<T>;
      if (l == 0) continue;
      weights[l] = weights[l - 1] + padded<T>(width[l]) * pitch[l - 1];
      flat[l] = l == 1 && dual ? 0 : flat[l - 1] + p.mlp.size(2 * l - 2) + p.mlp.size(2 * l - 1);
    }
    support = narrow(p.support.count);
    samples = narrow(std::max(p.support.count, p.query.count));
    step_count = narrow(p.sgd.steps);

    const int64_t set = weights[layers];
    const bool trajectory = p.keeps_trajectory(), reverses = trajectory && !p.sgd.first_order;
    const bool all_buffers = p.backward && p.lr_gradient();
    home = steps = 0;
    const auto take = [](int64_t& used, bool wanted, int64_t count) {
      if (!wanted) return int64_t{-1};
      used += count;
      return used - count;
    };
    theta = take(home, resident || !trajectory, set);
    v = take(home, p.backward, set);
    m = take(home, reverses && !p.m_is_v_scaled(), set);
    buffer = take(home, p.sgd.momentum != 0 && !all_buffers, set);
    support_x = take(home, true, p.support.count * pitch[0]);
    query_x = take(home, p.has_query(), p.query.count * pitch[0]);
    out[0] = grad[0] = out_tangent[0] = grad_tangent[0] = -1;
    for (int l = layers; l >= 1; --l) {
      // Of two layers of one width, gradients take the place of the activations that they have come through.
      const bool in_place = l + 1 < layers && width[l] == width[l + 1];
      const bool hidden = l < layers;
      out[l] = take(home, true, samples * pitch[l]);
      out_tangent[l] = take(home, reverses && hidden, samples * pitch[l]);
      grad[l] = in_place ? out[l + 1] : take(home, true, samples * pitch[l]);
      grad_tangent[l] = in_place ? out_tangent[l + 1] : take(home, reverses, samples * pitch[l]);
    }
    home += 8;  // the last lines of a tile may be behind the end
    slots = take(steps, trajectory, (p.sgd.steps + !resident) * set);
    buffers = take(steps, all_buffers, p.sgd.steps * set);
    rates = take(steps, p.sgd.rates == nullptr, set);
  }
};

// Which kernel runs a problem, on how many teams of threads, with how much memory: it follows from the shapes
// and from the device.
enum class Path {
  warp,         // a warp to a task, which lives in shared memory
  small_block,  // 64 threads to a task, likewise
  large_block,  // 256 threads to a task, likewise
  staged,       // 256 threads to a task, which lives in the workspace
};

using WarpTeam = Team<kWarpSize, 4>;
using SmallBlockTeam = Team<64, 1>;
using LargeBlockTeam = Team<256, 1>;  // knows the dual form, of large networks

// That a multiprocessor holds at once: each has up to 255 of its 65,536 registers. Two warps for each of its
// schedulers are few, but their tiles have many independent sums.
constexpr int kBusyThreads = 256;

template <typename T>
struct Plan {
  InnerLoop<T> p;
  Path path;
  Layout<T> at;
  int64_t team_bytes;  // of shared memory
  int teams;           // of a block
  int64_t workspace;   // elements of a team
  int64_t items;       // teams: each leaves a row of sums
  bool wants_adapted;

  explicit Plan(const InnerLoop<T>& problem) : p(problem), at(problem, true) {
    const Device device;
    const Choice warp = resident<WarpTeam>(device), small = resident<SmallBlockTeam>(device),
                 large = resident<LargeBlockTeam>(device);
    // With small tiles that many threads share a product. A warp needs no barriers, and larger tiles load
    // less; but few tasks, or tasks too large for many of them to find room, leave a multiprocessor idle.
    const int64_t wanted = at.samples * *std::max_element(at.width + 1, at.width + p.mlp.layers + 1) / 2;
    const int64_t tasks = div_up<int64_t>(p.tasks, device.multiprocessors);  // of one of them
    constexpr int64_t kEnough = 4;
    if (!at.dual && warp.running > 0 && (wanted <= kWarpSize || std::min(tasks, warp.running) >= kEnough)) {
      use<WarpTeam>(Path::warp, warp, device);
    } else if (!at.dual && small.running > 0 &&
               (wanted <= SmallBlockTeam::kThreads || std::min(tasks, small.running) >= kEnough)) {
      use<SmallBlockTeam>(Path::small_block, small, device);
    } else if (large.running > 0) {
      use<LargeBlockTeam>(Path::large_block, large, device);
    } else {
      at = Layout<T>(p, false);
      const int64_t elements = padded<T>(LargeBlockTeam::kWarps) + kStageSize<T>;
      use<LargeBlockTeam>(Path::staged, choice<LargeBlockTeam>(device, elements * sizeof(T)), device);
    }
    wants_adapted =
        std::any_of(p.adapted, p.adapted + 2 * p.mlp.layers, [](const T* to) { return to != nullptr; });
  }

 private:
  struct Device {
    int64_t multiprocessors = cuda::multiprocessors();
    int64_t block_bytes = static_cast<int64_t>(max_shared_bytes());  // of shared memory, that it can have
  };
  struct Choice {
    int64_t bytes;    // of a team
    int teams;        // of a block
    int64_t running;  // teams that a multiprocessor holds at once; 0: it does not fit
  };

  // As many teams at once as find room in the shared memory of a multiprocessor.
  template <class Team>
  static Choice choice(const Device& device, int64_t bytes) {
    constexpr int64_t kReserved = 1 << 10;  // of each block, by the system
    Choice best{bytes, 1, 0};
    for (int teams = Team::kTeams; teams >= 1; teams /= 2) {
      if (teams * bytes > device.block_bytes) continue;
      const int64_t blocks = std::min<int64_t>((device.block_bytes + kReserved) / (teams * bytes + kReserved),
                                               kBusyThreads / (Team::kThreads * teams));
      if (blocks * teams > best.running) best = {bytes, teams, blocks * teams};
    }
    return best;
  }
  template <class Team>
  Choice resident(const Device& device) const {
    return choice<Team>(device, (padded<T>(Team::kWarps) + at.home) * static_cast<int64_t>(sizeof(T)));
  }

  template <class Team>
  void use(Path chosen, const Choice& choice, const Device& device) {
    constexpr int64_t kWorkspaceBytes = int64_t{1} << 31;  // of all teams, unless one alone needs more
    path = chosen;
    team_bytes = choice.bytes;
    teams = choice.teams;
    workspace = at.steps + (path == Path::staged ? at.home : 0);
    const int64_t affordable = kWorkspaceBytes / std::max<int64_t>(1, workspace * sizeof(T));
    items = std::min({p.tasks, device.multiprocessors * choice.running, std::max<int64_t>(1, affordable)});
  }
};

}  // namespace

}  // namespace metafast::cuda
