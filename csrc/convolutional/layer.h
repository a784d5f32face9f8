// A convolution of each task's own and the two other products of its family, as kernels over maps in memory
// that the caller holds.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>

#include "convolutional/params.h"

namespace metafast {

// A border of zeros around each image.
struct Border {
  int64_t top = 0, left = 0, bottom = 0, right = 0;
  bool any() const { return top || left || bottom || right; }
};

// Of images [T, B, C, H, W], kernels [T, O, C, kh, kw] and maps [T, B, O, H', W'].
struct Layer {
  int64_t tasks, images, channels, outputs;
  std::array<int64_t, 2> size, kernel, stride, padding, out_size;

  int64_t places() const { return kernel[0] * kernel[1]; }
  int64_t in_pitch() const { return pitch_of(channels); }
  int64_t out_pitch() const { return pitch_of(outputs); }

  // What images need around them to be convolved.
  Border image_border() const { return {padding[0], padding[1], padding[0], padding[1]}; }
  // What maps need around them on the way back to the images: pixel y of an image meets place k of the kernel
  // at pixel (y + padding - k) / stride of the map.
  Border map_border() const {
    const auto before = [this](int i) {
      return std::max<int64_t>(0, (kernel[i] - 1 - padding[i] + stride[i] - 1) / stride[i]);
    };
    const auto behind = [this](int i) {
      return std::max<int64_t>(0, (size[i] - 1 + padding[i]) / stride[i] - (out_size[i] - 1));
    };
    return {before(0), before(1), behind(0), behind(1)};
  }
};

// The pixels of an image, or a map, that the first place of the kernel meets, from that of the first on.
template <typename T>
Maps<const T> under_kernel(const Layer& l, Maps<const T> images) {
  images.data -= l.padding[0] * images.row + l.padding[1] * images.pixel;
  images.row *= l.stride[0];
  images.pixel *= l.stride[1];
  return images;
}

template <class Params>
void set_sizes(Params& p, const Layer& l, int64_t height, int64_t width, int64_t pitch) {
  p.tasks = l.tasks;
  p.images = l.images;
  p.height = height;
  p.width = width;
  p.pitch = pitch;
}

// Rows of the kernel as taps, of all its columns at once where the channels are dense.
template <class Params, typename T>
void set_taps(Params& p, const Layer& l, const Maps<const T>& images) {
  const bool dense = images.pixel == l.channels;
  p.taps_y = l.kernel[0];
  p.taps_x = dense ? 1 : l.kernel[1];
  p.depth = dense ? l.kernel[1] * l.channels : l.channels;
  p.tap_row = images.row;
  p.tap_pixel = images.pixel;
}

// Maps from images and weights [kh, kw, C, pitch(O)].
template <typename T>
Convolve<T> to_maps(const Layer& l, const Maps<const T>& images, const T* weights, int64_t weights_task,
                    const Maps<T>& maps) {
  Convolve<T> p{};
  set_sizes(p, l, l.out_size[0], l.out_size[1], l.out_pitch());
  set_taps(p, l, images);
  p.factors[0] = {under_kernel(l, images), weights, weights_task};
  p.count = 1;
  p.weights_pixel = l.channels * p.pitch;
  p.weights_row = l.kernel[1] * p.weights_pixel;
  p.out = maps;
  return p;
}

// Weights [kh, kw, C, pitch(O)] from images and maps of pitch(O).
template <typename T>
ConvolveWeights<T> to_weights(const Layer& l, const Maps<const T>& images, const Maps<const T>& maps,
                              T* weights, int64_t weights_task) {
  ConvolveWeights<T> p{};
  set_sizes(p, l, l.out_size[0], l.out_size[1], l.out_pitch());
  set_taps(p, l, images);
  p.factors[0] = {under_kernel(l, images), maps};
  p.count = 1;
  p.out = weights;
  p.out_task = weights_task;
  return p;
}

// Images of pitch(C) from maps and weights [kh, kw, O, pitch(C)], the last place first. Pixels of an image
// that differ by a stride meet the same places of the kernel: run(p) runs the kernel for each such class of
// them.
template <typename T, class F>
void to_images(const Layer& l, std::initializer_list<typename Convolve<T>::Factor> factors,
               const Maps<T>& images, bool adds, const F& run) {
  struct Class {                 // of rows, or columns
    int64_t first, count;        // pixels of the image
    int64_t last_place, places;  // of the kernel, a stride apart, from the last one down
    int64_t pixel;               // of the map, that the last one meets
    Class(const Layer& l, int i, int64_t rest) {
      const int64_t stride = l.stride[i], padding = l.padding[i], kernel = l.kernel[i];
      first = ((rest - padding) % stride + stride) % stride;
      count = first < l.size[i] ? (l.size[i] - 1 - first) / stride + 1 : 0;
      places = rest < kernel ? (kernel - 1 - rest) / stride + 1 : 0;
      last_place = rest + (places - 1) * stride;
      pixel = (first + padding - last_place) / stride;
    }
  };
  const int64_t pitch = l.in_pitch(), place = l.outputs * pitch;
  for (int64_t rest_y = 0; rest_y < l.stride[0]; ++rest_y) {
    const Class rows(l, 0, rest_y);
    for (int64_t rest_x = 0; rest_x < l.stride[1]; ++rest_x) {
      const Class columns(l, 1, rest_x);
      if (rows.count == 0 || columns.count == 0) continue;
      Convolve<T> p{};
      set_sizes(p, l, rows.count, columns.count, pitch);
      const bool some = rows.places > 0 && columns.places > 0;
      p.taps_y = some ? rows.places : 0;
      p.taps_x = some ? columns.places : 0;
      p.depth = l.outputs;
      for (typename Convolve<T>::Factor factor : factors) {
        p.tap_row = factor.source.row;
        p.tap_pixel = factor.source.pixel;
        if (some) {
          factor.source.data += rows.pixel * p.tap_row + columns.pixel * p.tap_pixel;
          factor.weights +=
              ((l.kernel[0] - 1 - rows.last_place) * l.kernel[1] + l.kernel[1] - 1 - columns.last_place) *
              place;
        }
        p.factors[p.count++] = factor;
      }
      p.weights_row = l.stride[0] * l.kernel[1] * place;
      p.weights_pixel = l.stride[1] * place;
      if (l.stride[1] == 1 && p.tap_pixel == l.outputs && some) {  // dense: a row of the kernel is a tap
        p.depth *= p.taps_x;
        p.taps_x = 1;
      }
      p.out = images;
      p.out.data += rows.first * images.row + columns.first * images.pixel;
      p.out.row *= l.stride[0];
      p.out.pixel *= l.stride[1];
      p.adds = adds;
      run(p);
    }
  }
}

}  // namespace metafast
