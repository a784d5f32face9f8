// The MLP of one task on the GPU: forward, backward, and both along a tangent of the parameters, which
// together give Hessian-vector products (Pearlmutter 1994). Part of cuda.cu.
#pragma once

#include "inner_loop/cuda_layout.h"
#include "inner_loop/cuda_product.h"
#include "inner_loop/math.h"

namespace metafast::cuda {
namespace {

// The support or the query examples of one task. Registers are few: what follows from the kernel's parameters
// is found anew wherever it is used.
template <typename T>
struct Batch {
  const InnerLoop<T>& p;
  const Layout<T>& at;
  int64_t task;
  bool of_query;
  T share;         // of an example in the task's mean, or, with weights, of its weight
  bool empty;      // no example counts: the mean is undefined
  bool has_grads;  // of x, y and weights, if they are wanted

  __device__ __forceinline__ int count() const {
    return static_cast<int>(of_query ? p.query.count : p.support.count);
  }
  // Of the task's first example in arrays of all tasks.
  __device__ __forceinline__ int64_t row() const { return task * count(); }
  // Of the batch's first among the task's examples: support, then query.
  __device__ __forceinline__ int first() const { return of_query ? static_cast<int>(p.support.count) : 0; }
  // Where [count, pitch[0]] lies in the task's memory: the inputs, or in dual form rows of X X^T.
  __device__ __forceinline__ int64_t x() const { return of_query ? at.query_x : at.support_x; }
  __device__ __forceinline__ const T* targets() const {  // [count, O]
    return (of_query ? p.query.y : p.support.y) + row() * at.width[p.mlp.layers];
  }
  __device__ __forceinline__ const int64_t* labels() const {
    return (of_query ? p.query.labels : p.support.labels) + row();
  }
  // [count, H], the dual form's X [W b]_0^T.
  __device__ __forceinline__ const T* start() const {
    return (of_query ? p.dual.query : p.dual.support) + row() * at.width[1];
  }
  __device__ __forceinline__ T share_of(int s) const {
    const T* const weights = of_query ? p.query.weights : p.support.weights;
    return weights == nullptr ? share : share * weights[row() + s];
  }
  // [count] or null. On the way back the gradients of shares, and in the end those of weights.
  __device__ __forceinline__ T* grad_weights() const {
    T* const all = of_query ? p.query.grad_weights : p.support.grad_weights;
    return has_grads && all != nullptr ? all + row() : nullptr;
  }
  __device__ __forceinline__ T* grad_x() const {  // [count, D] or null
    T* const all = of_query ? p.query.grad_x : p.support.grad_x;
    return has_grads && all != nullptr ? all + row() * at.width[0] : nullptr;
  }
  __device__ __forceinline__ T* grad_y() const {  // [count, O] or null
    T* const all = of_query ? p.query.grad_y : p.support.grad_y;
    return has_grads && all != nullptr ? all + row() * at.width[p.mlp.layers] : nullptr;
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
  using ActivationsAlong = Operand<T, true, true>;  // the inputs have no tangent
  using ActivationsAcross = Operand<T, false, true>;

  static constexpr bool kMayBeDual = std::is_same_v<Team, LargeBlockTeam>;
  __device__ __forceinline__ bool is_dual(int l) const { return kMayBeDual && l == 0 && at.dual; }
  __device__ __forceinline__ int pitch(int l) const { return static_cast<int>(at.pitch[l]); }

  // Activations l, and how far behind them their tangents begin; the inputs have none.
  __device__ __forceinline__ const T* activations(int l, const Batch<T>& batch) const {
    return home + (l == 0 ? batch.x() : at.out[l]);
  }
  __device__ __forceinline__ int64_t to_tangents(int l) const {
    return l == 0 ? 0 : at.out_tangent[l] - at.out[l];
  }

  template <bool kValue, bool kTangent, class A, class B, class Finish, class AnyConsumer>
  __device__ __forceinline__ void multiply(const A& a, const B& b, int rows, int cols, int inner,
                                           const Finish& finish, const AnyConsumer& consumer) const {
    Products::template multiply<Team, kValue, kTangent>(Factors<A, B>{a, b}, rows, cols, inner, stage, finish,
                                                        consumer);
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
    if (weight != T(0) && batch.grad_weights() != nullptr) {
      add_share_gradients<kTangent>(batch, weight);
      Team::sync();  // what it reads is overwritten
    }
    Team::for_each(batch.count(), outputs, [&](int s, int o) {
      const int64_t i = s * at.pitch[last] + o, target = static_cast<int64_t>(s) * outputs + o;
      const T z = home[at.out[last] + i], y = batch.targets()[target], share = batch.share_of(s);
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
      if (T* const grad_y = batch.grad_y()) grad_y[target] -= grad;  // the targets enter as -z
    });
    return loss;
  }

  // Of an example its squares times `weight`, or how they change along the tangent.
  template <bool kTangent>
  __device__ __forceinline__ void add_share_gradients(const Batch<T>& batch, T weight) const {
    const int last = mlp.layers, outputs = at.width[last];
    Team::for_each(batch.count(), [&](int64_t s) {
      const T* const z = home + at.out[last] + s * at.pitch[last];
      const T* const tangent = kTangent ? home + at.grad_tangent[last] + s * at.pitch[last] : nullptr;
      const T* const y = batch.targets() + s * outputs;
      T sum = 0;
#pragma unroll 1
      for (int o = 0; o < outputs; ++o) sum += (z[o] - y[o]) * (kTangent ? 2 * tangent[o] : z[o] - y[o]);
      if (batch.share_of(static_cast<int>(s)) != T(0)) batch.grad_weights()[s] += weight * sum;
    });
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
      const int64_t label = batch.labels()[s];
      const T share = label == kIgnoreLabel ? T(0) : batch.share_of(s);
      const bool valid = share != T(0);
      T top = z[0], others = 0, mean = 0;
#pragma unroll 1
      for (int o = lane; o < outputs; o += kWarpSize) top = z[o] > top ? z[o] : top;
      top = warp_max(top);
#pragma unroll 1
      for (int o = lane; o < outputs; o += kWarpSize) others += o == label ? T(0) : Math<T>::exp(z[o] - top);
      others = warp_sum(others);
      const T own = valid ? Math<T>::exp(z[label] - top) : T(0), scale = share / (own + others);
      const T own_tangent = kTangent && valid ? tangent[label] : T(0);
      if constexpr (kTangent) {
#pragma unroll 1
        for (int o = lane; o < outputs; o += kWarpSize) {
          mean += Math<T>::exp(z[o] - top) * (tangent[o] - own_tangent);
        }
        mean = warp_sum(mean) / (own + others);
      }
      if (lane == 0 && valid) {
        const T nll = L::nll(top - z[label], own, others);
        loss += share * nll;
        if (T* const grad_weights = batch.grad_weights(); grad_weights != nullptr && weight != T(0)) {
          grad_weights[s] += kTangent ? mean : weight * nll;  // `mean` is already beside the label's own
        }
      }
#pragma unroll 1
      for (int o = lane; o < outputs; o += kWarpSize) {
        const T e = Math<T>::exp(z[o] - top);
        grad[o] = valid ? weight * L::slope(e, T(o == label), others, scale) : T(0);
        if constexpr (kTangent) tangent[o] = valid ? scale * e * (tangent[o] - own_tangent - mean) : T(0);
      }
    }
    return loss;
  }

