// Threads that help with a CPU kernel's work. A call deals its work out in shares, which whoever runs takes:
// the calling thread and, as soon as the system has scheduled them, helpers. A caller that finds no share
// left returns without waiting for a helper that never began one. Beside busy processes a call so takes no
// longer than on one thread; a fork and join, as OpenMP's, waits for every thread of its team to be
// scheduled.
//
// That is why the kernels have a pool of their own beside torch's OpenMP: nothing in OpenMP lets the caller
// go on without its team. Helpers exist from the first call that wants them, as many as the greatest number
// of threads asked for, one fewer; they sleep between calls, and several callers share them.
//
// A call that takes long can be interrupted: the calling thread looks now and then whether the program wants
// it ended, and then it deals out nothing more, waits for the helpers and throws.
#pragma once

#include <cstdint>
#include <memory>

namespace metafast {

// Multiply-adds that take long enough to look for interrupts between one such part of a call and the next:
// some tens of milliseconds.
constexpr int64_t kLong = 1 << 27;

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
// A call from within a share runs on its thread alone. If it `takes_long`, the caller heeds interrupts
// between shares.
void share_out(int64_t shares, int64_t helpers, int64_t wakes, const Work& work, bool takes_long = false);

// For shares that take long themselves, at times within them, on whatever thread: throws where the call is to
// end. In calls that do not take long it does nothing.
void heed_interrupts();

// Says how a program learns of interrupts: `look` is called on the thread that made a call which takes long,
// some ten times a second, and throws what is to reach the caller if the call is to end.
void set_interrupts(void (*look)());

// While one lives, the kernels that this thread runs are parts of one call, which takes long if all of them
// together do.
class Watch;
class LongCall {
 public:
  LongCall();
  ~LongCall();
  LongCall(const LongCall&) = delete;
  LongCall& operator=(const LongCall&) = delete;

 private:
  const std::unique_ptr<Watch> watch_;
  Watch* const before_;
};

// While one lives, this thread's calls are done to their end: what is written in place must not be left half
// written.
class Uninterrupted {
 public:
  Uninterrupted();
  ~Uninterrupted();
  Uninterrupted(const Uninterrupted&) = delete;
  Uninterrupted& operator=(const Uninterrupted&) = delete;
};

}  // namespace metafast
