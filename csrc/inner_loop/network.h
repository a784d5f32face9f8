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
      layer.pitch = Layout::row(width(l + 1) + (l + 1 < layers()));
      layer.grad_pitch = Layout::row(width(l + 1));
      layer.out = arena.take(rows * layer.pitch);
      layer.grad = arena.take(rows * layer.grad_pitch);
      layer.out_tangent = arena.take_if(tangents && l + 1 < layers(), rows * layer.pitch);
      layer.grad_tangent = arena.take_if(tangents, rows * layer.grad_pitch);
      layer.out_rows = layer.out;
      layer.tangent_rows = layer.out_tangent;
      if (Layout::kSamples > 1 && l + 1 < layers()) {
        layer.out_rows = arena.take(samples * cols(l + 1));
        layer.tangent_rows = arena.take_if(tangents, samples * cols(l + 1));
      }
      if (arena.counts()) continue;
      if (kPads) std::fill_n(layer.grad, rows * layer.grad_pitch * kLanes<T>, T(0));
      if (l + 1 == layers()) continue;
      std::fill_n(layer.out, rows * layer.pitch * kLanes<T>, T(0));   // also what pads the rows
      set_feature(layer.out, layer.pitch, rows, width(l + 1), T(1));  // meets the bias
      if (tangents) std::fill_n(layer.out_tangent, rows * layer.pitch * kLanes<T>, T(0));
    }
    layers_[0].pitch = Layout::row(width(0) + 1);
    input_scratch_ = arena.take_if(input_gradients, rows * Layout::row(width(0)));
  }

  void forward(const T* theta, const Batch<Layout, T>& batch) {
    layers_[0].out = batch.x;
    layers_[0].out_rows = batch.x_transposed;
    for (int l = 0; l < layers(); ++l) {
      const Layer in = layers_[l], layer = layers_[l + 1];
      if (is_dual(l, batch)) {
        dual_product(theta, batch.dual.support, batch, layer.out, layer.pitch);
        each(layer, l + 1, batch.rows, [&](int64_t a, int64_t g) {
          store(layer.out + a, load(layer.out + a) + load(batch.dual.start + g));
        });
      } else {
        const Factor<T> factor{layer_of(theta, l), in.out, in.pitch, Layout::row(width(l) + 1)};
        apply<1>(&factor, l, batch, layer.out, layer.pitch);
      }
      if (l + 1 == layers()) break;
      with_activation(mlp_.activation, [&]<class A>() {
        each(layer, l + 1, batch.rows,
             [&](int64_t out, int64_t) { store(layer.out + out, A::value(load(layer.out + out))); });
      });
      if (kPads) set_feature(layer.out, layer.pitch, batch.rows, width(l + 1), T(1));
      if (Layout::kSamples > 1) {
        transpose_samples(layer.out, layer.pitch, batch.samples, cols(l + 1), layer.out_rows);
      }
    }
  }

  // After forward: the loss in each lane.
  Vec<T> loss(const Batch<Layout, T>& batch) const {
    const Layer& last = layers_[layers()];
    Number sum{};
    with_loss(mlp_.loss, [&]<class L>() {
      for (int64_t r = 0; r < batch.rows; ++r) {
        sum += L::value(row(last.out, r, last.pitch), row(batch.y, r, last.pitch), *row(batch.share, r, 1),
                        batch.outputs);
      }
    });
    return Layout::lanes(sum) + batch.undefined;
  }

  // After forward: the gradient of `weight` times the loss. consumer_of(l)(i, v) takes vector i of the
  // parameters, a part of layer l, once that layer has passed its gradient on: it may overwrite the
  // parameters. Of a dual layer these are coordinates.
  template <class Consumer>
  void backward(const T* theta, const Batch<Layout, T>& batch, Vec<T> weight, const Consumer& consumer_of) {
    loss_gradient(batch, weight);
    if (batch.grad_y != nullptr) {  // the targets enter mse as -z
      for (int64_t i = 0; i < batch.rows * batch.out_pitch; ++i) {
        subtract(batch.grad_y + i * kLanes<T>, load(layers_[layers()].grad + i * kLanes<T>));
      }
    }
    for (int l = layers() - 1; l >= 0; --l) {
      const Layer in = layers_[l], out = layers_[l + 1];
      if (is_dual(l, batch)) {
        dual_gradient(out.grad, batch, consumer_of(l));
        return;
      }
      const Factor<T> factor{layer_of(theta, l), out.grad, out.grad_pitch, width(l + 1)};
      if (l > 0) {
        apply_transposed<1>(&factor, l, batch, in.grad);
        with_activation(mlp_.activation, [&]<class A>() {
          each(in, l, batch.rows, [&](int64_t a, int64_t g) {
            store(in.grad + g, load(in.grad + g) * A::slope(load(in.out + a)));
          });
        });
        clear_padding(in.grad, l, batch.rows);
      } else if (batch.grad_x != nullptr) {
        add_input_gradient<1>(&factor, batch);
      }
      const OuterFactor<T> outer_factor{out.grad, in.out_rows};
      outer<Layout, 1>(&outer_factor, {out.grad_pitch, cols(l)}, batch.samples, width(l + 1), cols(l),
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
      if (is_dual(l, batch)) {
        dual_gradient(out.grad_tangent, batch, consume);
        return;
      }
      const Factor<T> factors[2] = {{layer_of(theta, l), out.grad_tangent, out.grad_pitch, width(l + 1)},
                                    {layer_of(u, l), out.grad, out.grad_pitch, width(l + 1)}};
      const OuterFactor<T> outer_factors[2] = {{out.grad_tangent, in.out_rows}, {out.grad, in.tangent_rows}};
      const OuterPitch pitch{out.grad_pitch, cols(l)};
      if (l == 0) {  // the inputs have no tangent
        if (batch.grad_x != nullptr) add_input_gradient<2>(factors, batch);
        outer<Layout, 1>(outer_factors, pitch, batch.samples, width(l + 1), cols(l), parameters_.offset(l),
                         consume);
        return;
      }
      apply_transposed<2>(factors, l, batch, in.grad_tangent);
      const Factor<T> factor{layer_of(theta, l), out.grad, out.grad_pitch, width(l + 1)};
      apply_transposed<1>(&factor, l, batch, in.grad);
      with_activation(mlp_.activation, [&]<class A>() {
        each(in, l, batch.rows, [&](int64_t a, int64_t g) {
          const Vec<T> out = load(in.out + a), slope = A::slope(out), grad = load(in.grad + g);
          Vec<T> tangent = load(in.grad_tangent + g) * slope;
          if constexpr (A::kCurved) tangent += grad * A::bend(out, load(in.out_tangent + a));
          store(in.grad_tangent + g, tangent);
          store(in.grad + g, grad * slope);
        });
      });
      clear_padding(in.grad, l, batch.rows);
      clear_padding(in.grad_tangent, l, batch.rows);
      outer<Layout, 2>(outer_factors, pitch, batch.samples, width(l + 1), cols(l), parameters_.offset(l),
                       consume);
    }
  }

  // Number o of row r of out [rows, H] = the inner product of example r of the batch with row o of what `u`
  // holds of the dual layer: coordinates of the first `examples` of the task. `pitch` is that of out.
  void dual_product(const T* u, int64_t examples, const Batch<Layout, T>& batch, T* out,
                    int64_t pitch) const {
    const Factor<T> factor{u + parameters_.offset(0) * kLanes<T>, batch.dual.gram, batch.dual.pitch,
                           examples};
    multiply<Layout, 1>(&factor, {kLanes<T>, cols(0) * kLanes<T>}, batch.rows, cols(0), out, pitch);
  }

 private:
  using Number = typename Layout::Number;
  static constexpr bool kPads = kStep<Layout, T> == 1;  // rows of activations, to whole vectors

  struct Layer {
    int64_t pitch, grad_pitch;   // of out and out_tangent: a last feature of constant 1 (0) follows, but for
                                 // the outputs; of grad and grad_tangent
    T *out, *out_tangent;        // activations a and R a, [rows, pitch]
    T *out_rows, *tangent_rows;  // the same as the outer product reads them (lanes.h)
    T *grad, *grad_tangent;      // dloss/dz and its tangent, [rows, width]
  };

  static const Number* row(const T* array, int64_t r, int64_t pitch) {
    return reinterpret_cast<const Number*>(array + r * pitch * kLanes<T>);
  }
  static Number* row(T* array, int64_t r, int64_t pitch) {
    return reinterpret_cast<Number*>(array + r * pitch * kLanes<T>);
  }
  static void subtract(T* to, Vec<T> v) { store(to, load(to) - v); }

  int64_t width(int l) const { return mlp_.widths[l]; }
  int layers() const { return mlp_.layers; }
  int64_t cols(int l) const { return parameters_.cols(l); }
  const T* layer_of(const T* theta, int l) const { return theta + parameters_.offset(l) * kLanes<T>; }
  static bool is_dual(int l, const Batch<Layout, T>& batch) {
    return kPads && l == 0 && batch.dual.start != nullptr;
  }

  // ---- products with the parameters of layer l ----

  // out [rows, pitch], the outputs of the layer, from its inputs.
  template <int kFactors>
  void apply(const Factor<T>* factors, int l, const Batch<Layout, T>& batch, T* out, int64_t pitch) const {
    if constexpr (kPads) {
      dots<kFactors>(factors, batch.rows, width(l + 1), out, pitch);
    } else {
      multiply<Layout, kFactors>(factors, {cols(l) * kLanes<T>, Layout::kTasks}, batch.rows, width(l + 1),
                                 out, pitch);
    }
  }

  // grad [rows, features], of its inputs, from that of its outputs. It leaves anything in the padding.
  template <int kFactors>
  void apply_transposed(const Factor<T>* factors, int l, const Batch<Layout, T>& batch, T* grad) const {
    const int64_t pitch = Layout::row(width(l));
    const Strides strides{kPads ? kLanes<T> : Layout::kTasks, cols(l) * kLanes<T>};
    multiply<Layout, kFactors>(factors, strides, batch.rows, pitch, grad, pitch);
  }

  template <class Consume>
  void dual_gradient(const T* grad, const Batch<Layout, T>& batch, const Consume& consume) const {
    const int64_t first = parameters_.offset(0) + batch.dual.first * cols(0);
    for (int64_t i = 0; i < batch.rows * cols(0); ++i) consume(first + i, load(grad + i * kLanes<T>));
  }

  // ---- rows of activations ----

  // Number i of each row.
  static void set_feature(T* array, int64_t pitch, int64_t rows, int64_t i, T value) {
    for (int64_t r = 0; r < rows; ++r) {
      std::fill_n(array + lane_offset<Layout, T>(r, pitch, i, 0), kStep<Layout, T>, value);
    }
  }

  // The product with the transposed parameters left the bias' own there.
  void clear_padding(T* grad, int l, int64_t rows) const {
    const int64_t pitch = Layout::row(width(l));
    if (kPads && width(l) < pitch * kLanes<T>) set_feature(grad, pitch, rows, width(l), T(0));
  }

  // f(offset in out, offset in grad) for every feature of activations l. Layers are copied where this runs:
  // behind a reference, the compiler would have to expect that f's stores change the pointers in them.
  template <class F>
  METAFAST_HD void each(const Layer layer, int l, int64_t rows, const F& f) const {
    const int64_t vectors = Layout::row(width(l));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t out = r * layer.pitch * kLanes<T>, grad = r * vectors * kLanes<T>;
      for (int64_t i = 0; i < vectors * kLanes<T>; i += kLanes<T>) f(out + i, grad + i);
    }
  }

  void forward_tangent(const T* theta, const T* u, const Batch<Layout, T>& batch) {
    for (int l = 0; l < layers(); ++l) {
      const Layer in = layers_[l], layer = layers_[l + 1];
      const bool last = l + 1 == layers();
      T* out = last ? layer.grad_tangent : layer.out_tangent;
      const Factor<T> factors[2] = {{layer_of(u, l), in.out, in.pitch, Layout::row(width(l) + 1)},
                                    {layer_of(theta, l), in.out_tangent, in.pitch,
                                     kPads ? in.pitch : width(l)}};  // without the constant, if it can be
      if (is_dual(l, batch)) {
        dual_product(u, batch.dual.examples, batch, out, last ? layer.grad_pitch : layer.pitch);
      } else if (l == 0) {
        apply<1>(factors, l, batch, out, layer.pitch);
      } else {
        apply<2>(factors, l, batch, out, layer.pitch);
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
        Number* grad = row(last.grad, r, last.pitch);
        L::gradient(row(last.out, r, last.pitch), row(batch.y, r, last.pitch), *row(batch.share, r, 1),
                    batch.outputs, grad);
        for (int64_t o = 0; o < batch.outputs; ++o) grad[o] *= Layout::number(weight);
      }
    });
  }

  void loss_tangent(const Batch<Layout, T>& batch) {
    const Layer& last = layers_[layers()];
    with_loss(mlp_.loss, [&]<class L>() {
      for (int64_t r = 0; r < batch.rows; ++r) {
        L::tangent(row(last.out, r, last.pitch), *row(batch.share, r, 1), batch.outputs,
                   row(last.grad_tangent, r, last.pitch));
      }
    });
    if (batch.grad_y == nullptr) return;
    for (int64_t i = 0; i < batch.rows * batch.out_pitch; ++i) {
      subtract(batch.grad_y + i * kLanes<T>, load(last.grad_tangent + i * kLanes<T>));
    }
  }

  template <int kFactors>
  void add_input_gradient(const Factor<T>* factors, const Batch<Layout, T>& batch) {
    apply_transposed<kFactors>(factors, 0, batch, input_scratch_);
    for (int64_t i = 0; i < batch.rows * Layout::row(width(0)); ++i) {
      subtract(batch.grad_x + i * kLanes<T>, -load(input_scratch_ + i * kLanes<T>));
    }
  }

  const Mlp<T>& mlp_;
  const Parameters<Layout, T>& parameters_;
  Layer layers_[kMaxLayers + 1] = {};
  T* input_scratch_;
};

}  // namespace metafast::METAFAST_ISA
