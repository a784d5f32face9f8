// IEEE half precision for the emulator: storage and conversion, nothing else. Kernels accumulate in float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 0x1f;
  const int mantissa = h.bits & 0x3ff;
  float magnitude;
  if (exponent == 0x1f) {
    magnitude = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa | 0x400), exponent - 25);
  }
  return h.bits & 0x8000 ? -magnitude : magnitude;
}

// Rounds to nearest, ties to even.
inline __half __float2half(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  std::uint16_t bits;
  if (std::isnan(value)) {
    bits = 0x7fff;
  } else if (magnitude >= 65520.0f) {  // half-way between the largest half and what would be the next
    bits = 0x7c00;
  } else if (magnitude < 0x1p-14f) {  // subnormal: a multiple of 2^-24
    bits = static_cast<std::uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  } else {
    int exponent;
    const float fraction = std::frexp(magnitude, &exponent);  // in [0.5, 1)
    // A mantissa that rounds up to 2048 carries into the exponent, as it should.
    bits = static_cast<std::uint16_t>((exponent + 13) * 1024 +
                                      static_cast<int>(std::nearbyint(fraction * 2048)));
  }
  return {static_cast<std::uint16_t>(sign | bits)};
}
