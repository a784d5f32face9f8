// CUDA kernels that families share.
#include <cstdint>

#include "common/cuda.h"
#include "common/sums.h"

namespace metafast::cuda {
namespace {

// Warps of a block: many where there are many chunks, since what takes time are loads that wait in line.
constexpr int kSlices = 8, kMostSlices = 32, kManyChunks = 8 * kMostSlices;
constexpr int kAtOnce = 8;  // loads of a thread that are under way together

template <typename T>
struct SliceSums {
  T values[kMostSlices][kWarpSize];
};

// A block to 32 neighbouring elements of the result, a lane to each: every warp adds a slice of the chunks, c
// = warp, warp + slices, ..., the first warp the slices.
template <typename T, class Params>
__global__ void __launch_bounds__(kMostSlices* kWarpSize) sum_partials(const __grid_constant__ Params p) {
  SliceSums<T>& shared = shared_memory<SliceSums<T>>();
  const int slices = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t index = block_index() * kWarpSize + lane;
  const bool inside = index < p.outer * p.inner;
  T sum = 0;
  if (inside) {
    const T* partial = p.partial + index / p.inner * p.chunks * p.inner + index % p.inner;
    for (int64_t first = warp; first < p.chunks; first += kAtOnce * slices) {
      T values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t chunk = first + i * slices;
        values[i] = chunk < p.chunks ? partial[chunk * p.inner] : T(0);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += values[i];
    }
  }
  shared.values[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || !inside) return;
  for (int slice = 1; slice < slices; ++slice) sum += shared.values[slice][lane];
  if (T* const result = p.result(index)) *result = sum;
}

template <typename T, class Params>
void launch_sum(const Params& p, Stream stream) {
  const int64_t blocks = div_up<int64_t>(p.outer * p.inner, kWarpSize);
  const unsigned threads = (p.chunks < kManyChunks ? kSlices : kMostSlices) * kWarpSize;
  launch_kernel({"sum_partials", grid_of(blocks), threads, sizeof(SliceSums<T>), stream},
                sum_partials<T, Params>, p);
}

}  // namespace

template <typename T>
void launch(const SumPartials<T>& p, Stream stream) {
  launch_sum<T>(p, stream);
}
template <typename T>
void launch(const SumColumns<T>& p, Stream stream) {
  launch_sum<T>(p, stream);
}

#define METAFAST_INSTANTIATE(Params)                  \
  template void launch(const Params<float>&, Stream); \
  template void launch(const Params<double>&, Stream);
METAFAST_INSTANTIATE(SumPartials)
METAFAST_INSTANTIATE(SumColumns)
#undef METAFAST_INSTANTIATE

}  // namespace metafast::cuda
