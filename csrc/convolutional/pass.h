// Forward, backward, and the same along a direction in the parameters, for a group of tasks at once: a chain
// of kernels over maps in memory that the caller holds.
#pragma once

#include <algorithm>

#include "convolutional/memory.h"

namespace metafast {

template <typename T>
class Pass {
 public:
  // `like` says on which device.
  Pass(const Network& network, const Tensor& like, int64_t tasks, int64_t images, Maps<const T> x)
      : network_(network), like_(like), tasks_(tasks), images_(images), x_(x) {}

  void forward(Packed<const T> theta, const Activations<T>& to) const {
    for (size_t i = 0; i < blocks().size(); ++i) {
      const NetworkBlock& b = blocks()[i];
      pair(i, theta.at(b.weight), theta.task, b.pitch(), to[i].paired);
      Convolve<T> z = convolution(i, input(i, to), theta, to[i].paired, to[i].z);
      BlockForward<T> p = block_forward(i, to[i]);
      set_affine(p, b, theta);
      p.out = to[i].out;
      if (network_.thin(i)) {
        p.thin = thin_input(&z, nullptr);
      } else {
        launch(z);
      }
      launch(p);
    }
  }

  // From the gradient of the last result, which gradients.blocks.back().out holds.
  void backward(Packed<const T> theta, const Activations<T>& of, const Gradients<T>& gradients,
                Packed<T> grad, const Maps<T>* grad_x) const {
    for (size_t i = blocks().size(); i-- > 0;) {
      const NetworkBlock& b = blocks()[i];
      const auto& g = gradients.blocks[i];
      BlockBackward<T> p = block_backward(i, of[i], theta);
      p.grad = as_const(g.out);
      p.grad_z = g.z;
      set_gradients(p, b, grad);
      Convolve<T> z = convolution(i, input(i, of), theta, of[i].paired, of[i].z);
      Tensor found;
      if (finds_z(i, grad_x)) {
        p.thin = thin_input(&z, nullptr);
      } else if (network_.thin(i)) {
        p.z = found_again(z, found);
      }
      ConvolveWeights<T> weights = weights_gradient(i, input(i, of), as_const(g.z), grad);
      launch_with_weights(p, weights);
      const Maps<T>* const to = i > 0 ? &gradients.blocks[i - 1].out : grad_x;
      if (to == nullptr) continue;
      const Packed<const T> transposed = transpose(i, theta, g);
      run_back(i, {{as_const(g.z), transposed.data, transposed.task}}, *to, false);
    }
  }

  // The tangents of all that forward() has left, along `direction`.
  void forward_tangent(Packed<const T> theta, Packed<const T> direction, const Activations<T>& of,
                       const Tangents<T>& to) const {
    for (size_t i = 0; i < blocks().size(); ++i) {
      const NetworkBlock& b = blocks()[i];
      pair(i, direction.at(b.weight), direction.task, b.pitch(), to.blocks[i].paired);
      const Convolve<T> z = convolution(i, input(i, of), theta, of[i].paired, of[i].z);
      Convolve<T> tangent = convolution(i, input(i, of), direction, to.blocks[i].paired, to.blocks[i].z);
      if (i > 0) {
        tangent.factors[1] = z.factors[0];
        tangent.factors[1].source = under_kernel(layer(b), as_const(to.blocks[i - 1].out));
        tangent.count = 2;
      }
      BlockForward<T> p = block_forward(i, of[i]);
      set_affine(p, b, theta);
      set_tangents(p, b, direction, to.blocks[i]);
      p.out_tangent = to.blocks[i].out;
      if (network_.thin(i)) {
        p.thin = thin_input(&z, &tangent);
      } else {
        launch(tangent);
      }
      launch(p);
    }
  }

  // The product of the Hessian with `direction`, from the gradient of the last result and its tangent. To
  // grad_x, if there is one, that of the mixed derivatives is added.
  void backward_tangent(Packed<const T> theta, Packed<const T> direction, const Activations<T>& of,
                        const Tangents<T>& tangents, const Gradients<T>& gradients,
                        const Gradients<T>& gradient_tangents, Packed<T> product,
                        const Maps<T>* grad_x) const {
    for (size_t i = blocks().size(); i-- > 0;) {
      const NetworkBlock& b = blocks()[i];
      const auto &g = gradients.blocks[i], &t = gradient_tangents.blocks[i];
      BlockBackward<T> p = block_backward(i, of[i], theta);
      set_tangents(p, b, direction, tangents.blocks[i]);
      p.grad = as_const(g.out);
      p.grad_tangent = as_const(t.out);
      // The first block's is for that of images alone.
      if (i > 0 || grad_x != nullptr || !runs_cuda(like_)) p.grad_z = g.z;
      p.grad_z_tangent = t.z;
      set_gradients(p, b, product);
      Convolve<T> z = convolution(i, input(i, of), theta, of[i].paired, of[i].z),
                  tangent = convolution(i, input(i, of), direction, tangents.blocks[i].paired,
                                        tangents.blocks[i].z);
      Tensor found, found_tangent;
      if (finds_z(i, grad_x)) {
        p.thin = thin_input(&z, &tangent);
      } else if (network_.thin(i)) {
        p.z = found_again(z, found);
        p.z_tangent = found_again(tangent, found_tangent);
      }
      ConvolveWeights<T> weights = weights_gradient(i, input(i, of), as_const(t.z), product);
      if (i > 0) {
        weights.factors[1] = {under_kernel(layer(b), as_const(tangents.blocks[i - 1].out)), as_const(g.z)};
        weights.count = 2;
      }
      launch_with_weights(p, weights);
      const Maps<T>* const to = i > 0 ? &gradient_tangents.blocks[i - 1].out : grad_x;
      if (to == nullptr) continue;
      const Packed<const T> weights_back = transpose(i, theta, g), along = transpose(i, direction, t);
      if (i > 0) {
        run_back(i, {{as_const(g.z), weights_back.data, weights_back.task}}, gradients.blocks[i - 1].out,
                 false);
      }
      run_back(
          i, {{as_const(t.z), weights_back.data, weights_back.task}, {as_const(g.z), along.data, along.task}},
          *to, i == 0);
    }
  }

