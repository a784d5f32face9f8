// CPU kernels of the learned optimizer family.
#include "common/threads.h"
#include "learned_optimizer/adjoint.h"

namespace metafast::METAFAST_ISA {

template <typename T>
void load_theta(const T* params, const Span& span, T* row) {
  if (params != nullptr) return load_row(params, span, row);
  std::fill_n(row, kGroup<T>, T(0));
}

// A thread's forward: group after group, all steps of one before the next.
template <typename T>
class Forward {
 public:
  Forward(Arena<T>& arena, const LstmUnroll<T>& p)
      : p_(p),
        takes_long_(p.item_cost() > kLong),
        weights_(arena, p.lstm, p.steps),
        stepper_(arena, weights_),
        theta_(arena.take(kVecs)),
        state_(arena.take(p.lstm.state_rows() * kVecs)) {}

  void run(int64_t begin, int64_t end) {
    for_groups(p_, begin, end, [&](const Span& span) { run_group(span); });
  }

 private:
  void run_group(const Span& span) {
    if (stays_in_place(span)) {
      if (!p_.bfloat16_state) return run_in_place<StateOf<T>>(span);
      if constexpr (sizeof(T) == sizeof(float)) return run_in_place<BFloat16State>(span);
    }
    const Rows<T> rows{state_, kGroup<T>};
    load_state(p_, p_.state, span, state_);
    if (span.count > 0) run_steps<StateOf<T>>(span, rows, rows, 0);
    if (p_.new_state != nullptr) store_state(p_, state_, span, p_.new_state);
  }

  // Not a part of a group, whose empty lanes must stay 0; nor a bfloat16 state of several steps, which is
  // rounded after the last of them alone.
  bool stays_in_place(const Span& span) const {
    return span.count == kGroup<T> && p_.new_state != nullptr &&
           (p_.bfloat16_state ? p_.steps == 1 : p_.steps > 0);
  }

  template <class State>
  void run_in_place(const Span& span) {
    using Element = typename State::Element;
    const int64_t block_size = p_.lstm.state_rows() * kStateBlock;
    const int64_t first = span.block * block_size + span.place;
    const int64_t to_next = span.place + kGroup<T> < kStateBlock ? kGroup<T> : block_size - span.place;
    run_steps<State>(span, {static_cast<const Element*>(p_.state) + first, kStateBlock},
                     {static_cast<Element*>(p_.new_state) + first, kStateBlock}, to_next);
  }

  template <class State>
  void run_steps(const Span& span, Rows<const typename State::Element> before,
                 Rows<typename State::Element> after, int64_t ahead) {
    const auto& item = p_.list[span.item];
    load_theta(item.params, span, theta_);
    for (int64_t k = 0; k < p_.steps; ++k) {
      if (takes_long_) heed_interrupts();
      load_step(item.grads, item.size, k, std::min(k + 1, p_.steps - 1), span, stepper_.gradient);
      stepper_.template run<State>(k, before, after, theta_, ahead);
      before = after;  // where the first step has left it
      if (item.out == nullptr) continue;
      store_row(item.params == nullptr ? stepper_.update : theta_, span, item.out + k * item.size);
    }
  }

