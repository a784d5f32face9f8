// The inner loop on the CPU. A group of tasks, as many as the lanes hold (lanes.h), goes through all its
// steps and back before the next begins, in memory of the thread that fits its cache: the parameters of each
// step, never activations of more than one.
//
// The way back from v = dL/dtheta_K needs no graph: for k = K-1, ..., 0
//   M = dL/dm_{k+1} = momentum M - lr v,   v += H_k M,   grad_lr -= v m_{k+1},
// where H_k is the Hessian of the support loss at theta_k, and M = 0 at the start. Without momentum M is v
// but for a factor, so there v serves as M.
//
// A thread holds K + 1 sets of a group's parameters and up to 5 more, K more for a gradient of lr; up to 4 in
// all with first_order and a given lr; 1 or 2 to adapt alone. Where the sets of the steps pass
// p.trajectory_bytes, it keeps every c-th, c = ceil(sqrt(K)), and the c of one stretch between two of them,
// which it finds again by the same steps: 2 c sets in place of K, the same bits. Nothing grows with the
// number of tasks but results.
#pragma once

#include "common/threads.h"
#include "inner_loop/network.h"

namespace metafast::METAFAST_ISA {

template <class Layout, typename T>
class Adaptation {
 public:
  static void run(const InnerLoop<T>& p, int64_t begin, int64_t end) {
    with_arena<T>([&](Arena<T>& arena) {
      Adaptation adaptation(p, arena);
      if (arena.counts()) return;
      if (adaptation.start_stays()) adaptation.load_start();
      for (int64_t item = begin; item < end; ++item) adaptation.run_item(item);
    });
  }

 private:
  static constexpr bool kMayBeDual = std::is_same_v<Layout, FeaturesInLanes<T>>;

  const InnerLoop<T>& p_;
  const bool dual_, trajectory_, reverses_;
  const bool takes_long_;  // an item
  const int64_t stride_;   // of the kept parameters; those between are kept for one stretch at a time
  const bool keeps_buffers_;
  Batch<Layout, T> support_, query_;
  const Parameters<Layout, T> parameters_;
  Network<Layout, T> support_network_, query_network_;
  const int64_t vectors_;
  T* theta_;          // [slots, vectors] with a trajectory, else [1, vectors], overwritten step by step
  T* buffers_;        // momentum m_1, ..., m_K, [slots, vectors], or [1, vectors], or null
  T* v_;              // [vectors], dL/dtheta
  T* m_;              // [vectors], dL/dm, or null where it is v times a number
  T* elements_;       // learning rates of elements, or null
  T* grad_shared_;    // [vectors], sum of v over groups, or null where an item is one group
  T* grad_elements_;  // [vectors], gradient of `elements`, or null
  T* grad_rates_;     // [K, L], in lanes, gradient of `rates`, or null
  T* grad_weights_;   // [K], in lanes, gradient of step_weights, or null
  T* dual_scratch_;   // [S, cols(0)] or null
  Vec<T> losses_, total_loss_, task_weights_;
  int64_t first_;  // of the tasks of the group
  int tasks_;      // of the group
  bool v_unset_;   // v_ is 0, and has not been written
  Vec<T> in_use_;  // 0 in lanes without a task, or whose task no gradient reaches, else 1

