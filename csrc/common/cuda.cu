// CUDA kernels that families share.
#include <cstdint>

#include "common/cuda.h"
#include "common/sums.h"

namespace metafast::cuda {
namespace {

constexpr int kThreads = 256;

// A thread to an element of the result.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_partials(SumPartials<T> p) {
  const int64_t index = block_index() * kThreads + threadIdx.x;
  if (index >= p.outer * p.inner) return;
  const T* partial = p.partial + index / p.inner * p.chunks * p.inner + index % p.inner;
  T sum = 0;
  for (int64_t c = 0; c < p.chunks; ++c) sum += partial[c * p.inner];
  p.out[index] = sum;
}

}  // namespace

template <typename T>
void launch(const SumPartials<T>& p, Stream stream) {
  launch_kernel({"sum_partials", grid_of(div_up(p.outer * p.inner, kThreads)), kThreads, 0, stream},
                sum_partials<T>, p);
}

template void launch(const SumPartials<float>&, Stream);
template void launch(const SumPartials<double>&, Stream);

}  // namespace metafast::cuda
