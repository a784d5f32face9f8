// What the emulated CUDA headers ask of the scheduler (emulator.cpp).
//
// Every CUDA thread is a fiber. It runs until it reaches a barrier, a shuffle or a vote, and goes on when all
// the threads that take part have arrived. Among the threads that can go on, a seed decides which one does.
// Blocks run one after another, in an order that the seed decides too.
#pragma once

#include <cstddef>
#include <cstdint>

namespace metafast::emulator {

struct CallSite {
  const char* operation;
  const char* file;
  int line;
};

struct Launch {
  unsigned grid[3];
  unsigned block[3];
  std::size_t shared_bytes;
  void (*run_thread)(void* kernel);  // runs the kernel's body for the current thread
  void* kernel;
};

void run(const Launch& launch);

// The block's dynamic shared memory: exactly the requested bytes, so that AddressSanitizer sees an overrun.
void* dynamic_shared();

// Waits for every thread of the block. Returns how many came with a true predicate.
int block_barrier(CallSite site, bool predicate);

// Each waits for the lanes in `mask`, which must all call the same operation at the same place with the same
// mask.
void warp_barrier(CallSite site, unsigned mask);
unsigned warp_ballot(CallSite site, unsigned mask, bool predicate);  // bit i: lane i's predicate
std::uint64_t warp_shuffle(CallSite site, unsigned mask, std::uint64_t value,
                           int source_lane);  // that lane's value

// All 32 lanes come together: `function` runs once, with what each of them has brought.
void warp_collective(CallSite site, void* operands, void (*function)(void* const* operands));

int current_lane();

// The thread's copies into shared memory, which arrive when it waits for them (cuda_pipeline.h).
void copy_async(void* shared, const void* global, std::size_t bytes, std::size_t zeros);
void commit_copies();
void wait_for_copies(std::size_t batches_that_may_remain);

}  // namespace metafast::emulator

// The seed of every schedule from here on. Before the first call it is METAFAST_EMULATOR_SEED, or 0.
extern "C" void metafast_emulator_set_seed(std::uint64_t seed);