  Adaptation(const InnerLoop<T>& p, Arena<T>& arena)
      : p_(p),
        dual_(p.dual.support != nullptr),
        trajectory_(p.keeps_trajectory()),
        reverses_(trajectory_ && !p.sgd.first_order),
        takes_long_(p.item_cost() > kLong),
        stride_(stride_of(p)),
        keeps_buffers_(p.backward && (p.lr_gradient() || (p.sgd.momentum != 0 && stride_ > 1))),
        support_(arena, p.mlp, p.support),
        query_(arena, p.mlp, p.query),
        parameters_(p.mlp, dual_ ? p.support.count + p.query.count : 0),
        support_network_(arena, p.mlp, parameters_, p.support.count, reverses_, p.support.grad_x != nullptr),
        query_network_(arena, p.mlp, parameters_, p.query.count, false, p.query.grad_x != nullptr),
        vectors_(parameters_.vectors()),
        theta_(arena.take((trajectory_ ? slots() : 1) * vectors_)),
        buffers_(
            arena.take_if(keeps_buffers_ || p.sgd.momentum != 0, (keeps_buffers_ ? slots() : 1) * vectors_)),
        v_(arena.take_if(p.backward, vectors_)),
        m_(arena.take_if(reverses_ && !p.m_is_v_scaled(), vectors_)),
        elements_(arena.take_if(p.sgd.rates == nullptr, vectors_)),
        grad_shared_(arena.take_if(p.sums.params >= 0 && p.tasks_per_item() > Layout::kTasks, vectors_)),
        grad_elements_(arena.take_if(p.lr_gradient() && p.sgd.rates == nullptr, vectors_)),
        grad_rates_(arena.take_if(p.lr_gradient() && p.sgd.rates != nullptr, p.sgd.steps * p.mlp.layers)),
        grad_weights_(arena.take_if(p.sums.step_weights >= 0, p.sgd.steps)),
        dual_scratch_(arena.take_if(dual_ && p.lr_gradient(), p.support.count * parameters_.cols(0))) {
    if (dual_) {
      support_.take_dual(arena, p, 0);
      query_.take_dual(arena, p, p.support.count);
    }
    if (arena.counts()) return;
    if (elements_ == nullptr) return;
    clear(elements_, vectors_);
    parameters_.load_elements(p.sgd.elements, elements_);
  }

  // ---- what is kept of the trajectory ----

  static int64_t stride_of(const InnerLoop<T>& p) {
    const Parameters<Layout, T> parameters(p.mlp, p.dual.support ? p.support.count + p.query.count : 0);
    const int64_t sets = (p.sgd.steps + 1) * (p.lr_gradient() ? 2 : 1);
    if (!p.keeps_trajectory() || sets * parameters.vectors() * kVectorBytes <= p.trajectory_bytes) return 1;
    int64_t stride = 1;
    while (stride * stride < p.sgd.steps) ++stride;
    return stride;
  }
  int64_t slots() const { return p_.sgd.steps / stride_ + stride_; }
  // Of theta_k and m_k: the multiples of the stride first, then those between two of them.
  int64_t slot(int64_t k) const {
    return k % stride_ == 0 ? k / stride_ : p_.sgd.steps / stride_ + k % stride_;
  }
  T* theta(int64_t k) const { return theta_ + (trajectory_ ? slot(k) : 0) * vectors_ * kLanes<T>; }
  T* buffer(int64_t k) const { return buffers_ + (keeps_buffers_ ? slot(k) : 0) * vectors_ * kLanes<T>; }

  // Before the way back enters the stretch that ends with step k, its parameters once more.
  void recompute_stretch(int64_t k) {
    if (stride_ == 1 || (k + 1) % stride_ != 0 || k + 1 == p_.sgd.steps) return;
    for (int64_t i = k + 1 - stride_; i < k; ++i) step(i);
    if (p_.lr_gradient()) step(k);  // for m_{k + 1}
  }

  // lr of a layer in a step. By value in the loops over parameters, like every pointer there: their stores
  // could change what is read through `this`, for all that the compiler knows.
  struct Rate {
    const T* elements;
    Vec<T> value;
    METAFAST_HD Vec<T> of(int64_t i) const {
      return elements != nullptr ? Layout::shared(elements, i) : value;
    }
  };
  Rate rate(int64_t k, int l) const {
    if (elements_ != nullptr) return {elements_, Vec<T>{}};
    return {nullptr, broadcast(p_.sgd.rates[k * p_.sgd.step_stride + l * p_.sgd.layer_stride])};
  }

  // ---- work items ----

