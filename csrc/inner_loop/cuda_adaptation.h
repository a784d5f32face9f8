// The inner loop on the GPU. A team of threads takes one task after the other through all its steps and back.
// The task's parameters and activations live in shared memory, or for large networks in the workspace; what
// is kept of each step, its parameters and never its activations, in the workspace.
// csrc/inner_loop/adaptation.h has the formulas of the way back. Part of cuda.cu.
#pragma once

#include "inner_loop/cuda_network.h"

namespace metafast::cuda {
namespace {

template <class Team, class Products, typename T>
class Adaptation {
 public:
  static constexpr bool kResident = std::is_same_v<Products, Resident>;

  __device__ __forceinline__ Adaptation(const Plan<T>& plan, int64_t item, unsigned char* shared)
      : p_(plan.p),
        at_(plan.at),
        wants_adapted_(plan.wants_adapted),
        steps_memory_(plan.workspace == 0 ? nullptr : plan.p.workspace + item * plan.workspace),
        row_(plan.p.sums.rows == nullptr ? nullptr : plan.p.sums.rows + item * plan.p.sums.columns),
        scratch_(reinterpret_cast<T*>(shared)),
        network_{plan.p.mlp, plan.at, nullptr, nullptr} {
    T* const behind = scratch_ + padded<T>(Team::kWarps);
    home_ = kResident ? behind : steps_memory_ + at_.steps;
    network_.home = home_;
    network_.stage = kResident ? nullptr : behind;
  }

  // Before the first task: zeros in what pads matrices, the constant feature in activations.
  __device__ __forceinline__ void start() const {
    Team::for_each(at_.home, [&](int64_t i) { home_[i] = 0; });
    if constexpr (!kResident) {  // parameters of all steps are operands
      if (at_.slots >= 0) {
        const int64_t size = (p_.sgd.steps + 1) * at_.weights[p_.mlp.layers];
        Team::for_each(size, [&](int64_t i) { steps_memory_[at_.slots + i] = 0; });
      }
    }
    if (row_ != nullptr) Team::for_each(p_.sums.columns, [&](int64_t i) { row_[i] = 0; });
    Team::sync();
    for (int l = 1; l < p_.mlp.layers; ++l) {
      Team::for_each(at_.samples,
                     [&](int64_t s) { home_[at_.out[l] + s * at_.pitch[l] + at_.width[l]] = 1; });
    }
  }

  __device__ __forceinline__ void run(int64_t task) const {
    const Batch<T> support = load_examples(p_.support, p_.dual.support, 0, task, at_.support_x);
    const Batch<T> query =
        load_examples(p_.query, p_.dual.query, static_cast<int>(p_.support.count), task, at_.query_x);
    for_each_parameter([&](int l, int o, int c, int64_t i) {
      theta(0)[i] = network_.is_dual(l) ? T(0) : *element(p_.mlp.params, l, p_.mlp.shared ? 0 : task, o, c);
      if (!p_.backward) return;
      const T* const given = element(p_.grad_adapted, l, task, o, c);
      home_[at_.v + i] = given != nullptr ? *given : T(0);
    });
    Team::sync();

    const T task_weight =
        p_.loss_scale * (p_.task_weights == nullptr ? T(1) : p_.task_weights[task * p_.task_weight_stride]);
    // A task that no gradient reaches leaves zeros, NaN or not: so far there is nothing else.
    if (p_.backward && p_.task_weights != nullptr && task_weight == T(0)) return finish(task, T(0), T(0));
    // To theta_K and, where the backward needs more than that, back again, with the query loss on the way it
    // counts on. One loop for both ways, since each of the passes is inlined wherever it is called.
    const bool returns = p_.keeps_trajectory();
    const bool adapts = returns || p_.has_query() || wants_adapted_;
    const int steps = adapts ? at_.step_count : 0, last = returns ? 2 * steps : steps;
    Batch<T> constant_support = support;  // of the way there: its gradients are those of the way back
    constant_support.has_grads = false;
    T loss = 0;
    for (int i = 0; i <= last; ++i) {
      const int k = i <= steps ? i : 2 * steps - i;
      if (i == steps && wants_adapted_) store_adapted(task);
      if (!returns || i >= steps) loss += query_pass(query, k, task_weight);
      if (i == last) break;
      if (i < steps) {
        pass(constant_support, k, T(1), true, /*updates=*/true);
      } else {
        step_back(support, k - 1);
      }
    }
    finish(task, Team::sum(loss, scratch_), task_weight);
  }

