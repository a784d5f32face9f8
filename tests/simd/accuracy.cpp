// Prints the largest error of exp, log, log1p and tanh of common/simd.h over the floats, in units in the last
// place of the C library's double result, the largest absolute error of an LSTM's nonlinearities, and whether
// special values and sum_lanes() come out right: "exp 0.9\nlog ...".
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "common/simd.h"
#include "learned_optimizer/nonlinear.h"

using metafast::Math;
using namespace metafast::METAFAST_ISA;
using V = Vec<float>;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

double error_in_ulp(float result, double exact) {
  const float rounded = static_cast<float>(exact);
  if (std::isinf(rounded) || std::isinf(result)) return rounded == result ? 0 : kInfinity;
  const float magnitude = std::fabs(rounded);
  if (magnitude < std::numeric_limits<float>::min()) {  // flushed to zero, or subnormal
    return std::fabs(result - exact) <= std::numeric_limits<float>::min() ? 0 : kInfinity;
  }
  return std::fabs(result - exact) / (std::nextafterf(magnitude, kInfinity) - magnitude);
}

template <class F, class G>
void report(const char* name, bool negative, F vector, G exact) {
  double worst = 0;
  V x{};
  int filled = 0;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 1009) {
    const uint32_t pattern = static_cast<uint32_t>(bits);
    float value;
    std::memcpy(&value, &pattern, sizeof value);
    if (std::isnan(value) || (!negative && std::signbit(value))) continue;
    x[filled++] = value;
    if (filled < kLanes<float>) continue;
    filled = 0;
    const V y = vector(x);
    for (int i = 0; i < kLanes<float>; ++i) worst = std::fmax(worst, error_in_ulp(y[i], exact(double{x[i]})));
  }
  std::printf("%s %g\n", name, worst);
}

V all(float x) { return V{} + x; }

template <class F, class G>
void report_absolute(const char* name, F vector, G exact) {
  double worst = 0;
  for (float x = -20; x <= 20; x += 1.0f / 4096)
    worst = std::fmax(worst, std::fabs(vector(all(x))[0] - exact(x)));
  std::printf("%s %g\n", name, worst);
}

// Saturated exactly, so that their slopes are 0 there; NaN passes.
bool saturates() {
  using N = Nonlinear<float>;
  return N::tanh(all(9))[0] == 1 && N::tanh(all(-kInfinity))[0] == -1 && N::sigmoid(all(18))[0] == 1 &&
         N::sigmoid(all(-18))[0] == 0 && std::isnan(N::tanh(all(std::nanf("")))[0]);
}

bool specials() {
  const float nan = std::nanf("");
  return Math<V>::exp(all(-kInfinity))[0] == 0 && Math<V>::exp(all(kInfinity))[0] == kInfinity &&
         Math<V>::exp(all(0))[0] == 1 && std::isnan(Math<V>::exp(all(nan))[0]) &&
         Math<V>::log(all(0))[0] == -kInfinity && Math<V>::log(all(kInfinity))[0] == kInfinity &&
         std::isnan(Math<V>::log(all(-1))[0]) && std::isnan(Math<V>::log(all(nan))[0]) &&
         std::isnan(Math<V>::log1p(all(nan))[0]) && Math<V>::tanh(all(kInfinity))[0] == 1 &&
         Math<V>::tanh(all(-kInfinity))[0] == -1 && std::isnan(Math<V>::tanh(all(nan))[0]);
}

template <typename T>
bool sums_lanes() {
  Vec<T> rows[kLanes<T>];
  T expected[kLanes<T>] = {};
  for (int i = 0; i < kLanes<T>; ++i) {
    for (int l = 0; l < kLanes<T>; ++l) expected[i] += rows[i][l] = 100 * i + l;
  }
  const Vec<T> sums = sum_lanes<T>(rows);
  for (int i = 0; i < kLanes<T>; ++i) {
    if (sums[i] != expected[i]) return false;
  }
  return true;
}

// Every length from one element to two vectors: what is read and written, and that nothing beyond is touched.
template <typename T>
bool loads_parts() {
  constexpr int kMost = 2 * kLanes<T>;
  for (int count = 1; count <= kMost; ++count) {
    T from[kMost + 1], to[kMost + 1];
    for (int i = 0; i <= kMost; ++i) {
      from[i] = i + 1;
      to[i] = -1;
    }
    for_vectors<T>(count, [&](auto at) { at.store(to, at.load(from) + at.load(from)); });
    for (int i = 0; i <= kMost; ++i) {
      if (to[i] != (i < count ? 2 * (i + 1) : -1)) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  report("exp", true, [](V x) { return Math<V>::exp(x); }, [](double x) { return std::exp(x); });
  report("log", false, [](V x) { return Math<V>::log(x); }, [](double x) { return std::log(x); });
  report("log1p", false, [](V x) { return Math<V>::log1p(x); }, [](double x) { return std::log1p(x); });
  report("tanh", true, [](V x) { return Math<V>::tanh(x); }, [](double x) { return std::tanh(x); });
  report_absolute("lstm_tanh", Nonlinear<float>::tanh, [](double x) { return std::tanh(x); });
  report_absolute("lstm_sigmoid", Nonlinear<float>::sigmoid, [](double x) { return 1 / (1 + std::exp(-x)); });
  std::printf("saturates %d\n", saturates());
  std::printf("specials %d\n", specials());
  std::printf("sums %d\n", sums_lanes<float>() && sums_lanes<double>());
  std::printf("parts %d\n", loads_parts<float>() && loads_parts<double>());
}
