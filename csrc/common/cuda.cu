// CUDA kernels that families share.
#include <cstdint>

#include "common/cuda.h"
#include "common/sums.h"

namespace metafast::cuda {
namespace {

constexpr int kSlices = 8, kThreads = kSlices * kWarpSize;

template <typename T>
struct SliceSums {
  T values[kSlices][kWarpSize];
};

// A block to 32 neighbouring elements of the result, a lane to each: every warp adds a slice of the chunks, c
// = warp, warp + 8, ..., the first warp the slices.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_partials(SumPartials<T> p) {
  SliceSums<T>& shared = shared_memory<SliceSums<T>>();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t index = block_index() * kWarpSize + lane;
  const bool inside = index < p.outer * p.inner;
  T sum = 0;
  if (inside) {
    const T* partial = p.partial + index / p.inner * p.chunks * p.inner + index % p.inner;
    for (int64_t c = warp; c < p.chunks; c += kSlices) sum += partial[c * p.inner];
  }
  shared.values[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || !inside) return;
#pragma unroll
  for (int slice = 1; slice < kSlices; ++slice) sum += shared.values[slice][lane];
  p.out[index] = sum;
}

}  // namespace

template <typename T>
void launch(const SumPartials<T>& p, Stream stream) {
  const int64_t blocks = div_up(p.outer * p.inner, kWarpSize);
  launch_kernel({"sum_partials", grid_of(blocks), kThreads, sizeof(SliceSums<T>), stream}, sum_partials<T>,
                p);
}

template void launch(const SumPartials<float>&, Stream);
template void launch(const SumPartials<double>&, Stream);

}  // namespace metafast::cuda