  // ---- passes ----

  // From the sums of a tile of layer l at theta, along the tangent u, to its outputs and to their tangents.
  template <bool kTangent, class AnySums, class RowAt, class ColAt>
  __device__ __forceinline__ void finish_layer(int l, const T* theta, const T* u, const Batch<T>& batch,
                                               AnySums& sums, const RowAt& row_at,
                                               const ColAt& col_at) const {
    constexpr int kRows = AnySums::Shape::kRows, kCols = AnySums::Shape::kCols;
    const int units = at.width[l + 1];
    if (is_dual(l)) {
#pragma unroll
      for (int i = 0; i < kRows * kCols; ++i) {
        const int s = row_at(i / kCols), o = col_at(i % kCols);
        if (s < batch.count() && o < units) {
          sums.value[i / kCols][i % kCols] += batch.start()[static_cast<int64_t>(s) * units + o];
        }
      }
    } else if (at.inner[l] < at.columns[l]) {  // the bias is still to come
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const int64_t bias = at.weights[l] + min(col_at(j), units - 1) * pitch(l) + at.width[l];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          sums.value[i][j] += theta[bias];
          if constexpr (kTangent) sums.tangent[i][j] += u[bias];
        }
      }
    }
    if (l + 1 == mlp.layers || mlp.activation != Activation::relu) return;
#pragma unroll
    for (int i = 0; i < kRows * kCols; ++i) {
      T& out = sums.value[i / kCols][i % kCols];
      out = Relu::value(out);
      if constexpr (kTangent) {
        T& tangent = sums.tangent[i / kCols][i % kCols];
        tangent = Relu::through(tangent, out);
      }
    }
  }

  // tanh takes too many instructions to have them in every tile: f(i) for every hidden unit of layer l and
  // example of the batch, at i in its activations.
  template <class F>
  __device__ __forceinline__ void for_tanh(int l, const Batch<T>& batch, const F& f) const {
    if (l == 0 || l == mlp.layers || mlp.activation != Activation::tanh) return;
    Team::for_each(batch.count(), at.width[l], [&](int s, int i) { f(s * pitch(l) + i); });
    Team::sync();
  }

