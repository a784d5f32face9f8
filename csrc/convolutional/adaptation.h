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
#include "convolutional/pass.h"

namespace metafast {
namespace {

// What a sweep over the steps computes at each.
enum class Sweep { forth, back };

// Of a group of tasks.
template <typename T>
struct StepMemory {
  Activations<T> activations;
  Gradients<T> gradients;
  std::optional<Tangents<T>> tangents;
  std::optional<Gradients<T>> gradient_tangents;

  StepMemory(const Problem& problem, Sweep sweep, bool of_images, int64_t tasks, Workspace<T>& space)
      : activations(problem.network, tasks, problem.images(), space),
        gradients(problem.network, tasks, problem.images(), of_images, space) {
    if (sweep == Sweep::forth) return;
    tangents.emplace(problem.network, tasks, problem.images(), space);
    gradient_tangents.emplace(problem.network, tasks, problem.images(), of_images, space);
  }

  // Of the tasks from `slot` on.
  StepMemory from(int64_t slot) const {
    StepMemory moved = *this;
    moved.activations = activations.from(slot);
    moved.gradients = gradients.from(slot);
    if (tangents) moved.tangents = tangents->from(slot);
    if (gradient_tangents) moved.gradient_tangents = gradient_tangents->from(slot);
    return moved;
  }

  void clear_borders(const Problem& problem, int64_t tasks) const {
    const auto clear = [&](const auto& maps) {
      maps.clear_borders(problem.network, tasks, problem.images());
    };
    clear(activations);
    clear(gradients);
    if (tangents) clear(*tangents);
    if (gradient_tangents) clear(*gradient_tangents);
  }
};

// The steps of some tasks.
template <typename T>
class Steps {
 public:
  // rates: as Problem::rates has them; images: of all tasks; memory: of the group.
  Steps(const Problem& problem, const Tensor& rates, Maps<const T> images, const StepMemory<T>& memory,
        Some tasks)
      : problem_(problem),
        rates_(rates),
        tasks_(tasks),
        memory_(memory.from(tasks.slot)),
        pass_(problem.network, problem.x, tasks.count, problem.images(), maps_from(images, tasks.first)) {
    if (!runs_cuda(problem.x)) memory_.clear_borders(problem, tasks.count);
  }

  // From theta [n, P] by gradient and momentum: writes buffer and next [n, P]; `before` is the buffer of the
  // step before, if there is one. statistics: [2, T, channels of blocks with norm] or undefined.
  void step(int64_t k, const Tensor& theta, const Tensor& before, const Tensor& buffer, const Tensor& next,
            const Tensor& statistics) const {
    pass_.forward(packed_view<const T>(theta), memory_.activations);
    differentiate_loss();
    pass_.backward(packed_view<const T>(theta), memory_.activations, memory_.gradients,
                   packed_view<T>(buffer), nullptr);
    keep_statistics(statistics);
    const SameArithmetic arithmetic;
    if (before.defined() && problem_.momentum != 0) buffer.add_(before, problem_.momentum);
    at::addcmul_out(const_cast<Tensor&>(next), theta, buffer, rate(k), -1);
  }

  // The direction M of step k from that of the one behind it.
  void turn(int64_t k, const Tensor& v, const Tensor& direction) const {
    const SameArithmetic arithmetic;
    if (k + 1 < problem_.steps && problem_.momentum != 0) {
      direction.mul_(problem_.momentum).addcmul_(v, rate(k), -1);
    } else {
      at::mul_out(const_cast<Tensor&>(direction), v, rate(k)).neg_();
    }
  }

  // v += H_k direction; to grad_x and grad_y, where they are, the mixed derivatives are added; to changes [T,
  // B], if defined, how what each example adds to the loss changes along the direction.
  void step_back(const Tensor& theta, const Tensor& direction, const Tensor& product, const Tensor& v,
                 const Maps<T>* grad_x, T* grad_y, const Tensor& changes) const {
    const auto at = packed_view<const T>(theta), along = packed_view<const T>(direction);
    pass_.forward(at, memory_.activations);
    differentiate_loss();
    pass_.forward_tangent(at, along, memory_.activations, *memory_.tangents);
    differentiate_loss(true, grad_y);
    if (changes.defined()) add_changes(changes);
    pass_.backward_tangent(at, along, memory_.activations, *memory_.tangents, memory_.gradients,
                           *memory_.gradient_tangents, packed_view<T>(product), grad_x);
    const SameArithmetic arithmetic;
    v.add_(product);
  }

 private:
  const Problem& problem_;
  const Tensor& rates_;
  const Some tasks_;
  const StepMemory<T> memory_;
  const Pass<T> pass_;

  Tensor rate(int64_t k) const { return rates_.narrow(0, rates_.size(0) > 1 ? k : 0, 1); }

  // Of the last result, or of its tangent.
  void differentiate_loss(bool tangent = false, T* grad_y = nullptr) const {
    const int64_t examples = tasks_.first * problem_.images();
    OutputGradient<T> p{};
    p.tasks = tasks_.count;
    p.images = problem_.images();
    p.outputs = problem_.network.outputs();
    p.out = as_const(memory_.activations.back().out);
    p.grad = memory_.gradients.blocks.back().out;
    if (tangent) {
      p.out_tangent = as_const(memory_.tangents->blocks.back().out);
      p.grad = memory_.gradient_tangents->blocks.back().out;
      if (grad_y != nullptr) p.grad_y = grad_y + examples * p.outputs;
    }
    if (problem_.shares) {
      p.shares = problem_.shares->of_examples.template const_data_ptr<T>() + examples;
    }
    if (problem_.labels) {
      p.labels = problem_.y.template const_data_ptr<int64_t>() + examples;
    } else {
      p.y = problem_.y.template const_data_ptr<T>() + examples * p.outputs;
    }
    run_kernel(p, problem_.x);
  }

