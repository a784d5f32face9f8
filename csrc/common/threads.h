// The threads of a CPU kernel, which are those of torch's OpenMP. A call deals its work out in shares, and
// whoever is free takes one.
//
// Why not a pool of our own: OpenMP's threads spin on their cores for some milliseconds after each operation
// of torch. Another pool's would have to fight them for the time, and between operations of torch, which is
// where programs call, a second thread of such a pool was worth nothing.
//
// But a region of OpenMP ends only when the system has let every thread of its team run, if only to see that
// nothing is left to do; beside busy processes that takes milliseconds, a thousand times as long as a short
// kernel. So a caller keeps account: where its team made a call slower than its one thread would have been,
// it stays alone for as long as it has lost, and for longer each time that this goes on.
//
// A call that takes long can be interrupted: the calling thread looks now and then whether the program wants
// it ended, and then it deals out nothing more, waits for the others and throws.
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

// Calls work(0), ..., work(shares - 1), each once, on a team of `threads`, this one among them, and returns
// when all are done. The first exception of a share ends the dealing and reaches the caller. A call from
// within a share runs on its thread alone, and so does every call in the child of a fork, which has no thread
// but the one that forked. If it `takes_long`, the caller heeds interrupts between shares.
void share_out(int64_t shares, int64_t threads, const Work& work, bool takes_long = false);

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
