// The formulas of the inner loop: activations and losses with their first derivatives, and how these change
// along a tangent of the parameters, which is all that a Hessian-vector product needs. V is a scalar on CUDA
// and a SIMD vector on the CPU. `R z` is the derivative of z along the tangent (Pearlmutter 1994).
#pragma once

#include "common/math.h"

namespace metafast {

// ---- activations a = value(z), and as functions of a: g times their slope da/dz, as a gradient or tangent g
// goes through them, and the bend, how the slope changes along R z ----

// NaN stays NaN, on the way back too; the derivative at 0 is 0, as torch's.
struct Relu {
  static constexpr bool kCurved = false;
  template <typename V>
  static METAFAST_HD V value(V z) {
    return z < V{} ? V{} : z;
  }
  template <typename V>
  static METAFAST_HD V through(V g, V a) {
    return a <= V{} ? V{} : g;
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
  static METAFAST_HD V through(V g, V a) {
    return g * (1 - a * a);
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
  static METAFAST_HD V through(V g, V) {
    return g;
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
    return w != V{} ? w * sum : V{};
  }
  template <typename V>
  static METAFAST_HD void gradient(const V* z, const V* y, V w, int64_t outputs, V* grad) {
    for (int64_t o = 0; o < outputs; ++o) grad[o] = w != V{} ? 2 * w * (z[o] - y[o]) : V{};
  }
  // Overwrites the tangent of z by that of the gradient.
  template <typename V>
  static METAFAST_HD void tangent(const V*, const V*, V w, int64_t outputs, V* tangent) {
    for (int64_t o = 0; o < outputs; ++o) tangent[o] = w != V{} ? 2 * w * tangent[o] : V{};
  }
};

// y is one-hot. What a well classified example has left, a loss and a gradient near 0, is where cross entropy
// would cancel, as the difference of large logits or as 1 - softmax. So the exponentials e of the outputs,
// around the largest, are summed apart: `own`, of the label, and `others`; `scale` is w / (own + others).
struct CrossEntropy {
  // Of an example whose label's output is `gap` below the largest.
  template <typename V>
  static METAFAST_HD V nll(V gap, V own, V others) {
    return gap + Math<V>::log1p(own - 1 + others);
  }
  template <typename V>
  static METAFAST_HD V slope(V e, V is_own, V others, V scale) {
    return scale * (is_own > V{} ? -others : e);
  }
  template <typename V>
  static METAFAST_HD V largest(const V* z, int64_t outputs) {
    V top = z[0];
    for (int64_t o = 1; o < outputs; ++o) top = z[o] > top ? z[o] : top;
    return top;
  }
  template <typename V>
  static METAFAST_HD V value(const V* z, const V* y, V w, int64_t outputs) {
    const V top = largest(z, outputs);
    V label{}, own{}, others{};
    for (int64_t o = 0; o < outputs; ++o) {
      const V e = Math<V>::exp(z[o] - top);
      label = y[o] > V{} ? z[o] : label;
      own = y[o] > V{} ? e : own;
      others += y[o] > V{} ? V{} : e;
    }
    return w != V{} ? w * nll<V>(top - label, own, others) : V{};
  }
  template <typename V>
  static METAFAST_HD void gradient(const V* z, const V* y, V w, int64_t outputs, V* grad) {
    const V top = largest(z, outputs);
    V own{}, others{};
    for (int64_t o = 0; o < outputs; ++o) {
      const V e = grad[o] = Math<V>::exp(z[o] - top);
      own = y[o] > V{} ? e : own;
      others += y[o] > V{} ? V{} : e;
    }
    const V scale = w / (own + others);
    for (int64_t o = 0; o < outputs; ++o) grad[o] = w != V{} ? slope<V>(grad[o], y[o], others, scale) : V{};
  }
  template <typename V>
  static METAFAST_HD void tangent(const V* z, const V* y, V w, int64_t outputs, V* tangent) {
    const V top = largest(z, outputs);
    V sum{}, mean{}, label{};
    for (int64_t o = 0; o < outputs; ++o) label = y[o] > V{} ? tangent[o] : label;
    for (int64_t o = 0; o < outputs; ++o) {
      const V e = Math<V>::exp(z[o] - top);
      tangent[o] -= label;  // where nearly all weight is the label's, its own change would cancel in the mean
      sum += e;
      mean += e * tangent[o];
    }
    mean /= sum;
    for (int64_t o = 0; o < outputs; ++o) {
      tangent[o] = w != V{} ? w / sum * Math<V>::exp(z[o] - top) * (tangent[o] - mean) : V{};
    }
  }
};

}  // namespace metafast
