// What follows the convolution of a block, on the CPU: a vector of a task's channels goes through all of its
// images, once for each sum it needs before the next. With a thin input each image's z is found first, and
// the sums come from the input (thin.h).
#pragma once

#include "common/arena.h"
#include "convolutional/convolve.h"
#include "convolutional/thin.h"

namespace metafast::METAFAST_ISA {

// ---- the functions of a channel ----

template <typename T>
METAFAST_HD Vec<T> activate(MapActivation activation, Vec<T> y) {
  if (activation == MapActivation::relu) return y <= Vec<T>{} ? Vec<T>{} : y;  // NaN stays
  return activation == MapActivation::tanh ? Math<Vec<T>>::tanh(y) : y;
}

// The activation's first derivative at y, and its second, which a ReLU has not.
template <typename T>
struct Slope {
  Vec<T> first, second;
  METAFAST_HD Slope(MapActivation activation, Vec<T> y) {
    first = Vec<T>{} + 1;
    second = Vec<T>{};
    if (activation == MapActivation::relu) first = y <= Vec<T>{} ? Vec<T>{} : first;
    if (activation == MapActivation::tanh) {
      const Vec<T> value = Math<Vec<T>>::tanh(y);
      first = 1 - value * value;
      second = -2 * value * first;
    }
  }
};

// y = gamma n + beta with n = (z - mean) rstd, and its tangent. Without norm n is z.
template <typename T>
struct Affine {
  Vec<T> mean{}, rstd = Vec<T>{} + 1, gamma = Vec<T>{} + 1, beta{};
  Vec<T> mean_tangent{}, scale_tangent{}, gamma_tangent{}, beta_tangent{};

  Affine() = default;
  // From BlockForward or BlockBackward: the vector of a task's channels at `channel`.
  template <class Params>
  METAFAST_HD Affine(const Params& p, int64_t task, int64_t channel) {
    const int64_t at = task * p.shape.pitch + channel;
    if (p.gamma) gamma = load(p.gamma + task * p.affine_task + channel);
    if (p.beta) beta = load(p.beta + task * p.affine_task + channel);
    if (p.gamma_tangent) gamma_tangent = load(p.gamma_tangent + task * p.tangent_task + channel);
    if (p.beta_tangent) beta_tangent = load(p.beta_tangent + task * p.tangent_task + channel);
    if (!p.shape.norm) return;
    mean = load(p.mean + at);
    rstd = load(p.rstd + at);
    if (p.mean_tangent) mean_tangent = load(p.mean_tangent + at);
    if (p.scale_tangent) scale_tangent = load(p.scale_tangent + at);
  }

  METAFAST_HD Vec<T> n(Vec<T> z) const { return (z - mean) * rstd; }
  METAFAST_HD Vec<T> y(Vec<T> n) const { return gamma * n + beta; }
  METAFAST_HD Vec<T> n_tangent(Vec<T> n, Vec<T> z_tangent) const {
    return rstd * (z_tangent - mean_tangent - n * scale_tangent);
  }
  METAFAST_HD Vec<T> y_tangent(Vec<T> n, Vec<T> n_tangent) const {
    return gamma * n_tangent + gamma_tangent * n + beta_tangent;
  }
};

// ---- windows ----

struct Window {
  int64_t y0, y1, x0, x1;  // what of it lies in the map

  METAFAST_HD Window(const BlockShape& s, int64_t out_y, int64_t out_x) {
    const int64_t y = out_y * s.pool_stride_y - s.pool_padding_y,
                  x = out_x * s.pool_stride_x - s.pool_padding_x;
    y0 = y > 0 ? y : 0;
    x0 = x > 0 ? x : 0;
    y1 = y + s.pool_height < s.height ? y + s.pool_height : s.height;
    x1 = x + s.pool_width < s.width ? x + s.pool_width : s.width;
  }
  template <class F>
  METAFAST_HD void each(const F& f) const {
    if (y1 - y0 == 2 && x1 - x0 == 2) {  // the usual window, without loops
      f(y0, x0);
      f(y0, x0 + 1);
      f(y0 + 1, x0);
      f(y0 + 1, x0 + 1);
      return;
    }
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t x = x0; x < x1; ++x) f(y, x);
    }
  }
};

// Calls f(y, x) for all pixels of maps of this height and width.
template <class F>
METAFAST_HD void for_pixels(int64_t height, int64_t width, const F& f) {
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) f(y, x);
  }
}

// A vector of an image's channels.
template <typename T>
METAFAST_HD Maps<T> image_of(const Maps<T>& maps, int64_t task, int64_t image, int64_t channel) {
  return {maps.at(task, image, 0, 0) + channel, 0, 0, maps.row, maps.pixel};
}

