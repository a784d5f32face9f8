#include "emulator.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

#if defined(__x86_64__) && !defined(METAFAST_EMULATOR_USES_UCONTEXT)
// void metafast_emulator_switch(void** save, void* load): the registers a callee must keep go on the stack.
asm(R"(
.text
.hidden metafast_emulator_switch
.globl metafast_emulator_switch
.type metafast_emulator_switch, @function
metafast_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size metafast_emulator_switch, .-metafast_emulator_switch
)");
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace metafast::emulator {
namespace {

constexpr int kWarpSize = 32;
constexpr std::size_t kStackBytes = 256 << 10;  // reserved; only the touched pages cost memory
constexpr std::size_t kGuardBytes = 64 << 10;   // inaccessible, so that a stack overflow is a fault

// splitmix64
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t operator()() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  std::size_t below(std::size_t bound) { return static_cast<std::size_t>((*this)() % bound); }

  template <typename T>
  void shuffle(T* first, std::size_t count) {
    for (std::size_t i = count; i > 1; --i) std::swap(first[i - 1], first[below(i)]);
  }

 private:
  std::uint64_t state_;
};

std::uint64_t seed_from_environment() {
  const char* text = std::getenv("METAFAST_EMULATOR_SEED");
  return text ? std::strtoull(text, nullptr, 0) : 0;
}

Random& random() {
  static Random instance(seed_from_environment());
  return instance;
}

class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* operator[](int thread) {
    while (static_cast<int>(stacks_.size()) <= thread) stacks_.push_back(map());
    return stacks_[thread];
  }

 private:
  static char* map() {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED ||
        mprotect(static_cast<char*>(memory) + kGuardBytes, kStackBytes, PROT_READ | PROT_WRITE)) {
      std::perror("metafast emulator: no memory for a thread's stack");
      std::abort();
    }
    return static_cast<char*>(memory) + kGuardBytes;
  }

  std::vector<char*> stacks_;  // kept for the life of the process
};

enum class State { ready, at_block_barrier, at_warp_operation, exited };
enum class WarpOperation { barrier, ballot, shuffle, collective };

struct Copy {
  void* shared;
  const void* global;
  std::size_t bytes, zeros;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int number;  // in the block
  State state;
  CallSite site;
  // a warp operation's arguments and result
  WarpOperation operation;
  unsigned mask;
  int source_lane;
  std::uint64_t value;  // of a collective, where the operands are
  void (*collective)(void* const* operands);
  std::uint64_t result;
  // copies that have not arrived: the batches, and what will be the next one
  std::deque<std::vector<Copy>> batches;
  std::vector<Copy> batch;

  int lane() const { return number % kWarpSize; }
  int warp() const { return number / kWarpSize; }
};

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_site(const CallSite& a, const CallSite& b) {
  return a.line == b.line && same_text(a.file, b.file) && same_text(a.operation, b.operation);
}

void thread_entry();

class Block {
 public:
  Block(const Launch& launch, std::vector<Thread>& threads, Stacks& stacks, void* shared)
      : launch_(launch), threads_(threads), stacks_(stacks), shared_(shared) {}

  void run() {
    std::memset(shared_, 0xff,
                launch_.shared_bytes);  // NaN in every floating-point type, -1 in every integer
    start_threads();
    // Depth first, the threads that were released last run on: one warp gets as far ahead of the others as it
    // can. Otherwise all advance at random. Each finds missing barriers that the other does not.
    const bool depth_first = random()() & 1;
    while (!ready_.empty()) {
      if (!depth_first) std::swap(ready_.back(), ready_[random().below(ready_.size())]);
      current_ = ready_.back();
      ready_.pop_back();
      threadIdx = current_->index;
      current_->fiber.resume();
    }
    if (exited_ != size()) report_divergence();
  }

  void* shared() const { return shared_; }
  Thread& current() { return *current_; }

  void run_current_thread() {
    current_->fiber.entered();
    launch_.run_thread(launch_.kernel);
    current_->state = State::exited;
    ++exited_;
    current_->fiber.exit();
  }

  int block_barrier(const CallSite& site, bool predicate) {
    Thread& self = *current_;
    self.state = State::at_block_barrier;
    self.site = site;
    votes_ += predicate;
    if (++at_barrier_ == size()) release_block();
    self.fiber.suspend();
    return static_cast<int>(self.result);
  }

