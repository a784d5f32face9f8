// Work shared out as kernels do, for tests/test_threads.py, which also compiles this under ThreadSanitizer.
// Prints nothing and returns 0 if every share ran once, whoever ran it.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/threads.h"

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// Each share writes memory that the caller reads, without an atomic: ThreadSanitizer sees what is not
// ordered.
void call(int64_t shares, int64_t threads) {
  std::vector<int64_t> runs(shares), scratch(shares);
  const auto work = [&](int64_t share) {
    ++runs[share];
    for (int i = 0; i < 200; ++i) scratch[share] += i;
  };
  metafast::share_out(shares, threads, metafast::Work(work));
  for (int64_t share = 0; share < shares; ++share) {
    expect(runs[share] == 1 && scratch[share] == 199 * 100, "a share did not run once");
  }
}

void calls_of_every_size() {
  for (int64_t shares : {0, 1, 2, 3, 7, 64, 1000}) {
    for (int64_t threads : {1, 2, 3, 6}) call(shares, threads);
  }
}

void many_callers() {
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([t] {
      for (int i = 0; i < 300; ++i) call(8 + i % 5, 2 + t % 3);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

// Threads fall asleep between these, late for some and in time for others.
void calls_with_pauses() {
  for (int i = 0; i < 200; ++i) {
    call(8, 3);
    std::this_thread::sleep_for(std::chrono::microseconds(50 * i));
  }
}

// Until one comes, which a busy machine may not schedule at once: the shares of two threads then wait for
// each other to begin, and the helper's takes its time.
void helpers_help_and_are_waited_for() {
  using Clock = std::chrono::steady_clock;
  const std::thread::id caller = std::this_thread::get_id();
  for (int64_t milliseconds : {0, 5}) {
    std::atomic<bool> helped{false};
    for (const auto end = Clock::now() + std::chrono::seconds(10); !helped && Clock::now() < end;) {
      std::atomic<int> begun{0};
      int done[2] = {};
      const auto work = [&](int64_t share) {
        const auto late = Clock::now() + std::chrono::milliseconds(50);
        ++begun;
        while (begun < 2 && Clock::now() < late) std::this_thread::yield();
        if (std::this_thread::get_id() != caller) {
          helped = true;
          std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
        }
        done[share] = 1;
      };
      metafast::share_out(2, 2, metafast::Work(work));
      expect(done[0] == 1 && done[1] == 1, "the caller left before a helper that had begun");
    }
    expect(helped, "no helper came");
  }
}

void exceptions_reach_the_caller() {
  for (int64_t thrower = 0; thrower < 8; ++thrower) {
    const auto work = [&](int64_t share) {
      if (share == thrower) throw std::runtime_error("of a share");
    };
    bool caught = false;
    try {
      metafast::share_out(8, 3, metafast::Work(work));
    } catch (const std::runtime_error&) {
      caught = true;
    }
    expect(caught, "an exception got lost");
    call(8, 3);
  }
}

// A look ends a call that takes long, whether its shares are many or go on until they are told, on the caller
// as on helpers; and no other call.
void interrupts_end_long_calls() {
  static std::atomic<int> looks{0};
  metafast::set_interrupts([] {
    ++looks;
    throw std::runtime_error("of a look");
  });
  const auto short_share = [](int64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(1)); };
  const auto endless_share = [](int64_t) {
    for (;;) metafast::heed_interrupts();
  };
  const auto ended = [](int64_t shares, int64_t threads, const auto& share) {
    const int before = looks;
    bool caught = false;
    try {
      metafast::share_out(shares, threads, metafast::Work(share), true);
    } catch (const std::runtime_error&) {
      caught = true;
    }
    call(8, 3);
    return caught && looks == before + 1;
  };
  for (int64_t threads : {1, 3}) {
    expect(ended(100000, threads, short_share), "many shares were not interrupted");
    expect(ended(1, threads, endless_share), "a share was not interrupted");
    expect(ended(3, threads, endless_share), "shares of several threads were not interrupted");
    const int before = looks;
    metafast::share_out(300, threads, metafast::Work(short_share));
    const metafast::Uninterrupted done_to_its_end;
    metafast::share_out(300, threads, metafast::Work(short_share), true);
    expect(looks == before, "a call was interrupted that must not be");
  }
  // A call of many kernels, none of which takes long.
  bool caught = false;
  try {
    const metafast::LongCall call;
    for (int i = 0; i < 100000; ++i) {
      metafast::share_out(2, 1 + i % 2, metafast::Work(short_share));
    }
  } catch (const std::runtime_error&) {
    caught = true;
  }
  expect(caught, "a call of many kernels was not interrupted");
  // While the caller has nothing left to do but wait; should no helper come, between its own two shares.
  std::atomic<bool> helped{false};
  const auto of_helpers = [&, caller = std::this_thread::get_id()](int64_t) {
    const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(1);
    if (std::this_thread::get_id() == caller) {
      while (!helped && std::chrono::steady_clock::now() < late) std::this_thread::yield();
      return;
    }
    helped = true;
    for (;;) metafast::heed_interrupts();
  };
  expect(ended(2, 2, of_helpers), "a helper's share was not interrupted");
  metafast::set_interrupts(nullptr);
}

void calls_within_shares() {
  std::atomic<int> runs{0};
  const auto inner = [&](int64_t) { ++runs; };
  const auto outer = [&](int64_t) { metafast::share_out(5, 3, metafast::Work(inner)); };
  metafast::share_out(6, 3, metafast::Work(outer));
  expect(runs == 30, "a call within a share did not do all of its own");
}

void children_compute_on() {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // should it wait for threads that only its parent has
    calls_of_every_size();
    _exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child of a fork failed");
  call(64, 4);
}

}  // namespace

int main(int count, char**) {
  calls_of_every_size();
  many_callers();
  calls_with_pauses();
  helpers_help_and_are_waited_for();
  exceptions_reach_the_caller();
  interrupts_end_long_calls();
  calls_within_shares();
  if (count == 1) children_compute_on();  // ThreadSanitizer starts no thread after a fork
}
