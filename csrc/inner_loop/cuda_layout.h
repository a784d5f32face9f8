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
  bool dual;                        // the first layer
  int64_t pitch[kMaxLayers + 1];    // of activations l, and of the parameters of layer l
  int64_t weights[kMaxLayers + 1];  // of layer l in a set of parameters; [L]: the size of the set
  int64_t flat[kMaxLayers + 1];     // the same in one that is not padded, as in the rows of sums
  int samples;                      // of the larger batch
  int step_count;

  // in home; -1: not needed
  int64_t theta, v, m, buffer, support_x, query_x;
  int64_t out[kMaxLayers + 1], grad[kMaxLayers + 1];
  int64_t out_tangent[kMaxLayers + 1], grad_tangent[kMaxLayers + 1];
  int64_t home;

  // in the workspace; -1: not needed
  int64_t slots;    // theta_0, ..., theta_{K-1} and, where home lies in the workspace, theta_K
  int64_t buffers;  // m_1, ..., m_K
  int64_t steps;    // elements of both

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
      // Whole tiles of 4 columns, in an odd number of vectors.
      const int64_t vectors = div_up(columns[l], 4) * 4 / kVectorLength<T>;
      pitch[l] = (vectors | 1) * kVectorLength<T>;
      if (l == 0) continue;
      weights[l] = weights[l - 1] + padded<T>(width[l]) * pitch[l - 1];
      flat[l] = l == 1 && dual ? 0 : flat[l - 1] + p.mlp.size(2 * l - 2) + p.mlp.size(2 * l - 1);
    }
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
    m = take(home, reverses, set);
    buffer = take(home, p.sgd.momentum != 0 && !all_buffers, set);
    support_x = take(home, true, p.support.count * pitch[0]);
    query_x = take(home, p.has_query(), p.query.count * pitch[0]);
    out[0] = grad[0] = out_tangent[0] = grad_tangent[0] = -1;
    for (int l = 1; l <= layers; ++l) {
      out[l] = take(home, true, samples * pitch[l]);
      grad[l] = take(home, true, samples * pitch[l]);
      out_tangent[l] = take(home, reverses && l < layers, samples * pitch[l]);
      grad_tangent[l] = take(home, reverses, samples * pitch[l]);
    }
    slots = take(steps, trajectory, (p.sgd.steps + !resident) * set);
    buffers = take(steps, all_buffers, p.sgd.steps * set);
  }
};

// Which kernel runs a problem, on how many teams of threads, with how much memory: it follows from the shapes
// and from the shared memory that a block of this device can have.
enum class Path {
  warp,         // a warp to a task, which lives in shared memory
  small_block,  // 64 threads to a task, likewise
  large_block,  // 256 threads to a task, likewise
  staged,       // 256 threads to a task, which lives in the workspace
};

using WarpTeam = Team<kWarpSize, 2>;
using SmallBlockTeam = Team<64, 1>;
using LargeBlockTeam = Team<256, 1>;  // knows the dual form, of large networks

template <typename T>
struct Plan {
  InnerLoop<T> p;
  Path path;
  Layout<T> at;
  int64_t team_bytes;  // of shared memory
  int64_t workspace;   // elements of a team
  int64_t items;       // teams: each leaves a row of sums
  bool wants_adapted;

  explicit Plan(const InnerLoop<T>& problem) : p(problem), at(problem, true) {
    const int64_t shared_bytes = static_cast<int64_t>(max_shared_bytes());
    const int64_t tiles = most_tiles();
    const auto resident = [&]<class Team>() {
      return (padded<T>(Team::kWarps) + at.home) * static_cast<int64_t>(sizeof(T));
    };
    // A warp needs no barriers between warps, and with few tiles the others would idle. With many tasks, it
    // is also worth it to take up to four tiles a thread, if enough warps find room.
    constexpr int64_t kManyTasks = 2048, kSmallTask = 12 << 10;
    const int64_t warp_bytes = resident.template operator()<WarpTeam>();
    const bool few_tiles = tiles <= kWarpSize && WarpTeam::kTeams * warp_bytes <= shared_bytes;
    const bool many_tasks = tiles <= 4 * kWarpSize && p.tasks >= kManyTasks && warp_bytes <= kSmallTask;
    if (!at.dual && (few_tiles || many_tasks)) {
      use<WarpTeam>(Path::warp, warp_bytes, shared_bytes);
    } else if (resident.template operator()<LargeBlockTeam>() > shared_bytes) {
      at = Layout<T>(p, false);
      const int64_t elements = padded<T>(LargeBlockTeam::kWarps) + kStageSize<T>;
      use<LargeBlockTeam>(Path::staged, elements * sizeof(T), shared_bytes);
    } else if (!at.dual && tiles <= 2 * SmallBlockTeam::kThreads) {
      use<SmallBlockTeam>(Path::small_block, resident.template operator()<SmallBlockTeam>(), shared_bytes);
    } else {
      use<LargeBlockTeam>(Path::large_block, resident.template operator()<LargeBlockTeam>(), shared_bytes);
    }
    wants_adapted =
        std::any_of(p.adapted, p.adapted + 2 * p.mlp.layers, [](const T* to) { return to != nullptr; });
  }

 private:
  // Of the largest product.
  int64_t most_tiles() const {
    int64_t most = 0;
    const int64_t sample_tiles = div_up<int64_t>(at.samples, kTile);
    for (int l = 0; l < p.mlp.layers; ++l) {
      const int64_t rows = div_up<int64_t>(at.width[l + 1], kTile),
                    cols = div_up<int64_t>(at.columns[l], kTile);
      most = std::max({most, rows * cols, sample_tiles * std::max(rows, cols)});
    }
    return most;
  }

  template <class Team>
  void use(Path chosen, int64_t bytes, int64_t shared_bytes) {
    constexpr int64_t kMultiprocessors = 132;              // of the largest GPU of today
    constexpr int64_t kThreads = 1024;                     // that one of them keeps busy
    constexpr int64_t kWorkspaceBytes = int64_t{1} << 31;  // of all teams, unless one alone needs more
    path = chosen;
    team_bytes = bytes;
    workspace = at.steps + (path == Path::staged ? at.home : 0);
    const int64_t blocks =
        std::clamp<int64_t>(shared_bytes / (bytes * Team::kTeams), 1, kThreads / Team::kBlockThreads);
    const int64_t affordable = kWorkspaceBytes / std::max<int64_t>(1, workspace * sizeof(T));
    items = std::min({p.tasks, kMultiprocessors * blocks * Team::kTeams, std::max<int64_t>(1, affordable)});
  }
};

}  // namespace

}  // namespace metafast::cuda
