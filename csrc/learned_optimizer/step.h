// A step of a group of coordinates: in place, or recorded for the backward.
#pragma once

#include "learned_optimizer/cell.h"

namespace metafast::METAFAST_ISA {

// Steps where the state lies, one after the other.
template <typename T>
class Stepper {
 public:
  Stepper(Arena<T>& arena, const Weights<T>& weights)
      : gradient(arena.take(kVecs)),
        update(arena.take(kVecs)),
        weights_(weights),
        inputs_(arena.take(weights.lstm.own_inputs() * kVecs)),
        old_h_(arena.take(weights.lstm.hidden * kVecs)),
        new_h_{arena.take(weights.lstm.hidden * kVecs), arena.take(weights.lstm.hidden * kVecs)} {}

  T* const gradient;  // in
  T* const update;    // out, with Head::update

  // `before` and `after`, rows of the state, may be the same. It prefetches the group whose rows lie `ahead`
  // elements behind these: they are so far apart that no processor guesses it.
  template <class State>
  void run(int64_t step, Rows<const typename State::Element> before, Rows<typename State::Element> after,
           T* theta, int64_t ahead) {
    const Lstm<T>& lstm = weights_.lstm;
    const auto fetch = [&](int64_t row) __attribute__((always_inline)) {
      for (int v = 0; v < kVecs; ++v) __builtin_prefetch(before[row] + ahead + v * kLanes<T>);
    };
    find_inputs(weights_, gradient, inputs_);
    const T* x = inputs_;
    for (int l = 0; l < lstm.layers; ++l) {
      const int64_t h = lstm.h_row(l), c = lstm.c_row(l);
      for (int64_t u = 0; u < lstm.hidden; ++u) {
        fetch(h + u);
        for (int v = 0; v < kVecs; ++v) {
          store(old_h_ + u * kGroup<T> + v * kLanes<T>, State::read(before[h + u] + v * kLanes<T>));
        }
      }
      T* new_h = new_h_[l % 2];
      lstm_layer<false>(
          weights_, l, step,
          LayerRows<State, T>{x, old_h_, before.from(c), after.from(c), after.from(h), new_h, nullptr},
          [&](int64_t u, int64_t count) __attribute__((always_inline)) {
            for (int64_t i = 0; i < count; ++i) fetch(c + u + i);
          });
      x = new_h;
    }
    apply_head<State>(weights_, step, x, gradient, before, after, theta, theta, update);
  }

 private:
  const Weights<T>& weights_;
  T *inputs_, *old_h_, *new_h_[2];
};

// A step in memory, rows of a group: what was there before it (the packed state's rows, then theta), what
// came in, and the gates [H, 4] of each layer. The backward keeps steps one behind the other, so that what is
// there after a step is the next one's `before`.
template <typename T>
struct Slot {
  const Lstm<T>& lstm;

  int64_t theta() const { return lstm.state_rows(); }
  int64_t carried() const { return theta() + 1; }  // rows that go from step to step
  int64_t inputs() const { return carried(); }
  int64_t gradient() const { return inputs() + lstm.own_inputs(); }
  int64_t gates(int l) const { return gradient() + 1 + l * 4 * lstm.hidden; }
  int64_t rows() const { return gates(lstm.layers); }
  int64_t vectors() const { return rows() * kVecs; }
};

// A whole step of a slot: its `gradient` row is there, and `before`; `after` has the rows that go on.
template <typename T>
void record_step(const Weights<T>& weights, int64_t step, T* slot, T* after) {
  using State = StateOf<T>;
  const Lstm<T>& lstm = weights.lstm;
  const Slot<T> rows{lstm};
  const Rows<T> old_rows{slot, kGroup<T>}, new_rows{after, kGroup<T>};
  find_inputs(weights, old_rows[rows.gradient()], old_rows[rows.inputs()]);
  const T* x = old_rows[rows.inputs()];
  for (int l = 0; l < lstm.layers; ++l) {
    const int64_t h = lstm.h_row(l), c = lstm.c_row(l);
    lstm_layer<true>(
        weights, l, step,
        LayerRows<State, T>{
            x, old_rows[h], old_rows.from(c), new_rows.from(c), {}, new_rows[h], old_rows[rows.gates(l)]},
        [](int64_t, int64_t) {});
    x = new_rows[h];
  }
  // Back through a sum, nobody asks what theta was.
  if (lstm.head == Head::update) return;
  apply_head<State>(weights, step, x, old_rows[rows.gradient()], old_rows, new_rows, old_rows[rows.theta()],
                    new_rows[rows.theta()], static_cast<T*>(nullptr));
}

}  // namespace metafast::METAFAST_ISA
