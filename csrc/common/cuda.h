// What all CUDA kernels share: launch, shared memory, vector access, number conversion, reductions.
//
// House rules for kernels: plain CUDA C++, no torch; one plain struct and a stream per kernel; no
// floating-point atomics; no `__shared__` variables, but shared_memory<T>() as one struct, or as SharedArrays
// where sizes are known at launch alone; blocks of a multiple of 32 threads, none of which leaves before the
// last barrier or shuffle. Such kernels also run on the CPU: see tests/cuda_emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace metafast::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr std::size_t kDefaultSharedBytes = 48 << 10;  // a kernel must ask for more

template <typename A, typename B>
__host__ __device__ constexpr A div_up(A a, B b) {
  return static_cast<A>((a + b - 1) / b);
}

// ---- launch ----

struct Launch {
  const char* name;  // for the error
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes;
  cudaStream_t stream;
};

inline void check(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, so not to the next caller
  throw std::runtime_error(std::string("metafast: launch of CUDA kernel ") + kernel +
                           " failed: " + cudaGetErrorString(error));
}

// Runs kernel(params) on the stream. An empty grid is no work, not an error.
template <typename Params>
void launch_kernel(const Launch& where, void (*kernel)(Params), const Params& params) {
  if (where.grid.x == 0 || where.grid.y == 0 || where.grid.z == 0) return;
  if (where.shared_bytes > kDefaultSharedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(where.shared_bytes)),
          where.name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = where.grid;
  config.blockDim = where.block;
  config.dynamicSmemBytes = where.shared_bytes;
  config.stream = where.stream;
  check(cudaLaunchKernelEx(&config, kernel, params), where.name);
}

// A grid of any number of blocks; those whose block_index() is not below it have nothing to do.
inline dim3 grid_of(std::int64_t blocks) {
  constexpr std::int64_t kMaxX = 0x7fffffff;
  const std::int64_t x = blocks < kMaxX ? blocks : kMaxX;
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(x == 0 ? 0 : div_up(blocks, x)));
}

__device__ __forceinline__ std::int64_t block_index() {
  return static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
}

// ---- shared memory ----

// The block's shared memory as the struct that the kernel wants; launch it with shared_bytes = sizeof(T).
template <typename T>
__device__ __forceinline__ T& shared_memory() {
  static_assert(alignof(T) <= 16, "dynamic shared memory is aligned to 16 bytes");
#if defined(METAFAST_CUDA_EMULATOR)
  return *static_cast<T*>(emulator::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char metafast_shared_memory[];
  return *reinterpret_cast<T*>(metafast_shared_memory);
#endif
}

// Arrays one behind the other in shared memory, each aligned to 16 bytes, for sizes that are known at launch
// alone. With a null base it only counts the bytes.
struct SharedArrays {
  unsigned char* base;
  std::size_t bytes = 0;

  template <typename T>
  __host__ __device__ T* take(std::size_t count) {
    T* array = base == nullptr ? nullptr : reinterpret_cast<T*>(base + bytes);
    bytes += (count * sizeof(T) + 15) / 16 * 16;
    return array;
  }
};

// ---- the current device ----

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "(device attribute)");
  check(cudaDeviceGetAttribute(&value, attribute, device), "(device attribute)");
  return value;
}

// The most shared memory that a block can have.
inline std::size_t max_shared_bytes() {
  return static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// ---- numbers ----

// What sums of T are kept in.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

__device__ __forceinline__ float to_accumulate(float x) { return x; }
__device__ __forceinline__ double to_accumulate(double x) { return x; }
__device__ __forceinline__ float to_accumulate(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_accumulate(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_accumulate(float x, float& out) { out = x; }
__device__ __forceinline__ void from_accumulate(double x, double& out) { out = x; }
__device__ __forceinline__ void from_accumulate(float x, __half& out) { out = __float2half(x); }
__device__ __forceinline__ void from_accumulate(float x, __nv_bfloat16& out) { out = __float2bfloat16(x); }

// a / b for 0 <= a < 2^20, in four instructions: the quotient's error is below half of 1 / b.
__device__ __forceinline__ int small_quotient(int a, int b) {
  return static_cast<int>(__fdividef(static_cast<float>(a) + 0.5f, static_cast<float>(b)));
}

// ---- vector access ----

// N numbers that travel as one load or store of up to 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

template <typename T>
constexpr int kVectorLength = 16 / static_cast<int>(sizeof(T));

// Whether rows of `length` numbers, `stride` apart, can be read and written in vectors.
template <typename T>
bool is_vectorizable(const void* data, std::int64_t length, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && length % kVectorLength<T> == 0 &&
         stride % kVectorLength<T> == 0;
}

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T, N>*>(address);
}

template <int N, typename T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(address) = vector;
}

// ---- asynchronous copies into shared memory ----

// Begins to copy N numbers; where not `inside`, to set them to zero, and `global` is not read.
template <int N, typename T>
__device__ __forceinline__ void copy_async(T* shared, const T* global, bool inside) {
  __pipeline_memcpy_async(shared, global, N * sizeof(T), inside ? 0 : N * sizeof(T));
}

// The copies begun so far are one batch; wait_for_copies<n>() returns when all but the last n have arrived,
// for this thread: the others' arrive with a barrier behind it.
__device__ __forceinline__ void commit_copies() { __pipeline_commit(); }
template <int kRemaining>
__device__ __forceinline__ void wait_for_copies() {
  __pipeline_wait_prior(kRemaining);
}

// ---- the grid's last block ----

// Whether all other blocks of the grid have been here: this one then sees what they wrote before, through
// __ldcg. `counter` is 0 before the launch, and again behind it.
__device__ __forceinline__ bool is_last_block(unsigned long long* counter, std::int64_t blocks) {
  __threadfence();
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1ull) == static_cast<unsigned long long>(blocks - 1);
    if (last) *counter = 0;
  }
  last = __syncthreads_or(last);
  __threadfence();
  return last;
}

// ---- reductions: every thread gets the result, the same bits in every run ----

template <typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
  return warp_reduce(value, [](T a, T b) { return a > b ? a : b; });
}

// `scratch` lies in shared memory and may be used again at once.
template <typename T, int Warps, typename Combine>
__device__ __forceinline__ T block_reduce(T value, T (&scratch)[Warps], Combine combine) {
  value = warp_reduce(value, combine);
  __syncthreads();  // the readers of an earlier reduction are done
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < Warps; ++warp) value = combine(value, scratch[warp]);
  return value;
}

template <typename T, int Warps>
__device__ __forceinline__ T block_sum(T value, T (&scratch)[Warps]) {
  return block_reduce(value, scratch, [](T a, T b) { return a + b; });
}

template <typename T, int Warps>
__device__ __forceinline__ T block_max(T value, T (&scratch)[Warps]) {
  return block_reduce(value, scratch, [](T a, T b) { return a > b ? a : b; });
}

}  // namespace metafast::cuda

// Stops the kernel and makes the CUDA context report an assertion failure, in release builds too; assert() is
// gone there.
#define METAFAST_DEVICE_CHECK(condition, message)                           \
  do {                                                                      \
    if (!(condition)) __assert_fail(message, __FILE__, __LINE__, __func__); \
  } while (false)
