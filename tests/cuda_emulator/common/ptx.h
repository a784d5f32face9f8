// csrc/common/ptx.h for the emulator: the same functions, in plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_runtime.h"

namespace metafast::cuda {

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

inline int fresh_thread_index() { return static_cast<int>(threadIdx.x); }

template <int N, typename T>
void copy_async_cached(T* shared, const T* global, bool inside) {
  emulator::copy_async(shared, global, N * sizeof(T), inside ? 0 : N * sizeof(T));
}

struct Tf32Pair {
  float high, low;
};

// A number as the tensor cores read it: the low 13 bits do not count.
inline float as_tf32(float x, std::uint32_t added = 0) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + added) & 0xffffe000u;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

inline Tf32Pair split_tf32(float x) {
  const float high = as_tf32(x, 0x1000);
  return {high, x - high};
}

// What a lane brings to a product, and takes from it.
struct Tf32Operands {
  float (*sums)[4];
  const Tf32Pair* a;
  const Tf32Pair* b;
};

// Tensor cores round a sum towards zero, or not much better.
inline float towards_zero(double x) {
  const float rounded = static_cast<float>(x);
  return std::fabs(rounded) > std::fabs(x) && std::isfinite(x) ? std::nextafter(rounded, 0.0f) : rounded;
}

inline float before_tf32(float x) { return x * (1 + 0.7f / (1 << 11)); }

// kProducts of the whole warp, whose lanes' operands lie as in csrc/common/ptx.h.
template <int kProducts>
void multiply_add_warp(void* const* lanes) {
  float a[2][16][8], b[2][8][8];  // high, low
  const auto of = [lanes](int lane) -> const Tf32Operands& {
    return *static_cast<const Tf32Operands*>(lanes[lane]);
  };
  for (int lane = 0; lane < warpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[0][g + i % 2 * 8][t + i / 2 * 4] = as_tf32(of(lane).a[i].high);
      a[1][g + i % 2 * 8][t + i / 2 * 4] = as_tf32(of(lane).a[i].low);
    }
    for (int i = 0; i < 2; ++i) {
      b[0][t + i * 4][g] = as_tf32(of(lane).b[i].high);
      b[1][t + i * 4][g] = as_tf32(of(lane).b[i].low);
    }
  }
  // Low times high, high times low, high times high; the last alone where that is all there is.
  constexpr int kParts[3][2] = {{1, 0}, {0, 1}, {0, 0}};
  for (int lane = 0; lane < warpSize; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float& result = (*of(lane).sums)[i];
      for (int part = 3 - kProducts; part < 3; ++part) {
        const auto& [of_a, of_b] = kParts[part];
        double sum = result;
        for (int k = 0; k < 8; ++k) sum += static_cast<double>(a[of_a][row][k]) * b[of_b][k][column];
        result = towards_zero(sum);
      }
    }
  }
}

inline void multiply_add(float (&sums)[4], const Tf32Pair (&a)[4], const Tf32Pair (&b)[2],
                         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Tf32Operands mine{&sums, a, b};
  emulator::warp_collective({"multiply_add", file, line}, &mine, multiply_add_warp<3>);
}

// Of numbers without a second part.
inline void multiply_add(float (&sums)[4], const float (&a)[4], const float (&b)[2],
                         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const Tf32Pair a_pairs[4] = {{a[0], 0}, {a[1], 0}, {a[2], 0}, {a[3], 0}},
                 b_pairs[2] = {{b[0], 0}, {b[1], 0}};
  Tf32Operands mine{&sums, a_pairs, b_pairs};
  emulator::warp_collective({"multiply_add", file, line}, &mine, multiply_add_warp<1>);
}

inline unsigned bfloat16_pair(float first, float second) {
  return __float2bfloat16(first).bits | unsigned{__float2bfloat16(second).bits} << 16;
}

struct Bfloat16Operands {
  float (*sums)[4];
  const unsigned *a, *b;
};

// As multiply_add_warp.
inline void multiply_add_bfloat16_warp(void* const* lanes) {
  float a[16][16], b[16][8];
  const auto of = [lanes](int lane) -> const Bfloat16Operands& {
    return *static_cast<const Bfloat16Operands*>(lanes[lane]);
  };
  const auto half = [](unsigned pair, int e) {
    return __bfloat162float({static_cast<std::uint16_t>(pair >> 16 * e)});
  };
  for (int lane = 0; lane < warpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = half(of(lane).a[i], e);
      for (int i = 0; i < 2; ++i) b[2 * t + i * 8 + e][g] = half(of(lane).b[i], e);
    }
  }
  for (int lane = 0; lane < warpSize; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float& result = (*of(lane).sums)[i];
      double sum = result;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      result = towards_zero(sum);
    }
  }
}

inline void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Bfloat16Operands mine{&sums, a, b};
  emulator::warp_collective({"multiply_add", file, line}, &mine, multiply_add_bfloat16_warp);
}

}  // namespace metafast::cuda
