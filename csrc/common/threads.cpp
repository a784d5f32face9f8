#include "common/threads.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <optional>
#include <thread>

#include "common/mkl.h"

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace metafast {
namespace {

constexpr size_t kLine = 64;  // bytes of a cache line

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kBetweenLooks{100};

std::atomic<void (*)()> g_look{nullptr};

std::atomic<bool> g_forked{false};

thread_local bool t_in_share = false;
thread_local bool t_is_helper = false;
thread_local int t_uninterrupted = 0;
thread_local Watch* t_watch = nullptr;  // of the call that this thread is in, if that takes long

// While one lives, a variable of this thread has another value.
template <typename T>
class Set {
 public:
  Set(T& variable, T value) : variable_(variable), before_(variable) { variable_ = value; }
  ~Set() { variable_ = before_; }
  Set(const Set&) = delete;
  Set& operator=(const Set&) = delete;

 private:
  T& variable_;
  const T before_;
};

}  // namespace

// What the threads of a call that takes long ask whether it is to end.
class Watch {
 public:
  void heed(bool caller) {
    if (ended) throw Ended();
    if (!caller || Clock::now() < next_look_) return;
    if (const auto look = g_look.load(std::memory_order_relaxed)) {
      const Set<Watch*> calls_of_its_own(t_watch, nullptr);
      look();
    }
    next_look_ = Clock::now() + kBetweenLooks;
  }

  std::atomic<bool> ended{false};  // by what some share has thrown

 private:
  struct Ended {};  // never seen: it comes after what ended the call
  Clock::time_point next_look_ = Clock::now() + kBetweenLooks;
};

namespace {

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The shares of one call, on the caller's stack.
class alignas(kLine) Job {
 public:
  Job(int64_t shares, int64_t threads, const Work& work, Watch* watch)
      : shares_(shares), threads_(threads), work_(work), watch_(watch), ranges_(new Range[threads]) {
    for (int64_t t = 0; t < threads; ++t) {
      ranges_[t].next = shares * t / threads;
      ranges_[t].end = shares * (t + 1) / threads;
    }
  }

  // The caller's part: does shares until none is left. In a call that takes long it then waits for those who
  // still have one, heeding interrupts.
  void lead() noexcept {
    run(0);
    for (int64_t waits = 0; watch_ != nullptr && busy_ > 0; ++waits) {
      constexpr int64_t kSpins = 10000;
      if (waits < kSpins) {
        pause();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
      const Set<Watch*> watched(t_watch, watch_);
      attempt(heed_interrupts);
    }
  }

  // That of another thread, which may come late.
  void help(int64_t thread) noexcept {
    const Set<bool> in_share(t_in_share, true), is_helper(t_is_helper, true);
    ++busy_;
    run(thread);
    --busy_;
  }

  // When no thread is within, these two.
  //
  // About how long the caller would have taken alone, from the shares that it did. Not from the time that all
  // were at work: a helper that the system takes off its core amid a share is not at work.
  Clock::duration alone() const { return took_ * shares_ / std::max<int64_t>(did_, 1); }
  void rethrow() const {
    if (failed_) std::rethrow_exception(error_);
  }

 private:
  struct alignas(kLine) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };

  // Each thread begins with a range of its own, the same in every call, whose data its cache may still hold,
  // and goes on with those of others.
  void run(int64_t thread) noexcept {
    const Set<Watch*> watched(t_watch, watch_);
    const Clock::time_point began = Clock::now();
    int64_t did = 0;
    for (int64_t i = 0; i < threads_; ++i) {
      Range& range = ranges_[(thread + i) % threads_];
      while (range.next.load(std::memory_order_relaxed) < range.end && !failed_) {
        const int64_t share = range.next.fetch_add(1, std::memory_order_relaxed);
        if (share < range.end) {
          attempt([&] {
            heed_interrupts();
            work_(share);
          });
          ++did;
        }
      }
    }
    if (thread > 0) return;
    did_ = did;
    took_ = Clock::now() - began;
  }

  template <class F>
  void attempt(const F& f) noexcept {
    try {
      f();
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
      if (watch_ != nullptr) watch_->ended = true;
    }
  }

  const int64_t shares_, threads_;
  const Work& work_;
  Watch* const watch_;  // null in a call that does not take long
  const std::unique_ptr<Range[]> ranges_;
  std::atomic<int64_t> busy_{0};  // helpers that are within
  int64_t did_ = 0;               // shares of the caller
  Clock::duration took_{};        // for those
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// What OpenMP orders, at both ends of a region, ThreadSanitizer has to be told.
#ifdef __SANITIZE_THREAD__
#define NOT_SANITIZED __attribute__((no_sanitize("thread")))
void comes_before(Job& job) { __tsan_release(&job); }
void comes_after(Job& job) { __tsan_acquire(&job); }
#else
#define NOT_SANITIZED
void comes_before(Job&) {}
void comes_after(Job&) {}
#endif

// A thread's account of what its team is worth.
class Team {
 public:
  bool helps() const { return !g_forked && (alone_until_ == kNever || Clock::now() >= alone_until_); }

  // Whether this thread has one, which OpenMP keeps.
  bool exists() const { return exists_; }

  void run(Job& job, int threads) {
    exists_ = true;
    const Clock::time_point began = Clock::now();
    fork_and_join(job, threads);
    const Clock::time_point end = Clock::now();
    const Clock::duration lost = end - began - job.alone();
    if (lost > Clock::duration::zero()) {
      alone_until_ = end + patience_ * lost;
      patience_ = std::min(2 * patience_, kMostPatience);
    } else {
      alone_until_ = kNever;
      patience_ = std::max(patience_ - 1, 1);
    }
  }

 private:
  static constexpr Clock::time_point kNever{};
  static constexpr int kMostPatience = 32;
  Clock::time_point alone_until_ = kNever;
  int patience_ = 1;  // times as long as was lost
  bool exists_ = false;

  NOT_SANITIZED static void fork_and_join(Job& job, int threads) {
    comes_before(job);
#pragma omp parallel num_threads(threads)
    if (const int thread = omp_get_thread_num(); thread == 0) {
      job.lead();
    } else {
      comes_after(job);
      job.help(thread);
      comes_before(job);
    }
    comes_after(job);
  }
};

thread_local Team t_team;

// Calls in the child of a fork would wait for threads that only its parent has. So would torch's operations,
// within ops and beside them, if the thread that forked had a team, which OpenMP takes for alive.
[[maybe_unused]] const int g_at_fork = pthread_atfork(nullptr, nullptr, [] {
  g_forked = true;
  if (!t_team.exists()) return;
  omp_set_num_threads(1);
  if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(1);
});

}  // namespace

void share_out(int64_t shares, int64_t threads, const Work& work, bool takes_long) {
  std::optional<LongCall> call;
  if (takes_long && t_watch == nullptr && !t_in_share && t_uninterrupted == 0) call.emplace();
  if (shares < 2 || threads < 2 || t_in_share || !t_team.helps()) {
    for (int64_t share = 0; share < shares; ++share) {
      heed_interrupts();
      work(share);
    }
    return;
  }
  Job job(shares, threads, work, t_watch);
  {
    const Set<bool> in_share(t_in_share, true);
    t_team.run(job, static_cast<int>(threads));
  }
  job.rethrow();
}

void heed_interrupts() {
  if (t_watch != nullptr) t_watch->heed(!t_is_helper);
}

void set_interrupts(void (*look)()) { g_look = look; }

LongCall::LongCall() : watch_(new Watch), before_(t_watch) { t_watch = watch_.get(); }
LongCall::~LongCall() { t_watch = before_; }

Uninterrupted::Uninterrupted() { ++t_uninterrupted; }
Uninterrupted::~Uninterrupted() { --t_uninterrupted; }

}  // namespace metafast
