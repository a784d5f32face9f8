// How the tasks of a call go together: in groups, whose maps are in memory at once.
//
// On the CPU each thread takes a task of the group through the whole pass, where there are enough of them: a
// kernel that is cut in parts ends with its slowest thread, and a pass is some fifty kernels. Where there are
// few tasks the kernels are cut. On a GPU a group goes through each kernel together.
#pragma once

#include <algorithm>

#include "common/one_thread.h"
#include "convolutional/memory.h"

namespace metafast {
namespace {

// Tasks [first, first + count), whose maps are those from place `slot` on of a group's.
struct Some {
  int64_t first, count, slot;

  Tensor of_group(const Tensor& rows) const { return rows.narrow(0, slot, count); }
  Tensor of_all(const Tensor& rows) const { return rows.narrow(0, first, count); }
};

// While one lives, arithmetic on whole tensors gives the same bits on a thread that has a task of its own and
// on one whose kernels are cut.
struct SameArithmetic {
  [[maybe_unused]] const FlushSubnormals flush;
  const OneThreadedLibrary one_thread;
};

class Groups {
 public:
  // Of `tasks` tasks, of about `task_cost` multiply-adds each; `elements` is the memory that one takes.
  template <typename T>
  static Groups of(int64_t tasks, int64_t task_cost, int64_t elements, const Tensor& like) {
    constexpr int64_t kBytes = 512 << 20, kBytesOfThread = 4 << 20;
    const int64_t bytes = std::max<int64_t>(1, elements * static_cast<int64_t>(sizeof(T)));
    Groups groups{tasks, task_cost, kBytes / bytes, runs_cuda(like), 1};
    if (!groups.together_) {
      if (!at::in_parallel_region()) groups.threads_ = at::get_num_threads();
      // Several small tasks of each thread, so that one which is late holds up less.
      constexpr int64_t kMostOfThread = 8;
      const int64_t of_thread = std::clamp<int64_t>(kBytesOfThread / bytes, 1, kMostOfThread);
      groups.size_ = std::min(groups.size_, groups.threads_ * of_thread);
    }
    groups.size_ = std::clamp<int64_t>(groups.size_, 1, std::max<int64_t>(1, tasks));
    return groups;
  }

  int64_t size() const { return size_; }  // of the largest

  // Calls f(some) for all tasks, on several threads, and when those of a group are done then(first, count).
  template <class F, class Then>
  void run(const F& f, const Then& then) const {
    for (int64_t first = 0; first < tasks_; first += size_) {
      const int64_t count = std::min(size_, tasks_ - first);
      if (together_ || 2 * count <= threads_) {
        f(Some{first, count, 0});
      } else {
        parallel_for(count, task_cost_, [&](int64_t begin, int64_t end) {
          const at::AutoDispatchBelowADInplaceOrView below_autograd;  // on helpers too
          const SameArithmetic arithmetic;
          for (int64_t i = begin; i < end; ++i) f(Some{first + i, 1, i});
        });
      }
      then(first, count);
    }
  }
  template <class F>
  void run(const F& f) const {
    run(f, [](int64_t, int64_t) {});
  }

 private:
  int64_t tasks_, task_cost_, size_;
  bool together_;
  int64_t threads_;

  Groups(int64_t tasks, int64_t task_cost, int64_t size, bool together, int64_t threads)
      : tasks_(tasks), task_cost_(task_cost), size_(size), together_(together), threads_(threads) {}
};

// What build(space) takes.
template <typename T, class F>
int64_t elements_of(const F& build) {
  Workspace<T> count;
  build(count);
  return count.elements();
}

}  // namespace
}  // namespace metafast
