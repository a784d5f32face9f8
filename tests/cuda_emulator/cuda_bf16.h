// bfloat16 for the emulator: storage and conversion, nothing else. Kernels accumulate in float.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 b) {
  const std::uint32_t bits = std::uint32_t{b.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Rounds to nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16(float value) {
  if (value != value) return {0x7fff};
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
