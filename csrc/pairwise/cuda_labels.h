// Labels on the device. Values are checked here, since the host would have to wait for the GPU to look at
// them. Part of cuda.cu.
#pragma once

#include "common/cuda.h"
#include "common/kernel.h"

namespace metafast::cuda {
namespace {

// How many classes the task has.
__device__ __forceinline__ int64_t ways_of(const int64_t* ways, int64_t way, int64_t task) {
  return ways != nullptr ? ways[task] : way;
}

__device__ __forceinline__ void check_ways(int64_t ways, int64_t way) {
  METAFAST_DEVICE_CHECK(ways >= 1 && ways <= way, "ways: expected values in [1, num_classes]");
}

__device__ __forceinline__ void check_label(int64_t label, int64_t ways) {
  METAFAST_DEVICE_CHECK(label == kIgnoreLabel || (label >= 0 && label < ways),
                        "labels: expected classes in [0, ways) or -100 (ignored)");
}

__device__ __forceinline__ void check_members(int64_t members) {
  METAFAST_DEVICE_CHECK(members > 0, "support_labels: expected a support example of every class");
}

// Calls f(i) for each i < count with labels[i] == label, in order; returns how many there are. For whole
// warps.
template <typename F>
__device__ __forceinline__ int64_t for_each_member(const int64_t* labels, int64_t count, int64_t label, F f) {
  int64_t members = 0;
  for (int64_t start = 0; start < count; start += kWarpSize) {
    const int64_t i = start + threadIdx.x % kWarpSize;
    unsigned found = __ballot_sync(kFullWarp, i < count && labels[i] == label);
    members += __popc(found);
    for (; found != 0; found &= found - 1) f(start + __ffs(static_cast<int>(found)) - 1);
  }
  return members;
}

}  // namespace

}  // namespace metafast::cuda
