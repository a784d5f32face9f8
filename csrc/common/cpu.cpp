// CPU kernels that families share.
#include <algorithm>

#include "common/sums.h"

namespace metafast::METAFAST_ISA {

namespace {

// Rows of `count` numbers, `pitch` apart.
template <typename T>
void sum_rows(const T* rows, int64_t chunks, int64_t pitch, int64_t count, T* out) {
  std::fill_n(out, count, T(0));
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t i = 0; i < count; ++i) out[i] += rows[c * pitch + i];
  }
}

}  // namespace

template <typename T>
void run(const SumPartials<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t o = item / p.blocks(), first = item % p.blocks() * p.kBlock;
    sum_rows(p.partial + o * p.chunks * p.inner + first, p.chunks, p.inner,
             std::min(p.kBlock, p.inner - first), p.out + o * p.inner + first);
  }
}

template <typename T>
void run(const SumColumns<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const auto& part = p.parts[item];
    sum_rows(p.partial + part.begin, p.chunks, p.inner, part.end - part.begin, part.out);
  }
}

#define METAFAST_INSTANTIATE(Params)                         \
  template void run(const Params<float>&, int64_t, int64_t); \
  template void run(const Params<double>&, int64_t, int64_t);
METAFAST_INSTANTIATE(SumPartials)
METAFAST_INSTANTIATE(SumColumns)
#undef METAFAST_INSTANTIATE

}  // namespace metafast::METAFAST_ISA
