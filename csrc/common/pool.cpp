#include "common/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <bitset>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>

namespace metafast {
namespace {

constexpr size_t kLine = 64;  // bytes of a cache line

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kBetweenLooks{100};

std::atomic<void (*)()> g_look{nullptr};

thread_local bool t_in_share = false;
thread_local bool t_is_helper = false;
thread_local int t_uninterrupted = 0;
thread_local Watch* t_watch = nullptr;  // of the call that this thread is in, if that takes long

// This thread works for a call with this watch, or without.
class Watched {
 public:
  explicit Watched(Watch* watch) : before_(t_watch) { t_watch = watch; }
  ~Watched() { t_watch = before_; }
  Watched(const Watched&) = delete;
  Watched& operator=(const Watched&) = delete;

 private:
  Watch* before_;
};

}  // namespace

// What the threads of a call that takes long ask whether it is to end.
class Watch {
 public:
  void heed(bool caller) {
    if (ended) throw Ended();
    if (!caller || Clock::now() < next_look_) return;
    if (const auto look = g_look.load(std::memory_order_relaxed)) {
      const Watched calls_of_its_own(nullptr);
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

// The core that this thread is on, or -1 where the system does not tell.
int this_core() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

// Whether `ready` comes true within some 25 microseconds, which is what falling asleep and being woken takes,
// and as long as a program often takes from one call to the next. It never yields: on a busy core that would
// give away the time of a whole slice, where a thread that sleeps is let in again as soon as it is woken.
template <class F>
bool comes_soon(const F& ready) {
  constexpr int kPauses = 1000;
  for (int i = 0; i < kPauses; ++i) {
    if (ready()) return true;
    pause();
  }
  return ready();
}

// The shares of one call, on the caller's stack: a helper touches it between taking the job and leaving it,
// and until then the caller stays.
class alignas(kLine) Job {
 public:
  Job(int64_t shares, int helpers, const Work& work, Watch* watch)
      : threads_(helpers + 1), work_(work), watch_(watch), ranges_(new Range[threads_]) {
    for (int64_t t = 0; t < threads_; ++t) {
      ranges_[t].next = shares * t / threads_;
      ranges_[t].end = shares * (t + 1) / threads_;
    }
  }

  // Does shares until none is left. Each thread begins with a range of its own, the same in every call, whose
  // data its cache may still hold, and goes on with those of others.
  void run(int thread) noexcept {
    const Watched watched(watch_);
    for (int i = 0; i < threads_; ++i) {
      Range& range = ranges_[(thread + i) % threads_];
      while (range.next.load(std::memory_order_relaxed) < range.end && !failed_) {
        const int64_t share = range.next.fetch_add(1, std::memory_order_relaxed);
        if (share < range.end) {
          attempt([&] {
            heed_interrupts();
            work_(share);
          });
        }
      }
    }
  }

  // For the caller, while it waits for helpers.
  void heed() noexcept {
    const Watched watched(watch_);
    attempt(heed_interrupts);
  }

  const int core = this_core();  // the caller's, when it began

  // When no helper is within.
  void rethrow() const {
    if (failed_) std::rethrow_exception(error_);
  }

 private:
  struct alignas(kLine) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };

  template <class F>
  void attempt(const F& f) noexcept {
    try {
      f();
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
      if (watch_ != nullptr) watch_->ended = true;
    }
  }

  const int threads_;
  const Work& work_;
  Watch* const watch_;  // null in a call that does not take long
  const std::unique_ptr<Range[]> ranges_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// A helper and the box where it finds jobs. All that a caller and a helper that is awake say to each other is
// one word, so that no line of memory travels between their cores more often than it must.
class Helper {
 public:
  // False if it is at work for somebody, or if it sleeps and may not be woken. `wakes` counts down.
  bool offer(Job& job, int64_t& wakes) {
    if (box_.load(std::memory_order_relaxed) != kEmpty) return false;
    if (sleeps_ && (wakes <= 0 || rests())) return false;
    uintptr_t empty = kEmpty;
    if (!box_.compare_exchange_strong(empty, word(job))) return false;
    if (sleeps_) {
      // Without the mutex: it is not for the caller to wait here. A notice that comes just before the helper
      // falls asleep is lost; the next call gives another.
      changed_.notify_all();
      --wakes;
    }
    return true;
  }

  // Takes an offer back or, where the helper has taken it, waits until it has left.
  void withdraw(Job& job) {
    uintptr_t seen = word(job);
    if (box_.compare_exchange_strong(seen, kEmpty, std::memory_order_acquire)) return;
    const auto has_left = [&] { return (box_.load(std::memory_order_acquire) & ~kTags) != word(job); };
    if (comes_soon(has_left)) return;
    std::unique_lock lock(mutex_);
    seen = word(job) | kTaken;
    if (!box_.compare_exchange_strong(seen, word(job) | kAwaited, std::memory_order_acquire)) return;
    while (!changed_.wait_for(lock, kBetweenLooks, has_left)) {
      lock.unlock();  // which the helper takes before it gives notice
      job.heed();
      lock.lock();
    }
  }

  // The helper's own thread, for as long as the process lives.
  [[noreturn]] void live(int thread, bool may_spin) {
    int useless = 0;  // wakes in a row
    for (bool helped = false;;) {
      const auto has_offer = [&] { return box_.load(std::memory_order_relaxed) != kEmpty; };
      if (!may_spin || !helped || !comes_soon(has_offer)) sleep();
      helped = serve(thread);
      useless = helped ? 0 : std::min(useless + 1, 4);
      rest_ = helped ? 0 : 1 << useless;
    }
  }

 private:
  // What the box holds: nothing, or the address of a job, offered; once taken with the first tag, and with
  // the second where its caller sleeps until it is done.
  static constexpr uintptr_t kEmpty = 0, kTaken = 1, kAwaited = 2, kTags = 3;
  static uintptr_t word(const Job& job) { return reinterpret_cast<uintptr_t>(&job); }

  // Whether it helped. On a busy machine it often wakes too late, or on the caller's own core, where it would
  // only stand in its way: then it sleeps again at once, and through the next calls.
  bool serve(int thread) {
    uintptr_t offer = box_;
    if (offer == kEmpty) return false;
    if (!box_.compare_exchange_strong(offer, offer | kTaken, std::memory_order_acquire)) return false;
    Job* const job = reinterpret_cast<Job*>(offer);
    const bool beside = job->core < 0 || this_core() != job->core;
    if (beside) job->run(thread);
    if (box_.exchange(kEmpty, std::memory_order_release) & kAwaited) {
      {
        const std::lock_guard lock(mutex_);
      }  // else the caller might look, and only then fall asleep
      changed_.notify_all();
    }
    return beside;
  }

  // Counts calls for which it is left asleep.
  bool rests() {
    const int rest = rest_.load(std::memory_order_relaxed);
    if (rest > 0) rest_.store(rest - 1, std::memory_order_relaxed);
    return rest > 0;
  }

  void sleep() {
    std::unique_lock lock(mutex_);
    sleeps_ = true;
    if (box_ == kEmpty) changed_.wait(lock);
    sleeps_ = false;
  }

  alignas(kLine) std::atomic<uintptr_t> box_{kEmpty};
  std::atomic<bool> sleeps_{false};
  std::atomic<int> rest_{0};
  alignas(kLine) std::mutex mutex_;
  std::condition_variable changed_;
};

class Pool {
 public:
  static constexpr int kMaxHelpers = 255;

  // The process's own. It is never destroyed, since its threads run until the process ends; after a fork,
  // which takes no thread but the caller along, the child makes another.
  static Pool& instance() {
    Pool* pool = instance_;
    if (pool != nullptr) return *pool;
    auto made = std::make_unique<Pool>();
    return instance_.compare_exchange_strong(pool, made.get()) ? *made.release() : *pool;
  }

  void run(Job& job, int helpers, int64_t wakes) {
    if (started_.load(std::memory_order_acquire) < helpers) start(helpers);
    // Not more than there are, of which a smaller number of threads leaves the last in peace.
    helpers = std::min(helpers, started_.load(std::memory_order_acquire));
    std::bitset<kMaxHelpers> offered;
    for (int i = 0; i < helpers; ++i) offered[i] = helpers_[i].offer(job, wakes);
    job.run(0);
    for (int i = 0; i < helpers; ++i) {
      if (offered[i]) helpers_[i].withdraw(job);
    }
  }

 private:
  // Where the system gives no more threads, the call goes on with those that there are.
  void start(int helpers) {
    const std::unique_lock lock(starting_, std::try_to_lock);
    if (!lock) return;  // another caller is about it
    // More threads than cores would only wait in each other's way.
    const int cores = static_cast<int>(std::thread::hardware_concurrency());
    sigset_t all, before;  // signals are for the threads of the program
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (int i = started_; i < helpers; ++i) {
        std::thread([this, i, cores] {
          t_in_share = t_is_helper = true;
#ifdef __linux__
          pthread_setname_np(pthread_self(), "metafast");  // for top and debuggers
#endif
          helpers_[i].live(i + 1, i + 1 < cores);
        }).detach();
        started_.store(i + 1, std::memory_order_release);
      }
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  static inline std::atomic<Pool*> instance_{nullptr};
  static inline const int at_fork_ = pthread_atfork(nullptr, nullptr, [] { instance_ = nullptr; });

  std::mutex starting_;
  std::atomic<int> started_{0};
  Helper helpers_[kMaxHelpers];
};

}  // namespace

void share_out(int64_t shares, int64_t helpers, int64_t wakes, const Work& work, bool takes_long) {
  std::optional<LongCall> call;
  if (takes_long && t_watch == nullptr && !t_in_share && t_uninterrupted == 0) call.emplace();
  helpers = std::min<int64_t>({helpers, shares - 1, Pool::kMaxHelpers});
  if (helpers <= 0 || t_in_share) {
    for (int64_t share = 0; share < shares; ++share) {
      heed_interrupts();
      work(share);
    }
    return;
  }
  Job job(shares, static_cast<int>(helpers), work, t_watch);
  Pool& pool = Pool::instance();
  t_in_share = true;
  pool.run(job, static_cast<int>(helpers), wakes);
  t_in_share = false;
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
