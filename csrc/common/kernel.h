// How a kernel is declared. A kernel is one plain struct of pointers and sizes; every backend overloads
// one function on that struct, so op.cpp names a kernel by the struct it fills:
//
//   metafast::<isa>::run(params, begin, end)    CPU: work items [begin, end) of params.items(), no torch
//   metafast::cuda::launch(params, stream)      CUDA: the whole problem on the given stream, no torch
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to this; named here so that no CUDA header is needed

namespace metafast {

using Stream = CUstream_st*;

// The caller writes labels of this value where an example is to be left out (torch's ignore_index).
constexpr int64_t kIgnoreLabel = -100;

}  // namespace metafast

#define METAFAST_DECLARE_KERNEL(Params)                        \
  namespace baseline {                                         \
  template <typename T>                                        \
  void run(const Params<T>& params, int64_t begin, int64_t end); \
  }                                                            \
  namespace avx2 {                                             \
  template <typename T>                                        \
  void run(const Params<T>& params, int64_t begin, int64_t end); \
  }                                                            \
  namespace avx512 {                                           \
  template <typename T>                                        \
  void run(const Params<T>& params, int64_t begin, int64_t end); \
  }                                                            \
  namespace cuda {                                             \
  template <typename T>                                        \
  void launch(const Params<T>& params, Stream stream);         \
  }
