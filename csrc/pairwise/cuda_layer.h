// The first layer of a relation head, of queries and classes in one launch: products on the tensor cores, to
// float32's accuracy, whose operands come through shared memory in stages. Part of cuda.cu.
#pragma once

#include "common/cuda.h"
#include "common/ptx.h"
#include "pairwise/params.h"

namespace metafast::cuda {
namespace {

// A block has kRows x kLayerUnits sums; its four warps lie 2 x 2.
constexpr int kLayerThreads = 4 * kWarpSize, kLayerUnits = 64;
constexpr int kLayerFeatures = 32, kLayerStages = 3;
// So that the pairs of numbers that half a warp reads, of four rows, lie in different banks.
constexpr int kLayerPitch = kLayerFeatures + 8;

template <int kRows>
struct alignas(16) LayerStage {
  float rows[kRows * kLayerPitch], weight[kLayerUnits * kLayerPitch];
};

template <int kRows>
struct LayerShared {
  LayerStage<kRows> stages[kLayerStages];
};

// The lines first.. of a [limit, ...] array, `pitch` apart, at features from `d` on, into a stage. Lines
// behind the last are read as that one, and features behind the last are zero.
template <int kLines, int kLength>
__device__ __forceinline__ void copy_lines(float* stage, const float* array, int64_t first, int64_t limit,
                                           int64_t pitch, int64_t d, int64_t features) {
  constexpr int kVectors = kLayerFeatures / kLength;
  const int at = threadIdx.x % kVectors * kLength;
  const bool inside = d + at < features;
#pragma unroll
  for (int line = threadIdx.x / kVectors; line < kLines; line += kLayerThreads / kVectors) {
    copy_async<kLength>(stage + line * kLayerPitch + at,
                        array + min(first + line, limit - 1) * pitch + d + at, inside);
  }
}

// Row `line` of a warp's operand, whose features two by two are taken for those of an instruction: what it
// takes for t and t + 4 of eight are 2 t and 2 t + 1.
__device__ __forceinline__ void load_operand(const float* from, int line, Tf32Pair& near, Tf32Pair& far) {
  const Vector<float, 2> two = load_vector<2>(from + line * kLayerPitch);
  near = split_tf32(two.values[0]);
  far = split_tf32(two.values[1]);
}

template <int kRows, int kLength>
__global__ void __launch_bounds__(kLayerThreads)
    relation_layer(const __grid_constant__ RelationLayer<float> p) {
  constexpr int kRowTiles = kRows / 2 / 16, kUnitTiles = kLayerUnits / 2 / 8;
  auto& stages = shared_memory<LayerShared<kRows>>().stages;
  const int64_t unit_tiles = div_up(p.hidden, int64_t{kLayerUnits});
  const int64_t query_tiles = div_up(p.queries.count, int64_t{kRows});
  const int64_t class_tiles = div_up(p.classes.count, int64_t{kRows});
  const int64_t tile = block_index() / unit_tiles;
  if (tile >= query_tiles + class_tiles) return;
  const bool of_class = tile >= query_tiles;
  const float* const rows = of_class ? p.classes.rows : p.queries.rows;
  const float* const weight = of_class ? p.weight + p.features : p.weight;
  const int64_t count = of_class ? p.classes.count : p.queries.count;
  const int64_t first_row = (of_class ? tile - query_tiles : tile) * kRows;
  const int64_t first_unit = block_index() % unit_tiles * kLayerUnits;

  const auto copy = [&](int64_t d, LayerStage<kRows>& stage) {
    if (d < p.features) {
      copy_lines<kRows, kLength>(stage.rows, rows, first_row, count, p.features, d, p.features);
      copy_lines<kLayerUnits, kLength>(stage.weight, weight, first_unit, p.hidden, 2 * p.features, d,
                                       p.features);
    }
    commit_copies();
  };
  constexpr int kAhead = kLayerStages - 1;
#pragma unroll
  for (int s = 0; s < kAhead; ++s) copy(s * kLayerFeatures, stages[s]);

  const int warp = threadIdx.x / kWarpSize, group = threadIdx.x % kWarpSize / 4, member = threadIdx.x % 4;
  const int row = warp / 2 * (kRows / 2) + group, unit = warp % 2 * (kLayerUnits / 2);
  float sums[kRowTiles][kUnitTiles][4] = {};
  int now = 0, next = kAhead;
  for (int64_t d = 0; d < p.features; d += kLayerFeatures) {
    wait_for_copies<kAhead - 1>();
    __syncthreads();  // all have arrived, and the readers of the stage that is filled next are done
    copy(d + kAhead * kLayerFeatures, stages[next]);
    const float* const of_rows = stages[now].rows + row * kLayerPitch + 2 * member;
    const float* const of_units = stages[now].weight + (unit + group) * kLayerPitch + 2 * member;
#pragma unroll
    for (int k = 0; k < kLayerFeatures; k += 8) {
      Tf32Pair a[kRowTiles][4], b[kUnitTiles][2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_operand(of_rows + k, i * 16, a[i][0], a[i][2]);
        load_operand(of_rows + k, i * 16 + 8, a[i][1], a[i][3]);
      }
#pragma unroll
      for (int j = 0; j < kUnitTiles; ++j) load_operand(of_units + k, j * 8, b[j][0], b[j][1]);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kUnitTiles; ++j) multiply_add(sums[i][j], a[i], b[j]);
      }
    }
    now = now + 1 == kLayerStages ? 0 : now + 1;
    next = next + 1 == kLayerStages ? 0 : next + 1;
  }

  float* const out = of_class ? p.classes.out : p.queries.out;
#pragma unroll
  for (int j = 0; j < kUnitTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t h = first_unit + unit + j * 8 + 2 * member + e;
      if (h >= p.hidden) continue;
      const float bias = of_class ? 0.0f : p.bias[h];
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const int64_t r = first_row + row + i * 8;
        if (r < count) out[r * p.hidden + h] = sums[i / 2][j][i % 2 * 2 + e] + bias;
      }
    }
  }
}

template <int kRows, int kLength>
void launch_layer(const RelationLayer<float>& p, Stream stream) {
  const int64_t row_tiles = div_up(p.queries.count, int64_t{kRows}) + div_up(p.classes.count, int64_t{kRows});
  const int64_t blocks = row_tiles * div_up(p.hidden, int64_t{kLayerUnits});
  launch_kernel({"relation_layer", grid_of(blocks), kLayerThreads, sizeof(LayerShared<kRows>), stream},
                relation_layer<kRows, kLength>, p);
}

template <int kLength>
void launch_layer(const RelationLayer<float>& p, Stream stream) {
  // Where large tiles would be too few to keep a device busy, small ones, which are through sooner.
  constexpr int kLarge = 64, kSmall = 32;
  const int64_t tiles = (p.queries.count + p.classes.count) / kLarge * div_up(p.hidden, int64_t{kLayerUnits});
  if (tiles >= multiprocessors()) return launch_layer<kLarge, kLength>(p, stream);
  launch_layer<kSmall, kLength>(p, stream);
}

}  // namespace

template <typename T>
void launch(const RelationLayer<T>& p, Stream stream) {
  const bool vectors = is_vectorizable<T>(p.queries.rows, p.features, p.features) &&
                       is_vectorizable<T>(p.classes.rows, p.features, p.features) &&
                       is_vectorizable<T>(p.weight, p.features, p.features);
  if (vectors) return launch_layer<kVectorLength<T>>(p, stream);
  launch_layer<1>(p, stream);
}

}  // namespace metafast::cuda
