// What follows the convolution of a block, on the CPU: a vector of a task's channels goes through all of its
// images, once for each sum it needs before the next.
#pragma once

#include "common/simd.h"
#include "convolutional/params.h"

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
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t x = x0; x < x1; ++x) f(y, x);
    }
  }
};

// Calls f(image, y, x) for all pixels of maps of this height and width.
template <class F>
METAFAST_HD void for_pixels(int64_t images, int64_t height, int64_t width, const F& f) {
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < width; ++x) f(image, y, x);
    }
  }
}

// The mean of f(image, y, x) over a task's pixels: summed by rows, then images, so that rounding stays small.
template <typename T, class F>
METAFAST_HD Vec<T> mean_over_pixels(const BlockShape& s, const F& f) {
  Vec<T> sum{};
  for (int64_t image = 0; image < s.images; ++image) {
    Vec<T> of_image{};
    for (int64_t y = 0; y < s.height; ++y) {
      Vec<T> of_row{};
      for (int64_t x = 0; x < s.width; ++x) of_row += f(image, y, x);
      of_image += of_row;
    }
    sum += of_image;
  }
  return sum / static_cast<T>(s.pixels());
}

// ---- forward ----

template <typename T>
METAFAST_HD void measure(const BlockForward<T>& p, int64_t task, int64_t channel) {
  const BlockShape& s = p.shape;
  const int64_t at = task * s.pitch + channel;
  if (p.z_tangent.data == nullptr) {
    const Vec<T> mean = mean_over_pixels<T>(s, [&](auto... pixel) __attribute__((always_inline)) {
      return load(p.z.at(task, pixel...) + channel);
    });
    const Vec<T> var = mean_over_pixels<T>(s, [&](auto... pixel) __attribute__((always_inline)) {
      const Vec<T> centred = load(p.z.at(task, pixel...) + channel) - mean;
      return centred * centred;
    });
    store(p.mean + at, mean);
    store(p.var + at, var);
    store(p.rstd + at, 1 / Math<Vec<T>>::sqrt(var + static_cast<T>(s.eps)));
    return;
  }
  const Vec<T> mean = load(p.mean + at), rstd = load(p.rstd + at);
  Vec<T> scale{};
  const Vec<T> mean_tangent = mean_over_pixels<T>(s, [&](auto... pixel) __attribute__((always_inline)) {
    return load(p.z_tangent.at(task, pixel...) + channel);
  });
  scale = mean_over_pixels<T>(s, [&](auto... pixel) __attribute__((always_inline)) {
    return (load(p.z.at(task, pixel...) + channel) - mean) * rstd *
           load(p.z_tangent.at(task, pixel...) + channel);
  });
  store(p.mean_tangent + at, mean_tangent);
  store(p.scale_tangent + at, scale);
}

template <bool kTangent, typename T>
void pool_forward(const BlockForward<T>& p, int64_t task, int64_t channel) {
  const BlockShape& s = p.shape;
  const Affine<T> affine(p, task, channel);
  const auto n_at = [&](auto... pixel) __attribute__((always_inline)) {
    return affine.n(load(p.z.at(task, pixel...) + channel));
  };
  const auto tangent_at = [&](Vec<T> n, auto... pixel) __attribute__((always_inline)) {
    return affine.y_tangent(n, affine.n_tangent(n, load(p.z_tangent.at(task, pixel...) + channel)));
  };
  const auto keep = [&](Vec<T> value, Vec<T> tangent, auto... pixel) __attribute__((always_inline)) {
    if constexpr (kTangent) {
      store(p.out_tangent.at(task, pixel...) + channel, tangent);
    } else {
      store(p.out.at(task, pixel...) + channel, value);
    }
  };
  // Of what the activation gets, and its tangent.
  const auto activated = [&](Vec<T> y, Vec<T> tangent, auto... pixel) __attribute__((always_inline)) {
    if constexpr (kTangent) {
      keep(y, Slope<T>(s.activation, y).first * tangent, pixel...);
    } else {
      keep(activate<T>(s.activation, y), tangent, pixel...);
    }
  };
  if (s.pool == Pool::none) {
    return for_pixels(s.images, s.height, s.width, [&](auto... pixel) __attribute__((always_inline)) {
      const Vec<T> n = n_at(pixel...);
      activated(affine.y(n), kTangent ? tangent_at(n, pixel...) : Vec<T>{}, pixel...);
    });
  }
  if (s.pool == Pool::max) {  // the activation is monotone, so it may come later
    return for_pixels(
        s.images, s.out_height, s.out_width,
        [&](int64_t image, int64_t out_y, int64_t out_x) __attribute__((always_inline)) {
          Vec<T> best = Vec<T>{} - static_cast<T>(__builtin_inf()), tangent{};
          Window(s, out_y, out_x).each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
            const Vec<T> n = n_at(image, y, x), value = affine.y(n);
            const auto larger = (value > best) | (value != value);
            best = larger ? value : best;
            if constexpr (kTangent) tangent = larger ? tangent_at(n, image, y, x) : tangent;
          });
          activated(best, tangent, image, out_y, out_x);
        });
  }
  const T share = T(1) / static_cast<T>(s.pool_height * s.pool_width);
  for_pixels(s.images, s.out_height, s.out_width,
             [&](int64_t image, int64_t out_y, int64_t out_x) __attribute__((always_inline)) {
               Vec<T> sum{}, tangent{};
               Window(s, out_y, out_x).each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
                 const Vec<T> n = n_at(image, y, x), value = affine.y(n);
                 sum += s.pools_first ? value : activate<T>(s.activation, value);
                 if constexpr (kTangent) {
                   const Vec<T> of_y = tangent_at(n, image, y, x);
                   tangent += s.pools_first ? of_y : Slope<T>(s.activation, value).first * of_y;
                 }
               });
               if (s.pools_first) {
                 activated(share * sum, share * tangent, image, out_y, out_x);
               } else {
                 keep(share * sum, share * tangent, image, out_y, out_x);
               }
             });
}