  void add_changes(const Tensor& changes) const {
    const auto rows = [&](const Maps<T>& maps) {
      return at::from_blob(maps.data, {tasks_.count, problem_.images(), problem_.network.outputs()},
                           {maps.task, maps.image, 1}, problem_.options());
    };
    const SameArithmetic arithmetic;
    const Tensor gradient = rows(memory_.gradients.blocks.back().out);
    tasks_.of_all(changes).add_((gradient * rows(memory_.tangents->blocks.back().out)).sum(2));
  }

  void keep_statistics(const Tensor& statistics) const {
    if (!statistics.defined()) return;
    const Activations<T>& of = memory_.activations;
    const int64_t channels = statistics.size(2);
    int64_t channel = 0;
    for (size_t i = 0; i < problem_.network.blocks().size(); ++i) {
      const NetworkBlock& b = problem_.network.blocks()[i];
      if (!b.shape.norm) continue;
      for (int64_t j = 0; j < 2; ++j) {
        T* const out = statistics.template mutable_data_ptr<T>() +
                       (j * problem_.tasks() + tasks_.first) * channels + channel;
        permute<T>(problem_.x, j == 0 ? of[i].mean : of[i].var, out, {tasks_.count, 1, 1, 1, b.outputs},
                   {b.pitch(), 0, 0, 0, 1}, {channels, 0, 0, 0, 1});
      }
      channel += b.outputs;
    }
  }
};

// A problem's images and learning rates as the kernels want them, and the memory of a group.
template <typename T>
class Adaptation {
 public:
  Adaptation(const Problem& problem, Sweep sweep, bool of_images)
      : problem_(problem),
        rates_(problem.rates<T>()),
        images_(load_images<T>(problem.network, problem.x, image_memory_)) {
    const auto of_tasks = [&](int64_t tasks) {
      return
          [&, tasks](Workspace<T>& space) { return StepMemory<T>(problem, sweep, of_images, tasks, space); };
    };
    groups_ = problem.groups<T>(elements_of<T>(of_tasks(1)));
    step_memory_.emplace(in_memory<T>(memory_, problem.options(), of_tasks(groups_->size())));
  }

  const Groups& groups() const { return *groups_; }
  Steps<T> of(Some tasks) const { return {problem_, rates_, images_, *step_memory_, tasks}; }

 private:
  const Problem& problem_;
  const Tensor rates_;
  Tensor image_memory_, memory_;
  const Maps<const T> images_;
  std::optional<Groups> groups_;
  std::optional<StepMemory<T>> step_memory_;
};

// The gradient of the learning rates, from each step's v m, in an order that no number of threads changes.
template <typename T>
class RateGradient {
 public:
  RateGradient(const Problem& problem, bool wanted, int64_t group) : problem_(problem), wanted_(wanted) {
    if (!wanted) return;
    const int64_t P = problem.network.size();
    if (by_element()) {
      of_group_ = at::zeros({group, P}, problem.options());
      sum_ = at::zeros({1, P}, problem.options());
    } else {
      of_blocks_ = at::zeros({problem.tasks(), problem.steps, problem.blocks()}, problem.options());
    }
  }

  // With m the buffer behind step k.
  void add(Some tasks, int64_t k, const Tensor& v, const Tensor& m) const {
    if (!wanted_) return;
    const SameArithmetic arithmetic;
    if (by_element()) {
      tasks.of_group(of_group_).addcmul_(v, m, -1);
      return;
    }
    const Network& network = problem_.network;
    const Tensor products = v * m;
    for (int64_t l = 0; l < problem_.blocks(); ++l) {
      const int64_t begin = network.blocks()[l].weight;
      const int64_t end = l + 1 < problem_.blocks() ? network.blocks()[l + 1].weight : network.size();
      tasks.of_all(of_blocks_).select(1, k).select(1, l).sub_(products.narrow(1, begin, end - begin).sum(1));
    }
  }

  // When a group of `count` tasks is done.
  void end_group(int64_t count) const {
    if (!wanted_ || !by_element()) return;
    sum_.add_(sum_rows<T>(of_group_.narrow(0, 0, count)));
    of_group_.zero_();
  }

  std::vector<Tensor> finish() const {
    if (by_element()) {
      PackedOutput<T> of_params(problem_.network, 1, true, problem_.options());
      of_params.add(sum_);
      return of_params.finish();
    }
    const int64_t rates = problem_.lr[0].numel();
    const Tensor sum =
        sum_rows<T>(of_blocks_.view({of_blocks_.numel() / std::max<int64_t>(1, rates), rates}));
    return {sum.view(problem_.lr[0].sizes())};
  }

 private:
  const Problem& problem_;
  const bool wanted_;
  Tensor of_group_, sum_, of_blocks_;

  bool by_element() const { return problem_.lr.size() > 1; }
};

}  // namespace
}  // namespace metafast