 private:
  const InnerLoop<T>& p_;
  const Layout<T>& at_;
  const bool wants_adapted_;
  T* steps_memory_;  // in the workspace
  T* row_;           // of sums
  T* scratch_;       // [Team::kWarps]
  T* home_;
  Network<Team, Products, T> network_;

  // ---- parameters ----

  __device__ __forceinline__ T* slot(int64_t k) const {
    return steps_memory_ + at_.slots + k * at_.weights[p_.mlp.layers];
  }
  __device__ __forceinline__ T* theta(int64_t k) const {
    return at_.theta >= 0 ? home_ + at_.theta : slot(k);
  }
  // m_k, k >= 1
  __device__ __forceinline__ T* buffer(int64_t k) const {
    if (at_.buffers >= 0) return steps_memory_ + at_.buffers + (k - 1) * at_.weights[p_.mlp.layers];
    return at_.buffer >= 0 ? home_ + at_.buffer : nullptr;
  }

  // Element (o, c) of layer l in arrays of the shapes of the parameters, or null where there are none; the
  // last column is the bias.
  template <typename Element>
  __device__ __forceinline__ Element* element(Element* const* arrays, int l, int64_t task, int o,
                                              int c) const {
    const int64_t inputs = at_.width[l], row = task * at_.width[l + 1] + o;
    Element* const array = arrays[2 * l + (c == inputs)];
    return array == nullptr ? nullptr : array + (c < inputs ? row * inputs + c : row);
  }
  // The same in one row of all parameters.
  __device__ __forceinline__ int64_t flat(int l, int o, int c) const {
    const int64_t inputs = at_.width[l];
    return at_.flat[l] + (c < inputs ? o * inputs + c : at_.width[l + 1] * inputs + o);
  }

  // f(l, o, c, i) for every parameter, at i in a set of them.
  template <class F>
  __device__ __forceinline__ void for_each_parameter(const F& f) const {
    for (int l = 0; l < p_.mlp.layers; ++l) {
      Team::for_each(at_.width[l + 1], at_.columns[l],
                     [&](int o, int c) { f(l, o, c, at_.weights[l] + o * at_.pitch[l] + c); });
    }
  }

  // lr of a layer in a step.
  struct Rate {
    const Adaptation& owner;
    int l;
    T value;
    __device__ __forceinline__ T of(int o, int c) const {
      const Sgd<T>& sgd = owner.p_.sgd;
      return sgd.rates == nullptr ? *owner.element(sgd.elements, l, 0, o, c) : value;
    }
  };
  __device__ __forceinline__ Rate rate(int64_t k, int l) const {
    const Sgd<T>& sgd = p_.sgd;
    return {*this, l, sgd.rates == nullptr ? T(0) : sgd.rates[k * sgd.step_stride + l * sgd.layer_stride]};
  }

  // ---- examples ----

