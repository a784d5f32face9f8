// A block's result, on the CPU.
#pragma once

#include "convolutional/block.h"
#include "convolutional/thin.h"

namespace metafast::METAFAST_ISA {

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

}  // namespace metafast::METAFAST_ISA
