// Memory of the kernels: aligned arrays of vectors, without an allocation in the loops over tasks and steps.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "common/simd.h"

namespace metafast::METAFAST_ISA {

// Memory of this thread, which keeps it from call to call unless it is large.
class ThreadMemory {
 public:
  // While another is in use, as in a handler of the signal that interrupts its kernel, it is taken anew.
  explicit ThreadMemory(int64_t bytes) {
    std::swap(block_, this_thread());
    if (block_.size < bytes) block_.resize((bytes + 63) / 64 * 64);
  }
  ~ThreadMemory() {
    constexpr int64_t kKeep = 16 << 20;
    if (block_.size <= kKeep) std::swap(block_, this_thread());
  }
  ThreadMemory(const ThreadMemory&) = delete;
  ThreadMemory& operator=(const ThreadMemory&) = delete;

  void* get() const { return block_.data.get(); }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  struct Block {
    std::unique_ptr<void, Free> data;
    int64_t size = 0;
    void resize(int64_t bytes) {
      data.reset();
      size = 0;
      data.reset(bytes > 0 ? std::aligned_alloc(64, bytes) : nullptr);
      if (data == nullptr && bytes > 0) throw std::bad_alloc();
      size = bytes;
    }
  };
  static Block& this_thread() {
    static thread_local Block block;
    return block;
  }

  Block block_;
};

// Deals out memory in arrays of vectors. Without memory it only counts: so whoever needs arrays takes them in
// one place, once to count and once in earnest.
template <typename T>
class Arena {
 public:
  Arena() = default;
  explicit Arena(T* memory) : memory_(memory), counts_(false) {}

  T* take(int64_t vectors) {
    T* taken = counts_ ? nullptr : memory_ + used_ * kLanes<T>;
    used_ += vectors;
    return taken;
  }
  T* take_if(bool wanted, int64_t vectors) { return wanted ? take(vectors) : nullptr; }
  bool counts() const { return counts_; }
  int64_t bytes() const { return used_ * kVectorBytes; }

 private:
  T* memory_ = nullptr;
  bool counts_ = true;
  int64_t used_ = 0;
};

// Calls f(arena) twice: to count the memory it takes (arena.counts()), and with that memory, to work.
template <typename T, class F>
void with_arena(F&& f) {
  Arena<T> counter;
  f(counter);
  const ThreadMemory memory(counter.bytes());
  Arena<T> arena(static_cast<T*>(memory.get()));
  f(arena);
}

}  // namespace metafast::METAFAST_ISA