  void run_item(int64_t item) {
    const int64_t begin = item * p_.tasks_per_item(), end = std::min(p_.tasks, begin + p_.tasks_per_item());
    if (grad_shared_ != nullptr) clear(grad_shared_, vectors_);
    if (grad_elements_ != nullptr) clear(grad_elements_, vectors_);
    if (grad_rates_ != nullptr) clear(grad_rates_, p_.sgd.steps * p_.mlp.layers);
    if (grad_weights_ != nullptr) clear(grad_weights_, p_.sgd.steps);
    total_loss_ = Vec<T>{};
    for (int64_t first = begin; first < end; first += Layout::kTasks) {
      run_group(first, static_cast<int>(std::min<int64_t>(Layout::kTasks, end - first)));
    }
    if (p_.sums.rows == nullptr) return;
    T* sums = p_.sums.rows + item * p_.sums.columns;
    if (p_.sums.loss >= 0) sums[p_.sums.loss] = sum_of_lanes<T>(total_loss_);
    if (p_.sums.params >= 0) {
      parameters_.store_sum(grad_shared_ != nullptr ? grad_shared_ : v_, sums + p_.sums.params);
    }
    if (grad_elements_ != nullptr) parameters_.store_sum(grad_elements_, sums + p_.sums.lr);
    if (grad_rates_ != nullptr) store_sums(grad_rates_, p_.sgd.steps * p_.mlp.layers, sums + p_.sums.lr);
    if (grad_weights_ != nullptr) store_sums(grad_weights_, p_.sgd.steps, sums + p_.sums.step_weights);
  }

  // Whether theta_0 is the same for all groups and none of them overwrites it.
  bool start_stays() const { return p_.mlp.shared && trajectory_; }

  // All of theta_0 that does not depend on the task.
  void load_start() {
    parameters_.clear_padding(theta(0));  // where the task before may have left NaN
    if (dual_) clear(theta(0), parameters_.offset(1));
    if (p_.mlp.shared) parameters_.load_shared(p_.mlp.params, theta(0));
  }

  static void store_sums(const T* in_lanes, int64_t count, T* sums) {
    for (int64_t i = 0; i < count; ++i) sums[i] = sum_of_lanes<T>(load(in_lanes + i * kLanes<T>));
  }

  void run_group(int64_t first, int tasks) {
    first_ = first;
    tasks_ = tasks;
    in_use_ = Vec<T>{};
    task_weights_ = losses_ = Vec<T>{};
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const int task = lane % Layout::kTasks;
      if (task >= tasks) continue;
      const T weight = p_.task_weights ? p_.task_weights[(first + task) * p_.task_weight_stride] : T(1);
      in_use_[lane] = weight != 0;
      task_weights_[lane] = p_.loss_scale * weight;
    }
    support_.load_tasks(p_.support, first, tasks);
    if (!start_stays()) load_start();
    if (!p_.mlp.shared) parameters_.load_tasks(p_.mlp.params, first, tasks, theta(0));
    if (p_.has_query()) query_.load_tasks(p_.query, first, tasks);
    if constexpr (kMayBeDual) {
      if (dual_) {
        support_.load_dual(p_.dual.support, support_, query_, first);
        query_.load_dual(p_.dual.query, support_, query_, first);
      }
    }
    if (p_.backward) start_backward();

    if (!trajectory_ && p_.has_query() && p_.sgd.steps == 0) query_step(0, 1);
    const bool adapts = trajectory_ || p_.has_query() || p_.adapted[0] != nullptr;
    for (int64_t k = 0; k < p_.sgd.steps && adapts; ++k) {
      step(k);
      if (!trajectory_) query_after(k + 1);
    }
    if (p_.adapted[0] != nullptr) parameters_.store_tasks(theta(p_.sgd.steps), first, tasks, p_.adapted);
    if (trajectory_) {
      for (int64_t k = p_.sgd.steps - 1; k >= 0; --k) {
        query_after(k + 1);
        recompute_stretch(k);
        step_back(k);
      }
    }
    finish();
  }

  void start_backward() {
    v_unset_ = true;
    if (dual_ || p_.grad_adapted[0] != nullptr) clear_unset_v();
    if (p_.grad_adapted[0] != nullptr) parameters_.load_tasks(p_.grad_adapted, first_, tasks_, v_);
  }

  void clear_unset_v() {
    if (v_unset_) clear(v_, vectors_);
    v_unset_ = false;
  }