  // `first` of the task's examples: the query's come behind the support's.
  __device__ __forceinline__ Batch<T> load_examples(const Examples<T>& from, const T* start,
                                                    int first_example, int64_t task, int64_t at) const {
    const int count = static_cast<int>(from.count), features = at_.width[0],
              outputs = at_.width[p_.mlp.layers];
    Batch<T> batch{
        from, task * from.count, at < 0 ? nullptr : home_ + at, start, first_example, T(0), count == 0, true};
    if (at < 0) return batch;  // no query
    if (network_.is_dual(0)) {
      for (int other = 0; other < 2; ++other) {  // products with the support and with the query
        const Examples<T>& with = other == 0 ? p_.support : p_.query;
        load_products(from.x + batch.row * features, count, with.x + task * with.count * features,
                      static_cast<int>(with.count), home_ + at + (other == 0 ? 0 : p_.support.count));
      }
    } else {
      Team::for_each(count, features + 1, [&](int s, int i) {
        home_[at + s * at_.pitch[0] + i] = i < features ? from.x[(batch.row + s) * features + i] : T(1);
      });
    }
    if (T* const grad_x = batch.grad_x(features)) {
      Team::for_each(from.count * features, [&](int64_t i) { grad_x[i] = 0; });
    }
    if (T* const grad_y = batch.grad_y(outputs)) {
      Team::for_each(from.count * outputs, [&](int64_t i) { grad_y[i] = 0; });
    }
    if (from.labels == nullptr) {
      batch.share = T(1) / static_cast<T>(from.count * outputs);
      return batch;
    }
    T valid = 0;
    Team::for_each(from.count, [&](int64_t s) {
      const int64_t label = from.labels[batch.row + s];
      METAFAST_DEVICE_CHECK(label == kIgnoreLabel || (label >= 0 && label < outputs),
                            "labels: expected classes in [0, O) or -100 (ignored)");
      valid += label != kIgnoreLabel;
    });
    valid = Team::sum(valid, scratch_);
    batch.share = T(1) / valid;
    batch.empty = valid == 0;
    return batch;
  }

  // out [rows, pitch[0]] = x y^T + 1, for inputs x [rows, D] and y [cols, D]: a warp to an element.
  __device__ __forceinline__ void load_products(const T* x, int rows, const T* y, int cols, T* out) const {
    const int64_t features = at_.width[0];
    for (int64_t i = Team::warp(); i < static_cast<int64_t>(rows) * cols; i += Team::kWarps) {
      const int64_t row = i / cols, col = i % cols;
      T sum = 0;
      for (int64_t d = Team::lane(); d < features; d += kWarpSize)
        sum += x[row * features + d] * y[col * features + d];
      sum = warp_sum(sum);
      if (Team::lane() == 0) out[row * at_.pitch[0] + col] = sum + 1;
    }
  }

  // ---- steps ----

  // Forward and, where it `differentiates`, backward of a batch at theta_k. The gradient updates the
  // parameters, or, times `weight`, is added to v. Returns a thread's part of the loss.
  __device__ __forceinline__ T pass(const Batch<T>& batch, int k, T weight, bool differentiates,
                                    bool updates) const {
    network_.forward(theta(k), batch);
    const T momentum = k > 0 ? p_.sgd.momentum : T(0);
    T* const saved = kResident && p_.keeps_trajectory() ? slot(k) : nullptr;
    const T *const theta = this->theta(k), *const old_buffer = momentum != 0 ? buffer(k) : nullptr;
    T *const next = updates ? this->theta(k + 1) : nullptr, *const new_buffer = buffer(k + 1);
    return network_.backward(theta, batch, weight, differentiates, [&](int l) {
      return [=, this, lr = rate(updates ? k : 0, l)](int o, int c, T grad) {
        const int64_t i = at_.weights[l] + o * at_.pitch[l] + c;
        if (!updates) {
          home_[at_.v + i] += grad;
          return;
        }
        if (old_buffer != nullptr) grad += momentum * old_buffer[i];
        if (new_buffer != nullptr) new_buffer[i] = grad;
        const T before = theta[i];
        if (saved != nullptr) saved[i] = before;
        next[i] = before - lr.of(o, c) * grad;
      };
    });
  }

  // The query loss after k steps, where it counts; a thread's part of it.
  __device__ __forceinline__ T query_pass(const Batch<T>& query, int k, T task_weight) const {
    T weight = T(k == p_.sgd.steps);
    if (p_.step_weights != nullptr) weight = k == 0 ? T(0) : p_.step_weights[k - 1];
    const bool wanted = p_.sums.step_weights >= 0 && k > 0;  // the gradient of the weight
    if (!p_.has_query() || (weight == T(0) && !wanted)) return 0;
    T loss = pass(query, k, weight * task_weight, p_.backward && weight != T(0), /*updates=*/false);
    if (query.empty) loss = std::numeric_limits<T>::quiet_NaN();
    if (wanted) {
      const T sum = Team::sum(loss, scratch_);
      if (Team::rank() == 0) row_[p_.sums.step_weights + k - 1] += task_weight * sum;
    }
    return weight == T(0) ? T(0) : weight * loss;
  }

