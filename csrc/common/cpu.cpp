// CPU kernels that families share.
#include <algorithm>

#include "common/sums.h"

namespace metafast::METAFAST_ISA {

template <typename T>
void run(const SumPartials<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t o = item / p.blocks(), first = item % p.blocks() * p.kBlock;
    const int64_t count = std::min(p.kBlock, p.inner - first);
    T* out = p.out + o * p.inner + first;
    std::fill_n(out, count, T(0));
    for (int64_t c = 0; c < p.chunks; ++c) {
      const T* partial = p.partial + (o * p.chunks + c) * p.inner + first;
      for (int64_t i = 0; i < count; ++i) out[i] += partial[i];
    }
  }
}

template void run(const SumPartials<float>&, int64_t, int64_t);
template void run(const SumPartials<double>&, int64_t, int64_t);

}  // namespace metafast::METAFAST_ISA
