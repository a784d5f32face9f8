// What the system is told of large memory. All of it is advice: a refusal costs only time.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace metafast {

constexpr size_t kHugePage = 2 << 20;  // bytes

// A first write to fresh memory costs a page fault every 4 KiB otherwise, which takes longer than kernels do.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t size) {
#ifdef MADV_HUGEPAGE
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + size) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// What is in it is not needed any more. Until something is written there, the system may take it back.
inline void let_go([[maybe_unused]] void* data, [[maybe_unused]] size_t size) {
#ifdef MADV_FREE
  madvise(data, size, MADV_FREE);
#endif
}

}  // namespace metafast
