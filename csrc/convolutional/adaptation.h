// The inner loop of convolutional networks: groups of tasks go through all their steps, and back, one group
// after the other, so that what is in memory besides parameters is the activations of one step of one group.
//
// The way back from v = dL/dtheta_K needs no graph: for k = K-1, ..., 0
//   M = dL/dm_{k+1} = momentum M - lr v,   v += H_k M,   grad_lr -= v m_{k+1},
// where H_k is the Hessian of the support loss at theta_k, and M = 0 at the start. The product with it is
// forward over reverse: a forward, its tangent along M, and both their gradients in one sweep back.
#pragma once

#include <optional>

#include "convolutional/arguments.h"

namespace metafast {
namespace {

// How many tasks go at once: enough for all threads, or on a GPU as many as the memory holds; build(space)
// takes what one of them needs.
template <typename T, class F>
int64_t group_of(const Network& network, int64_t tasks, const Tensor& like, const F& build) {
  constexpr int64_t kBytes = 512 << 20;
  Workspace<T> count;
  build(count);
  int64_t group = kBytes / std::max<int64_t>(1, count.elements() * static_cast<int64_t>(sizeof(T)));
  if (!runs_cuda(like)) {
    const int64_t items = network.blocks()[0].shape.blocks();  // of a task, in the kernels with the fewest
    group = std::min(group, (2 * at::get_num_threads() + items - 1) / items);
  }
  return std::clamp<int64_t>(group, 1, std::max<int64_t>(1, tasks));
}

template <typename T>
class Adaptation {
 public:
  // With `reverses` it can go back, with the gradients of x if `of_images`.
  Adaptation(const Problem& problem, bool reverses, bool of_images)
      : problem_(problem), reverses_(reverses), of_images_(of_images) {
    images_ = load_images<T>(problem.network, problem.x, image_memory_);
    rates_ = problem.rates<T>();
    group_ = group_of<T>(problem.network, problem.tasks(), problem.x,
                         [&](Workspace<T>& space) { Parts(*this, 1, space); });
    parts_.emplace(in_memory<T>(memory_, problem.options(),
                                [&](Workspace<T>& space) { return Parts(*this, group_, space); }));
  }

  int64_t group() const { return group_; }

  // Takes the group of tasks [first, first + count).
  void enter(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
  }

  // From theta [n, P] by gradient and momentum: writes buffer and next [n, P]; `before` is the buffer of the
  // step before, if there is one. statistics: [2, T, channels of blocks with norm] or undefined.
  void step(int64_t k, const Tensor& theta, const Tensor& before, const Tensor& buffer, const Tensor& next,
            const Tensor& statistics) {
    const Parts& parts = *parts_;
    const Pass<T> pass = this->pass();
    pass.forward(packed_view<const T>(theta), parts.activations);
    differentiate_loss(parts, false, nullptr);
    pass.backward(packed_view<const T>(theta), parts.activations, parts.gradients, packed_view<T>(buffer),
                  nullptr);
    keep_statistics(parts.activations, statistics);
    if (before.defined() && problem_.momentum != 0) buffer.add_(before, problem_.momentum);
    at::mul_out(const_cast<Tensor&>(next), buffer, rate(k));
    next.neg_().add_(theta);
  }

  // v += H_k direction; to grad_x and grad_y, where they are, the mixed derivatives are added.
  void step_back(const Tensor& theta, const Tensor& direction, const Tensor& product, const Tensor& v,
                 const Maps<T>* grad_x, T* grad_y) {
    const Parts& parts = *parts_;
    const Pass<T> pass = this->pass();
    const auto at = packed_view<const T>(theta), along = packed_view<const T>(direction);
    pass.forward(at, parts.activations);
    differentiate_loss(parts, false, nullptr);
    pass.forward_tangent(at, along, parts.activations, *parts.tangents);
    differentiate_loss(parts, true, grad_y);
    pass.backward_tangent(at, along, parts.activations, *parts.tangents, parts.gradients,
                          *parts.gradient_tangents, packed_view<T>(product), grad_x);
    v.add_(product);
  }

  Tensor rate(int64_t k) const { return rates_.narrow(0, rates_.size(0) > 1 ? k : 0, 1); }

 private:
  const Problem& problem_;
  const bool reverses_, of_images_;
  Tensor image_memory_, memory_, rates_;
  Maps<const T> images_;
  int64_t group_, first_ = 0, count_ = 0;

  struct Parts {
    Activations<T> activations;
    Gradients<T> gradients;
    std::optional<Tangents<T>> tangents;
    std::optional<Gradients<T>> gradient_tangents;

    Parts(const Adaptation& of, int64_t tasks, Workspace<T>& space)
        : activations(of.problem_.network, tasks, of.problem_.images(), space),
          gradients(of.problem_.network, tasks, of.problem_.images(), of.of_images_, space) {
      if (!of.reverses_) return;
      tangents.emplace(of.problem_.network, tasks, of.problem_.images(), space);
      gradient_tangents.emplace(of.problem_.network, tasks, of.problem_.images(), of.of_images_, space);
    }
  };
  std::optional<Parts> parts_;

  Pass<T> pass() const {
    Maps<const T> x = images_;
    x.data += first_ * x.task;
    return {problem_.network, problem_.x, count_, problem_.images(), x};
  }

  // Of the last result, or of its tangent.
  void differentiate_loss(const Parts& parts, bool tangent, T* grad_y) const {
    const int64_t examples = first_ * problem_.images();
    OutputGradient<T> p{};
    p.tasks = count_;
    p.images = problem_.images();
    p.outputs = problem_.network.outputs();
    p.out = as_const(parts.activations.back().out);
    p.grad = parts.gradients.blocks.back().out;
    if (tangent) {
      p.out_tangent = as_const(parts.tangents->blocks.back().out);
      p.grad = parts.gradient_tangents->blocks.back().out;
      if (grad_y != nullptr) p.grad_y = grad_y + examples * p.outputs;
    }
    if (problem_.labels) {
      p.labels = problem_.y.template const_data_ptr<int64_t>() + examples;
    } else {
      p.y = problem_.y.template const_data_ptr<T>() + examples * p.outputs;
    }
    run_kernel(p, problem_.x);
  }

  void keep_statistics(const Activations<T>& of, const Tensor& statistics) const {
    if (!statistics.defined()) return;
    const int64_t channels = statistics.size(2);
    int64_t channel = 0;
    for (size_t i = 0; i < problem_.network.blocks().size(); ++i) {
      const NetworkBlock& b = problem_.network.blocks()[i];
      if (!b.shape.norm) continue;
      for (int64_t j = 0; j < 2; ++j) {
        T* const out =
            statistics.template mutable_data_ptr<T>() + (j * problem_.tasks() + first_) * channels + channel;
        permute<T>(problem_.x, j == 0 ? of[i].mean : of[i].var, out, {count_, 1, 1, 1, b.outputs},
                   {b.pitch(), 0, 0, 0, 1}, {channels, 0, 0, 0, 1});
      }
      channel += b.outputs;
    }
  }
};

}  // namespace
}  // namespace metafast