  void finish() {
    total_loss_ += in_use(losses_ * task_weights_);
    if (p_.losses != nullptr) {
      for (int t = 0; t < tasks_; ++t) {
        T sum = 0;
        for (int lane = t; lane < kLanes<T>; lane += Layout::kTasks) sum += losses_[lane];
        p_.losses[first_ + t] = sum;
      }
    }
    if (!p_.backward) return;
    clear_unset_v();
    keep_in_use(v_, vectors_);
    if (p_.grad_params[2 * p_.mlp.layers - 1] != nullptr)
      parameters_.store_tasks(v_, first_, tasks_, p_.grad_params);
    if (dual_ && p_.dual.grad_support != nullptr) {
      const T* v = v_ + parameters_.offset(0) * kLanes<T>;
      support_.store_tasks(v, p_.mlp.widths[1], first_, 1, p_.dual.grad_support);
      v += support_.samples * parameters_.cols(0) * kLanes<T>;
      query_.store_tasks(v, p_.mlp.widths[1], first_, 1, p_.dual.grad_query);
    }
    for (int64_t i = 0; grad_shared_ != nullptr && i < vectors_ * kLanes<T>; i += kLanes<T>) {
      store(grad_shared_ + i, load(grad_shared_ + i) + load(v_ + i));
    }
    store_examples(p_.support, support_);
    store_examples(p_.query, query_);
  }

  void store_examples(const Examples<T>& examples, const Batch<Layout, T>& batch) const {
    keep_in_use(batch.grad_x, batch.rows * Layout::row(batch.features));
    keep_in_use(batch.grad_y, batch.rows * batch.out_pitch);
    keep_in_use(batch.grad_share, batch.rows);
    if (examples.grad_x) batch.store_tasks(batch.grad_x, batch.features, first_, tasks_, examples.grad_x);
    if (examples.grad_y) batch.store_tasks(batch.grad_y, batch.outputs, first_, tasks_, examples.grad_y);
    if (examples.grad_weights) batch.store_weights(examples, first_, tasks_);
  }

  // ---- steps ----

  void heed() const {
    if (takes_long_) heed_interrupts();
  }

  void step(int64_t k) {
    heed();
    const T momentum = k > 0 ? p_.sgd.momentum : T(0);
    const T *theta = this->theta(k), *old_buffer = momentum != 0 ? buffer(k) : nullptr;
    T *next = this->theta(k + 1), *new_buffer = buffers_ ? buffer(k + 1) : nullptr;
    differentiate_support(k);
    const auto update = [&](const auto& consumer) {
      support_network_.gradient(theta, without_gradients(support_), consumer);
    };
    if (new_buffer == nullptr && elements_ == nullptr) {
      update([&](int l) {
        return [theta, next, lr = rate(k, l).value](int64_t i, Vec<T> grad) __attribute__((always_inline)) {
          store(next + i * kLanes<T>, load(theta + i * kLanes<T>) - lr * grad);
        };
      });
    } else {
      update([&](int l) {
        return [=, lr = rate(k, l)](int64_t i, Vec<T> grad) __attribute__((always_inline)) {
          if (old_buffer != nullptr) grad += momentum * load(old_buffer + i * kLanes<T>);
          if (new_buffer != nullptr) store(new_buffer + i * kLanes<T>, grad);
          store(next + i * kLanes<T>, load(theta + i * kLanes<T>) - lr.of(i) * grad);
        };
      });
    }
  }

  void differentiate_support(int64_t k, int first_layer = 1) {
    support_network_.forward(theta(k), support_);
    support_network_.backward(theta(k), support_, Vec<T>{} + 1, first_layer);
  }

  static Batch<Layout, T> without_gradients(Batch<Layout, T> batch) {
    batch.grad_x = batch.grad_y = nullptr;
    return batch;
  }

  // The query loss after k >= 1 steps, where it counts.
  void query_after(int64_t k) {
    if (!p_.has_query()) return;
    const T weight = p_.step_weights ? p_.step_weights[k - 1] : T(k == p_.sgd.steps);
    if (weight != 0 || grad_weights_ != nullptr) query_step(k, weight);
  }

  void query_step(int64_t k, T weight) {
    heed();
    query_network_.forward(theta(k), query_);
    const Vec<T> loss = query_network_.loss(query_);
    if (grad_weights_ != nullptr) add_in_use(grad_weights_ + (k - 1) * kLanes<T>, task_weights_ * loss);
    if (weight == 0) return;
    losses_ += weight * loss;
    if (!p_.backward) return;
    if (query_.grad_share != nullptr) query_network_.add_share_gradient(query_, weight * task_weights_);
    query_network_.backward(theta(k), query_, weight * task_weights_);
    const auto consume = [&](const auto& consumer) {
      query_network_.gradient(theta(k), query_, [&](int) { return consumer; });
    };
    if (v_unset_) {
      consume([v = v_](int64_t i, Vec<T> grad)
                  __attribute__((always_inline)) { store(v + i * kLanes<T>, grad); });
    } else {
      consume(add_to_v());
    }
    v_unset_ = false;
  }

