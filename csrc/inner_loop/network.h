// An MLP of one group of tasks, in the lanes of one layout (lanes.h): forward, backward, and both along a
// tangent of the parameters, which together give Hessian-vector products (Pearlmutter 1994).
//
// Layer l takes activations l to l + 1; activations 0 are the inputs, L the outputs. Arrays are [rows,
// features] of vectors; `R x` is the tangent of x.
#pragma once

#include "inner_loop/batch.h"
#include "inner_loop/gemm.h"
#include "inner_loop/math.h"
#include "inner_loop/parameters.h"

namespace metafast::METAFAST_ISA {

template <class F>
METAFAST_HD void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::relu:
      return f.template operator()<Relu>();
    case Activation::tanh:
      return f.template operator()<Tanh>();
    case Activation::none:
      return f.template operator()<Identity>();
  }
}

template <class F>
METAFAST_HD void with_loss(Loss loss, F&& f) {
  if (loss == Loss::mse) {
    f.template operator()<MeanSquaredError>();
  } else {
    f.template operator()<CrossEntropy>();
  }
}

template <class Layout, typename T>
class Network {
 public:
  Network(Arena<T>& arena, const Mlp<T>& mlp, const Parameters<Layout, T>& parameters, int64_t samples,
          bool tangents, bool input_gradients)
      : mlp_(mlp), parameters_(parameters) {
    const int64_t rows = div_up(samples, Layout::kSamples);
    for (int l = 0; l < layers(); ++l) {
      Layer& layer = layers_[l + 1];
      layer.pitch = width(l + 1) + (l + 1 < layers());
      layer.out = arena.take(rows * layer.pitch);
      layer.grad = arena.take(rows * width(l + 1));
      layer.out_tangent = arena.take_if(tangents && l + 1 < layers(), rows * layer.pitch);
      layer.grad_tangent = arena.take_if(tangents, rows * width(l + 1));
      layer.out_rows = layer.out;
      layer.tangent_rows = layer.out_tangent;
      if (l + 1 == layers()) continue;
      if (Layout::kSamples > 1) {
        layer.out_rows = arena.take(samples * cols(l + 1));
        layer.tangent_rows = arena.take_if(tangents, samples * cols(l + 1));
      }
      if (arena.counts()) continue;
      for (int64_t r = 0; r < rows; ++r) {  // the constant feature that meets the bias
        store(layer.out + (r * layer.pitch + width(l + 1)) * kLanes<T>, Vec<T>{} + 1);
        if (tangents) store(layer.out_tangent + (r * layer.pitch + width(l + 1)) * kLanes<T>, Vec<T>{});
      }
    }
    layers_[0].pitch = width(0) + 1;
    input_scratch_ = arena.take_if(input_gradients, rows * width(0));
  }

  void forward(const T* theta, const Batch<Layout, T>& batch) {
    layers_[0].out = batch.x;
    layers_[0].out_rows = batch.x_transposed;
    for (int l = 0; l < layers(); ++l) {
      const Layer in = layers_[l], layer = layers_[l + 1];
      const Factor<T> factor{layer_of(theta, l), in.out, in.pitch, width(l) + 1};
      multiply<Layout, 1>(&factor, forward_strides(l), batch.rows, width(l + 1), layer.out, layer.pitch);
      if (l + 1 == layers()) break;
      with_activation(mlp_.activation, [&]<class A>() {
        each(layer, l + 1, batch.rows,
             [&](int64_t out, int64_t) { store(layer.out + out, A::value(load(layer.out + out))); });
      });
      if (Layout::kSamples > 1) {
        transpose_samples(layer.out, layer.pitch, batch.samples, cols(l + 1), layer.out_rows);
      }
    }
  }

  // After forward: the loss in each lane.
  Vec<T> loss(const Batch<Layout, T>& batch) const {
    const Layer& last = layers_[layers()];
    Vec<T> sum{};
    with_loss(mlp_.loss, [&]<class L>() {
      for (int64_t r = 0; r < batch.rows; ++r) {
        sum += L::value(row(last.out, r, last.pitch), row(batch.y, r, last.pitch),
                        load(batch.share + r * kLanes<T>), batch.outputs);
      }
    });
    return sum + batch.undefined;
  }

