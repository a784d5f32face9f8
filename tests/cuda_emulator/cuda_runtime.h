// The part of CUDA that metafast's kernels use, for the host compiler: a test-only stand-in for the toolkit's
// header of the same name. Put this directory first on the include path and a .cu file compiles unchanged as
// C++17.
//
// Not here on purpose: `__shared__`. A kernel's shared memory is one struct, obtained from shared_memory<T>()
// in csrc/common/cuda.h. GCC cannot collect the static variables of templates and of plain functions in one
// section ("section type conflict"), so the emulator could not refill them with NaN for each block; nor would
// AddressSanitizer see their bounds. Nor floating-point atomics: metafast's results do not depend on the
// order in which threads run. Nor float4 and its like: common/cuda.h has Vector<T, N>.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define METAFAST_CUDA_EMULATOR 1

// ---- language ----

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ use_shared_memory_of_common_cuda_h_instead_of___shared__

using std::max;
using std::min;

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

// ---- arithmetic that the C library lacks ----

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

// A load that goes past the multiprocessor's own cache: for what other blocks wrote.
template <typename T>
T __ldcg(const T* address) {
  return *address;
}

// Blocks run one after another here, threads one at a time.
template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_unsigned_v<T>, "integers alone: sums of floats would depend on the order");
  return std::exchange(*address, *address + value);
}
inline void __threadfence() {}

[[noreturn]] inline void __trap() { __builtin_trap(); }

// ---- barriers, votes and shuffles ----
// The default arguments say where the call stands, for the messages.

#define METAFAST_CALL_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(METAFAST_CALL_SITE) {
  metafast::emulator::block_barrier({"__syncthreads", file, line}, false);
}
inline int __syncthreads_count(int predicate, METAFAST_CALL_SITE) {
  return metafast::emulator::block_barrier({"__syncthreads_count", file, line}, predicate != 0);
}
inline int __syncthreads_or(int predicate, METAFAST_CALL_SITE) {
  return metafast::emulator::block_barrier({"__syncthreads_or", file, line}, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, METAFAST_CALL_SITE) {
  return metafast::emulator::block_barrier({"__syncthreads_and", file, line}, predicate == 0) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, METAFAST_CALL_SITE) {
  metafast::emulator::warp_barrier({"__syncwarp", file, line}, mask);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, METAFAST_CALL_SITE) {
  return metafast::emulator::warp_ballot({"__ballot_sync", file, line}, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, METAFAST_CALL_SITE) {
  return metafast::emulator::warp_ballot({"__any_sync", file, line}, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, METAFAST_CALL_SITE) {
  return metafast::emulator::warp_ballot({"__all_sync", file, line}, mask, predicate == 0) == 0;
}

namespace metafast::emulator {

template <typename T>
T shuffle(CallSite site, unsigned mask, T value, int source_lane) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(std::uint64_t), "shuffles take numbers");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_shuffle(site, mask, bits, source_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace metafast::emulator

// A source outside the calling lane's group of `width` lanes stands for the lane itself, as on the device.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, METAFAST_CALL_SITE) {
  const int first = metafast::emulator::current_lane() / width * width;
  const int source_lane = first + (source & (width - 1));
  return metafast::emulator::shuffle({"__shfl_sync", file, line}, mask, value, source_lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, METAFAST_CALL_SITE) {
  const int lane = metafast::emulator::current_lane();
  const int source_lane =
      lane % width + static_cast<int>(delta) < width ? lane + static_cast<int>(delta) : lane;
  return metafast::emulator::shuffle({"__shfl_down_sync", file, line}, mask, value, source_lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, METAFAST_CALL_SITE) {
  const int lane = metafast::emulator::current_lane();
  const int source_lane = lane % width >= static_cast<int>(delta) ? lane - static_cast<int>(delta) : lane;
  return metafast::emulator::shuffle({"__shfl_up_sync", file, line}, mask, value, source_lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, METAFAST_CALL_SITE) {
  const int lane = metafast::emulator::current_lane();
  const int source_lane = (lane ^ lane_mask) / width <= lane / width ? lane ^ lane_mask : lane;
  return metafast::emulator::shuffle({"__shfl_xor_sync", file, line}, mask, value, source_lane);
}

#undef METAFAST_CALL_SITE

// ---- runtime ----

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace metafast::emulator {

inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, std::size_t>
    shared_limits;  // of the kernels that asked for more than the default

inline cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// The limits are those of compute capability 8.0, the lowest that metafast is built for.
constexpr int kMaxSharedBytes = 163 << 10;
// Few, so that what the kernels do for more work than a device takes at once happens in small tests.
constexpr int kMultiprocessors = 3;

inline cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = shared_limits.find(kernel);
  if (config.dynamicSmemBytes > (limit == shared_limits.end() ? 48u << 10 : limit->second))
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

}  // namespace metafast::emulator

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaPeekAtLastError() { return metafast::emulator::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(metafast::emulator::last_error, cudaSuccess); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? metafast::emulator::kMultiprocessors
                                                       : metafast::emulator::kMaxSharedBytes;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > metafast::emulator::kMaxSharedBytes)
    return metafast::emulator::record(cudaErrorInvalidValue);
  metafast::emulator::shared_limits[reinterpret_cast<const void*>(kernel)] = static_cast<std::size_t>(bytes);
  return cudaSuccess;
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... arguments) {
  if (const cudaError_t error =
          metafast::emulator::check_launch(*config, reinterpret_cast<const void*>(kernel))) {
    return metafast::emulator::record(error);
  }
  auto call =
      std::make_pair(kernel, std::tuple<std::decay_t<Expected>...>(std::forward<Actual>(arguments)...));
  const auto run_thread = [](void* erased) {
    const auto& [function, values] = *static_cast<decltype(call)*>(erased);
    std::apply(function, values);
  };
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  metafast::emulator::run(
      {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config->dynamicSmemBytes, run_thread, &call});
  return cudaSuccess;
}
