// The MLP of one task on the GPU: forward, backward, and both along a tangent of the parameters, which
// together give Hessian-vector products (Pearlmutter 1994). Part of cuda.cu.
#pragma once

#include "inner_loop/cuda_layout.h"
#include "inner_loop/cuda_product.h"
#include "inner_loop/math.h"

namespace metafast::cuda {
namespace {

template <class F>
__device__ __forceinline__ void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::relu:
      return f.template operator()<Relu>();
    case Activation::tanh:
      return f.template operator()<Tanh>();
    case Activation::none:
      return f.template operator()<Identity>();
  }
}

// The examples of one task. Addresses follow from the kernel's parameters where they are used: registers are
// few.
template <typename T>
struct Batch {
  const Examples<T>& from;
  int64_t row;     // of the task's first example in arrays of all tasks
  const T* x;      // [count, pitch[0]], in the task's memory: the inputs, or in dual form rows of X X^T
  const T* start;  // [T count, H], the dual form's X [W b]_0^T, or null
  int first;       // of the task's examples: support, then query
  T share;         // of an example in the task's mean
  bool empty;      // no example counts: the mean is undefined
  bool has_grads;  // of x and y, if they are wanted

  __device__ int count() const { return static_cast<int>(from.count); }
  __device__ int64_t label(int s) const { return from.labels[row + s]; }
  __device__ T* grad_x(int64_t features) const {
    return has_grads && from.grad_x != nullptr ? from.grad_x + row * features : nullptr;
  }
  __device__ T* grad_y(int64_t outputs) const {
    return has_grads && from.grad_y != nullptr ? from.grad_y + row * outputs : nullptr;
  }
};

// The threads of a team go through it together. Between two phases, of which one reads what the other wrote,
// they meet in Team::sync().
template <class Team, class Products, typename T>
struct Network {
  const Mlp<T>& mlp;
  const Layout<T>& at;
  T* home;   // the task's memory
  T* stage;  // scratch of Products

  using Along = Operand<T, true>;
  using Across = Operand<T, false>;

  static constexpr bool kMayBeDual = std::is_same_v<Team, LargeBlockTeam>;
  __device__ __forceinline__ bool is_dual(int l) const { return kMayBeDual && l == 0 && at.dual; }
  __device__ __forceinline__ const T* activations(int l, const Batch<T>& batch) const {
    return l == 0 ? batch.x : home + at.out[l];
  }
  __device__ __forceinline__ const T* tangents(int l) const {
    return l == 0 ? nullptr : home + at.out_tangent[l];  // the inputs have none
  }

  template <bool kValue, bool kTangent, class A, class B, class Finish, class Consume>
  __device__ __forceinline__ void multiply(const A& a, const B& b, int rows, int cols, int inner,
                                           const Finish& finish, const Consume& consume) const {
    Products::template multiply<Team, kValue, kTangent>(Factors<A, B>{a, b}, rows, cols, inner, stage, finish,
                                                        consume);
  }

  // ---- loss ----

  // After forward: the gradient by the outputs of `weight` times the loss, over their tangent that of the
  // gradient; the targets' gradient gets that of the last. Returns a thread's part of the loss.
  template <bool kTangent>
  __device__ __forceinline__ T differentiate_loss(const Batch<T>& batch, T weight) const {
    return mlp.loss == Loss::mse ? differentiate_mse<kTangent>(batch, weight)
                                 : differentiate_cross_entropy<kTangent>(batch, weight);
  }

  template <bool kTangent>
  __device__ __forceinline__ T differentiate_mse(const Batch<T>& batch, T weight) const {
    using L = MeanSquaredError;
    const int last = mlp.layers, outputs = at.width[last];
    T loss = 0;
    Team::for_each(batch.count(), outputs, [&](int s, int o) {
      const int64_t i = s * at.pitch[last] + o, target = static_cast<int64_t>(s) * outputs + o;
      const T z = home[at.out[last] + i], y = batch.from.y[batch.row * outputs + target], share = batch.share;
      loss += L::value(&z, &y, share, 1);
      T grad;
      L::gradient(&z, &y, share, 1, &grad);
      grad *= weight;
      home[at.grad[last] + i] = grad;
      if constexpr (kTangent) {
        grad = home[at.grad_tangent[last] + i];
        L::tangent(&z, &y, share, 1, &grad);
        home[at.grad_tangent[last] + i] = grad;
      }
      if (T* const grad_y = batch.grad_y(outputs)) grad_y[target] -= grad;  // the targets enter as -z
    });
    return loss;
  }

