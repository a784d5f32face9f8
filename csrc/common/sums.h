// Work items that run at the same time leave partial sums, which this kernel then adds in a fixed order: the
// same bits with any number of threads. Scalars T are float or double.
#pragma once

#include "common/kernel.h"
#include "common/math.h"

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

  METAFAST_HD T* result(int64_t index) const { return out + index; }
};

// The same for one outer element, whose inner ones are several results, one behind the other: each goes to
// memory of its own, in the one launch.
template <typename T>
struct SumColumns {
  static constexpr int kMaxParts = 40;
  struct Part {
    T* out;
    int64_t begin, end;  // columns
  };

  const T* partial;  // [chunks, inner]
  int64_t chunks, inner;
  Part parts[kMaxParts];
  int count;
  static constexpr int64_t outer = 1;

  // On the CPU a work item is a part.
  int64_t items() const { return count; }
  int64_t item_cost() const { return chunks * inner / (count > 0 ? count : 1); }

  // Null: nobody asked for this column.
  METAFAST_HD T* result(int64_t index) const {
    for (int i = 0; i < count; ++i) {
      if (index >= parts[i].begin && index < parts[i].end) return parts[i].out + (index - parts[i].begin);
    }
    return nullptr;
  }
};

METAFAST_DECLARE_KERNEL(SumPartials)
METAFAST_DECLARE_KERNEL(SumColumns)

}  // namespace metafast