  // v becomes dL/dtheta_k; it was dL/dtheta_{k+1}.
  __device__ __forceinline__ void step_back(const Batch<T>& support, int k) const {
    if (at_.theta >= 0) {
      const T* const from = slot(k);
      for_each_parameter([&](int l, int, int c, int64_t i) {
        if (!network_.is_dual(l) || c < support.count())
          home_[at_.theta + i] = from[i];  // of queries it stays 0
      });
    }
    const T momentum = k + 1 < p_.sgd.steps ? p_.sgd.momentum : T(0);
    const bool wants_rates = p_.lr_gradient(), wants_elements = wants_rates && p_.sgd.rates == nullptr;
    const T *const v = home_ + at_.v, *const used = wants_rates ? buffer(k + 1) : nullptr;
    T* const m = at_.m >= 0 ? home_ + at_.m : nullptr;
    for (int l = 0; l < p_.mlp.layers; ++l) {
      const Rate lr = rate(k, l);
      T sum = 0;
      Team::for_each(at_.width[l + 1], at_.columns[l], [&](int o, int c) {
        const int64_t i = at_.weights[l] + o * at_.pitch[l] + c;
        T product = 0;
        if (wants_rates && network_.is_dual(l)) {
          if (c < support.count()) product = used[i] * dual_product(support, c, v + i - c);
        } else if (wants_rates) {
          product = v[i] * used[i];
        }
        sum -= product;
        if (wants_elements) row_[p_.sums.lr + flat(l, o, c)] -= product;
        if (m == nullptr) return;
        const T own = -lr.of(o, c) * v[i];
        m[i] = momentum != 0 ? own + momentum * m[i] : own;
      });
      if (!wants_rates || wants_elements) continue;
      sum = Team::sum(sum, scratch_);
      if (Team::rank() == 0) row_[p_.sums.lr + k * p_.mlp.layers + l] += sum;
    }
    Team::sync();
    if (m != nullptr) network_.add_hessian_product(theta(k), m, support, home_ + at_.v);
  }

  // The inner product of example s of the support with the row of the first layer that has coordinates v [E].
  __device__ __forceinline__ T dual_product(const Batch<T>& support, int s, const T* v) const {
    T sum = 0;
    for (int e = 0; e < at_.columns[0]; ++e) sum += support.x[s * at_.pitch[0] + e] * v[e];
    return sum;
  }

  // ---- results ----

  __device__ __forceinline__ void store_adapted(int64_t task) const {
    const T* const theta = this->theta(p_.sgd.steps);
    for_each_parameter([&](int l, int o, int c, int64_t i) {
      if (T* const to = element(p_.adapted, l, task, o, c)) *to = theta[i];
    });
  }

  // `loss` of the task, in every thread.
  __device__ __forceinline__ void finish(int64_t task, T loss, T task_weight) const {
    if (Team::rank() == 0) {
      if (p_.losses != nullptr) p_.losses[task] = loss;
      if (p_.sums.loss >= 0) row_[p_.sums.loss] += loss * task_weight;
    }
    if (p_.backward) {
      for_each_parameter([&](int l, int o, int c, int64_t i) {
        const T grad = home_[at_.v + i];
        if (network_.is_dual(l)) {
          const bool of_query = c >= p_.support.count;
          T* const to = of_query ? p_.dual.grad_query : p_.dual.grad_support;
          const int64_t row =
              of_query ? task * p_.query.count + c - p_.support.count : task * p_.support.count + c;
          if (to != nullptr) to[row * at_.width[1] + o] = grad;
          return;
        }
        if (T* const to = element(p_.grad_params, l, task, o, c)) *to = grad;
        if (p_.sums.params >= 0) row_[p_.sums.params + flat(l, o, c)] += grad;
      });
    }
    Team::sync();  // the next task overwrites all this
  }
};

}  // namespace

}  // namespace metafast::cuda
