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
        item_(static_cast<int>(item)),
        scratch_(reinterpret_cast<T*>(shared)),
        network_{plan.p.mlp, plan.at, nullptr, nullptr} {
    T* const behind = scratch_ + padded<T>(Team::kWarps);
    home_ = kResident ? behind : steps_memory_ + at_.steps;
    network_.home = home_;
    network_.stage = kResident ? nullptr : behind;
  }

  // Before the first task: zeros in what pads matrices, the constant feature in activations, and where all
  // tasks start from the same parameters and return to them, these.
  __device__ __forceinline__ void start() const {
    Team::for_each(at_.home, [&](int64_t i) { home_[i] = 0; });
    if constexpr (!kResident) {  // parameters of all steps are operands
      if (at_.slots >= 0) {
        const int64_t size = (p_.sgd.steps + 1) * at_.weights[p_.mlp.layers];
        Team::for_each(size, [&](int64_t i) { steps_memory_[at_.slots + i] = 0; });
      }
    }
    if (p_.sums.rows != nullptr) Team::for_each(p_.sums.columns, [&](int64_t i) { row()[i] = 0; });
    Team::sync();
    if (start_stays()) load_set(p_.mlp.params, 0, slot(0));
    if (at_.rates >= 0) load_set(p_.sgd.elements, 0, steps_memory_ + at_.rates);
    for (int l = 1; l < p_.mlp.layers; ++l) {
      Team::for_each(at_.samples,
                     [&](int64_t s) { home_[at_.out[l] + s * at_.pitch[l] + at_.width[l]] = 1; });
    }
    Team::sync();
  }

  __device__ __forceinline__ void run(int64_t task) const {
    const Batch<T> support = load_examples(task, false), query = load_examples(task, true);
    if (network_.is_dual(0)) load_products(task);
    if (!start_stays()) {
      load_set(p_.mlp.params, p_.mlp.shared ? 0 : task, theta(0));
    } else if (kResident) {
      return_to(0);
    }
    if (p_.backward) load_v(task);
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
    T loss = 0;
    for (int i = 0; i <= last; ++i) {
      const int k = i <= steps ? i : 2 * steps - i;
      if (i == steps && wants_adapted_) store_adapted(task);
#pragma unroll 1
      for (int of_query = !returns || i >= steps; of_query >= 0; --of_query) {
        if (of_query ? !query_counts(k) : i >= steps) continue;
        const T weight = of_query ? query_weight(k) : T(1);
        Batch<T> batch = support;
        batch.of_query = batch.has_grads = of_query;  // those of the support are of the way back
        batch.share = of_query ? query.share : support.share;
        const T part = pass(batch, k, of_query ? weight * task_weight : weight,
                            of_query ? p_.backward && weight != T(0) : true, /*updates=*/!of_query);
        if (of_query) loss += weigh_query_loss(part, query.empty, k, weight, task_weight);
      }
      if (i >= steps && i < last) step_back(support, k - 1);
    }
#pragma unroll 1
    for (int of_query = p_.has_query(); of_query >= 0; --of_query) finish_weights(task, of_query);
    finish(task, Team::sum(loss, scratch_), task_weight);
  }

 private:
  const InnerLoop<T>& p_;
  const Layout<T>& at_;
  const bool wants_adapted_;
  T* steps_memory_;  // in the workspace
  int item_;         // among all teams
  T* scratch_;       // [Team::kWarps]
  T* home_;
  Network<Team, Products, T> network_;

  // Of sums; found anew wherever it is used, since registers are few.
  __device__ __forceinline__ T* row() const { return p_.sums.rows + item_ * p_.sums.columns; }

  // ---- parameters ----

  __device__ __forceinline__ T* slot(int64_t k) const {
    return steps_memory_ + at_.slots + k * at_.weights[p_.mlp.layers];
  }
  __device__ __forceinline__ T* theta(int64_t k) const {
    return kResident || at_.theta >= 0 ? home_ + at_.theta : slot(k);
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

  // lr of a layer in a step, at element i of a set of parameters and those behind it.
  struct Rate {
    const T* elements;  // a set, or null
    T value;
    template <int kLength>
    __device__ __forceinline__ Vector<T, kLength> of(int64_t i) const {
      if (elements != nullptr) return load_row<kLength>(elements + i);
      Vector<T, kLength> same;
#pragma unroll
      for (int e = 0; e < kLength; ++e) same.values[e] = value;
      return same;
    }
  };
  __device__ __forceinline__ Rate rate(int64_t k, int l) const {
    const Sgd<T>& sgd = p_.sgd;
    if (at_.rates >= 0) return {steps_memory_ + at_.rates, T(0)};
    return {nullptr, sgd.rates[k * sgd.step_stride + l * sgd.layer_stride]};
  }

  // ---- the start, and what a step has kept ----

  // Whether slot(0) holds what all tasks start from.
  __device__ __forceinline__ bool start_stays() const { return p_.mlp.shared && at_.slots >= 0; }

  // A set from arrays of the shapes of parameters, and zeros in the padding of its rows, and for a layer in
  // dual form.
  __device__ __forceinline__ void load_set(const T* const* arrays, int64_t task, T* to) const {
    for (int l = 0; l < p_.mlp.layers; ++l) {
      const int columns = at_.columns[l], rows = at_.width[l + 1];
      Team::copy_each(
          rows, static_cast<int>(padded<T>(columns)),
          [&](int o, int c) {
            const bool zero = network_.is_dual(l) || c >= columns;
            return zero ? T(0) : *element(arrays, l, task, o, c);
          },
          [&](int o, int c, T value) { to[at_.weights[l] + o * at_.pitch[l] + c] = value; });
    }
  }

  // theta = theta_k.
  __device__ __forceinline__ void return_to(int k) const {
    constexpr int kLength = kVectorLength<T>;
    const T* const from = slot(k);
    T* const theta = home_ + at_.theta;
    for (int l = 0; l < p_.mlp.layers; ++l) {
      if (network_.is_dual(l)) {  // of queries it stays 0
        Team::for_each(at_.width[l + 1], static_cast<int>(p_.support.count), [&](int o, int c) {
          const int64_t i = at_.weights[l] + o * at_.pitch[l] + c;
          theta[i] = from[i];
        });
        continue;
      }
      Team::copy_each(
          at_.width[l + 1], div_up(at_.columns[l], kLength),
          [&](int o, int c) {
            return load_vector<kLength>(from + (at_.weights[l] + o * at_.pitch[l] + c * kLength));
          },
          [&](int o, int c, const Vector<T, kLength>& vector) {
            store_vector(theta + (at_.weights[l] + o * at_.pitch[l] + c * kLength), vector);
          });
    }
  }

  // What the gradient begins with: that of theta_K.
  __device__ __forceinline__ void load_v(int64_t task) const {
    bool given = false;
    for (int i = 0; i < 2 * p_.mlp.layers; ++i) given |= p_.grad_adapted[i] != nullptr;
    if (!given) {
      constexpr int kLength = kVectorLength<T>;
      Team::for_each(at_.weights[p_.mlp.layers] / kLength,
                     [&](int64_t i) { store_vector(home_ + at_.v + i * kLength, Vector<T, kLength>{}); });
      return;
    }
    for_each_parameter([&](int l, int o, int c, int64_t i) {
      const T* const grad = element(p_.grad_adapted, l, task, o, c);
      home_[at_.v + i] = grad != nullptr ? *grad : T(0);
    });
  }

  // ---- examples ----

  __device__ __forceinline__ Batch<T> load_examples(int64_t task, bool of_query) const {
    Batch<T> batch{p_, at_, task, of_query, T(0), true, true};
    if (of_query && !p_.has_query()) return batch;
    const Examples<T>& from = of_query ? p_.query : p_.support;
    const int count = batch.count(), features = at_.width[0], outputs = at_.width[p_.mlp.layers];
    const int64_t row = batch.row();
    T* const x = home_ + batch.x();
    if (!network_.is_dual(0)) {
      Team::for_each(count, features + 1, [&](int s, int i) {
        x[s * at_.pitch[0] + i] = i < features ? from.x[(row + s) * features + i] : T(1);
      });
    }
    if (T* const grad_x = batch.grad_x()) {
      Team::for_each(static_cast<int64_t>(count) * features, [&](int64_t i) { grad_x[i] = 0; });
    }
    if (T* const grad_y = batch.grad_y()) {
      Team::for_each(static_cast<int64_t>(count) * outputs, [&](int64_t i) { grad_y[i] = 0; });
    }
    if (T* const grad_weights = batch.grad_weights()) {
      Team::for_each(count, [&](int64_t s) { grad_weights[s] = 0; });
    }
    if (from.labels == nullptr && from.weights == nullptr) {
      batch.share = T(1) / static_cast<T>(from.count * outputs);
      batch.empty = count == 0;
      return batch;
    }
    T total = 0;
    Team::for_each(from.count, [&](int64_t s) {
      const int64_t label = from.labels == nullptr ? 0 : from.labels[row + s];
      METAFAST_DEVICE_CHECK(label == kIgnoreLabel || (label >= 0 && label < outputs),
                            "labels: expected classes in [0, O) or -100 (ignored)");
      if (label != kIgnoreLabel) total += from.weights == nullptr ? T(1) : from.weights[row + s];
    });
    total = Team::sum(total, scratch_);
    batch.empty = total == 0;
    batch.share = batch.empty ? T(0) : T(1) / (total * terms(from));
    return batch;
  }

  // Of which the loss of an example is the mean.
  __device__ __forceinline__ T terms(const Examples<T>& examples) const {
    return T(examples.labels == nullptr ? at_.width[p_.mlp.layers] : 1);
  }

  // The gradients of the weights w, from those g of the shares w_s / (terms sum w):
  // (g_s - sum w g / sum w) / (terms sum w). What is left out has none.
  __device__ __forceinline__ void finish_weights(int64_t task, bool of_query) const {
    const Examples<T>& from = of_query ? p_.query : p_.support;
    if (from.grad_weights == nullptr) return;
    const int64_t row = task * from.count;
    T* const grads = from.grad_weights + row;
    const auto weight_of = [&](int64_t s) {
      const bool ignored = from.labels != nullptr && from.labels[row + s] == kIgnoreLabel;
      return ignored ? T(0) : from.weights[row + s];
    };
    Team::sync();
    T total = 0, weighed = 0;
    Team::for_each(from.count, [&](int64_t s) {
      const T weight = weight_of(s);
      total += weight;
      if (weight != T(0)) weighed += weight * grads[s];
    });
    total = Team::sum(total, scratch_);
    const T mean = Team::sum(weighed, scratch_) / total;
    Team::for_each(from.count, [&](int64_t s) {
      const bool counts = weight_of(s) != T(0) && total != T(0);
      grads[s] = counts ? (grads[s] - mean) / (terms(from) * total) : T(0);
    });
  }

  // In dual form the inner products of all examples with those of the support, the 1 of the bias included. A
  // warp takes one example and some of the support at a time.
  __device__ __forceinline__ void load_products(int64_t task) const {
    constexpr int kAtOnce = 4, kLength = kVectorLength<T>;
    const int support = at_.support, features = at_.width[0];
    const int examples = support + static_cast<int>(p_.query.count), groups = div_up(support, kAtOnce);
    const T* const of_support = p_.support.x + task * support * features;
    const T* const of_query = p_.query.x + task * p_.query.count * features;
    const bool in_vectors =
        features % kLength == 0 &&
        (reinterpret_cast<std::uintptr_t>(of_support) | reinterpret_cast<std::uintptr_t>(of_query)) % 16 == 0;
    for (int i = Team::warp(); i < examples * groups; i += Team::kWarps) {
      const int e = i / groups, first = i % groups * kAtOnce;
      const T* const x = e < support ? of_support + static_cast<int64_t>(e) * features
                                     : of_query + static_cast<int64_t>(e - support) * features;
      const T* y[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        y[j] = of_support + static_cast<int64_t>(min(first + j, support - 1)) * features;
      }
      T sums[kAtOnce] = {};
      if (in_vectors) {
#pragma unroll 1
        for (int d = Team::lane() * kLength; d < features; d += kWarpSize * kLength) {
          const auto a = load_vector<kLength>(x + d);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const auto b = load_vector<kLength>(y[j] + d);
#pragma unroll
            for (int v = 0; v < kLength; ++v) sums[j] += a.values[v] * b.values[v];
          }
        }
      } else {
#pragma unroll 1
        for (int d = Team::lane(); d < features; d += kWarpSize) {
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) sums[j] += x[d] * y[j][d];
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const T product = warp_sum(sums[j]) + 1;
        const int s = first + j;
        if (Team::lane() != 0 || s >= support) continue;
        T* const own = home_ + (e < support ? at_.support_x + e * at_.pitch[0]
                                            : at_.query_x + (e - support) * at_.pitch[0]);
        own[s] = product;
        if (e >= support) home_[at_.support_x + s * at_.pitch[0] + e] = product;
      }
    }
  }

  // ---- steps ----

  // What a gradient of layer l does: it is added to v, or updates the parameters.
  struct Update {
    const Adaptation& owner;
    int l;
    bool updates;
    T momentum;
    const T* from;        // theta_k, or v
    T* to;                // theta_{k+1}, or v
    T* saved;             // where theta_k is kept, or null
    const T* old_buffer;  // m_k, or null: 0
    T* new_buffer;        // m_{k+1}, or null: not needed
    Rate lr;

    __device__ __forceinline__ int64_t index(int o, int c) const {
      return owner.at_.weights[l] + o * owner.network_.pitch(l) + c;
    }
    template <int kCount>
    __device__ __forceinline__ Vector<T, kCount> load(int o, int c) const {
      return load_row<kCount>(from + index(o, c));
    }
    template <int kCount>
    __device__ __forceinline__ void store(int o, int c, const T (&grads)[kCount],
                                          Vector<T, kCount> row) const {
      const int64_t i = index(o, c);
      if (!updates) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) row.values[j] += grads[j];
        return store_row(to + i, row);
      }
      if (saved != nullptr) store_row(saved + i, row);
      Vector<T, kCount> step;