// z of one image after the other, and its tangent: a vector of a task's channels.
template <typename T>
class Preactivations {
 public:
  template <class Params>  // BlockForward or BlockBackward
  Preactivations(const Params& p, Arena<T>& arena) : z_(p.z), z_tangent_(p.z_tangent), thin_(p.thin) {
    const int64_t pixels = p.shape.height * p.shape.width;
    found_ = arena.take_if(thin_.z != nullptr, pixels);
    found_tangent_ = arena.take_if(thin_.z_tangent != nullptr, pixels);
  }

  void enter(int64_t task, int64_t image, int64_t channel) {
    of_z_ = of_image(z_, thin_.z, found_, task, image, channel);
    of_tangent_ = of_image(z_tangent_, thin_.z_tangent, found_tangent_, task, image, channel);
  }

  METAFAST_HD Vec<T> z(int64_t y, int64_t x) const { return load(of_z_.at(0, 0, y, x)); }
  METAFAST_HD Vec<T> z_tangent(int64_t y, int64_t x) const { return load(of_tangent_.at(0, 0, y, x)); }

 private:
  Maps<const T> z_, z_tangent_, of_z_{}, of_tangent_{};
  ThinInput<T> thin_;
  T *found_, *found_tangent_;

  static Maps<const T> of_image(const Maps<const T>& maps, const Convolve<T>* convolution, T* found,
                                int64_t task, int64_t image, int64_t channel) {
    if (convolution != nullptr) {
      convolve_image(*convolution, task, image, channel, found);
      return {found, 0, 0, convolution->width * kLanes<T>, kLanes<T>};
    }
    if (maps.data == nullptr) return {};
    return image_of(maps, task, image, channel);
  }
};

// The sum of f(y, x) over the pixels of an image, by rows, so that rounding stays small, and each row's in
// several chains, so that no addition waits for the one before.
template <typename T, class F>
METAFAST_HD Vec<T> sum_over_image(const BlockShape& s, const F& f) {
  constexpr int kChains = 4;
  Vec<T> sum{};
  for (int64_t y = 0; y < s.height; ++y) {
    Vec<T> of_row[kChains]{};
    int64_t x = 0;
    for (; x + kChains <= s.width; x += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) of_row[c] += f(y, x + c);
    }
    for (; x < s.width; ++x) of_row[0] += f(y, x);
    sum += (of_row[0] + of_row[1]) + (of_row[2] + of_row[3]);
  }
  return sum;
}

// ---- forward ----

// Mean and variance: of each image by itself, while it is in the cache, then of all together (Chan, Golub and
// LeVeque 1983, equation 1.5).
template <typename T>
void measure_values(const BlockForward<T>& p, Preactivations<T>& maps, int64_t task, int64_t channel) {
  const BlockShape& s = p.shape;
  const T count = static_cast<T>(s.height * s.width);
  Vec<T> mean{}, squares{};
  for (int64_t image = 0; image < s.images; ++image) {
    maps.enter(task, image, channel);
    const auto z = [&](int64_t y, int64_t x) __attribute__((always_inline)) { return maps.z(y, x); };
    const Vec<T> own = sum_over_image<T>(s, z) / count;
    squares += sum_over_image<T>(s, [&](int64_t y, int64_t x) __attribute__((always_inline)) {
      const Vec<T> centred = z(y, x) - own;
      return centred * centred;
    });
    const Vec<T> apart = own - mean;
    mean += apart / static_cast<T>(image + 1);
    squares += apart * apart * (count * static_cast<T>(image) / static_cast<T>(image + 1));
  }
  const Vec<T> var = squares / static_cast<T>(s.pixels());
  const int64_t at = task * s.pitch + channel;
  store(p.mean + at, mean);
  store(p.var + at, var);
  store(p.rstd + at, 1 / Math<Vec<T>>::sqrt(var + static_cast<T>(s.eps)));
}

template <typename T>
void measure_tangent(const BlockForward<T>& p, Preactivations<T>& maps, int64_t task, int64_t channel) {
  const BlockShape& s = p.shape;
  const int64_t at = task * s.pitch + channel;
  const Vec<T> mean = load(p.mean + at), rstd = load(p.rstd + at);
  Vec<T> sum{}, scaled{};
  for (int64_t image = 0; image < s.images; ++image) {
    maps.enter(task, image, channel);
    Vec<T> of_image{};
    sum += sum_over_image<T>(s, [&](int64_t y, int64_t x) __attribute__((always_inline)) {
      const Vec<T> tangent = maps.z_tangent(y, x);
      of_image += (maps.z(y, x) - mean) * tangent;
      return tangent;
    });
    scaled += of_image;
  }
  const T count = static_cast<T>(s.pixels());
  store(p.mean_tangent + at, sum / count);
  store(p.scale_tangent + at, rstd * scaled / count);
}

template <bool kTangent, typename T>
void measure(const BlockForward<T>& p, Preactivations<T>& maps, int64_t task, int64_t channel) {
  if (!p.shape.norm) return;
  if (p.thin.moments != nullptr) return measure_thin<kTangent>(p, task, channel);
  if constexpr (kTangent) {
    measure_tangent(p, maps, task, channel);
  } else {
    measure_values(p, maps, task, channel);
  }
}

