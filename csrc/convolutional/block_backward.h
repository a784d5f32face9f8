// A block's gradient, on the CPU.
#pragma once

#include "convolutional/block.h"
#include "convolutional/thin.h"

namespace metafast::METAFAST_ISA {

// What reaches y of a pixel, and what its tangent does.
template <typename T>
struct Reaching {
  Vec<T> grad, tangent;
};

// Batch norm needs sums over all of what reaches y before any gradient of z is known. So what reaches it is
// found twice, first for the sums and then for the gradient. Where windows overlap, it is added up in the
// place of the gradient. With a thin input it is found once, and what norm makes of it from the sums alone.
//
// An image is visited by a copy of the object: no store to the maps can change that, so its members stay in
// registers.
template <bool kTangent, typename T>
class BlockGradient {
 public:
  BlockGradient(const BlockBackward<T>& p, const Preactivations<T>& maps, Arena<T>& arena)
      : p_(p), s_(p.shape), maps_(maps) {
    const int64_t pixels = s_.height * s_.width;
    const bool to_weights = p.weights != nullptr;
    own_grad_ = arena.take_if(to_weights, pixels);
    own_tangent_ = arena.take_if(to_weights && kTangent, pixels);
    of_places_ = arena.take_if(to_weights, kFewTerms);
    of_places_tangent_ = arena.take_if(to_weights && kTangent, kFewTerms);
  }

  void run(int64_t task, int64_t channel) {
    task_ = task;
    channel_ = channel;
    affine_ = Affine<T>(p_, task, channel);
    sums_ = Sums{};
    if (p_.weights != nullptr) return run_to_weights();
    for (int64_t image = 0; image < s_.images; ++image) {
      enter(image);
      BlockGradient copy(*this);
      copy.template visit<Sink::sums>();
      sums_ = copy.sums_;
    }
    store_affine();
    finish_sums();
    for (int64_t image = 0; image < s_.images; ++image) {
      enter(image);
      BlockGradient copy(*this);
      copy.differentiate_image();
    }
  }

 private:
  enum class Sink { sums, gradient, addition, sums_and_parts };

  // Over all pixels, of what reaches y, and of that times n, and their tangents; then the means.
  struct Sums {
    Vec<T> grad{}, scaled{}, tangent{}, scaled_tangent{};
  };

  const BlockBackward<T>& p_;
  const BlockShape s_;
  Preactivations<T> maps_;
  // With a thin input: what reaches y of an image, and the sums over all of it times what the places meet.
  T *own_grad_, *own_tangent_, *of_places_, *of_places_tangent_;
  int64_t task_ = 0, channel_ = 0;
  Maps<const T> grad_{}, grad_tangent_{};  // of the image
  Maps<T> to_grad_{}, to_tangent_{};
  Affine<T> affine_;
  Sums sums_;
  Vec<T> factor_{}, factor_tangent_{};

  void enter(int64_t image) {
    maps_.enter(task_, image, channel_);
    const auto place = [&](const Maps<T>& maps, T* own) -> Maps<T> {
      if (own != nullptr) return {own, 0, 0, s_.width * kLanes<T>, kLanes<T>};
      return image_of(maps, task_, image, channel_);
    };
    grad_ = image_of(p_.grad, task_, image, channel_);
    to_grad_ = place(p_.grad_z, own_grad_);
    if constexpr (!kTangent) return;
    grad_tangent_ = image_of(p_.grad_tangent, task_, image, channel_);
    to_tangent_ = place(p_.grad_z_tangent, own_tangent_);
  }

  void run_to_weights() {
    const ConvolveWeights<T>& w = *p_.weights;
    for (T* sums : {of_places_, of_places_tangent_}) {
      if (sums != nullptr) std::fill_n(sums, w.rows() * kLanes<T>, T(0));
    }
    for (int64_t image = 0; image < s_.images; ++image) {
      enter(image);
      BlockGradient copy(*this);
      copy.find_parts();
      sums_ = copy.sums_;
      add_image_weights(w, task_, image, own_grad_, of_places_);
      if constexpr (kTangent) add_image_weights(w, task_, image, own_tangent_, of_places_tangent_);
    }
    store_affine();
    ThinSums<T> sums{sums_.grad,           sums_.scaled, sums_.tangent,
                     sums_.scaled_tangent, of_places_,   of_places_tangent_};
    store_thin_weights<kTangent>(p_, sums, task_, channel_);
  }

  struct Point {  // y of a pixel
    Vec<T> n, y, n_tangent, y_tangent;
  };
  METAFAST_HD Point point(int64_t y, int64_t x) const {
    Point point{};
    point.n = affine_.n(maps_.z(y, x));
    point.y = affine_.y(point.n);
    if constexpr (kTangent) {
      point.n_tangent = affine_.n_tangent(point.n, maps_.z_tangent(y, x));
      point.y_tangent = affine_.y_tangent(point.n, point.n_tangent);
    }
    return point;
  }

