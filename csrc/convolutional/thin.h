// Blocks of a thin input (ThinInput in params.h), on the CPU: what norm asks of z over all pixels follows
// from the input's moments. With X_k = mean(x_k) and C_kj = cov(x_k, x_j) of the numbers that places k and j
// meet,
//
//   mean(z) = b + w.X,   var(z) = w.C.w,   mean(dz) = db + dw.X,   mean(n dz) = rstd w.C.dw,
//
// and with G the sum of what reaches y, S that of it times n, A_k that of it times x_k, the weights' gradient
//
//   sum_p x_k(p) grad_z(p) = gamma rstd (A_k - G X_k - S rstd (C w)_k).
#pragma once

#include <cmath>

#include "common/arena.h"
#include "convolutional/convolve.h"

namespace metafast::METAFAST_ISA {

// ---- moments of the input ----

// Products are added in tiles of so many places, their sums in registers.
#if defined(__AVX512F__)
constexpr int kHighPlaces = 4, kLowPlaces = 4;
#else
constexpr int kHighPlaces = 4, kLowPlaces = 2;
#endif

// What the places meet in some rows of pixels, less a number: a line for each place.
template <typename T>
struct Lines {
  T* data;         // [places, length]; behind the last pixel of a row, and behind the last place, zeros
  int64_t rows;    // of pixels, at most
  int64_t pitch;   // of a row
  int64_t length;  // of a line

  // In memory that the first-level cache holds, but for wide images.
  Lines(const ThinMoments<T>& p, Arena<T>& arena) {
    constexpr int64_t kLength = 256;
    const int64_t vectors = div_up(p.width, kLanes<T>);
    pitch = vectors * kLanes<T>;
    rows = std::clamp<int64_t>(kLength / pitch, 1, p.height);
    length = rows * pitch;
    data = arena.take(places(p.terms()) * rows * vectors);
    if (!arena.counts()) std::fill_n(data, places(p.terms()) * length, T(0));
  }
  static int64_t places(int64_t terms) { return div_up(terms, kHighPlaces) * kHighPlaces; }