  // The outputs of the batch.
  __device__ __forceinline__ void forward(const T* theta, const Batch<T>& batch) const {
    for (int l = 0; l < mlp.layers; ++l) {
      T* const out = home + at.out[l + 1];
      const int units = at.width[l + 1];
      // In dual form the parameters are zero behind the support.
      const int inner = is_dual(l) ? at.support : at.inner[l];
      multiply<true, false>(
          ActivationsAlong{activations(l, batch), 0, pitch(l)}, Along{theta + at.weights[l], 0, pitch(l)},
          batch.count(), units, inner,
          [&](auto& sums, const auto& row_at, const auto& col_at) {
            finish_layer<false>(l, theta, nullptr, batch, sums, row_at, col_at);
          },
          Writer{[&](int s, const auto& col_at, const auto& values, const auto&) {
            T* const to = out + s * pitch(l + 1);
            for_columns(col_at, units, values, [&](int, int o, T z) { to[o] = z; });
          }});
      Team::sync();
      for_tanh(l + 1, batch, [&](int i) { out[i] = Tanh::value(out[i]); });
    }
  }

  // After forward: a thread's part of the loss. With `differentiates` the gradient of `weight` times the
  // loss: consumer_of(l) takes elements (o, c), (o, c + 1), ... of the gradient of layer l, once that layer
  // has passed its gradient on: first load<kCount>(o, c) what they meet, then store(o, c, g, loaded), which
  // may overwrite the parameters. Some of the elements may be padding, with a gradient of 0.
  // consume_coordinates(g) takes that of a layer in dual form, the coordinates g [count, pitch(1)] of the
  // batch's examples.
  template <class ConsumerOf, class ConsumeCoordinates>
  __device__ __forceinline__ T backward(const T* theta, const Batch<T>& batch, T weight, bool differentiates,
                                        const ConsumerOf& consumer_of,
                                        const ConsumeCoordinates& consume_coordinates) const {
    const T loss = differentiate_loss<false>(batch, weight);
    Team::sync();
    if (!differentiates) return loss;
    for (int l = mlp.layers - 1; l >= 0; --l) {
      const T* const grad = home + at.grad[l + 1];
      const int inputs = at.width[l];
      if (l > 0 || batch.grad_x() != nullptr) {
        sync_before_gradient(l);
        multiply<true, false>(Along{grad, 0, pitch(l + 1)}, Across{theta + at.weights[l], 0, pitch(l)},
                              batch.count(), inputs, at.width[l + 1], AsItIs{},
                              Writer{[&](int s, const auto& col_at, const auto& values, const auto&) {
                                if (l == 0) {
                                  T* const to = batch.grad_x() + static_cast<int64_t>(s) * inputs;
                                  for_columns(col_at, inputs, values, [&](int, int i, T g) { to[i] += g; });
                                  return;
                                }
                                const T* const outs = home + at.out[l] + s * pitch(l);
                                T* const to = home + at.grad[l] + s * pitch(l);
                                const bool relu = mlp.activation == Activation::relu;
                                for_columns(col_at, inputs, values, [&](int, int i, T g) {
                                  to[i] = relu ? Relu::through(g, outs[i]) : g;
                                });
                              }});
        Team::sync();
        for_tanh(l, batch, [&](int i) {
          T& g = home[at.grad[l] + i];
          g = Tanh::through(g, home[at.out[l] + i]);
        });
      }
      if (is_dual(l)) {
        consume_coordinates(grad);
        continue;
      }
      const auto consumer = consumer_of(l);
      multiply<true, false>(
          Across{grad, 0, pitch(l + 1)}, ActivationsAcross{activations(l, batch), 0, pitch(l)},
          at.width[l + 1], at.columns[l], batch.count(), AsItIs{},
          Consumer{
              [&](int o, const auto& col_at) { return consumer.template load<kGradientCols>(o, col_at(0)); },
              [&](int o, const auto& col_at, const auto& values, const auto&, const auto& loaded) {
                consumer.store(o, col_at(0), values, loaded);
              }});
    }
    Team::sync();
    return loss;
  }

