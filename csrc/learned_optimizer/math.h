// The formulas of the learned optimizers, for scalars (CUDA) and vectors (CPU, a coordinate in each lane).
#pragma once

#include "common/math.h"

namespace metafast {

// On a GPU float's is within two units in the last place: the last half of them takes ten instructions more.
template <typename V, typename W>
METAFAST_HD V quotient(V x, W y) {
  return x / y;
}
METAFAST_HD float quotient(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

// The two inputs that stand for a gradient: log(|g|) / p and its sign where |g| >= exp(-p), else -1 and
// exp(p) g (Andrychowicz et al. 2016, appendix A). An infinite gradient counts as the largest finite number.
template <typename V>
struct LogSign {
  V size, sign;
};

template <typename V, typename T>
METAFAST_HD LogSign<V> log_sign(V g, T p, T exp_p, T largest) {
  using M = Math<V>;
  const V zero = M::constant(0), one = M::constant(1);
  V magnitude = g < zero ? -g : g;
  magnitude = magnitude > M::constant(largest) ? M::constant(largest) : magnitude;
  const V scaled = magnitude * exp_p;
  const auto is_small = scaled < one;  // false for NaN, which the logarithm passes on
  const V sign = g < zero ? -one : one;
  return {is_small ? -one : quotient(M::log(magnitude), p), is_small ? g * exp_p : sign};
}

// The gradient of <grad, log_sign(g)>. The sign, and the size of an infinite gradient, have none.
template <typename V, typename T>
METAFAST_HD V log_sign_backward(LogSign<V> grad, V g, T p, T exp_p, T largest) {
  using M = Math<V>;
  const V zero = M::constant(0);
  const V magnitude = g < zero ? -g : g;
  const V of_size = magnitude > M::constant(largest) ? zero : quotient(grad.size, g * p);
  return magnitude * exp_p < M::constant(1) ? grad.sign * exp_p : of_size;
}

// One unit of an LSTM layer behind its nonlinearities: c = f c_before + i g, h = o tanh(c).
template <typename V>
struct LstmGates {
  V i, f, g, o;
};

// The gradients of the gates before their nonlinearities, given those of h and c; `c_before` is the gradient
// that goes on to the step before.
template <typename V>
struct LstmGatesBackward {
  LstmGates<V> gates;
  V c_before;
};

template <typename V>
METAFAST_HD LstmGatesBackward<V> lstm_backward(V grad_h, V grad_c, LstmGates<V> gates, V c_before, V tanh_c) {
  const V one = Math<V>::constant(1);
  const V grad_o = grad_h * tanh_c * gates.o * (one - gates.o);
  const V total = grad_c + grad_h * gates.o * (one - tanh_c * tanh_c);
  const V grad_i = total * gates.g * gates.i * (one - gates.i);
  const V grad_f = total * c_before * gates.f * (one - gates.f);
  const V grad_g = total * gates.i * (one - gates.g * gates.g);
  return {{grad_i, grad_f, grad_g, grad_o}, total * gates.f};
}

}  // namespace metafast
