// Ways through the pixels of maps. Part of cuda.cu.
#pragma once

#include "common/cuda.h"

namespace metafast::cuda {
namespace {

// A pixel of a task's maps, which advances through rows, then images.
struct Raster {
  int height, width;
  int image, y, x;

  __device__ __forceinline__ Raster(int64_t map_height, int64_t map_width, int pixel)
      : height(static_cast<int>(map_height)), width(static_cast<int>(map_width)) {
    const int line = pixel / width;
    image = line / height;
    y = line - image * height;
    x = pixel - line * width;
  }
  __device__ __forceinline__ void advance(int pixels) {
    const int lines = small_quotient(x + pixels, width);
    x += pixels - lines * width;
    const int images = small_quotient(y + lines, height);
    y += lines - images * height;
    image += images;
  }
};

}  // namespace

}  // namespace metafast::cuda