  void store_affine() const {
    const int64_t at = task_ * p_.grad_task + channel_;
    if (p_.grad_gamma) store(p_.grad_gamma + at, kTangent ? sums_.scaled_tangent : sums_.scaled);
    if (p_.grad_beta) store(p_.grad_beta + at, kTangent ? sums_.tangent : sums_.grad);
  }

  void finish_sums() {
    const T count = static_cast<T>(s_.pixels());
    for (Vec<T>* sum : {&sums_.grad, &sums_.scaled, &sums_.tangent, &sums_.scaled_tangent}) *sum /= count;
    const Affine<T>& a = affine_;
    factor_ = a.gamma * a.rstd;
    factor_tangent_ = a.gamma_tangent * a.rstd - a.gamma * a.rstd * a.rstd * a.scale_tangent;
  }

  // Whether no two windows see the same pixel.
  bool apart() const {
    return s_.pool == Pool::none ||
           (s_.pool_stride_y == s_.pool_height && s_.pool_stride_x == s_.pool_width &&
            s_.pool_padding_y == 0 && s_.pool_padding_x == 0);
  }

  // What reaches y, in the places of an image, and its sums.
  METAFAST_HD void find_parts() {
    const auto clear = [&](int64_t y, int64_t x) __attribute__((always_inline)) { put(Reaching<T>{}, y, x); };
    if (apart()) {
      visit<Sink::sums_and_parts>();
      return visit_uncovered(clear);
    }
    visit<Sink::sums>();
    for_pixels(s_.height, s_.width, clear);
    visit<Sink::addition>();
  }

  METAFAST_HD void differentiate_image() {
    if (apart()) {
      visit<Sink::gradient>();
      visit_uncovered([&](int64_t y, int64_t x)
                          __attribute__((always_inline)) { put_gradient(Reaching<T>{}, point(y, x), y, x); });
      return;
    }
    for_pixels(s_.height, s_.width,
               [&](int64_t y, int64_t x) __attribute__((always_inline)) { put(Reaching<T>{}, y, x); });
    visit<Sink::addition>();
    for_pixels(s_.height, s_.width, [&](int64_t y, int64_t x) __attribute__((always_inline)) {
      put_gradient(added(y, x), point(y, x), y, x);
    });
  }

  // ---- what reaches y ----

  template <Sink kSink>
  METAFAST_HD void visit() {
    if (s_.pool == Pool::none) {
      return for_pixels(s_.height, s_.width, [&](int64_t y, int64_t x) __attribute__((always_inline)) {
        const Point at = point(y, x);
        give<kSink>(through(of_result(y, x), at.y, at.y_tangent), at, y, x);
      });
    }
    for_pixels(s_.out_height, s_.out_width, [&](int64_t y, int64_t x) __attribute__((always_inline)) {
      if (s_.pool == Pool::max) {
        give_to_largest<kSink>(y, x);
      } else {
        give_evenly<kSink>(y, x);
      }
    });
  }

  // The pixels behind the last window.
  template <class F>
  METAFAST_HD void visit_uncovered(const F& f) const {
    if (s_.pool == Pool::none) return;
    const int64_t height = s_.out_height * s_.pool_height, width = s_.out_width * s_.pool_width;
    for (int64_t y = 0; y < s_.height; ++y) {
      for (int64_t x = y < height ? width : 0; x < s_.width; ++x) f(y, x);
    }
  }

  METAFAST_HD Reaching<T> of_result(int64_t y, int64_t x) const {
    Reaching<T> grad{load(grad_.at(0, 0, y, x)), Vec<T>{}};
    if constexpr (kTangent) grad.tangent = load(grad_tangent_.at(0, 0, y, x));
    return grad;
  }

  // Back through the activation at y.
  METAFAST_HD Reaching<T> through(const Reaching<T>& grad, Vec<T> y, Vec<T> y_tangent) const {
    const Slope<T> slope(s_.activation, y);
    if constexpr (!kTangent) return {grad.grad * slope.first, Vec<T>{}};
    return {grad.grad * slope.first, grad.tangent * slope.first + grad.grad * slope.second * y_tangent};
  }

