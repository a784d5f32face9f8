// How a kernel is declared. A kernel is one plain struct of pointers and sizes; every backend overloads
// one function on that struct, so op.cpp names a kernel by the struct it fills:
//
//   metafast::<isa>::run(params, begin, end)    CPU: work items [begin, end) of params.items(), no torch
//   metafast::cuda::launch(params, stream)      CUDA: the whole problem on the given stream, no torch
#pragma once

#include <cstdint>

#include "common/isa.h"

struct CUstream_st;  // cudaStream_t is a pointer to this; named here so that no CUDA header is needed

namespace metafast {

using Stream = CUstream_st*;

// The caller writes labels of this value where an example is to be left out (torch's ignore_index).
constexpr int64_t kIgnoreLabel = -100;

}  // namespace metafast

#ifdef METAFAST_HAVE_AVX2
#define METAFAST_ON_ACTIVE_ISA(call) \
  switch (active_isa()) {            \
    case Isa::baseline:              \
      return baseline::call;         \
    case Isa::avx2:                  \
      return avx2::call;             \
    case Isa::avx512:                \
      return avx512::call;           \
  }
#else
#define METAFAST_ON_ACTIVE_ISA(call) baseline::call;
#endif

// For each kernel, besides these: run_on_isa and launch_cuda, which the generic code of dispatch.h finds by
// the struct.
#define METAFAST_DECLARE_KERNEL(Params)                                  \
  namespace baseline {                                                   \
  template <typename T>                                                  \
  void run(const Params<T>& params, int64_t begin, int64_t end);         \
  }                                                                      \
  namespace avx2 {                                                       \
  template <typename T>                                                  \
  void run(const Params<T>& params, int64_t begin, int64_t end);         \
  }                                                                      \
  namespace avx512 {                                                     \
  template <typename T>                                                  \
  void run(const Params<T>& params, int64_t begin, int64_t end);         \
  }                                                                      \
  namespace cuda {                                                       \
  template <typename T>                                                  \
  void launch(const Params<T>& params, Stream stream);                   \
  }                                                                      \
  template <typename T>                                                  \
  void run_on_isa(const Params<T>& params, int64_t begin, int64_t end) { \
    METAFAST_ON_ACTIVE_ISA(run(params, begin, end))                      \
  }                                                                      \
  template <typename T>                                                  \
  void launch_cuda(const Params<T>& params, Stream stream) {             \
    cuda::launch(params, stream);                                        \
  }