  // A warp to an example.
  template <bool kTangent>
  __device__ __forceinline__ T differentiate_cross_entropy(const Batch<T>& batch, T weight) const {
    using L = CrossEntropy;
    const int last = mlp.layers, outputs = at.width[last], lane = Team::lane();
    T loss = 0;
    for (int s = Team::warp(); s < batch.count(); s += Team::kWarps) {
      const T* z = home + at.out[last] + s * at.pitch[last];
      T* grad = home + at.grad[last] + s * at.pitch[last];
      T* tangent = kTangent ? home + at.grad_tangent[last] + s * at.pitch[last] : nullptr;
      const int64_t label = batch.label(s);
      const T share = label == kIgnoreLabel ? T(0) : batch.share;
      const bool valid = share > T(0);
      T top = z[0], others = 0, mean = 0;
      for (int o = lane; o < outputs; o += kWarpSize) top = z[o] > top ? z[o] : top;
      top = warp_max(top);
      for (int o = lane; o < outputs; o += kWarpSize) others += o == label ? T(0) : Math<T>::exp(z[o] - top);
      others = warp_sum(others);
      const T own = valid ? Math<T>::exp(z[label] - top) : T(0), scale = share / (own + others);
      const T own_tangent = kTangent && valid ? tangent[label] : T(0);
      if constexpr (kTangent) {
        for (int o = lane; o < outputs; o += kWarpSize) {
          mean += Math<T>::exp(z[o] - top) * (tangent[o] - own_tangent);
        }
        mean = warp_sum(mean) / (own + others);
      }
      if (lane == 0 && valid) loss += share * L::nll(top - z[label], own, others);
      for (int o = lane; o < outputs; o += kWarpSize) {
        const T e = Math<T>::exp(z[o] - top);
        grad[o] = valid ? weight * L::slope(e, T(o == label), others, scale) : T(0);
        if constexpr (kTangent) tangent[o] = valid ? scale * e * (tangent[o] - own_tangent - mean) : T(0);
      }
    }
    return loss;
  }

  // ---- passes ----

  // From the sums of a tile of layer l to its outputs, and to their tangents.
  template <bool kTangent, class RowAt, class ColAt>
  __device__ __forceinline__ void finish_layer(int l, const Batch<T>& batch, Sums<T>& sums,
                                               const RowAt& row_at, const ColAt& col_at) const {
    if (is_dual(l)) {
#pragma unroll
      for (int i = 0; i < kTile * kTile; ++i) {
        const int s = row_at(i / kTile), o = col_at(i % kTile);
        if (s < batch.count() && o < at.width[1]) {
          sums.value[i / kTile][i % kTile] += batch.start[(batch.row + s) * at.width[1] + o];
        }
      }
    }
    if (l + 1 == mlp.layers) return;
    with_activation(mlp.activation, [&]<class A>() {
#pragma unroll
      for (int i = 0; i < kTile * kTile; ++i) {
        T& out = sums.value[i / kTile][i % kTile];
        out = A::value(out);
        if constexpr (kTangent)
          sums.tangent[i / kTile][i % kTile] = A::through(sums.tangent[i / kTile][i % kTile], out);
      }
    });
  }

  // The outputs of the batch.
  __device__ __forceinline__ void forward(const T* theta, const Batch<T>& batch) const {
    for (int l = 0; l < mlp.layers; ++l) {
      T* const out = home + at.out[l + 1];
      multiply<true, false>(
          Along{activations(l, batch), nullptr, at.pitch[l]},
          Along{theta + at.weights[l], nullptr, at.pitch[l]}, batch.count(), at.width[l + 1], at.columns[l],
          [&](Sums<T>& sums, const auto& row_at, const auto& col_at) {
            finish_layer<false>(l, batch, sums, row_at, col_at);
          },
          [&](int s, int o, T z, T) { out[s * at.pitch[l + 1] + o] = z; });
      Team::sync();
    }
  }

