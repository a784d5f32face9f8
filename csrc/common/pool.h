// Threads that help with a CPU kernel's work. A call deals its work out in shares, which whoever runs takes:
// the calling thread and, as soon as the system has scheduled them, helpers. A caller that finds no share
// left returns without waiting for a helper that never began one. Beside busy processes a call so takes no
// longer than on one thread; a fork and join, as OpenMP's, waits for every thread of its team to be
// scheduled.
//
// That is why the kernels have a pool of their own beside torch's OpenMP: nothing in OpenMP lets the caller
// go on without its team. Helpers exist from the first call that wants them, as many as the greatest number
// of threads asked for, one fewer; they sleep between calls, and several callers share them.
#pragma once

#include <cstdint>

namespace metafast {

// Refers to a function that outlives it.
class Work {
 public:
  template <class F>
  explicit Work(const F& f)
      : function_(&f), call_([](const void* f, int64_t share) { (*static_cast<const F*>(f))(share); }) {}
  void operator()(int64_t share) const { call_(function_, share); }

 private:
  const void* function_;
  void (*call_)(const void*, int64_t);
};

// Calls work(0), ..., work(shares - 1), each once, on this thread and on at most `helpers` others, of which
// it wakes `wakes` if they sleep: a helper that is awake anyway costs nothing, a wake the time of a short
// kernel. Returns when all are done. The first exception of a share ends the dealing and reaches the caller.
// A call from within a share runs on its thread alone.
void share_out(int64_t shares, int64_t helpers, int64_t wakes, const Work& work);

}  // namespace metafast