template <typename T>
void run(const BlockForward<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t task = item / p.shape.blocks(), first = item % p.shape.blocks() * kChannelBlock;
    for (int64_t c = first; c < first + kChannelBlock; c += kLanes<T>) {
      if (p.shape.norm) measure(p, task, c);
      if (p.z_tangent.data != nullptr) {
        pool_forward<true>(p, task, c);
      } else {
        pool_forward<false>(p, task, c);
      }
    }
  }
}

// ---- backward ----

// What reaches y of a pixel from a window, and what its tangent does.
template <typename T>
struct Reaching {
  Vec<T> grad, tangent;
};

template <bool kTangent, typename T>
class BlockGradient {
 public:
  BlockGradient(const BlockBackward<T>& p, int64_t task, int64_t channel)
      : p_(p), s_(p.shape), task_(task), channel_(channel), affine_(p, task, channel) {}

  void run() {
    spread();
    const T count = static_cast<T>(s_.pixels());
    const int64_t at = task_ * p_.grad_task + channel_;
    if (p_.grad_gamma) store(p_.grad_gamma + at, kTangent ? scaled_tangent_ : scaled_);
    if (p_.grad_beta) store(p_.grad_beta + at, kTangent ? sum_tangent_ : sum_);
    if (!s_.norm) return;
    const Affine<T>& a = affine_;
    const Vec<T> m1 = sum_ / count, m2 = scaled_ / count, factor = a.gamma * a.rstd;
    const Vec<T> m1_tangent = sum_tangent_ / count, m2_tangent = scaled_tangent_ / count;
    const Vec<T> factor_tangent = a.gamma_tangent * a.rstd - a.gamma * a.rstd * a.rstd * a.scale_tangent;
    for_pixels(s_.images, s_.height, s_.width, [&](auto... pixel) __attribute__((always_inline)) {
      T* const grad = p_.grad_z.at(task_, pixel...) + channel_;
      const Vec<T> n = a.n(load(p_.z.at(task_, pixel...) + channel_)), inner = load(grad) - m1 - n * m2;
      store(grad, factor * inner);
      if constexpr (kTangent) {
        T* const tangent = p_.grad_z_tangent.at(task_, pixel...) + channel_;
        const Vec<T> n_tangent = a.n_tangent(n, load(p_.z_tangent.at(task_, pixel...) + channel_));
        const Vec<T> inner_tangent = load(tangent) - m1_tangent - n_tangent * m2 - n * m2_tangent;
        store(tangent, factor_tangent * inner + factor * inner_tangent);
      }
    });
  }

 private:
  const BlockBackward<T>& p_;
  const BlockShape& s_;
  const int64_t task_, channel_;
  const Affine<T> affine_;
  // Over all pixels, of what reaches y, and of that times n; and their tangents.
  Vec<T> sum_{}, scaled_{}, sum_tangent_{}, scaled_tangent_{};

  struct Point {  // y of a pixel
    Vec<T> n, y, n_tangent, y_tangent;
  };
  METAFAST_HD Point point(int64_t image, int64_t y, int64_t x) const {
    Point point{};
    point.n = affine_.n(load(p_.z.at(task_, image, y, x) + channel_));
    point.y = affine_.y(point.n);
    if constexpr (kTangent) {
      point.n_tangent = affine_.n_tangent(point.n, load(p_.z_tangent.at(task_, image, y, x) + channel_));
      point.y_tangent = affine_.y_tangent(point.n, point.n_tangent);
    }
    return point;
  }

  METAFAST_HD Reaching<T> of_result(int64_t image, int64_t y, int64_t x) const {
    Reaching<T> grad{load(p_.grad.at(task_, image, y, x) + channel_), Vec<T>{}};
    if constexpr (kTangent) grad.tangent = load(p_.grad_tangent.at(task_, image, y, x) + channel_);
    return grad;
  }

