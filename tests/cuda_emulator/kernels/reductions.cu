// Correct kernels: a schedule must not change what they compute.
#include "common/cuda.h"
#include "common/ptx.h"

namespace {

using metafast::cuda::launch_kernel;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / metafast::cuda::kWarpSize;

struct SumParams {
  const float* x;  // [blocks, n]
  float* out;      // [blocks]
  int n;
};

struct SumShared {
  float warps[kWarps];
  float tile[2][kThreads];
};

// Each block sums a row and, to make the barriers count, passes every number through shared memory and
// another thread.
__global__ void __launch_bounds__(kThreads) row_sum(SumParams p) {
  SumShared& shared = metafast::cuda::shared_memory<SumShared>();
  const float* row = p.x + static_cast<std::int64_t>(blockIdx.x) * p.n;
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int start = 0, step = 0; start < p.n; start += kThreads, ++step) {
    float (&tile)[kThreads] = shared.tile[step % 2];
    tile[thread] = start + thread < p.n ? row[start + thread] : 0.0f;
    __syncthreads();
    sum += tile[kThreads - 1 - thread];
  }
  const float total = metafast::cuda::block_sum(sum, shared.warps);
  if (thread == 0) p.out[blockIdx.x] = total;
}

struct ProductParams {
  const float *a, *b;  // [16, 8], [8, 8]
  float* out;          // [16, 8], to which their product is added
};

__global__ void __launch_bounds__(metafast::cuda::kWarpSize) tensor_core_product(ProductParams p) {
  using metafast::cuda::split_tf32;
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  metafast::cuda::Tf32Pair a[4], b[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = split_tf32(p.a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
    sums[i] = p.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  }
  for (int i = 0; i < 2; ++i) b[i] = split_tf32(p.b[(t + i * 4) * 8 + g]);
  metafast::cuda::multiply_add(sums, a, b);
  for (int i = 0; i < 4; ++i) p.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

struct ScanParams {
  const double* x;  // [n]
  double* out;      // [n], inclusive prefix sums within each warp
  int* positive;    // [n / 32], how many of the warp's are positive
};

__global__ void __launch_bounds__(kThreads) warp_scan(ScanParams p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int lane = i % metafast::cuda::kWarpSize;
  double sum = p.x[i];
  const unsigned positive = __ballot_sync(metafast::cuda::kFullWarp, sum > 0);
  for (unsigned delta = 1; delta < metafast::cuda::kWarpSize; delta *= 2) {
    const double other = __shfl_up_sync(metafast::cuda::kFullWarp, sum, delta);
    if (lane >= static_cast<int>(delta)) sum += other;
  }
  p.out[i] = sum;
  if (lane != 0) return;
  int count = 0;
  for (unsigned bits = positive; bits != 0; bits &= bits - 1) ++count;
  p.positive[i / metafast::cuda::kWarpSize] = count;
}

struct VoteParams {
  const int* x;  // [blocks, 128]
  int* out;      // [blocks, 3]: count, or, and of x > 0
};

__global__ void __launch_bounds__(kThreads) block_vote(VoteParams p) {
  const bool positive = p.x[blockIdx.x * kThreads + threadIdx.x] > 0;
  const int count = __syncthreads_count(positive);
  const int any = __syncthreads_or(positive);
  const int all = __syncthreads_and(positive);
  if (threadIdx.x != 0) return;
  p.out[blockIdx.x * 3] = count;
  p.out[blockIdx.x * 3 + 1] = any != 0;
  p.out[blockIdx.x * 3 + 2] = all != 0;
}

template <typename T>
struct ScaleParams {
  const T* x;  // [n]
  T* out;      // [n]
  std::int64_t n;
  float factor;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) scale(ScaleParams<T> p) {
  constexpr int N = metafast::cuda::kVectorLength<T>;
  const std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (i >= p.n) return;
  metafast::cuda::Vector<T, N> vector = metafast::cuda::load_vector<N>(p.x + i);
#pragma unroll
  for (T& value : vector.values) {
    metafast::cuda::from_accumulate(metafast::cuda::to_accumulate(value) * p.factor, value);
  }
  metafast::cuda::store_vector(p.out + i, vector);
}

template <typename T>
void launch_scale(const void* x, void* out, std::int64_t n, float factor) {
  const auto blocks =
      static_cast<unsigned>(metafast::cuda::div_up(n, kThreads * metafast::cuda::kVectorLength<T>));
  launch_kernel({"scale", blocks, kThreads, 0, nullptr}, scale<T>,
                ScaleParams<T>{static_cast<const T*>(x), static_cast<T*>(out), n, factor});
}

struct TransposeParams {
  const float* x;  // [128, 128]
  float* out;      // [128, 128]
};

struct TransposeShared {
  float tile[kThreads][kThreads + 1];  // 64.5 KiB: more than a kernel may use unasked
};

__global__ void __launch_bounds__(kThreads) transpose(TransposeParams p) {
  TransposeShared& shared = metafast::cuda::shared_memory<TransposeShared>();
  const int thread = static_cast<int>(threadIdx.x);
  for (int row = 0; row < kThreads; ++row) shared.tile[row][thread] = p.x[row * kThreads + thread];
  __syncthreads();
  for (int row = 0; row < kThreads; ++row) p.out[row * kThreads + thread] = shared.tile[thread][row];
}

struct GridSumParams {
  const float* x;               // [blocks, n]
  float* partial;               // [blocks]
  unsigned long long* counter;  // 0
  float* out;                   // [1]
  int n;
};

struct GridSumShared {
  float tile[2][kThreads];
  float warps[kWarps];
};

// Rows pass through shared memory in two buffers; the last block adds up what all have left. Numbers go
// through another thread, to make waits and barriers count.
__global__ void __launch_bounds__(kThreads) grid_sum(GridSumParams p) {
  GridSumShared& shared = metafast::cuda::shared_memory<GridSumShared>();
  const float* row = p.x + static_cast<std::int64_t>(blockIdx.x) * p.n;
  const int thread = static_cast<int>(threadIdx.x), steps = metafast::cuda::div_up(p.n, kThreads);
  const auto stage = [&](int step) {
    const int i = step * kThreads + thread;
    if (step < steps) metafast::cuda::copy_async<1>(&shared.tile[step % 2][thread], row + i, i < p.n);
    metafast::cuda::commit_copies();
  };
  float sum = 0;
  stage(0);
  for (int step = 0; step < steps; ++step) {
    stage(step + 1);
    metafast::cuda::wait_for_copies<1>();
    __syncthreads();
    sum += shared.tile[step % 2][kThreads - 1 - thread];
    __syncthreads();
  }
  sum = metafast::cuda::block_sum(sum, shared.warps);
  if (thread == 0) p.partial[blockIdx.x] = sum;
  if (!metafast::cuda::is_last_block(p.counter, gridDim.x)) return;
  sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) sum += __ldcg(p.partial + i);
  sum = metafast::cuda::block_sum(sum, shared.warps);
  if (thread == 0) *p.out = sum;
}

}  // namespace