  const LstmUnroll<T>& p_;
  const bool takes_long_;  // a work item
  Weights<T> weights_;
  Stepper<T> stepper_;
  T *theta_, *state_;
};

template <typename T>
void run(const LstmUnroll<T>& p, int64_t begin, int64_t end) {
  with_arena<T>([&](Arena<T>& arena) {
    Forward<T> forward(arena, p);
    if (!arena.counts()) forward.run(begin, end);
  });
}

// A thread's backward: the steps of as many groups as its memory holds, then the weights' gradient over all
// of them at once; of a long unroll, parts of the steps of one group, each run again from its first state.
template <typename T>
class Backward {
 public:
  Backward(Arena<T>& arena, const LstmUnrollBackward<T>& p)
      : p_(p),
        forward_(p.forward),
        takes_long_(p.item_cost() > kLong),
        lstm_(p.forward.lstm),
        rows_{lstm_},
        part_(std::max<int64_t>(1, std::min(forward_.steps, slots_in_memory() - 1))),
        parts_((forward_.steps + part_ - 1) / part_),
        max_runs_(std::max<int64_t>(1, std::min(kStepsAtOnce / part_, slots_in_memory() / (part_ + 1)))),
        weights_(arena, lstm_, forward_.steps),
        stepper_(arena, weights_),
        sums_(arena, lstm_, p.sums == nullptr ? 0 : forward_.steps),
        adjoint_(arena, lstm_),
        slots_(arena.take(max_runs_ * (part_ + 1) * rows_.vectors())),
        starts_(arena.take((parts_ + 1) * carried())) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      if (wants_weights()) sums_.clear();
      for_groups(forward_, p_.item_block(item), p_.item_block(item + 1),
                 [&](const Span& span) { run_group(span); });
      if (!wants_weights()) continue;
      finish_runs();
      sums_.finish(weights_, forward_.steps, p_.sums + item * p_.columns());
    }
  }

 private:
  bool wants_weights() const { return p_.sums != nullptr; }
  WeightGradient<T>* sums() { return wants_weights() ? &sums_ : nullptr; }
  int64_t carried() const { return rows_.carried() * kVecs; }     // in vectors
  int64_t slot_size() const { return rows_.rows() * kGroup<T>; }  // in elements
  // A thread holds as many slots as the second-level cache does, but no more groups than give the weights'
  // gradient enough steps at once.
  static constexpr int64_t kStepsAtOnce = 20;
  int64_t slots_in_memory() const {
    constexpr int64_t kCacheBytes = 3 << 18;  // of a second-level cache
    return kCacheBytes / (slot_size() * static_cast<int64_t>(sizeof(T)));
  }
  T* slot(int64_t run, int64_t step) { return slots_ + (run * (part_ + 1) + step) * slot_size(); }
  T* start(int64_t part) { return starts_ + part * rows_.carried() * kGroup<T>; }

  void load_gradient(const Span& span, int64_t k, T* row) const {
    if (takes_long_) heed_interrupts();
    const auto& item = forward_.list[span.item];
    load_step(item.grads, item.size, k, std::min(k + 1, forward_.steps - 1), span, row);
  }

  void find_starts(const Span& span) {
    load_state(forward_, forward_.state, span, start(0));
    load_theta(forward_.list[span.item].params, span, start(0) + rows_.theta() * kGroup<T>);
    for (int64_t part = 0; part + 1 < parts_; ++part) {
      std::copy_n(start(part), rows_.carried() * kGroup<T>, start(part + 1));
      const Rows<T> rows{start(part + 1), kGroup<T>};
      for (int64_t k = part * part_; k < (part + 1) * part_; ++k) {
        load_gradient(span, k, stepper_.gradient);
        stepper_.template run<StateOf<T>>(k, rows, rows, rows[rows_.theta()], 0);
      }
    }
  }

  void run_group(const Span& span) {
    const auto& item = p_.list[span.item];
    if (span.count > 0) {
      find_starts(span);
      load_end(span);
      for (int64_t part = parts_ - 1; part >= 0; --part) run_part(span, part);
    } else {
      std::fill_n(adjoint_.carried, rows_.carried() * kGroup<T>, T(0));
    }
    if (p_.grad_state != nullptr) {
      store_state<StateOf<T>>(adjoint_.carried, lstm_.state_rows(), span, p_.grad_state);
    }
    if (item.grad_params != nullptr && span.count > 0) {
      store_row(adjoint_.carried + rows_.theta() * kGroup<T>, span, item.grad_params);
    }
  }

  // The gradient of what is there after all steps.
  void load_end(const Span& span) {
    std::fill_n(adjoint_.carried, rows_.carried() * kGroup<T>, T(0));
    if (p_.grad_new_state == nullptr) return;
    load_state<StateOf<T>>(p_.grad_new_state, lstm_.state_rows(), span, adjoint_.carried);
  }

  void run_part(const Span& span, int64_t part) {
    const int64_t first = part * part_, count = std::min(part_, forward_.steps - first);
    std::copy_n(start(part), rows_.carried() * kGroup<T>, slot(runs_, 0));
    for (int64_t t = 0; t < count; ++t) {
      load_gradient(span, first + t, slot(runs_, t) + rows_.gradient() * kGroup<T>);
      record_step(weights_, first + t, slot(runs_, t), slot(runs_, t + 1));
    }
    for (int64_t t = count - 1; t >= 0; --t) step(span, first + t, slot(runs_, t), slot(runs_, t + 1));
    if (!wants_weights()) return;
    steps_ = count;
    if (++runs_ == max_runs_) finish_runs();
  }

  void step(const Span& span, int64_t k, T* slot, const T* after) {
    if (takes_long_) heed_interrupts();
    const auto& item = p_.list[span.item];
    const int64_t size = forward_.list[span.item].size;
    T* theta = adjoint_.carried + rows_.theta() * kGroup<T>;
    const bool keeps = forward_.list[span.item].params != nullptr;  // else the update of one step alone
    if (!keeps) std::fill_n(theta, kGroup<T>, T(0));
    if (item.grad_out != nullptr) {
      load_step(item.grad_out, size, k, std::max<int64_t>(k - 1, 0), span, adjoint_.gradient);
      for (int v = 0; v < kVecs; ++v) {
        add_to(theta + v * kLanes<T>, load(adjoint_.gradient + v * kLanes<T>));
      }
    }
    step_backward(weights_, k, slot, after, adjoint_, k > 0 || p_.grad_state != nullptr,
                  item.grad_grads != nullptr, sums());
    if (item.grad_grads != nullptr) store_row(adjoint_.gradient, span, item.grad_grads + k * size);
  }

  void finish_runs() {
    layer_weights(lstm_, {slots_, runs_, (part_ + 1) * slot_size(), steps_, slot_size()}, sums_);
    runs_ = 0;
  }

  const LstmUnrollBackward<T>& p_;
  const LstmUnroll<T>& forward_;
  const bool takes_long_;  // a work item
  const Lstm<T>& lstm_;
  Slot<T> rows_;
  int64_t part_, parts_, max_runs_;  // steps of a part; parts; groups before the weights' gradient
  Weights<T> weights_;
  Stepper<T> stepper_;
  WeightGradient<T> sums_;
  Adjoint<T> adjoint_;
  T* slots_;   // [max_runs, part + 1]
  T* starts_;  // [parts], what was there before each
  int64_t runs_ = 0, steps_ = 0;
};

template <typename T>
void run(const LstmUnrollBackward<T>& p, int64_t begin, int64_t end) {
  with_arena<T>([&](Arena<T>& arena) {
    Backward<T> backward(arena, p);
    if (!arena.counts()) backward.run(begin, end);
  });
}

#define METAFAST_INSTANTIATE(Params)                         \
  template void run(const Params<float>&, int64_t, int64_t); \
  template void run(const Params<double>&, int64_t, int64_t);
METAFAST_INSTANTIATE(LstmUnroll)
METAFAST_INSTANTIATE(LstmUnrollBackward)
#undef METAFAST_INSTANTIATE

}  // namespace metafast::METAFAST_ISA