  METAFAST_HD void copy(const ThinMoments<T>& p, int64_t task, int64_t image, int64_t y, int64_t count,
                        T less) const {
    T* line = data;
    for (int64_t i = 0; i < p.taps_y; ++i) {
      for (int64_t j = 0; j < p.taps_x; ++j) {
        for (int64_t d = 0; d < p.depth; ++d, line += length) {
          for (int64_t r = 0; r < count; ++r) {
            const T* const from = p.source.at(task, image, y + r, 0) + i * p.tap_row + j * p.tap_pixel + d;
            T* const to = line + r * pitch;
            if (p.source.pixel == 1) {
              for (int64_t x = 0; x < p.width; ++x) to[x] = from[x] - less;
            } else {
              for (int64_t x = 0; x < p.width; ++x) to[x] = from[x * p.source.pixel] - less;
            }
          }
        }
      }
    }
  }
};

// Adds the sums of `count` rows: a vector for each.
template <typename T>
METAFAST_HD void add_products(const Lines<T>& lines, int64_t terms, int64_t count, T* products) {
  const auto add = [](T* to, Vec<T> sum) { store(to, load(to) + sum); };
  const int64_t length = count * lines.pitch;
  for (int64_t high = 0; high < terms; high += kHighPlaces) {
    const T* const of_high = lines.data + high * lines.length;
    for (int64_t low = 0; low < std::min<int64_t>(high + kHighPlaces, terms); low += kLowPlaces) {
      const T* const of_low = lines.data + low * lines.length;
      Vec<T> sums[kHighPlaces][kLowPlaces]{};
      for (int64_t x = 0; x < length; x += kLanes<T>) {
        Vec<T> right[kLowPlaces];
#pragma GCC unroll 4
        for (int j = 0; j < kLowPlaces; ++j) right[j] = load(of_low + j * lines.length + x);
#pragma GCC unroll 4
        for (int k = 0; k < kHighPlaces; ++k) {
          const Vec<T> left = load(of_high + k * lines.length + x);
#pragma GCC unroll 4
          for (int j = 0; j < kLowPlaces; ++j) sums[k][j] += left * right[j];
        }
      }
      for (int64_t k = high; k < std::min<int64_t>(high + kHighPlaces, terms); ++k) {
        for (int64_t j = low; j < std::min<int64_t>(low + kLowPlaces, k + 1); ++j) {
          add(products + (terms + k * (k + 1) / 2 + j) * kLanes<T>, sums[k - high][j - low]);
        }
      }
    }
  }
  for (int64_t k = 0; k < terms; ++k) {
    Vec<T> sum{};
    for (int64_t x = 0; x < length; x += kLanes<T>) sum += load(lines.data + k * lines.length + x);
    add(products + k * kLanes<T>, sum);
  }
}

// Adds the sums of an image, from those apart from `middle`.
template <typename T>
void add_image(const T* products, int64_t terms, double middle, double pixels, double* sums) {
  const auto total = [&](int64_t k) {
    double sum = 0;
    for (int64_t e = 0; e < kLanes<T>; ++e) sum += static_cast<double>(products[k * kLanes<T> + e]);
    return sum;
  };
  double apart[kFewTerms];
  for (int64_t k = 0, next = terms; k < terms; ++k) {
    apart[k] = total(k);
    sums[k] += apart[k] + pixels * middle;
    for (int64_t j = 0; j <= k; ++j, ++next) {
      sums[next] += total(next) + middle * (apart[k] + apart[j] + pixels * middle);
    }
  }
}

// The products of an image are added up as they are, apart from a number amid them: so those of an even image
// are 0, and rounding does not count them as its variance. Then in double.
template <typename T>
void run(const ThinMoments<T>& p, int64_t begin, int64_t end) {
  const int64_t terms = p.terms(), count = p.sums(terms);
  const double pixels = static_cast<double>(p.height * p.width);
  with_arena<T>([&](Arena<T>& arena) {
    const Lines<T> lines(p, arena);
    T* const products = arena.take(count);  // a vector for each sum
    if (arena.counts()) return;
    for (int64_t task = begin; task < end; ++task) {
      double* const sums = p.moments + task * count;
      std::fill_n(sums, count, 0.0);
      for (int64_t image = 0; image < p.images; ++image) {
        const T middle = *p.source.at(task, image, p.height / 2, p.width / 2);
        std::fill_n(products, count * kLanes<T>, T(0));
        for (int64_t y = 0; y < p.height; y += lines.rows) {
          const int64_t rows = std::min(lines.rows, p.height - y);
          lines.copy(p, task, image, y, rows, middle);
          add_products(lines, terms, rows, products);
        }
        add_image(products, terms, static_cast<double>(middle), pixels, sums);
      }
    }
  });
}

// ---- what follows from them for a vector of channels ----

template <bool kTangent, typename T>
struct ThinStatistics {
  static constexpr int64_t kChannels = kLanes<T>;
  double mean[kFewTerms];  // of what the places meet
  // Of each channel, without its bias: the mean of z, its variance, and (C w)_k; the mean of its tangent,
  // that of n times it, and (C dw)_k.
  double centre[kChannels] = {}, var[kChannels] = {}, rstd[kChannels], spread[kFewTerms][kChannels] = {};
  double centre_tangent[kChannels] = {}, scale_tangent[kChannels] = {};
  double spread_tangent[kTangent ? kFewTerms : 1][kChannels] = {};

  template <class Params>  // BlockForward or BlockBackward
  ThinStatistics(const Params& p, int64_t task, int64_t channel) {
    const Convolve<T>& z = *p.thin.z;
    const Terms terms(z);
    const auto count = static_cast<double>(p.shape.pixels());
    const double* const sums = p.thin.moments + task * ThinMoments<T>::sums(terms.count);
    const auto weights_of = [&](const Convolve<T>& of) {
      return of.factors[0].weights + task * of.factors[0].weights_task + channel;
    };
    const T* const weights = weights_of(z);
    const T* const tangents = kTangent ? weights_of(*p.thin.z_tangent) : nullptr;
    for (int64_t k = 0; k < terms.count; ++k) mean[k] = sums[k] / count;
    for (int64_t k = 0; k < terms.count; ++k) {
      for (int64_t j = 0; j < terms.count; ++j) {
        const int64_t high = std::max(k, j), low = std::min(k, j);
        const double covariance = sums[terms.count + high * (high + 1) / 2 + low] / count - mean[k] * mean[j];
        add(spread[k], covariance, weights + terms.weights[j]);
        if constexpr (kTangent) add(spread_tangent[k], covariance, tangents + terms.weights[j]);
      }
      add(centre, mean[k], weights + terms.weights[k]);
      add(var, spread[k], weights + terms.weights[k]);
      if constexpr (kTangent) {
        add(centre_tangent, mean[k], tangents + terms.weights[k]);
        add(scale_tangent, spread[k], tangents + terms.weights[k]);
      }
    }
    for (int64_t e = 0; e < kChannels; ++e) {
      var[e] = std::max(var[e], 0.0);  // rounded
      rstd[e] = 1 / std::sqrt(var[e] + p.shape.eps);
      scale_tangent[e] *= rstd[e];
    }
  }