 private:
  const Network& network_;
  const Tensor& like_;
  const int64_t tasks_, images_;
  const Maps<const T> x_;
  mutable Tensor moments_;  // of a thin input

  const std::vector<NetworkBlock>& blocks() const { return network_.blocks(); }
  Maps<const T> input(size_t i, const Activations<T>& of) const {
    return i > 0 ? as_const(of[i - 1].out) : x_;
  }

  // Whether the backward of block i is of a thin input. On CUDA it gives no gradient of images.
  bool finds_z(size_t i, const Maps<T>* grad_x) const {
    return network_.thin(i) && !(runs_cuda(like_) && grad_x != nullptr);
  }
  ThinInput<T> thin_input(const Convolve<T>* z, const Convolve<T>* tangent) const {
    if (!moments_.defined() && blocks()[0].shape.norm) {
      ThinMoments<T> p{
          z->factors[0].source, tasks_,       images_, z->height, z->width, z->taps_y, z->taps_x, z->depth,
          z->tap_row,           z->tap_pixel, nullptr};
      const int64_t parts = runs_cuda(like_) ? p.kParts : 1;
      moments_ =
          empty({tasks_, parts, p.sums(p.terms())}, like_.options().dtype(at::kDouble).requires_grad(false));
      p.moments = moments_.mutable_data_ptr<double>();
      run_kernel(p, like_);
    }
    return {z, tangent, moments_.defined() ? moments_.const_data_ptr<double>() : nullptr};
  }
  // z of a thin input, or its tangent, written down in memory of its own.
  Maps<const T> found_again(Convolve<T>& z, Tensor& memory) const {
    z.out = in_memory<T>(memory, like_.options(), [&](Workspace<T>& space) {
      return space.take_maps(tasks_, images_, z.height, z.width, z.pitch, {});
    });
    launch(z);
    return as_const(z.out);
  }

  void launch(const Convolve<T>& p) const { run_kernel(p, like_); }
  void launch(ConvolveWeights<T>& p) const {
    p.wanted_items = at::get_num_threads() > 1 ? 4 * at::get_num_threads() : 1;
    launch_with(p, p.workspace_size());
  }
  void launch(BlockForward<T>& p) const { launch_with(p, p.workspace_size()); }
  void launch(BlockBackward<T>& p) const { launch_with(p, p.workspace_size()); }
  // A block's gradient, and that of its weights from it.
  void launch_with_weights(BlockBackward<T>& p, ConvolveWeights<T>& weights) const {
    if (p.thin.z != nullptr && p.grad_z.data == nullptr) {
      p.weights = &weights;
      launch(p);
    } else {
      launch(p);
      launch(weights);
    }
  }
  template <class Params>
  void launch_with(Params& p, int64_t workspace_size) const {
    Tensor workspace;
    if (runs_cuda(like_)) {
      workspace = empty({workspace_size}, like_.options().requires_grad(false));
      p.workspace = workspace.mutable_data_ptr<T>();
    }
    run_kernel(p, like_);
  }

  Layer layer(const NetworkBlock& b) const { return b.layer(tasks_, images_); }
  // With the numbers of a pixel of its input for channels.
  Layer layer_from_input(size_t i) const {
    Layer l = layer(blocks()[i]);
    if (network_.pairs(i)) l.channels /= 2;
    return l;
  }

  // `paired`: where block i is of pairs, its weights as such.
  Convolve<T> convolution(size_t i, const Maps<const T>& source, Packed<const T> weights, const T* paired,
                          const Maps<T>& out) const {
    const NetworkBlock& b = blocks()[i];
    const Packed<const T> of_pairs{paired, weights.task == 0 ? 0 : paired_size(b)};
    const bool pairs = network_.pairs(i);
    Convolve<T> p = to_maps<T>(layer_from_input(i), source, pairs ? of_pairs.data : weights.at(b.weight),
                               pairs ? of_pairs.task : weights.task, out);
    p.bias = weights.at(b.bias);
    p.bias_task = weights.task;
    p.rounding = network_.rounding(i);
    return p;
  }

