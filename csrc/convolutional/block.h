// What follows the convolution of a block, on the CPU: a vector of a task's channels goes through all of its
// images, once for each sum it needs before the next. With a thin input each image's z is found first, and
// the sums come from the input (thin.h).
#pragma once

#include "common/arena.h"
#include "convolutional/convolve.h"

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

// Calls f(task, channel) for the vectors of items, each a block of a task's channels.
template <typename T, class F>
void for_items(const BlockShape& shape, int64_t begin, int64_t end, const F& f) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t task = item / shape.blocks(), first = item % shape.blocks() * kChannelBlock;
    for (int64_t c = first; c < first + kChannelBlock; c += kLanes<T>) f(task, c);
  }
}

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

}  // namespace metafast::METAFAST_ISA