 private:
  static METAFAST_HD void add(double (&sums)[kChannels], double factor, const T* weights) {
    for (int64_t e = 0; e < kChannels; ++e) sums[e] += factor * static_cast<double>(weights[e]);
  }
  static METAFAST_HD void add(double (&sums)[kChannels], const double (&factors)[kChannels],
                              const T* weights) {
    for (int64_t e = 0; e < kChannels; ++e) sums[e] += factors[e] * static_cast<double>(weights[e]);
  }
};

// The statistics of a block's forward, or those of its tangent.
template <bool kTangent, typename T>
void measure_thin(const BlockForward<T>& p, int64_t task, int64_t channel) {
  const ThinStatistics<kTangent, T> of(p, task, channel);
  const int64_t at = task * p.shape.pitch + channel;
  const Convolve<T>& from = kTangent ? *p.thin.z_tangent : *p.thin.z;
  const T* const bias = from.bias != nullptr ? from.bias + task * from.bias_task + channel : nullptr;
  for (int64_t e = 0; e < kLanes<T>; ++e) {
    const double shift = bias != nullptr ? static_cast<double>(bias[e]) : 0.0;
    if constexpr (kTangent) {
      p.mean_tangent[at + e] = static_cast<T>(of.centre_tangent[e] + shift);
      p.scale_tangent[at + e] = static_cast<T>(of.scale_tangent[e]);
    } else {
      p.mean[at + e] = static_cast<T>(of.centre[e] + shift);
      p.var[at + e] = static_cast<T>(of.var[e]);
      p.rstd[at + e] = static_cast<T>(of.rstd[e]);
    }
  }
}

// ---- the weights' gradient ----

// Of a vector of channels, over all pixels: of what reaches y, of that times n, and their tangents; and of
// what reaches y times what each place meets, a vector for each, and its tangent.
template <typename T>
struct ThinSums {
  Vec<T> grad, scaled, tangent, scaled_tangent;
  const T *of_places, *of_places_tangent;
};

// With a tangent that of the gradient.
template <bool kTangent, typename T>
void store_thin_weights(const BlockBackward<T>& p, const ThinSums<T>& sums, int64_t task, int64_t channel) {
  const ConvolveWeights<T>& w = *p.weights;
  T* const out = w.out + task * w.out_task + channel;
  T* const bias = w.out_bias != nullptr ? w.out_bias + task * w.out_task + channel : nullptr;
  if (!p.shape.norm) {  // what reaches y is the gradient of z
    const T* const of_places = kTangent ? sums.of_places_tangent : sums.of_places;
    for (int64_t k = 0; k < w.rows(); ++k) store(out + k * w.pitch, load(of_places + k * kLanes<T>));
    if (bias != nullptr) store(bias, kTangent ? sums.tangent : sums.grad);
    return;
  }
  const ThinStatistics<kTangent, T> of(p, task, channel);
  const auto vector = [&](const T* from, int64_t stride, int64_t e, double otherwise) {
    return from != nullptr ? static_cast<double>(from[task * stride + channel + e]) : otherwise;
  };
  for (int64_t e = 0; e < kLanes<T>; ++e) {
    const double rstd = of.rstd[e], factor = vector(p.gamma, p.affine_task, e, 1) * rstd;
    const auto grad = static_cast<double>(sums.grad[e]), scaled = static_cast<double>(sums.scaled[e]);
    for (int64_t k = 0; k < w.rows(); ++k) {
      const auto of_place = [&](const T* from) { return static_cast<double>(from[k * kLanes<T> + e]); };
      const double spread = rstd * of.spread[k][e];
      const double inner = of_place(sums.of_places) - grad * of.mean[k] - scaled * spread;
      double result = factor * inner;
      if constexpr (kTangent) {
        const auto tangent = static_cast<double>(sums.tangent[e]),
                   scaled_tangent = static_cast<double>(sums.scaled_tangent[e]);
        const double factor_tangent =
            vector(p.gamma_tangent, p.tangent_task, e, 0) * rstd - factor * rstd * of.scale_tangent[e];
        const double spread_tangent = rstd * (of.spread_tangent[k][e] - spread * of.scale_tangent[e]);
        const double inner_tangent = of_place(sums.of_places_tangent) - tangent * of.mean[k] -
                                     scaled * spread_tangent - scaled_tangent * spread;
        result = factor_tangent * inner + factor * inner_tangent;
      }
      out[k * w.pitch + e] = static_cast<T>(result);
    }
  }
  if (bias != nullptr) store(bias, Vec<T>{});  // norm takes away what a bias adds
}

}  // namespace metafast::METAFAST_ISA
