// The formulas of the inner loop: activations and losses with their first derivatives, and how these change
// along a tangent of the parameters, which is all that a Hessian-vector product needs. V is a scalar on CUDA
// and a SIMD vector on the CPU. `R z` is the derivative of z along the tangent (Pearlmutter 1994).
#pragma once

#include "common/math.h"

namespace metafast {

// ---- activations a = value(z): slope da/dz and the bend d(slope)/dz * Rz, both as functions of a ----

// NaN stays NaN; the derivative at 0 is 0, as torch's.
struct Relu {
  static constexpr bool kCurved = false;
  template <typename V>
  static METAFAST_HD V value(V z) {
    return z < V{} ? V{} : z;
  }
  template <typename V>
  static METAFAST_HD V slope(V a) {
    V one = V{} + 1;
    return a > V{} ? one : V{};
  }
  template <typename V>
  static METAFAST_HD V bend(V, V) {
    return V{};
  }
};

struct Tanh {
  static constexpr bool kCurved = true;
  template <typename V>
  static METAFAST_HD V value(V z) {
    return Math<V>::tanh(z);
  }
  template <typename V>
  static METAFAST_HD V slope(V a) {
    return 1 - a * a;
  }
  template <typename V>
  static METAFAST_HD V bend(V a, V tangent_a) {
    return -2 * a * tangent_a;
  }
};

struct Identity {
  static constexpr bool kCurved = false;
  template <typename V>
  static METAFAST_HD V value(V z) {
    return z;
  }
  template <typename V>
  static METAFAST_HD V slope(V) {
    return V{} + 1;
  }
  template <typename V>
  static METAFAST_HD V bend(V, V) {
    return V{};
  }
};

// ---- losses of one example: outputs z [O], targets y [O], its share w of the task's mean; 0: left out ----
// Left out means that whatever it holds, NaN too, has no effect: hence ?: and no product with 0.

struct MeanSquaredError {
  template <typename V>
  static METAFAST_HD V value(const V* z, const V* y, V w, int64_t outputs) {
    V sum{};
    for (int64_t o = 0; o < outputs; ++o) sum += (z[o] - y[o]) * (z[o] - y[o]);
    return w > V{} ? w * sum : V{};
  }
  template <typename V>
  static METAFAST_HD void gradient(const V* z, const V* y, V w, int64_t outputs, V* grad) {
    for (int64_t o = 0; o < outputs; ++o) grad[o] = w > V{} ? 2 * w * (z[o] - y[o]) : V{};
  }
  // Overwrites the tangent of z by that of the gradient.
  template <typename V>
  static METAFAST_HD void tangent(const V*, V w, int64_t outputs, V* tangent) {
    for (int64_t o = 0; o < outputs; ++o) tangent[o] = w > V{} ? 2 * w * tangent[o] : V{};
  }
};

// y is one-hot. Of one output, from `all`, the log_sum_exp of z, and `mean`, that of the tangent of z weighed
// by softmax(z): slope() and curvature(), the gradient and its tangent.
struct CrossEntropy {
  template <typename V>
  static METAFAST_HD V slope(V z, V all, V y, V w) {
    return w > V{} ? w * (Math<V>::exp(z - all) - y) : V{};
  }
  template <typename V>
  static METAFAST_HD V curvature(V z, V all, V tangent, V mean, V w) {
    return w > V{} ? w * Math<V>::exp(z - all) * (tangent - mean) : V{};
  }
  template <typename V>
  static METAFAST_HD V log_sum_exp(const V* z, int64_t outputs) {
    V largest = z[0], sum{};
    for (int64_t o = 1; o < outputs; ++o) largest = z[o] > largest ? z[o] : largest;
    for (int64_t o = 0; o < outputs; ++o) sum += Math<V>::exp(z[o] - largest);
    return largest + Math<V>::log(sum);
  }
  template <typename V>
  static METAFAST_HD V value(const V* z, const V* y, V w, int64_t outputs) {
    V own{}, all = log_sum_exp(z, outputs);
    for (int64_t o = 0; o < outputs; ++o) own = y[o] > V{} ? z[o] : own;
    return w > V{} ? w * (all - own) : V{};
  }
  template <typename V>
  static METAFAST_HD void gradient(const V* z, const V* y, V w, int64_t outputs, V* grad) {
    const V all = log_sum_exp(z, outputs);
    for (int64_t o = 0; o < outputs; ++o) grad[o] = slope(z[o], all, y[o], w);
  }
  template <typename V>
  static METAFAST_HD void tangent(const V* z, V w, int64_t outputs, V* tangent) {
    const V all = log_sum_exp(z, outputs);
    V mean{};
    for (int64_t o = 0; o < outputs; ++o) mean += Math<V>::exp(z[o] - all) * tangent[o];
    for (int64_t o = 0; o < outputs; ++o) tangent[o] = curvature(z[o], all, tangent[o], mean, w);
  }
};

}  // namespace metafast
