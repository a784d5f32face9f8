// CPU kernels that families share.
#include <algorithm>

#include "common/sums.h"

namespace metafast::METAFAST_ISA {

template <typename T>
void run(const SumPartials<T>& p, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; ++o) {
    T* out = p.out + o * p.inner;
    std::fill_n(out, p.inner, T(0));
    for (int64_t c = 0; c < p.chunks; ++c) {
      const T* partial = p.partial + (o * p.chunks + c) * p.inner;
      for (int64_t i = 0; i < p.inner; ++i) out[i] += partial[i];
    }
  }
}

template void run(const SumPartials<float>&, int64_t, int64_t);
template void run(const SumPartials<double>&, int64_t, int64_t);

}  // namespace metafast::METAFAST_ISA
