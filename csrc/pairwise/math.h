// The formulas of the pairwise family, for one pair of features, one pair of rows, or one class probability.
// V is a scalar on CUDA and a SIMD vector on the CPU.
//
// A comparison of rows x and y is out = link(bias + sum_d w_d * value(x_d, y_d)). The derivatives of a term
// are stated without their common constant kDerivative, which kernels put into the per-pair factors: those
// are few.
#pragma once

#include <type_traits>

#include "common/math.h"

namespace metafast {

// ---- terms: value, its derivatives dx and dy, their changes ddx and ddy along a tangent (u, v) ----

// (x - y)^2
struct SquaredDifference {
  static constexpr bool kCurved = true;
  static constexpr int kDerivative = 2;
  template <typename V>
  static METAFAST_HD V value(V x, V y) {
    V d = x - y;
    return d * d;
  }
  template <typename V>
  static METAFAST_HD V dx(V x, V y) {
    return x - y;
  }
  template <typename V>
  static METAFAST_HD V dy(V x, V y) {
    return -(x - y);  // shares dx's subtraction
  }
  template <typename V>
  static METAFAST_HD V ddx(V, V, V u, V v) {
    return u - v;
  }
  template <typename V>
  static METAFAST_HD V ddy(V, V, V u, V v) {
    return v - u;
  }
};

// |x - y|; the derivative at 0 is 0, as torch's.
struct AbsoluteDifference {
  static constexpr bool kCurved = false;
  static constexpr int kDerivative = 1;
  template <typename V>
  static METAFAST_HD V value(V x, V y) {
    V d = x - y;
    if constexpr (std::is_floating_point_v<V>)
      return ::fabs(d);  // free on the GPU, a modifier of the addition
    return d < V{} ? -d : d;
  }
  template <typename V>
  static METAFAST_HD V dx(V x, V y) {
    V one = V{} + 1, d = x - y;
    return d > V{} ? one : (d < V{} ? -one : V{});
  }
  template <typename V>
  static METAFAST_HD V dy(V x, V y) {
    return dx(y, x);
  }
  template <typename V>
  static METAFAST_HD V ddx(V, V, V, V) {
    return V{};
  }
  template <typename V>
  static METAFAST_HD V ddy(V, V, V, V) {
    return V{};
  }
};

// -x y
struct NegativeProduct {
  static constexpr bool kCurved = true;
  static constexpr int kDerivative = 1;
  template <typename V>
  static METAFAST_HD V value(V x, V y) {
    return -(x * y);
  }
  template <typename V>
  static METAFAST_HD V dx(V, V y) {
    return -y;
  }
  template <typename V>
  static METAFAST_HD V dy(V x, V) {
    return -x;
  }
  template <typename V>
  static METAFAST_HD V ddx(V, V, V, V v) {
    return -v;
  }
  template <typename V>
  static METAFAST_HD V ddy(V, V, V u, V) {
    return -u;
  }
};

// relu(x + y); NaN stays NaN; the derivative at 0 is 0, as torch's.
struct ReluSum {
  static constexpr bool kCurved = false;
  static constexpr int kDerivative = 1;
  template <typename V>
  static METAFAST_HD V value(V x, V y) {
    V s = x + y;
    return s < V{} ? V{} : s;
  }
  template <typename V>
  static METAFAST_HD V dx(V x, V y) {
    V one = V{} + 1;
    return x + y > V{} ? one : V{};
  }
  template <typename V>
  static METAFAST_HD V dy(V x, V y) {
    return dx(x, y);
  }
  template <typename V>
  static METAFAST_HD V ddx(V, V, V, V) {
    return V{};
  }
  template <typename V>
  static METAFAST_HD V ddy(V, V, V, V) {
    return V{};
  }
};

// tanh(x + y)
struct TanhSum {
  static constexpr bool kCurved = true;
  static constexpr int kDerivative = 1;
  template <typename V>
  static METAFAST_HD V value(V x, V y) {
    return Math<V>::tanh(x + y);
  }
  template <typename V>
  static METAFAST_HD V dx(V x, V y) {
    V t = value(x, y);
    return 1 - t * t;
  }
  template <typename V>
  static METAFAST_HD V dy(V x, V y) {
    return dx(x, y);
  }
  template <typename V>
  static METAFAST_HD V ddx(V x, V y, V u, V v) {
    V t = value(x, y);
    return -2 * t * (1 - t * t) * (u + v);
  }
  template <typename V>
  static METAFAST_HD V ddy(V x, V y, V u, V v) {
    return ddx(x, y, u, v);
  }
};

// ---- links: out = forward(sum); derivatives as functions of `out` ----

struct IdentityLink {
  template <typename V>
  static METAFAST_HD V forward(V sum) {
    return sum;
  }
  template <typename V>
  static METAFAST_HD V first(V) {
    return V{} + 1;
  }
  template <typename V>
  static METAFAST_HD V second(V) {
    return V{};
  }
};

// sqrt; the derivatives at 0 are 0, so that coinciding points have no gradient instead of NaN.
struct RootLink {
  template <typename V>
  static METAFAST_HD V forward(V sum) {
    return Math<V>::sqrt(sum);
  }
  template <typename V>
  static METAFAST_HD V first(V out) {
    V safe = out > V{} ? out : V{} + 1;
    return out > V{} ? 1 / (2 * safe) : V{};
  }
  template <typename V>
  static METAFAST_HD V second(V out) {
    V f = first(out);
    return -2 * f * f * f;
  }
};

struct SigmoidLink {
  template <typename V>
  static METAFAST_HD V forward(V sum) {
    return 1 / (1 + Math<V>::exp(-sum));
  }
  template <typename V>
  static METAFAST_HD V first(V out) {
    return out * (1 - out);
  }
  template <typename V>
  static METAFAST_HD V second(V out) {
    return out * (1 - out) * (1 - 2 * out);
  }
};

// ---- metrics: a term and a link ----

struct SqEuclidean {
  using Term = SquaredDifference;
  using Link = IdentityLink;
  static constexpr bool kCosine = false;
};
struct Euclidean {
  using Term = SquaredDifference;
  using Link = RootLink;
  static constexpr bool kCosine = false;
};
struct CityBlock {
  using Term = AbsoluteDifference;
  using Link = IdentityLink;
  static constexpr bool kCosine = false;
};
struct Dot {
  using Term = NegativeProduct;
  using Link = IdentityLink;
  static constexpr bool kCosine = false;
};
struct RelationRelu {
  using Term = ReluSum;
  using Link = SigmoidLink;
  static constexpr bool kCosine = false;
};
struct RelationTanh {
  using Term = TanhSum;
  using Link = SigmoidLink;
  static constexpr bool kCosine = false;
};
// 1 + a b (-x.y) with a = 1/|x|, b = 1/|y|: its factor depends on the rows, so it is no link of the sum
// alone.
struct Cosine {
  using Term = NegativeProduct;
  using Link = IdentityLink;
  static constexpr bool kCosine = true;
};

// With r = -x.y, out = 1 + a b r. Kernels treat d out/dx = -(a b) y + (1 - out) a^2 x as the term's
// derivative with factor a b, plus a multiple of x itself. Below the norm kCosineEpsilon, a is constant:
// `slope` is then 0.
constexpr double kCosineEpsilon = 1e-8;

template <typename V>
struct InverseNorm {
  V inverse;  // a = 1 / max(|x|, epsilon)
  V slope;    // a^2, or 0 where the norm is clamped
};

template <typename V>
METAFAST_HD InverseNorm<V> inverse_norm(V sum_of_squares) {
  V epsilon = Math<V>::constant(kCosineEpsilon);
  V norm = Math<V>::sqrt(sum_of_squares);
  V inverse = 1 / (norm < epsilon ? epsilon : norm);
  return {inverse, norm < epsilon ? V{} : inverse * inverse};
}

// With tangents u of x and v of y, s = slope_x x.u, t = slope_y y.v and p = -(u.y + x.v), the tangent of r:
// the tangent of out.
template <typename V>
METAFAST_HD V cosine_tangent(V out, V ab, V p, V s, V t) {
  return ab * p + (1 - out) * (s + t);
}

// The gradient of g * tangent + e * out, with g and e held fixed, given that tangent. For one pair:
//   grad_x += ddx * (the term's ddx) + dx * (the term's dx) + rho_x u + sigma_x x        and likewise grad_y
template <typename V>
struct CosineSecond {
  V ddx, dx, rho_x, sigma_x, rho_y, sigma_y;
};

template <typename V>
METAFAST_HD CosineSecond<V> cosine_second(V g, V e, V out, V tangent, V ab, V s, V t, V slope_x, V slope_y) {
  V c = 1 - out;
  return {g * ab,          ab * (e - g * (s + t)),
          g * c * slope_x, slope_x * (e * c - g * (tangent + 2 * c * s)),
          g * c * slope_y, slope_y * (e * c - g * (tangent + 2 * c * t))};
}

// Of a squared distance |x|^2 - 2 x.y + |y|^2: how small a part of |x|^2 + |y|^2 it may be before the squares
// of the differences are summed instead.
constexpr double kCancelled = 1.0 / 32;

// ---- class probabilities ----

// log p(class) = log sum_{rows of the class} exp(logit) - log sum_{all rows} exp(logit). For one row with
// probability `all` among all rows and `own` among those of its class (1 for a prototype), with g the
// gradient of its class's log-probability and g_sum the sum of g over classes:

template <typename V>
METAFAST_HD V logit_gradient(V g, V own, V g_sum, V all) {
  return g * own - g_sum * all;
}

// Derivative of sum_rows h * logit_gradient with respect to the row's logit, h held fixed; `h_own` and
// `h_all` are the means of h under the class's and under all rows' probabilities.
template <typename V>
METAFAST_HD V logit_second(V g, V own, V g_sum, V all, V h, V h_own, V h_all) {
  return g * own * (h - h_own) - g_sum * all * (h - h_all);
}

}  // namespace metafast