  // After forward: the gradient of `weight` times the loss. consumer_of(l)(i, v) takes vector i of the
  // parameters, a part of layer l, once that layer has passed its gradient on: it may overwrite the
  // parameters.
  template <class Consumer>
  void backward(const T* theta, const Batch<Layout, T>& batch, Vec<T> weight, const Consumer& consumer_of) {
    loss_gradient(batch, weight);
    if (batch.grad_y != nullptr) {  // the targets enter mse as -z
      for (int64_t i = 0; i < batch.rows * batch.outputs; ++i) {
        subtract(batch.grad_y + i * kLanes<T>, load(layers_[layers()].grad + i * kLanes<T>));
      }
    }
    for (int l = layers() - 1; l >= 0; --l) {
      const Layer in = layers_[l], out = layers_[l + 1];
      const Factor<T> factor{layer_of(theta, l), out.grad, width(l + 1), width(l + 1)};
      if (l > 0) {
        multiply<Layout, 1>(&factor, backward_strides(l), batch.rows, width(l), in.grad, width(l));
        with_activation(mlp_.activation, [&]<class A>() {
          each(in, l, batch.rows, [&](int64_t a, int64_t g) {
            store(in.grad + g, load(in.grad + g) * A::slope(load(in.out + a)));
          });
        });
      } else if (batch.grad_x != nullptr) {
        add_input_gradient<1>(&factor, batch);
      }
      const OuterFactor<T> outer_factor{out.grad, in.out_rows};
      outer<Layout, 1>(&outer_factor, {width(l + 1), cols(l)}, batch.samples, width(l + 1), cols(l),
                       parameters_.offset(l), consumer_of(l));
    }
  }

  // consume(i, v) takes vector i of the Hessian of the loss times the tangent u of the parameters theta.
  // Gradients of the inputs and targets get the derivative of <u, gradient of the loss>.
  template <class Consume>
  void hessian_product(const T* theta, const T* u, const Batch<Layout, T>& batch, const Consume& consume) {
    forward(theta, batch);
    forward_tangent(theta, u, batch);
    loss_gradient(batch, Vec<T>{} + 1);
    loss_tangent(batch);
    for (int l = layers() - 1; l >= 0; --l) {
      const Layer in = layers_[l], out = layers_[l + 1];
      const Factor<T> factors[2] = {{layer_of(theta, l), out.grad_tangent, width(l + 1), width(l + 1)},
                                    {layer_of(u, l), out.grad, width(l + 1), width(l + 1)}};
      const OuterFactor<T> outer_factors[2] = {{out.grad_tangent, in.out_rows}, {out.grad, in.tangent_rows}};
      const OuterPitch pitch{width(l + 1), cols(l)};
      if (l == 0) {  // the inputs have no tangent
        if (batch.grad_x != nullptr) add_input_gradient<2>(factors, batch);
        outer<Layout, 1>(outer_factors, pitch, batch.samples, width(l + 1), cols(l), parameters_.offset(l),
                         consume);
        return;
      }
      multiply<Layout, 2>(factors, backward_strides(l), batch.rows, width(l), in.grad_tangent, width(l));
      const Factor<T> factor{layer_of(theta, l), out.grad, width(l + 1), width(l + 1)};
      multiply<Layout, 1>(&factor, backward_strides(l), batch.rows, width(l), in.grad, width(l));
      with_activation(mlp_.activation, [&]<class A>() {
        each(in, l, batch.rows, [&](int64_t a, int64_t g) {
          const Vec<T> out = load(in.out + a), slope = A::slope(out), grad = load(in.grad + g);
          Vec<T> tangent = load(in.grad_tangent + g) * slope;
          if constexpr (A::kCurved) tangent += grad * A::bend(out, load(in.out_tangent + a));
          store(in.grad_tangent + g, tangent);
          store(in.grad + g, grad * slope);
        });
      });
      outer<Layout, 2>(outer_factors, pitch, batch.samples, width(l + 1), cols(l), parameters_.offset(l),
                       consume);
    }
  }

 private:
  struct Layer {
    int64_t pitch;  // of out and out_tangent: a last feature of constant 1 (0) follows, but for the outputs
    T *out, *out_tangent;        // activations a and R a, [rows, pitch]
    T *out_rows, *tangent_rows;  // the same as the outer product reads them (lanes.h)
    T *grad, *grad_tangent;      // dloss/dz and its tangent, [rows, width]
  };

  static const Vec<T>* row(const T* array, int64_t r, int64_t pitch) {
    return reinterpret_cast<const Vec<T>*>(array + r * pitch * kLanes<T>);
  }
  static Vec<T>* row(T* array, int64_t r, int64_t pitch) {
    return reinterpret_cast<Vec<T>*>(array + r * pitch * kLanes<T>);
  }
  static void subtract(T* to, Vec<T> v) { store(to, load(to) - v); }

