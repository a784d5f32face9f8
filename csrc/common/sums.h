// Work items that run at the same time leave partial sums, which this kernel then adds in a fixed order: the
// same bits with any number of threads. Scalars T are float or double.
#pragma once

#include "common/kernel.h"

namespace metafast {

// out[o, i] = sum_c partial[o, c, i], in an order that depends on the sizes alone.
template <typename T>
struct SumPartials {
  const T* partial;  // [outer, chunks, inner]
  T* out;            // [outer, inner]
  int64_t outer, chunks, inner;

  // On the CPU a work item is a block of an outer element's inner ones.
  static constexpr int64_t kBlock = 1 << 12;
  int64_t blocks() const { return (inner + kBlock - 1) / kBlock; }
  int64_t items() const { return outer * blocks(); }
  int64_t item_cost() const { return chunks * (inner < kBlock ? inner : kBlock); }
};

METAFAST_DECLARE_KERNEL(SumPartials)

}  // namespace metafast
