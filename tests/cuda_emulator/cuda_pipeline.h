// Asynchronous copies into shared memory, for the emulator. They arrive as late as they may: what a thread
// copies holds NaN until that thread waits for it, so that a missing wait or barrier shows in the results.
#pragma once

#include <cstddef>

#include "emulator.h"

// The last `zeros` of the `bytes` are not read, but set to zero.
inline void __pipeline_memcpy_async(void* shared, const void* global, std::size_t bytes,
                                    std::size_t zeros = 0) {
  metafast::emulator::copy_async(shared, global, bytes, zeros);
}

// Ends a batch of copies; the next wait counts batches.
inline void __pipeline_commit() { metafast::emulator::commit_copies(); }

// Waits for all batches but the last `batches` ones.
inline void __pipeline_wait_prior(std::size_t batches) { metafast::emulator::wait_for_copies(batches); }