  std::uint64_t warp_operation(const CallSite& site, WarpOperation operation, unsigned mask,
                               std::uint64_t value, int source_lane,
                               void (*collective)(void* const*) = nullptr) {
    Thread& self = *current_;
    self.state = State::at_warp_operation;
    self.site = site;
    self.operation = operation;
    self.mask = mask;
    self.value = value;
    self.source_lane = source_lane;
    self.collective = collective;
    unsigned& waiting = waiting_lanes_[self.warp()];
    waiting |= 1u << self.lane();
    if (!(mask >> self.lane() & 1)) fail(self, "the mask does not name the calling lane");
    if (mask & ~active_lanes(self.warp())) fail(self, "the mask names inactive lanes");
    if (operation == WarpOperation::shuffle && !(mask >> source_lane & 1))
      fail(self, "reads from an inactive lane");
    if ((waiting & mask) == mask) release_warp(self);
    self.fiber.suspend();
    return self.result;
  }

 private:
  int size() const { return static_cast<int>(threads_.size()); }

  void start_threads() {
    ready_.clear();
    waiting_lanes_.assign((threads_.size() + kWarpSize - 1) / kWarpSize, 0u);
    for (int i = 0; i < size(); ++i) {
      threads_[i].batches.clear();
      threads_[i].batch.clear();
      // Stacks are a power of two apart: without an offset all their tops would share a few cache sets.
      threads_[i].fiber.prepare(stacks_[i], kStackBytes - 128 * (i % 64), thread_entry);
      threads_[i].state = State::ready;
      ready_.push_back(&threads_[i]);
    }
    random().shuffle(ready_.data(), ready_.size());
  }

  void make_ready(Thread* const* released, std::size_t count) {
    ready_.insert(ready_.end(), released, released + count);
    random().shuffle(ready_.data() + ready_.size() - count, count);
  }

  void release_block() {
    for (const Thread& thread : threads_) {
      if (!same_site(thread.site, threads_[0].site)) report_divergence();
    }
    released_.clear();
    for (Thread& thread : threads_) {
      thread.state = State::ready;
      thread.result = votes_;
      released_.push_back(&thread);
    }
    at_barrier_ = 0;
    votes_ = 0;
    make_ready(released_.data(), released_.size());
  }

  // Called when all lanes that `self` names wait; does nothing while some of them wait for something else.
  void release_warp(const Thread& self) {
    Thread* const lanes = &threads_[self.warp() * kWarpSize];
    released_.clear();
    unsigned ballot = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(self.mask >> lane & 1)) continue;
      if (lanes[lane].mask != self.mask || !same_site(lanes[lane].site, self.site)) return;
      ballot |= static_cast<unsigned>(lanes[lane].value & 1) << lane;
      released_.push_back(&lanes[lane]);
    }
    if (self.operation == WarpOperation::collective) {
      void* operands[kWarpSize];
      for (int lane = 0; lane < kWarpSize; ++lane)
        operands[lane] = reinterpret_cast<void*>(lanes[lane].value);
      self.collective(operands);
    }
    for (Thread* thread : released_) {
      thread->state = State::ready;
      thread->result =
          thread->operation == WarpOperation::shuffle ? lanes[thread->source_lane].value : ballot;
    }
    waiting_lanes_[self.warp()] &= ~self.mask;
    make_ready(released_.data(), released_.size());
  }

  unsigned active_lanes(int warp) const {
    unsigned lanes = 0;
    for (int i = warp * kWarpSize; i < size() && i < (warp + 1) * kWarpSize; ++i) {
      if (threads_[i].state != State::exited) lanes |= 1u << threads_[i].lane();
    }
    return lanes;
  }

  [[noreturn]] void fail(const Thread& thread, const char* what) const {
    std::fprintf(stderr, "metafast emulator: %s at %s:%d: %s (block (%u, %u, %u), thread (%u, %u, %u))\n",
                 thread.site.operation, thread.site.file, thread.site.line, what, blockIdx.x, blockIdx.y,
                 blockIdx.z, thread.index.x, thread.index.y, thread.index.z);
    std::abort();
  }

  [[noreturn]] void report_divergence() const {
    std::fprintf(stderr, "metafast emulator: divergent barrier in block (%u, %u, %u): no thread can go on\n",
                 blockIdx.x, blockIdx.y, blockIdx.z);
    std::vector<std::pair<std::string, int>> places;
    for (const Thread& thread : threads_) {
      const std::string place = thread.state == State::exited
                                    ? "exited"
                                    : std::string("wait at ") + thread.site.operation + " " +
                                          thread.site.file + ":" + std::to_string(thread.site.line);
      auto found = places.begin();
      while (found != places.end() && found->first != place) ++found;
      if (found == places.end()) found = places.insert(found, {place, 0});
      ++found->second;
    }
    for (const auto& [place, count] : places)
      std::fprintf(stderr, "  %d of %d threads %s\n", count, size(), place.c_str());
    std::abort();
  }

  const Launch& launch_;
  std::vector<Thread>& threads_;
  Stacks& stacks_;
  void* shared_;
  Thread* current_ = nullptr;
  std::vector<Thread*> ready_;
  std::vector<Thread*> released_;
  std::vector<unsigned> waiting_lanes_;  // per warp
  int at_barrier_ = 0;
  int votes_ = 0;
  int exited_ = 0;
};