  // Back through the activation at y.
  METAFAST_HD Reaching<T> through(const Reaching<T>& grad, Vec<T> y, Vec<T> y_tangent) const {
    const Slope<T> slope(s_.activation, y);
    return {grad.grad * slope.first,
            kTangent ? grad.tangent * slope.first + grad.grad * slope.second * y_tangent : Vec<T>{}};
  }

  METAFAST_HD void add_to_sums(const Reaching<T>& part, Vec<T> n, Vec<T> n_tangent) {
    sum_ += part.grad;
    scaled_ += part.grad * n;
    if constexpr (kTangent) {
      sum_tangent_ += part.tangent;
      scaled_tangent_ += part.tangent * n + part.grad * n_tangent;
    }
  }

  // To what reaches a pixel from other windows, where they overlap; else it is all.
  template <bool kAdds>
  METAFAST_HD void put(const Reaching<T>& part, int64_t image, int64_t y, int64_t x) {
    T* const grad = p_.grad_z.at(task_, image, y, x) + channel_;
    store(grad, kAdds ? load(grad) + part.grad : part.grad);
    if constexpr (kTangent) {
      T* const tangent = p_.grad_z_tangent.at(task_, image, y, x) + channel_;
      store(tangent, kAdds ? load(tangent) + part.tangent : part.tangent);
    }
  }

  // What reaches y, into the place of the gradient of z, and its sums.
  void spread() {
    if (s_.pool == Pool::none) {
      return for_pixels(s_.images, s_.height, s_.width,
                        [&](int64_t image, int64_t y, int64_t x) __attribute__((always_inline)) {
                          const Point at = point(image, y, x);
                          const Reaching<T> part = through(of_result(image, y, x), at.y, at.y_tangent);
                          add_to_sums(part, at.n, at.n_tangent);
                          put<false>(part, image, y, x);
                        });
    }
    const bool apart = s_.pool_stride_y >= s_.pool_height && s_.pool_stride_x >= s_.pool_width;
    const bool covered =
        s_.out_height * s_.pool_height == s_.height && s_.out_width * s_.pool_width == s_.width;
    if (!apart || !covered) {
      for_pixels(s_.images, s_.height, s_.width,
                 [&](auto... pixel) __attribute__((always_inline)) { put<false>(Reaching<T>{}, pixel...); });
    }
    if (apart) {
      spread_windows<false>();
    } else {
      spread_windows<true>();
    }
  }

  template <bool kAdds>
  void spread_windows() {
    for_pixels(s_.images, s_.out_height, s_.out_width,
               [&](int64_t image, int64_t y, int64_t x) __attribute__((always_inline)) {
                 if (s_.pool == Pool::max) {
                   spread_to_largest<kAdds>(image, y, x);
                 } else {
                   spread_evenly<kAdds>(image, y, x);
                 }
               });
  }

  template <bool kAdds>
  METAFAST_HD void spread_to_largest(int64_t image, int64_t out_y, int64_t out_x) {
    const Window window(s_, out_y, out_x);
    Vec<T> best = Vec<T>{} - static_cast<T>(__builtin_inf()), place{}, number{};
    Point largest{};
    window.each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
      const Point at = point(image, y, x);
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
    const Reaching<T> part = through(of_result(image, out_y, out_x), best, largest.y_tangent);
    add_to_sums(part, largest.n, largest.n_tangent);
    number = Vec<T>{};
    window.each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
      const auto here = number == place;
      put<kAdds>({here ? part.grad : Vec<T>{}, here ? part.tangent : Vec<T>{}}, image, y, x);
      number += 1;
    });
  }

  template <bool kAdds>
  METAFAST_HD void spread_evenly(int64_t image, int64_t out_y, int64_t out_x) {
    const T share = T(1) / static_cast<T>(s_.pool_height * s_.pool_width);
    const Window window(s_, out_y, out_x);
    Reaching<T> grad = of_result(image, out_y, out_x);
    grad = {share * grad.grad, share * grad.tangent};
    if (s_.pools_first) {
      Vec<T> sum{}, tangent{};
      window.each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
        const Point at = point(image, y, x);
        sum += at.y;
        tangent += at.y_tangent;
      });
      grad = through(grad, share * sum, share * tangent);
    }
    window.each([&](int64_t y, int64_t x) __attribute__((always_inline)) {
      const Point at = point(image, y, x);
      const Reaching<T> part = s_.pools_first ? grad : through(grad, at.y, at.y_tangent);
      add_to_sums(part, at.n, at.n_tangent);
      put<kAdds>(part, image, y, x);
    });
  }
};

template <typename T>
void run(const BlockBackward<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t task = item / p.shape.blocks(), first = item % p.shape.blocks() * kChannelBlock;
    for (int64_t c = first; c < first + kChannelBlock; c += kLanes<T>) {
      if (p.z_tangent.data != nullptr) {
        BlockGradient<true, T>(p, task, c).run();
      } else {
        BlockGradient<false, T>(p, task, c).run();
      }
    }
  }
}

}  // namespace metafast::METAFAST_ISA
