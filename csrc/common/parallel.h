// A loop over work items on as many threads as torch.set_num_threads says at the time of the call. Results do
// not depend on how many there are, or which of them runs an item: where items add up, each leaves a partial
// sum (sums.h).
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "common/threads.h"

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace metafast {

// While it lives, this thread's subnormal numbers are zero. Probabilities of unlikely classes are often
// subnormal, and arithmetic on them is so slow that the backward of a 20-way loss took twice as long.
class FlushSubnormals {
#if defined(__SSE2__)
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushResults | kFlushOperands); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  static constexpr unsigned kFlushResults = 0x8000, kFlushOperands = 0x0040;
  unsigned saved_;
#endif
};

// Work below this many multiply-adds is not worth dealing out.
constexpr int64_t kGrain = 1 << 16;

// Calls run(begin, end) for parts of [0, items), each item of about item_cost multiply-adds. What run()
// prepares it prepares for every part, so a thread's work is cut in two, and only where that takes long in
// four: whoever is done takes over parts of those that are late. Work of more than kLong multiply-adds
// (threads.h) is cut into parts of that size, so that it can be interrupted between them; an item of more
// heeds interrupts itself.
template <class F>
void parallel_for(int64_t items, int64_t item_cost, const F& run) {
  constexpr int64_t kCutInFour = 1 << 22;
  item_cost = std::max<int64_t>(1, item_cost);
  const int64_t cost = items * item_cost, items_of_share = std::max<int64_t>(1, kGrain / item_cost);
  int64_t shares = (items + items_of_share - 1) / items_of_share, threads = 1;
  if (shares > 1 && !at::in_parallel_region()) threads = at::get_num_threads();
  shares = threads > 1 ? std::min(shares, std::clamp(cost / kCutInFour, 2 * threads, 4 * threads)) : 1;
  if (item_cost <= kLong) shares = std::max(shares, cost / kLong);
  const auto run_share = [&](int64_t share) {
    [[maybe_unused]] const FlushSubnormals flush;
    run(items * share / shares, items * (share + 1) / shares);
  };
  share_out(shares, threads, Work(run_share), cost > kLong);
}

}  // namespace metafast