std::mutex one_launch_at_a_time;  // threadIdx and its like are global variables
Block* current_block = nullptr;

// Not instrumented: its frame is never left, and AddressSanitizer would hold its red zones against the next
// fiber here.
__attribute__((no_sanitize_address)) void thread_entry() { current_block->run_current_thread(); }

std::vector<Thread> make_threads(const unsigned (&block)[3]) {
  std::vector<Thread> threads(std::size_t{block[0]} * block[1] * block[2]);
  for (std::size_t i = 0; i < threads.size(); ++i) {
    threads[i].number = static_cast<int>(i);
    threads[i].index = {static_cast<unsigned>(i % block[0]), static_cast<unsigned>(i / block[0] % block[1]),
                        static_cast<unsigned>(i / block[0] / block[1])};
  }
  return threads;
}

}  // namespace

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  static Stacks stacks;
  std::vector<Thread> threads = make_threads(launch.block);
  const std::unique_ptr<void, decltype(&std::free)> shared(std::malloc(launch.shared_bytes), &std::free);

  std::vector<std::uint64_t> order(std::uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2]);
  std::iota(order.begin(), order.end(), std::uint64_t{0});
  random().shuffle(order.data(), order.size());

  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  for (const std::uint64_t number : order) {
    blockIdx = {static_cast<unsigned>(number % launch.grid[0]),
                static_cast<unsigned>(number / launch.grid[0] % launch.grid[1]),
                static_cast<unsigned>(number / launch.grid[0] / launch.grid[1])};
    Block block(launch, threads, stacks, shared.get());
    current_block = &block;
    block.run();
  }
  current_block = nullptr;
}

void* dynamic_shared() { return current_block->shared(); }

int current_lane() { return current_block->current().lane(); }

int block_barrier(CallSite site, bool predicate) { return current_block->block_barrier(site, predicate); }

void warp_barrier(CallSite site, unsigned mask) {
  current_block->warp_operation(site, WarpOperation::barrier, mask, 0, 0);
}

unsigned warp_ballot(CallSite site, unsigned mask, bool predicate) {
  return static_cast<unsigned>(
      current_block->warp_operation(site, WarpOperation::ballot, mask, predicate, 0));
}

std::uint64_t warp_shuffle(CallSite site, unsigned mask, std::uint64_t value, int source_lane) {
  return current_block->warp_operation(site, WarpOperation::shuffle, mask, value, source_lane);
}

void copy_async(void* shared, const void* global, std::size_t bytes, std::size_t zeros) {
  std::memset(shared, 0xff, bytes);
  current_block->current().batch.push_back({shared, global, bytes, zeros});
}

void commit_copies() {
  Thread& thread = current_block->current();
  thread.batches.push_back(std::exchange(thread.batch, {}));
}

void wait_for_copies(std::size_t batches_that_may_remain) {
  auto& batches = current_block->current().batches;
  for (; batches.size() > batches_that_may_remain; batches.pop_front()) {
    for (const Copy& copy : batches.front()) {
      if (copy.bytes > copy.zeros) std::memcpy(copy.shared, copy.global, copy.bytes - copy.zeros);
      std::memset(static_cast<char*>(copy.shared) + copy.bytes - copy.zeros, 0, copy.zeros);
    }
  }
}

void warp_collective(CallSite site, void* operands, void (*function)(void* const* operands)) {
  current_block->warp_operation(site, WarpOperation::collective, ~0u,
                                reinterpret_cast<std::uintptr_t>(operands), 0, function);
}

}  // namespace metafast::emulator

extern "C" __attribute__((visibility("default"))) void metafast_emulator_set_seed(std::uint64_t seed) {
  metafast::emulator::random() = metafast::emulator::Random(seed);
}