  auto add_to_v() const {
    return [v = v_](int64_t i, Vec<T> grad)
               __attribute__((always_inline)) { store(v + i * kLanes<T>, load(v + i * kLanes<T>) + grad); };
  }

  void step_back(int64_t k) {
    heed();
    clear_unset_v();
    for (int l = 0; l < p_.mlp.layers && p_.lr_gradient(); ++l) add_rate_gradient(k, l);
    if (!reverses_) return;
    if (k + 1 < p_.sgd.steps) {  // else the step has left it so
      differentiate_support(k, support_network_.first_of_hessian(support_));
    }
    if (m_ == nullptr) {  // M = -lr v, and the product is linear in it
      support_network_.hessian_product(theta(k), v_, support_,
                                       [v = v_, lr = rate(k, 0).value](int64_t i, Vec<T> product)
                                           __attribute__((always_inline)) {
                                             store(v + i * kLanes<T>, load(v + i * kLanes<T>) - lr * product);
                                           });
      return;
    }
    const T momentum = k + 1 < p_.sgd.steps ? p_.sgd.momentum : T(0);
    for (int l = 0; l < p_.mlp.layers; ++l) {
      T* const m = m_;
      const T* const v = v_;
      const Rate lr = rate(k, l);
      const int64_t end = parameters_.offset(l + 1) * kLanes<T>;
      for (int64_t i = parameters_.offset(l) * kLanes<T>; i < end; i += kLanes<T>) {
        const Vec<T> own = -lr.of(i / kLanes<T>) * load(v + i);
        store(m + i, momentum != 0 ? own + momentum * load(m + i) : own);
      }
    }
    support_network_.hessian_product(theta(k), m_, support_, add_to_v());
  }

  // Of lr in step k, layer l: -v m_{k+1}.
  void add_rate_gradient(int64_t k, int l) {
    Vec<T> sum{};
    if constexpr (kMayBeDual) {
      if (dual_ && l == 0) {  // <v, m> = sum over support s of m_s (v x_s)
        const int64_t cols = parameters_.cols(0);
        const T* m = buffer(k + 1) + parameters_.offset(0) * kLanes<T>;
        support_network_.dual_product(v_, support_.dual.examples, support_, dual_scratch_, cols);
        for (int64_t i = 0; i < support_.samples * cols * kLanes<T>; i += kLanes<T>) {
          sum -= load(dual_scratch_ + i) * load(m + i);
        }
        add_in_use(grad_rates_ + k * p_.mlp.layers * kLanes<T>, sum);
        return;
      }
    }
    for (int64_t i = parameters_.offset(l); i < parameters_.offset(l + 1); ++i) {
      const Vec<T> product = load(v_ + i * kLanes<T>) * load(buffer(k + 1) + i * kLanes<T>);
      sum -= product;
      if (grad_elements_ != nullptr) add_in_use(grad_elements_ + i * kLanes<T>, -product);
    }
    if (grad_rates_ != nullptr) add_in_use(grad_rates_ + (k * p_.mlp.layers + l) * kLanes<T>, sum);
  }

  // Lanes not in use may hold anything, NaN too.
  void keep_in_use(T* array, int64_t vectors) const {
    if (array == nullptr || !any<T>(in_use_ == Vec<T>{})) return;
    for (int64_t i = 0; i < vectors * kLanes<T>; i += kLanes<T>) store(array + i, in_use(load(array + i)));
  }
  METAFAST_HD Vec<T> in_use(Vec<T> v) const { return in_use_ > Vec<T>{} ? v : Vec<T>{}; }
  METAFAST_HD void add_in_use(T* to, Vec<T> v) const { store(to, load(to) + in_use(v)); }
  static void clear(T* array, int64_t vectors) { std::fill_n(array, vectors * kLanes<T>, T(0)); }
};

}  // namespace metafast::METAFAST_ISA