extern "C" {

void run_row_sum(const float* x, float* out, int blocks, int n) {
  launch_kernel({"row_sum", static_cast<unsigned>(blocks), kThreads, sizeof(SumShared), nullptr}, row_sum,
                SumParams{x, out, n});
}

void run_grid_sum(const float* x, float* partial, unsigned long long* counter, float* out, int blocks,
                  int n) {
  launch_kernel({"grid_sum", static_cast<unsigned>(blocks), kThreads, sizeof(GridSumShared), nullptr},
                grid_sum, GridSumParams{x, partial, counter, out, n});
}

void run_warp_scan(const double* x, double* out, int* positive, int n) {
  launch_kernel({"warp_scan", static_cast<unsigned>(n / kThreads), kThreads, 0, nullptr}, warp_scan,
                ScanParams{x, out, positive});
}

void run_tensor_core_product(const float* a, const float* b, float* out) {
  launch_kernel({"tensor_core_product", 1, metafast::cuda::kWarpSize, 0, nullptr}, tensor_core_product,
                ProductParams{a, b, out});
}

void run_block_vote(const int* x, int* out, int blocks) {
  launch_kernel({"block_vote", static_cast<unsigned>(blocks), kThreads, 0, nullptr}, block_vote,
                VoteParams{x, out});
}

void run_scale_float(const void* x, void* out, std::int64_t n, float factor) {
  launch_scale<float>(x, out, n, factor);
}
void run_scale_half(const void* x, void* out, std::int64_t n, float factor) {
  launch_scale<__half>(x, out, n, factor);
}
void run_scale_bfloat16(const void* x, void* out, std::int64_t n, float factor) {
  launch_scale<__nv_bfloat16>(x, out, n, factor);
}

void run_transpose(const float* x, float* out) {
  launch_kernel({"transpose", 1, kThreads, sizeof(TransposeShared), nullptr}, transpose,
                TransposeParams{x, out});
}

// The error of a launch with too large a block, or "" if there was none.
const char* launch_too_large() {
  static std::string message;
  try {
    launch_kernel({"warp_scan", 1, 2048, 0, nullptr}, warp_scan, ScanParams{});
    message.clear();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  return message.c_str();
}
}