  template <Sink kSink>
  METAFAST_HD void give_to_largest(int64_t out_y, int64_t out_x) {
    const Window window(s_, out_y, out_x);
    Vec<T> best = Vec<T>{} - static_cast<T>(__builtin_inf()), place{}, number{};
    Point largest{};
    window.each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
      const Point at = point(y, x);
      const auto larger = (at.y > best) | (at.y != at.y);
      best = larger ? at.y : best;
      place = larger ? number : place;
      largest.n = larger ? at.n : largest.n;
      if constexpr (kTangent) {
        largest.n_tangent = larger ? at.n_tangent : largest.n_tangent;
        largest.y_tangent = larger ? at.y_tangent : largest.y_tangent;
      }
      number += 1;
    });
    const Reaching<T> part = through(of_result(out_y, out_x), best, largest.y_tangent);
    if constexpr (kSink == Sink::sums || kSink == Sink::sums_and_parts) add_to_sums(part, largest);
    if constexpr (kSink == Sink::sums) return;
    number = Vec<T>{};
    window.each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
      const auto here = number == place;
      const Reaching<T> own{here ? part.grad : Vec<T>{}, here ? part.tangent : Vec<T>{}};
      if constexpr (kSink == Sink::gradient) put_gradient(own, point(y, x), y, x);
      if constexpr (kSink == Sink::addition) add(own, y, x);
      if constexpr (kSink == Sink::sums_and_parts) put(own, y, x);
      number += 1;
    });
  }

  template <Sink kSink>
  METAFAST_HD void give_evenly(int64_t out_y, int64_t out_x) {
    const T share = T(1) / static_cast<T>(s_.pool_height * s_.pool_width);
    const Window window(s_, out_y, out_x);
    Reaching<T> grad = of_result(out_y, out_x);
    grad = {share * grad.grad, share * grad.tangent};
    if (s_.pools_first) {
      Vec<T> sum{}, tangent{};
      window.each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
        const Point at = point(y, x);
        sum += at.y;
        tangent += at.y_tangent;
      });
      grad = through(grad, share * sum, share * tangent);
    }
    window.each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
      const Point at = point(y, x);
      give<kSink>(s_.pools_first ? grad : through(grad, at.y, at.y_tangent), at, y, x);
    });
  }

  // ---- where it goes ----

  template <Sink kSink>
  METAFAST_HD void give(const Reaching<T>& part, const Point& at, int64_t y, int64_t x) {
    if constexpr (kSink == Sink::sums || kSink == Sink::sums_and_parts) add_to_sums(part, at);
    if constexpr (kSink == Sink::sums_and_parts) put(part, y, x);
    if constexpr (kSink == Sink::gradient) put_gradient(part, at, y, x);
    if constexpr (kSink == Sink::addition) add(part, y, x);
  }

  METAFAST_HD void add_to_sums(const Reaching<T>& part, const Point& at) {
    sums_.grad += part.grad;
    sums_.scaled += part.grad * at.n;
    if constexpr (kTangent) {
      sums_.tangent += part.tangent;
      sums_.scaled_tangent += part.tangent * at.n + part.grad * at.n_tangent;
    }
  }

  // The gradient of z from what reaches y.
  METAFAST_HD void put_gradient(const Reaching<T>& part, const Point& at, int64_t y, int64_t x) {
    if (!s_.norm) return put(part, y, x);
    Reaching<T> grad{part.grad - sums_.grad - at.n * sums_.scaled, Vec<T>{}};
    if constexpr (kTangent) {
      const Vec<T> tangent =
          part.tangent - sums_.tangent - at.n_tangent * sums_.scaled - at.n * sums_.scaled_tangent;
      grad.tangent = factor_tangent_ * grad.grad + factor_ * tangent;
    }
    grad.grad *= factor_;
    put(grad, y, x);
  }

  METAFAST_HD void put(const Reaching<T>& grad, int64_t y, int64_t x) {
    store(to_grad_.at(0, 0, y, x), grad.grad);
    if constexpr (kTangent) store(to_tangent_.at(0, 0, y, x), grad.tangent);
  }

  METAFAST_HD Reaching<T> added(int64_t y, int64_t x) const {
    Reaching<T> sum{load(to_grad_.at(0, 0, y, x)), Vec<T>{}};
    if constexpr (kTangent) sum.tangent = load(to_tangent_.at(0, 0, y, x));
    return sum;
  }

  METAFAST_HD void add(const Reaching<T>& part, int64_t y, int64_t x) {
    const Reaching<T> sum = added(y, x);
    put({sum.grad + part.grad, sum.tangent + part.tangent}, y, x);
  }
};

template <bool kTangent, typename T>
void run_backward(const BlockBackward<T>& p, int64_t begin, int64_t end) {
  with_arena<T>([&](Arena<T>& arena) {
    const Preactivations<T> maps(p, arena);
    BlockGradient<kTangent, T> gradient(p, maps, arena);
    if (arena.counts()) return;
    for_items<T>(p.shape, begin, end, [&](int64_t task, int64_t channel) { gradient.run(task, channel); });
  });
}

template <typename T>
void run(const BlockBackward<T>& p, int64_t begin, int64_t end) {
  if (p.tangent()) {
    run_backward<true>(p, begin, end);
  } else {
    run_backward<false>(p, begin, end);
  }
}

}  // namespace metafast::METAFAST_ISA