#pragma unroll
      for (int j = 0; j < kCount; ++j) step.values[j] = grads[j];
      if (old_buffer != nullptr) {
        const auto old = load_row<kCount>(old_buffer + i);
#pragma unroll
        for (int j = 0; j < kCount; ++j) step.values[j] += momentum * old.values[j];
      }
      if (new_buffer != nullptr) store_row(new_buffer + i, step);
      const auto rates = lr.template of<kCount>(i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) row.values[j] -= rates.values[j] * step.values[j];
      store_row(to + i, row);
    }
  };

  // Forward and, where it `differentiates`, backward of a batch at theta_k. The gradient updates the
  // parameters, or, times `weight`, is added to v. Returns a thread's part of the loss.
  __device__ __forceinline__ T pass(const Batch<T>& batch, int k, T weight, bool differentiates,
                                    bool updates) const {
    network_.forward(theta(k), batch);
    const bool saves = kResident && p_.keeps_trajectory() && !(k == 0 && start_stays());
    const T momentum = k > 0 ? p_.sgd.momentum : T(0);
    const auto consumer_of = [&](int l) {
      return Update{*this,
                    l,
                    updates,
                    momentum,
                    updates ? theta(k) : home_ + at_.v,
                    updates ? theta(k + 1) : home_ + at_.v,
                    saves ? slot(k) : nullptr,
                    momentum != 0 ? buffer(k) : nullptr,
                    buffer(k + 1),
                    rate(updates ? k : 0, l)};
    };
    const auto consume_coordinates = [&](const T* grads) {
      const int pitch = network_.pitch(0), first = batch.first();
      if (!updates) {
        T* const v = home_ + at_.v;
        Team::copy_each(
            batch.count(), at_.width[1], [&](int s, int o) { return v[o * pitch + first + s]; },
            [&](int s, int o, T sum) { v[o * pitch + first + s] = sum + grads[s * network_.pitch(1) + o]; });
        return;
      }
      Team::for_each(batch.count(), at_.width[1], [&, consumer = consumer_of(0)](int s, int o) {
        const T grad[1] = {grads[s * network_.pitch(1) + o]};
        consumer.store(o, first + s, grad, consumer.template load<1>(o, first + s));
      });
    };
    return network_.backward(theta(k), batch, weight, differentiates, consumer_of, consume_coordinates);
  }

  // The weight of the query loss after k steps, and whether anything depends on that loss.
  __device__ __forceinline__ T query_weight(int k) const {
    if (p_.step_weights == nullptr) return T(k == p_.sgd.steps);
    return k == 0 ? T(0) : p_.step_weights[k - 1];
  }
  __device__ __forceinline__ bool wants_step_weight(int k) const {
    return p_.sums.step_weights >= 0 && k > 0;
  }
  __device__ __forceinline__ bool query_counts(int k) const {
    return p_.has_query() && (query_weight(k) != T(0) || wants_step_weight(k));
  }

  // A thread's part of the loss, from its part of the query loss after k steps.
  __device__ __forceinline__ T weigh_query_loss(T loss, bool undefined, int k, T weight,
                                                T task_weight) const {
    if (undefined) loss = std::numeric_limits<T>::quiet_NaN();
    if (wants_step_weight(k)) {
      const T sum = Team::sum(loss, scratch_);
      if (Team::rank() == 0) row()[p_.sums.step_weights + k - 1] += task_weight * sum;
    }
    return weight == T(0) ? T(0) : weight * loss;
  }

  // v becomes dL/dtheta_k; it was dL/dtheta_{k+1}.
  __device__ __forceinline__ void step_back(const Batch<T>& support, int k) const {
    if (kResident || at_.theta >= 0) return_to(k);
    const T momentum = k + 1 < p_.sgd.steps ? p_.sgd.momentum : T(0);
    const bool wants_rates = p_.lr_gradient(), wants_elements = wants_rates && p_.sgd.rates == nullptr;
    const T *const v = home_ + at_.v, *const used = wants_rates ? buffer(k + 1) : nullptr;
    T* const m = at_.m >= 0 ? home_ + at_.m : nullptr;
    for (int l = 0; l < p_.mlp.layers && (wants_rates || m != nullptr); ++l) {
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
        if (wants_elements) row()[p_.sums.lr + flat(l, o, c)] -= product;
        if (m == nullptr) return;
        const T own = -lr.template of<1>(i).values[0] * v[i];
        m[i] = momentum != 0 ? own + momentum * m[i] : own;
      });
      if (!wants_rates || wants_elements) continue;
      sum = Team::sum(sum, scratch_);
      if (Team::rank() == 0) row()[p_.sums.lr + k * p_.mlp.layers + l] += sum;
    }
    Team::sync();
    if (p_.sgd.first_order) return;
    network_.add_hessian_product(theta(k), home_ + (at_.m >= 0 ? at_.m : at_.v), support,
                                 at_.m >= 0 ? T(1) : -rate(k, 0).value, home_ + at_.v);
  }

  // The inner product of example s of the support with the row of the first layer that has coordinates v [E].
  __device__ __forceinline__ T dual_product(const Batch<T>& support, int s, const T* v) const {
    T sum = 0;
    const T* const products = home_ + support.x() + s * at_.pitch[0];
    for (int e = 0; e < at_.columns[0]; ++e) sum += products[e] * v[e];
    return sum;
  }

  // ---- results ----

  __device__ __forceinline__ void store_adapted(int64_t task) const {
    const T* const theta = this->theta(p_.sgd.steps);
    for_each_parameter([&](int l, int o, int c, int64_t i) {
      if (T* const to = element(p_.adapted, l, task, o, c)) *to = theta[i];
    });
  }

  // Where the gradient of a coordinate of the dual form goes, or null.
  __device__ __forceinline__ T* coordinate(int64_t task, int o, int c) const {
    const int64_t support = p_.support.count;
    T* const to = c < support ? p_.dual.grad_support : p_.dual.grad_query;
    const int64_t row = c < support ? task * support + c : task * p_.query.count + c - support;
    return to == nullptr ? nullptr : to + row * at_.width[1] + o;
  }

  // `loss` of the task, in every thread.
  __device__ __forceinline__ void finish(int64_t task, T loss, T task_weight) const {
    if (Team::rank() == 0) {
      if (p_.losses != nullptr) p_.losses[task] = loss;
      if (p_.sums.loss >= 0) row()[p_.sums.loss] += loss * task_weight;
    }
    if (p_.backward) {
      for (int l = 0; l < p_.mlp.layers; ++l) {
        const T* const v = home_ + at_.v + at_.weights[l];
        const bool dual = network_.is_dual(l);
        if (!dual && p_.grad_params[2 * l] == nullptr && p_.grad_params[2 * l + 1] == nullptr) continue;
        Team::copy_each(
            at_.width[l + 1], at_.columns[l], [&](int o, int c) { return v[o * at_.pitch[l] + c]; },
            [&](int o, int c, T grad) {
              T* const to = dual ? coordinate(task, o, c) : element(p_.grad_params, l, task, o, c);
              if (to != nullptr) *to = grad;
            });
      }
      for (int l = network_.is_dual(0); l < p_.mlp.layers && p_.sums.params >= 0; ++l) {
        T* const sums = row() + p_.sums.params;
        Team::copy_each(
            at_.width[l + 1], at_.columns[l], [&](int o, int c) { return sums[flat(l, o, c)]; },
            [&](int o, int c, T sum) {
              sums[flat(l, o, c)] = sum + home_[at_.v + at_.weights[l] + o * at_.pitch[l] + c];
            });
      }
    }
    Team::sync();  // the next task overwrites all this
  }
};

}  // namespace

}  // namespace metafast::cuda