  // After forward: a thread's part of the loss. With `differentiates` the gradient of `weight` times the
  // loss: consumer_of(l)(o, c, g) takes element (o, c) of the gradient of layer l, once that layer has passed
  // its gradient on; it may overwrite the parameters.
  template <class ConsumerOf>
  __device__ __forceinline__ T backward(const T* theta, const Batch<T>& batch, T weight, bool differentiates,
                                        const ConsumerOf& consumer_of) const {
    const T loss = differentiate_loss<false>(batch, weight);
    Team::sync();
    if (!differentiates) return loss;
    for (int l = mlp.layers - 1; l >= 0; --l) {
      const T* const grad = home + at.grad[l + 1];
      if (l > 0 || batch.grad_x(at.width[0]) != nullptr) {
        multiply<true, false>(Along{grad, nullptr, at.pitch[l + 1]},
                              Across{theta + at.weights[l], nullptr, at.pitch[l]}, batch.count(), at.width[l],
                              at.width[l + 1], AsItIs{}, [&](int s, int i, T g, T) {
                                if (l == 0) {
                                  batch.grad_x(at.width[0])[static_cast<int64_t>(s) * at.width[0] + i] += g;
                                  return;
                                }
                                const int64_t unit = s * at.pitch[l] + i;
                                const T out = home[at.out[l] + unit];
                                with_activation(mlp.activation, [&]<class A>() { g = A::through(g, out); });
                                home[at.grad[l] + unit] = g;
                              });
        Team::sync();
      }
      const auto consumer = consumer_of(l);
      if (is_dual(l)) {  // coordinates
        Team::for_each(batch.count(), at.width[1],
                       [&](int s, int o) { consumer(o, batch.first + s, grad[s * at.pitch[1] + o]); });
        continue;
      }
      multiply<true, false>(Across{grad, nullptr, at.pitch[l + 1]},
                            Across{activations(l, batch), nullptr, at.pitch[l]}, at.width[l + 1],
                            at.columns[l], batch.count(), AsItIs{},
                            [&](int o, int c, T g, T) { consumer(o, c, g); });
    }
    Team::sync();
    return loss;
  }

  // v += H u, H the Hessian of the loss at theta. Gradients of the inputs and targets get the derivative of
  // <u, gradient of the loss>.
  __device__ __forceinline__ void add_hessian_product(const T* theta, const T* u, const Batch<T>& batch,
                                                      T* v) const {
    for (int l = 0; l < mlp.layers; ++l) {
      const bool last = l + 1 == mlp.layers;
      T* const out = home + at.out[l + 1];
      T* const out_tangent = home + (last ? at.grad_tangent[l + 1] : at.out_tangent[l + 1]);
      multiply<true, true>(
          Along{activations(l, batch), tangents(l), at.pitch[l]},
          Along{theta + at.weights[l], u + at.weights[l], at.pitch[l]}, batch.count(), at.width[l + 1],
          at.columns[l],
          [&](Sums<T>& sums, const auto& row_at, const auto& col_at) {
            finish_layer<true>(l, batch, sums, row_at, col_at);
          },
          [&](int s, int o, T z, T tangent) {
            out[s * at.pitch[l + 1] + o] = z;
            out_tangent[s * at.pitch[l + 1] + o] = tangent;
          });
      Team::sync();
    }
    differentiate_loss<true>(batch, T(1));
    Team::sync();
    for (int l = mlp.layers - 1; l >= 0; --l) {
      const T *const grad = home + at.grad[l + 1], *const grad_tangent = home + at.grad_tangent[l + 1];
      if (l > 0 || batch.grad_x(at.width[0]) != nullptr) {
        multiply<true, true>(
            Along{grad, grad_tangent, at.pitch[l + 1]},
            Across{theta + at.weights[l], u + at.weights[l], at.pitch[l]}, batch.count(), at.width[l],
            at.width[l + 1], AsItIs{}, [&](int s, int i, T g, T tangent) {
              if (l == 0) {
                batch.grad_x(at.width[0])[static_cast<int64_t>(s) * at.width[0] + i] += tangent;
                return;
              }
              const int64_t unit = s * at.pitch[l] + i;
              const T out = home[at.out[l] + unit], out_tangent = home[at.out_tangent[l] + unit];
              with_activation(mlp.activation, [&]<class A>() {
                tangent = A::through(tangent, out);
                if constexpr (A::kCurved) tangent += g * A::bend(out, out_tangent);
                g = A::through(g, out);
              });
              home[at.grad[l] + unit] = g;
              home[at.grad_tangent[l] + unit] = tangent;
            });
        Team::sync();
      }
      T* const to = v + at.weights[l];
      if (is_dual(l)) {
        Team::for_each(batch.count(), at.width[1], [&](int s, int o) {
          to[o * at.pitch[0] + batch.first + s] += grad_tangent[s * at.pitch[1] + o];
        });
        continue;
      }
      multiply<false, true>(Across{grad, grad_tangent, at.pitch[l + 1]},
                            Across{activations(l, batch), tangents(l), at.pitch[l]}, at.width[l + 1],
                            at.columns[l], batch.count(), AsItIs{},
                            [&](int o, int c, T, T tangent) { to[o * at.pitch[l] + c] += tangent; });
    }
    Team::sync();
  }
};

}  // namespace

}  // namespace metafast::cuda