  ConvolveWeights<T> weights_gradient(size_t i, const Maps<const T>& source, const Maps<const T>& grad_z,
                                      Packed<T> grad) const {
    const NetworkBlock& b = blocks()[i];
    ConvolveWeights<T> p = to_weights<T>(layer_from_input(i), source, grad_z, grad.at(b.weight), grad.task);
    p.out_bias = grad.at(b.bias);
    p.rounding = network_.rounding(i);
    return p;
  }

  // Of a block of pairs: weights in rows of so many columns, of tasks `task` apart, as pairs.
  void pair([[maybe_unused]] size_t i, [[maybe_unused]] const T* weights, [[maybe_unused]] int64_t task,
            [[maybe_unused]] int64_t columns, [[maybe_unused]] T* to) const {
#if defined(METAFAST_WITH_CUDA) || defined(METAFAST_EMULATED)
    if constexpr (std::is_same_v<T, float>) {
      if (!network_.pairs(i)) return;
      const int64_t size = paired_size(blocks()[i]), tasks = task == 0 ? 1 : tasks_;
      run_kernel(PairRows<T>{tasks, size / columns, columns, task, size, weights, to}, like_);
    }
#endif
  }

  // Weights [kh, kw, C, pitch(O)] turned around, [kh, kw, O, pitch(C)], the last place first, as the products
  // of the block take them.
  Packed<const T> transpose(size_t i, Packed<const T> weights,
                            const typename Gradients<T>::OfBlock& to) const {
    const NetworkBlock& b = blocks()[i];
    const int64_t pitch = pitch_of(b.channels), places = b.kernel_y * b.kernel_x;
    Permute<T> p{};
    const int64_t in_place = b.channels * b.pitch(), out_place = b.outputs * pitch;
    const int64_t tasks = weights.task == 0 ? 1 : tasks_;
    const int64_t size[] = {tasks, places, b.outputs, 1, b.channels};
    const int64_t in[] = {weights.task, -in_place, 1, 0, b.pitch()};
    const int64_t task = weights.task == 0 ? 0 : Gradients<T>::transposed_size(b);
    const int64_t out[] = {task, out_place, pitch, 0, 1};
    std::copy_n(size, p.kDims, p.size);
    std::copy_n(in, p.kDims, p.in_stride);
    std::copy_n(out, p.kDims, p.out_stride);
    p.pad = pitch;
    p.in = weights.at(b.weight) + (places - 1) * in_place;
    p.out = to.transposed;
    run_kernel(p, like_);
    if (!network_.pairs(i)) return {to.transposed, task};
    pair(i, to.transposed, task, pitch, to.paired);
    return {to.paired, task / 2};
  }

  // From the gradient of z to that of the block's input.
  void run_back(size_t i, std::initializer_list<typename Convolve<T>::Factor> factors, const Maps<T>& to,
                bool adds) const {
    Layer l = layer(blocks()[i]);
    if (network_.pairs(i)) l.outputs /= 2;  // numbers of a pixel of its gradient
    to_images<T>(l, factors, to, adds, [this, i](Convolve<T>& p) {
      p.rounding = network_.rounding(i);
      launch(p);
    });
  }

  BlockShape shape(const NetworkBlock& b) const {
    BlockShape shape = b.shape;
    shape.tasks = tasks_;
    shape.images = images_;
    return shape;
  }

  template <class Params>
  static void set_affine(Params& p, const NetworkBlock& b, Packed<const T> theta) {
    p.gamma = theta.at(b.gamma);
    p.beta = theta.at(b.beta);
    p.affine_task = theta.task;
  }

  template <class Params>
  static void set_tangents(Params& p, const NetworkBlock& b, Packed<const T> direction,
                           const typename Tangents<T>::OfBlock& tangents) {
    p.gamma_tangent = direction.at(b.gamma);
    p.beta_tangent = direction.at(b.beta);
    p.tangent_task = direction.task;
    p.z_tangent = as_const(tangents.z);
    p.mean_tangent = tangents.mean;
    p.scale_tangent = tangents.scale;
  }

  BlockForward<T> block_forward(size_t i, const typename Activations<T>::OfBlock& of) const {
    BlockForward<T> p{};
    p.shape = shape(blocks()[i]);
    p.pairs = network_.pairs(i + 1);
    p.z = as_const(of.z);
    p.mean = of.mean;
    p.rstd = of.rstd;
    p.var = of.var;
    return p;
  }

  BlockBackward<T> block_backward(size_t i, const typename Activations<T>::OfBlock& of,
                                  Packed<const T> theta) const {
    const NetworkBlock& b = blocks()[i];
    BlockBackward<T> p{};
    p.shape = shape(b);
    p.pairs = network_.pairs(i);
    p.z = as_const(of.z);
    p.mean = of.mean;
    p.rstd = of.rstd;
    set_affine(p, b, theta);
    return p;
  }

  static void set_gradients(BlockBackward<T>& p, const NetworkBlock& b, Packed<T> grad) {
    p.grad_gamma = grad.at(b.gamma);
    p.grad_beta = grad.at(b.beta);
    p.grad_task = grad.task;
  }
};

}  // namespace metafast