// The results of an image that `maps` has entered.
template <bool kTangent, typename T>
void pool_image(const BlockForward<T>& p, const Preactivations<T>& entered, const Affine<T>& of_channel,
                int64_t task, int64_t image, int64_t channel) {
  // Copies, which no store to the maps can change: they stay in registers.
  const BlockShape s = p.shape;
  const Preactivations<T> maps = entered;
  const Affine<T> affine = of_channel;
  const Maps<T> out = image_of(kTangent ? p.out_tangent : p.out, task, image, channel);
  const auto n_at = [&](int64_t y, int64_t x)
                        __attribute__((always_inline)) { return affine.n(maps.z(y, x)); };
  const auto tangent_at = [&](Vec<T> n, int64_t y, int64_t x) __attribute__((always_inline)) {
    return affine.y_tangent(n, affine.n_tangent(n, maps.z_tangent(y, x)));
  };
  const auto keep = [&](Vec<T> value, Vec<T> tangent, int64_t y, int64_t x) __attribute__((always_inline)) {
    store(out.at(0, 0, y, x), kTangent ? tangent : value);
  };
  // Of what the activation gets, and its tangent.
  const auto activated = [&](Vec<T> value, Vec<T> tangent, int64_t y, int64_t x)
                             __attribute__((always_inline)) {
                               if constexpr (kTangent) {
                                 keep(value, Slope<T>(s.activation, value).first * tangent, y, x);
                               } else {
                                 keep(activate<T>(s.activation, value), tangent, y, x);
                               }
                             };
  if (s.pool == Pool::none) {
    return for_pixels(s.height, s.width, [&](int64_t y, int64_t x) __attribute__((always_inline)) {
      const Vec<T> n = n_at(y, x);
      activated(affine.y(n), kTangent ? tangent_at(n, y, x) : Vec<T>{}, y, x);
    });
  }
  if (s.pool == Pool::max) {  // the activation is monotone, so it may come later
    return for_pixels(
        s.out_height, s.out_width, [&](int64_t out_y, int64_t out_x) __attribute__((always_inline)) {
          Vec<T> best = Vec<T>{} - static_cast<T>(__builtin_inf()), tangent{};
          Window(s, out_y, out_x).each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
            const Vec<T> n = n_at(y, x), value = affine.y(n);
            const auto larger = (value > best) | (value != value);
            best = larger ? value : best;
            if constexpr (kTangent) tangent = larger ? tangent_at(n, y, x) : tangent;
          });
          activated(best, tangent, out_y, out_x);
        });
  }
  const T share = T(1) / static_cast<T>(s.pool_height * s.pool_width);
  for_pixels(s.out_height, s.out_width, [&](int64_t out_y, int64_t out_x) __attribute__((always_inline)) {
    Vec<T> sum{}, tangent{};
    Window(s, out_y, out_x).each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
      const Vec<T> n = n_at(y, x), value = affine.y(n);
      sum += s.pools_first ? value : activate<T>(s.activation, value);
      if constexpr (kTangent) {
        const Vec<T> of_y = tangent_at(n, y, x);
        tangent += s.pools_first ? of_y : Slope<T>(s.activation, value).first * of_y;
      }
    });
    if (s.pools_first) {
      activated(share * sum, share * tangent, out_y, out_x);
    } else {
      keep(share * sum, share * tangent, out_y, out_x);
    }
  });
}

template <bool kTangent, typename T>
void pool_forward(const BlockForward<T>& p, Preactivations<T>& maps, int64_t task, int64_t channel) {
  const Affine<T> affine(p, task, channel);
  for (int64_t image = 0; image < p.shape.images; ++image) {
    maps.enter(task, image, channel);
    pool_image<kTangent>(p, maps, affine, task, image, channel);
  }
}

// Calls f(task, channel) for the vectors of items, each a block of a task's channels.
template <typename T, class F>
void for_items(const BlockShape& shape, int64_t begin, int64_t end, const F& f) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t task = item / shape.blocks(), first = item % shape.blocks() * kChannelBlock;
    for (int64_t c = first; c < first + kChannelBlock; c += kLanes<T>) f(task, c);
  }
}

template <typename T>
void run(const BlockForward<T>& p, int64_t begin, int64_t end) {
  with_arena<T>([&](Arena<T>& arena) {
    Preactivations<T> maps(p, arena);
    if (arena.counts()) return;
    for_items<T>(p.shape, begin, end, [&](int64_t task, int64_t channel) {
      if (p.tangent()) {
        measure<true>(p, maps, task, channel);
        pool_forward<true>(p, maps, task, channel);
      } else {
        measure<false>(p, maps, task, channel);
        pool_forward<false>(p, maps, task, channel);
      }
    });
  });
}

// ---- backward ----

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
