// CPU kernels of the inner loop family.
#include "inner_loop/adaptation.h"

namespace metafast::METAFAST_ISA {

template <typename T>
void run(const InnerLoop<T>& p, int64_t begin, int64_t end) {
  constexpr int kLanesOfAvx2 = 32 / sizeof(T);  // Of these, a vector of AVX-512 holds pairs of examples.
  switch (p.lanes()) {
    case Lanes::tasks:
      return Adaptation<TasksInLanes<T, kLanes<T>>, T>::run(p, begin, end);
    case Lanes::pairs:
      return Adaptation<TasksInLanes<T, std::min(kLanes<T>, kLanesOfAvx2)>, T>::run(p, begin, end);
    case Lanes::samples:
      return Adaptation<TasksInLanes<T, 1>, T>::run(p, begin, end);
    case Lanes::features:
      return Adaptation<FeaturesInLanes<T>, T>::run(p, begin, end);
  }
}

// One tensor's elements [begin, begin + count).
template <typename T>
void update(const SgdUpdate<T>& p, const typename SgdUpdate<T>::Item& item, int64_t begin, int64_t count) {
  const T scalar_lr = item.lr_stride == 0 ? *item.lr : T(0);
  for_vectors<T>(count, [&](auto part) __attribute__((always_inline)) {
    const Vec<T> param = part.load(item.param + begin);
    Vec<T> step = part.load(item.grad + begin) + p.weight_decay * param;
    if (p.momentum != 0) {
      const Vec<T> buffer = item.buffer ? p.momentum * part.load(item.buffer + begin) + step : step;
      part.store(item.new_buffer + begin, buffer);
      step = p.nesterov ? step + p.momentum * buffer : buffer;
    }
    const Vec<T> lr = item.lr_stride == 0 ? broadcast(scalar_lr) : part.load(item.lr + begin);
    part.store(item.new_param + begin, param - lr * step);
  });
}

template <typename T>
void run(const SgdUpdate<T>& p, int64_t begin, int64_t end) {
  int i = 0;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    while (chunk >= p.first_chunk[i + 1]) ++i;
    const int64_t offset = (chunk - p.first_chunk[i]) * p.kChunk;
    update(p, p.list[i], offset, std::min(p.kChunk, p.list[i].size - offset));
  }
}

#define METAFAST_INSTANTIATE(Params)                         \
  template void run(const Params<float>&, int64_t, int64_t); \
  template void run(const Params<double>&, int64_t, int64_t);
METAFAST_INSTANTIATE(InnerLoop)
METAFAST_INSTANTIATE(SgdUpdate)
#undef METAFAST_INSTANTIATE

}  // namespace metafast::METAFAST_ISA
