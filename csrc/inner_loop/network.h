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
      with_activation(mlp.activation, [&]<class A>() {
        const bool bends = A::kCurved && tangents && l + 1 < layers();
        layer.out_grad = arena.take_if(bends, rows * layer.grad_pitch);
      });
      layer.out_rows = layer.out;
      layer.tangent_rows = layer.out_tangent;
      if (Layout::kTransposes && l + 1 < layers()) {
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
      const bool last = l + 1 == layers();
      const Finish<T> finish{last ? Activation::none : mlp_.activation};
      if (is_dual(l, batch)) {
        dual_product(theta, batch.dual.support, batch, layer.out, layer.pitch);
        add_start(batch, layer);
        finish.finish_block(layer.out, layer.pitch, 0, batch.rows, 0, layer.grad_pitch);
      } else {
        const Factor<T> factor{layer_of(theta, l), in.out, in.pitch, Layout::row(width(l) + 1)};
        apply<1>(&factor, l, batch, layer.out, layer.pitch, finish);
      }
      if (last) break;
      if (kPads) set_feature(layer.out, layer.pitch, batch.rows, width(l + 1), T(1));
      if (Layout::kTransposes) {
        transpose_samples<Layout>(layer.out, layer.pitch, batch.samples, cols(l + 1), layer.out_rows);
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

  // After forward: to the gradients of the examples' shares, those of `weight` times the loss.
  void add_share_gradient(const Batch<Layout, T>& batch, Vec<T> weight) const {
    const Layer& last = layers_[layers()];
    with_loss(mlp_.loss, [&]<class L>() {
      for (int64_t r = 0; r < batch.rows; ++r) {
        const Number counts = *row(batch.share, r, 1) != Number{} ? Number{} + 1 : Number{};
        *row(batch.grad_share, r, 1) +=
            Layout::number(weight) *
            L::value(row(last.out, r, last.pitch), row(batch.y, r, last.pitch), counts, batch.outputs);
      }
    });
  }

  // After forward: the gradients dloss/dz of all layers from `first` on, of `weight` times the loss.
  void backward(const T* theta, const Batch<Layout, T>& batch, Vec<T> weight, int first = 1) {
    loss_gradient(batch, weight);
    for (int l = layers() - 1; l >= first; --l) {
      const Layer in = layers_[l], out = layers_[l + 1];
      const Factor<T> factor{layer_of(theta, l), out.grad, out.grad_pitch, width(l + 1)};
      apply_transposed<1>(&factor, l, batch, in.grad, behind_slope(in, nullptr));
      clear_padding(in.grad, l, batch.rows);
    }
  }

  // After backward: the gradient of what that went back from. consumer_of(l)(i, v) takes vector i of the
  // parameters, a part of layer l: it may overwrite the parameters. Of a dual layer these are coordinates.
  template <class Consumer>
  void gradient(const T* theta, const Batch<Layout, T>& batch, const Consumer& consumer_of) {
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
      if (l == 0 && batch.grad_x != nullptr) {
        const Factor<T> factor{layer_of(theta, l), out.grad, out.grad_pitch, width(l + 1)};
        add_input_gradient<1>(&factor, batch);
      }
      const OuterFactor<T> outer_factor{out.grad, in.out_rows};
      outer<Layout, 1>(&outer_factor, outer_pitch(l), outer_depth(batch), width(l + 1), cols(l),
                       parameters_.offset(l), consumer_of(l));
    }
  }

  // The first layer of whose gradient hessian_product() makes use. That of layer 1 meets nothing but tangents
  // of the inputs, which have none, unless a curved activation or the inputs' own gradient asks for it.
  int first_of_hessian(const Batch<Layout, T>& batch) const {
    return layers_[1].out_grad != nullptr || batch.grad_x != nullptr ? 1 : 2;
  }

  // After backward, of the loss itself: consume(i, v) takes vector i of the Hessian of the loss times the
  // tangent u of the parameters theta. Gradients of the inputs, targets and shares get the derivative of <u,
  // gradient of the loss>.
  template <class Consume>
  void hessian_product(const T* theta, const T* u, const Batch<Layout, T>& batch, const Consume& consume) {
    forward_tangent(theta, u, batch);
    if (batch.grad_share != nullptr) add_share_tangent(batch);
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
      if (l == 0) {  // the inputs have no tangent
        if (batch.grad_x != nullptr) add_input_gradient<2>(factors, batch);
        outer<Layout, 1>(outer_factors, outer_pitch(l), outer_depth(batch), width(l + 1), cols(l),
                         parameters_.offset(l), consume);
        return;
      }
      apply_transposed<2>(factors, l, batch, in.grad_tangent, behind_slope(in, in.out_tangent));
      clear_padding(in.grad_tangent, l, batch.rows);
      outer<Layout, 2>(outer_factors, outer_pitch(l), outer_depth(batch), width(l + 1), cols(l),
                       parameters_.offset(l), consume);
    }
  }

  // Number o of row r of out [rows, H] = the inner product of example r of the batch with row o of what `u`
  // holds of the dual layer: coordinates of the first `examples` of the task. `pitch` is that of out.
  void dual_product(const T* u, int64_t examples, const Batch<Layout, T>& batch, T* out,
                    int64_t pitch) const {
    const Factor<T> factor{u + parameters_.offset(0) * kLanes<T>, batch.dual.gram, batch.dual.pitch,
                           examples};
    multiply<Layout, 1>(&factor, {kLanes<T>, cols(0) * kLanes<T>}, batch.rows, cols(0), out, pitch, {});
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
    T* out_grad;                 // dloss/da, if its tangent needs it, or null
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
  void apply(const Factor<T>* factors, int l, const Batch<Layout, T>& batch, T* out, int64_t pitch,
             const Finish<T>& finish) const {
    if constexpr (kPads) {
      dots<kFactors>(factors, batch.rows, width(l + 1), out, pitch);
      finish.finish_block(out, pitch, 0, batch.rows, 0, Layout::row(width(l + 1)));
    } else {
      multiply<Layout, kFactors>(factors, {cols(l) * kLanes<T>, Layout::kTasks}, batch.rows, width(l + 1),
                                 out, pitch, finish);
    }
  }

  // grad [rows, features], of its inputs, from that of its outputs. It leaves anything in the padding.
  template <int kFactors>
  void apply_transposed(const Factor<T>* factors, int l, const Batch<Layout, T>& batch, T* grad,
                        const Finish<T>& finish) const {
    const int64_t pitch = Layout::row(width(l));
    const Strides strides{kPads ? kLanes<T> : Layout::kTasks, cols(l) * kLanes<T>};
    multiply<Layout, kFactors>(factors, strides, batch.rows, pitch, grad, pitch, finish);
  }

  // Of gradients with respect to the layer's activations, and with their tangents R a of tangents of them.
  Finish<T> behind_slope(const Layer& layer, const T* tangents) const {
    return {mlp_.activation, layer.out, tangents, layer.out_grad, layer.pitch, layer.grad_pitch};
  }

  // Of the arrays that outer() reads for layer l, and over how many rows of them it sums.
  OuterPitch outer_pitch(int l) const {
    return {layers_[l + 1].grad_pitch, Layout::kTransposes ? cols(l) : layers_[l].pitch};
  }
  static int64_t outer_depth(const Batch<Layout, T>& batch) {
    return Layout::kTransposes ? batch.samples : batch.rows;
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

  // To outputs of a dual layer, those at theta_0.
  static void add_start(const Batch<Layout, T>& batch, const Layer& layer) {
    for (int64_t r = 0; r < batch.rows; ++r) {
      for (int64_t i = 0; i < layer.grad_pitch; ++i) {
        subtract(layer.out + (r * layer.pitch + i) * kLanes<T>,
                 -load(batch.dual.start + (r * layer.grad_pitch + i) * kLanes<T>));
      }
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
      const Finish<T> finish = {last ? Activation::none : mlp_.activation, layer.out, nullptr, nullptr,
                                layer.pitch};
      if (is_dual(l, batch)) {
        dual_product(u, batch.dual.examples, batch, out, layer.pitch);
        finish.finish_block(out, layer.pitch, 0, batch.rows, 0, layer.grad_pitch);
      } else if (l == 0) {
        apply<1>(factors, l, batch, out, layer.pitch, finish);
      } else {
        apply<2>(factors, l, batch, out, layer.pitch, finish);
      }
      if (last) break;
      if (Layout::kTransposes) {
        transpose_samples<Layout>(layer.out_tangent, layer.pitch, batch.samples, cols(l + 1),
                                  layer.tangent_rows);
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

  // That of <u, gradient of the loss> is how an example's loss changes along the outputs' tangent.
  void add_share_tangent(const Batch<Layout, T>& batch) const {
    const Layer& last = layers_[layers()];
    for (int64_t r = 0; r < batch.rows; ++r) {
      const Number *grad = row(last.grad, r, last.pitch), *tangent = row(last.grad_tangent, r, last.pitch);
      const Number share = *row(batch.share, r, 1);
      Number sum{};
      for (int64_t o = 0; o < batch.outputs; ++o) sum += grad[o] * tangent[o];
      *row(batch.grad_share, r, 1) += share != Number{} ? sum / share : Number{};
    }
  }

  void loss_tangent(const Batch<Layout, T>& batch) {
    const Layer& last = layers_[layers()];
    with_loss(mlp_.loss, [&]<class L>() {
      for (int64_t r = 0; r < batch.rows; ++r) {
        L::tangent(row(last.out, r, last.pitch), row(batch.y, r, last.pitch), *row(batch.share, r, 1),
                   batch.outputs, row(last.grad_tangent, r, last.pitch));
      }
    });
    if (batch.grad_y == nullptr) return;
    for (int64_t i = 0; i < batch.rows * batch.out_pitch; ++i) {
      subtract(batch.grad_y + i * kLanes<T>, load(last.grad_tangent + i * kLanes<T>));
    }
  }

  template <int kFactors>
  void add_input_gradient(const Factor<T>* factors, const Batch<Layout, T>& batch) {
    apply_transposed<kFactors>(factors, 0, batch, input_scratch_, {});
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