  int64_t width(int l) const { return mlp_.widths[l]; }
  int layers() const { return mlp_.layers; }
  int64_t cols(int l) const { return parameters_.cols(l); }
  const T* layer_of(const T* theta, int l) const { return theta + parameters_.offset(l) * kLanes<T>; }
  Strides forward_strides(int l) const { return {cols(l) * kLanes<T>, Layout::kTasks}; }
  Strides backward_strides(int l) const { return {Layout::kTasks, cols(l) * kLanes<T>}; }

  // f(offset in out, offset in grad) for every feature of activations l. Layers are copied where this runs:
  // behind a reference, the compiler would have to expect that f's stores change the pointers in them.
  template <class F>
  METAFAST_HD void each(const Layer layer, int l, int64_t rows, const F& f) const {
    const int64_t features = width(l);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t out = r * layer.pitch * kLanes<T>, grad = r * features * kLanes<T>;
      for (int64_t i = 0; i < features * kLanes<T>; i += kLanes<T>) f(out + i, grad + i);
    }
  }

  void forward_tangent(const T* theta, const T* u, const Batch<Layout, T>& batch) {
    for (int l = 0; l < layers(); ++l) {
      const Layer in = layers_[l], layer = layers_[l + 1];
      const bool last = l + 1 == layers();
      T* out = last ? layer.grad_tangent : layer.out_tangent;
      const Factor<T> factors[2] = {{layer_of(u, l), in.out, in.pitch, width(l) + 1},
                                    {layer_of(theta, l), in.out_tangent, in.pitch, width(l)}};
      if (l == 0) {
        multiply<Layout, 1>(factors, forward_strides(l), batch.rows, width(l + 1), out, layer.pitch);
      } else {
        multiply<Layout, 2>(factors, forward_strides(l), batch.rows, width(l + 1), out, layer.pitch);
      }
      if (last) break;
      with_activation(mlp_.activation, [&]<class A>() {
        each(layer, l + 1, batch.rows, [&](int64_t a, int64_t) {
          store(layer.out_tangent + a, load(layer.out_tangent + a) * A::slope(load(layer.out + a)));
        });
      });
      if (Layout::kSamples > 1) {
        transpose_samples(layer.out_tangent, layer.pitch, batch.samples, cols(l + 1), layer.tangent_rows);
      }
    }
  }

  void loss_gradient(const Batch<Layout, T>& batch, Vec<T> weight) {
    const Layer& last = layers_[layers()];
    with_loss(mlp_.loss, [&]<class L>() {
      for (int64_t r = 0; r < batch.rows; ++r) {
        Vec<T>* grad = row(last.grad, r, last.pitch);
        L::gradient(row(last.out, r, last.pitch), row(batch.y, r, last.pitch),
                    load(batch.share + r * kLanes<T>), batch.outputs, grad);
        for (int64_t o = 0; o < batch.outputs; ++o) grad[o] *= weight;
      }
    });
  }

  void loss_tangent(const Batch<Layout, T>& batch) {
    const Layer& last = layers_[layers()];
    with_loss(mlp_.loss, [&]<class L>() {
      for (int64_t r = 0; r < batch.rows; ++r) {
        L::tangent(row(last.out, r, last.pitch), load(batch.share + r * kLanes<T>), batch.outputs,
                   row(last.grad_tangent, r, last.pitch));
      }
    });
    if (batch.grad_y == nullptr) return;
    for (int64_t i = 0; i < batch.rows * batch.outputs; ++i) {
      subtract(batch.grad_y + i * kLanes<T>, load(last.grad_tangent + i * kLanes<T>));
    }
  }

  template <int kFactors>
  void add_input_gradient(const Factor<T>* factors, const Batch<Layout, T>& batch) {
    multiply<Layout, kFactors>(factors, backward_strides(0), batch.rows, width(0), input_scratch_, width(0));
    for (int64_t i = 0; i < batch.rows * width(0); ++i) {
      subtract(batch.grad_x + i * kLanes<T>, -load(input_scratch_ + i * kLanes<T>));
    }
  }

  const Mlp<T>& mlp_;
  const Parameters<Layout, T>& parameters_;
  Layer layers_[kMaxLayers + 1] = {};
  T* input_scratch_;
};

}  // namespace metafast::METAFAST_ISA