  // v += scale H u, H the Hessian of the loss at theta; u may be v. Gradients of the inputs and targets get
  // the derivative of <u, gradient of the loss>.
  __device__ __forceinline__ void add_hessian_product(const T* theta, const T* u, const Batch<T>& batch,
                                                      T scale, T* v) const {
    for (int l = 0; l < mlp.layers; ++l) {
      const bool last = l + 1 == mlp.layers;
      T* const out = home + at.out[l + 1];
      T* const out_tangent = home + (last ? at.grad_tangent[l + 1] : at.out_tangent[l + 1]);
      const int units = at.width[l + 1];
      multiply<true, true>(
          ActivationsAlong{activations(l, batch), to_tangents(l), pitch(l)},
          Along{theta + at.weights[l], u - theta, pitch(l)}, batch.count(), units, at.inner[l],
          [&](auto& sums, const auto& row_at, const auto& col_at) {
            finish_layer<true>(l, theta, u, batch, sums, row_at, col_at);
          },
          Writer{[&](int s, const auto& col_at, const auto& values, const auto& tangents) {
            const int row = s * pitch(l + 1);
            for_columns(col_at, units, values, [&](int j, int o, T z) {
              out[row + o] = z;
              out_tangent[row + o] = tangents[j];
            });
          }});
      Team::sync();
      for_tanh(l + 1, batch, [&](int i) {
        out[i] = Tanh::value(out[i]);
        out_tangent[i] = Tanh::through(out_tangent[i], out[i]);
      });
    }
    differentiate_loss<true>(batch, T(1));
    Team::sync();
    for (int l = mlp.layers - 1; l >= 0; --l) {
      const T* const grad = home + at.grad[l + 1];
      const int64_t to_tangent = at.grad_tangent[l + 1] - at.grad[l + 1];
      const int inputs = at.width[l];
      if (l > 0 || batch.grad_x() != nullptr) {
        sync_before_gradient(l);
        multiply<true, true>(
            Along{grad, to_tangent, pitch(l + 1)}, Across{theta + at.weights[l], u - theta, pitch(l)},
            batch.count(), inputs, at.width[l + 1], AsItIs{},
            Writer{[&](int s, const auto& col_at, const auto& values, const auto& tangents) {
              if (l == 0) {
                T* const to = batch.grad_x() + static_cast<int64_t>(s) * inputs;
                for_columns(col_at, inputs, tangents, [&](int, int i, T tangent) { to[i] += tangent; });
                return;
              }
              const int row = s * pitch(l);
              const T* const outs = home + at.out[l] + row;
              T *const to = home + at.grad[l] + row, *const to_tangents = home + at.grad_tangent[l] + row;
              const bool relu = mlp.activation == Activation::relu;
              for_columns(col_at, inputs, values, [&](int j, int i, T g) {
                to[i] = relu ? Relu::through(g, outs[i]) : g;
                to_tangents[i] = relu ? Relu::through(tangents[j], outs[i]) : tangents[j];
              });
            }});
        Team::sync();
        for_tanh(l, batch, [&](int i) {
          T &g = home[at.grad[l] + i], &tangent = home[at.grad_tangent[l] + i];
          const T out = home[at.out[l] + i], out_tangent = home[at.out_tangent[l] + i];
          tangent = Tanh::through(tangent, out) + g * Tanh::bend(out, out_tangent);
          g = Tanh::through(g, out);
        });
      }
      T* const to = v + at.weights[l];
      if (is_dual(l)) {
        Team::for_each(batch.count(), at.width[1], [&](int s, int o) {
          to[o * pitch(0) + batch.first() + s] += scale * grad[to_tangent + s * pitch(1) + o];
        });
        continue;
      }
      multiply<false, true>(
          Across{grad, to_tangent, pitch(l + 1)},
          ActivationsAcross{activations(l, batch), to_tangents(l), pitch(l)}, at.width[l + 1], at.columns[l],
          batch.count(), AsItIs{},
          Consumer{[&](int o, const auto& col_at) {
                     return load_row<kGradientCols>(to + (o * pitch(l) + col_at(0)));
                   },
                   [&](int o, const auto& col_at, const auto&, const auto& tangents, auto sums) {
#pragma unroll
                     for (int j = 0; j < kGradientCols; ++j) sums.values[j] += scale * tangents[j];
                     store_row(to + (o * pitch(l) + col_at(0)), sums);
                   }});
    }
    Team::sync();
  }

 private:
  // f(j, col_at(j), values[j]) for the columns within.
  template <class ColAt, int kCols, class F>
  static __device__ __forceinline__ void for_columns(const ColAt& col_at, int cols, const T (&values)[kCols],
                                                     const F& f) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      if (col_at(j) < cols) f(j, col_at(j), values[j]);
    }
  }

  // Where gradients of layer l's outputs take the place of what the layer behind still reads.
  __device__ __forceinline__ void sync_before_gradient(int l) const {
    if (l > 0 && at.grad[l] == at.out[l + 1]) Team::sync();
  }
};

}  // namespace

}  // namespace metafast::cuda
