// Back through pooling, activation and norm, and the tangents of that. Two launches with norm: sums over
// parts of the pixels, then the results. Part of cuda.cu.
//
// Nothing is kept between the two but the sums: what reaches a pixel is found again. A thread asks for each
// of its pixels what the windows have that hold it, so no two write to the same place.
#pragma once

#include "convolutional/cuda_block.h"
#include "convolutional/cuda_thin.h"

namespace metafast::cuda {
namespace {

// Pixels that are looked at together: those of a window and the pixels up to the next one, where windows do
// not overlap; else each for itself.
struct Cells {
  bool apart;
  int height, width;  // of a cell
  int rows, cols;     // of cells in a map

  __host__ __device__ explicit Cells(const BlockShape& s)
      : apart(s.pool_stride_y >= s.pool_height && s.pool_stride_x >= s.pool_width),
        height(apart ? static_cast<int>(s.pool_stride_y) : 1),
        width(apart ? static_cast<int>(s.pool_stride_x) : 1),
        rows(static_cast<int>(div_up(s.height + (apart ? s.pool_padding_y : 0), height))),
        cols(static_cast<int>(div_up(s.width + (apart ? s.pool_padding_x : 0), width))) {}
  __host__ __device__ int64_t count(int64_t images) const { return images * rows * cols; }
};

// What reaches the pixels of a thread.
template <int kSide, bool kTangent, typename T>
class Reaching {
 public:
  __device__ __forceinline__ Reaching(const BlockBackward<T>& p, const Place<T>& at)
      : affine(p, at), p_(p), s_(p.shape), at_(at) {}

  const Affine<kTangent, T> affine;

  // Calls use(image, y, x, n, grad) for all pixels of the thread's cells: n of its channels, and what reaches
  // y.
  template <class Use>
  __device__ __forceinline__ void each_pixel(const Cells& cells, const Use& use) const {
    Raster cell(cells.rows, cells.cols, at_.begin);
    for (int i = at_.begin; i < at_.end; i += at_.step) {
      if constexpr (kSide > 0) {
        in_square(cell, use);
      } else if (cells.apart) {
        in_cell(cells, cell, use);
      } else {
        in_pixel(cell, use);
      }
      cell.advance(at_.step);
    }
  }

 private:
  const BlockBackward<T>& p_;
  const BlockShape& s_;
  const Place<T>& at_;

  __device__ __forceinline__ bool has_window(const Raster& cell) const {
    return cell.y < s_.out_height && cell.x < s_.out_width;
  }

  // Of a window: what goes to its largest pixel, or to all of them.
  struct OfWindow {
    Duals<T> grad = {};
    int number[kChannels<T>] = {};

    __device__ __forceinline__ void load(const Reaching& reaching, int image, int out_y, int out_x) {
      grad = load_gradient<kTangent>(reaching.p_, reaching.at_, image, out_y, out_x);
    }
    // Through what stands between a pixel and the window's result. to_see(look) shows the window's pixels.
    template <class ToSee>
    __device__ __forceinline__ void pass(const Reaching& reaching, const ToSee& to_see) {
      const BlockShape& s = reaching.s_;
      if (s.pool != Pool::max) {
        const T share = T(1) / static_cast<T>(s.pool_height * s.pool_width);
#pragma unroll
        for (int e = 0; e < kChannels<T>; ++e) {
          grad.value[e] *= share;
          if constexpr (kTangent) grad.tangent[e] *= share;
        }
      }
      if (!pools_first(s)) return;
      Look<kTangent, T> look(s, reaching.affine);
      to_see(look);
      look.finish();
      pass_through<kTangent>(s.activation, look.y, grad);
#pragma unroll
      for (int e = 0; e < kChannels<T>; ++e) number[e] = look.number[e];
    }
  };

  // Adds a window's share of a pixel, one of its own.
  __device__ __forceinline__ void add(const OfWindow& of, int number, Duals<T>& grad) const {
    const bool all = s_.pool != Pool::max;
#pragma unroll
    for (int e = 0; e < kChannels<T>; ++e) {
      const bool gets = all || of.number[e] == number;
      grad.value[e] += gets ? of.grad.value[e] : T(0);
      if constexpr (kTangent) grad.tangent[e] += gets ? of.grad.tangent[e] : T(0);
    }
  }

  template <class Use>
  __device__ __forceinline__ void in_square(const Raster& cell, const Use& use) const {
    Square<kSide, kTangent, T> square;
    OfWindow of;
    square.load(p_, at_, cell);
    const bool within = has_window(cell);
    if (within) {
      of.load(*this, cell.image, cell.y, cell.x);
      of.pass(*this, [&](auto& look) { square.look(look); });
    }
#pragma unroll
    for (int k = 0; k < square.kPixels; ++k) {
      if (!square.has(s_, cell, k)) continue;
      Duals<T> n, of_y, grad = {};
      find(affine, square.pixels[k], n, of_y);
      if (within) add(of, k, grad);
      if (!pools_first(s_)) pass_through<kTangent>(s_.activation, of_y, grad);
      use(cell.image, square.y(cell, k), square.x(cell, k), n, grad);
    }
  }

  template <class Use>
  __device__ __forceinline__ void in_cell(const Cells& cells, const Raster& cell, const Use& use) const {
    const Window window(s_, cell.y, cell.x);
    const bool within = has_window(cell);
    OfWindow of;
    if (within) {
      of.load(*this, cell.image, cell.y, cell.x);
      of.pass(*this, [&](auto& look) { look_at(p_, at_, cell.image, window, look); });
    }
    const int first_y = cell.y * cells.height - static_cast<int>(s_.pool_padding_y);
    const int first_x = cell.x * cells.width - static_cast<int>(s_.pool_padding_x);
    const int end_y = min(first_y + cells.height, static_cast<int>(s_.height));
    const int end_x = min(first_x + cells.width, static_cast<int>(s_.width));
    for (int y = max(first_y, 0); y < end_y; ++y) {
      for (int x = max(first_x, 0); x < end_x; ++x) {
        Pixel<kTangent, T> pixel;
        pixel.load(p_, at_, cell.image, y, x);
        Duals<T> n, of_y, grad = {};
        find(affine, pixel, n, of_y);
        if (within && window.has(y, x)) add(of, window.number(y, x), grad);
        if (!pools_first(s_)) pass_through<kTangent>(s_.activation, of_y, grad);
        use(cell.image, y, x, n, grad);
      }
    }
  }

  template <class Use>
  __device__ __forceinline__ void in_pixel(const Raster& cell, const Use& use) const {
    Pixel<kTangent, T> pixel;
    pixel.load(p_, at_, cell.image, cell.y, cell.x);
    Duals<T> n, of_y, grad = {};
    find(affine, pixel, n, of_y);
    const int stride_y = static_cast<int>(s_.pool_stride_y), stride_x = static_cast<int>(s_.pool_stride_x);
    const int y = cell.y + static_cast<int>(s_.pool_padding_y);
    const int x = cell.x + static_cast<int>(s_.pool_padding_x);
    const int first_y = first_window(y, static_cast<int>(s_.pool_height), stride_y);
    const int first_x = first_window(x, static_cast<int>(s_.pool_width), stride_x);
    for (int out_y = first_y; out_y <= y / stride_y && out_y < s_.out_height; ++out_y) {
      for (int out_x = first_x; out_x <= x / stride_x && out_x < s_.out_width; ++out_x) {
        const Window window(s_, out_y, out_x);
        if (!window.has(cell.y, cell.x)) continue;
        OfWindow of;
        of.load(*this, cell.image, out_y, out_x);
        of.pass(*this, [&](auto& look) { look_at(p_, at_, cell.image, window, look); });
        add(of, window.number(cell.y, cell.x), grad);
      }
    }
    if (!pools_first(s_)) pass_through<kTangent>(s_.activation, of_y, grad);
    use(cell.image, cell.y, cell.x, n, grad);
  }

  // The first window that may hold the pixel `at`, counted from the first pixel of the first window.
  static __device__ __forceinline__ int first_window(int at, int size, int stride) {
    return at < size ? 0 : (at - size) / stride + 1;
  }
};

// Sums over pixels: of what reaches y, of that times n, and their tangents.
template <bool kTangent>
constexpr int kSums = kTangent ? 4 : 2;

template <int kSide, bool kTangent, typename T>
__global__ void __launch_bounds__(kMapThreads, 3)
    block_gradient_sums(const __grid_constant__ BlockBackward<T> p) {
  constexpr int kLength = kChannels<T>, kCount = kSums<kTangent>;
  auto& shared = shared_memory<SumShared<T, kCount>>();
  const Cells cells(p.shape);
  const Place<T> at(p.shape.pitch, cells.count(p.shape.images), static_cast<unsigned>(p.shape.parts()));
  if (at.task >= p.shape.tasks) return;
  const Reaching<kSide, kTangent, T> reaching(p, at);
  T sums[kCount][kLength] = {};
  reaching.each_pixel(cells, [&](int, int, int, const Duals<T>& n, const Duals<T>& grad) {
#pragma unroll
    for (int e = 0; e < kLength; ++e) {
      sums[0][e] += grad.value[e];
      sums[1][e] += grad.value[e] * n.value[e];
      if constexpr (kTangent) {
        sums[2][e] += grad.tangent[e];
        sums[3][e] += grad.tangent[e] * n.value[e] + grad.value[e] * n.tangent[e];
      }
    }
  });
#pragma unroll
  for (int i = 0; i < kCount * kLength; ++i) {
    shared.threads[i / kLength][threadIdx.x * kLength + i % kLength] = sums[i / kLength][i % kLength];
  }
  reduce_lanes(shared, at, p.shape, p.workspace, [&](const auto& value, auto& totals) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      totals[k] = 0;
      for (int lane = 0; lane < at.step; ++lane) totals[k] += value(k, lane);
    }
  });
}

template <typename T>
struct SlicedBackward {
  BlockBackward<T> p;
  unsigned slices;
};

template <int kSide, bool kTangent, typename T>
__global__ void __launch_bounds__(kMapThreads, 3)
    block_backward(const __grid_constant__ SlicedBackward<T> sliced) {
  constexpr int kLength = kChannels<T>, kCount = kSums<kTangent>;
  const BlockBackward<T>& p = sliced.p;
  const BlockShape& s = p.shape;
  auto& shared = shared_memory<SumShared<T, kCount>>();
  const Cells cells(s);
  const Place<T> at(s.pitch, cells.count(s.images), sliced.slices);
  if (at.task >= s.tasks) return;
  Channels<T> mean[kCount] = {};  // of the sums
  if (s.norm) {
    const int channel =
        min(at.group + static_cast<int>(threadIdx.x) % at.channels, static_cast<int>(s.pitch) - 1);
    T sums[kCount];
    sum_parts(
        shared, at, static_cast<int>(s.parts()),
        [&](int part, auto& total) {
#pragma unroll
          for (int k = 0; k < kCount; ++k) {
            total[k] += workspace_at(p.workspace, s, at.task, part, k)[channel];
          }
        },
        sums);
    if (at.reports(s)) {
      const int64_t to = at.task * p.grad_task + channel;
      if (p.grad_beta != nullptr) p.grad_beta[to] = sums[kCount - 2];
      if (p.grad_gamma != nullptr) p.grad_gamma[to] = sums[kCount - 1];
    }
    for (T& sum : sums) sum /= static_cast<T>(s.pixels());
    deal_out(shared, at, sums, mean);
  }
  const Reaching<kSide, kTangent, T> reaching(p, at);
  const auto& affine = reaching.affine;
  reaching.each_pixel(cells, [&](int image, int y, int x, const Duals<T>& n, const Duals<T>& grad) {
    T value[kLength], tangent[kLength];
#pragma unroll
    for (int e = 0; e < kLength; ++e) {
      value[e] = grad.value[e];
      if constexpr (kTangent) tangent[e] = grad.tangent[e];
      if (!s.norm) continue;
      const T gamma = affine.gamma.values[e], rstd = affine.rstd.values[e];
      const T inner = grad.value[e] - mean[0].values[e] - n.value[e] * mean[1].values[e];
      value[e] = gamma * rstd * inner;
      if constexpr (kTangent) {
        const T factor =
            affine.gamma_tangent.values[e] * rstd - gamma * rstd * rstd * affine.scale_tangent.values[e];
        const T inner_tangent = grad.tangent[e] - mean[2].values[e] - n.tangent[e] * mean[1].values[e] -
                                n.value[e] * mean[3].values[e];
        tangent[e] = factor * inner + gamma * rstd * inner_tangent;
      }
    }
    if (!kTangent || p.grad_z.data != nullptr) {
      store_channels(p.grad_z, p.pairs, at, image, y, x, value);
    }
    if constexpr (kTangent) {
      store_channels(p.grad_z_tangent, p.pairs, at, image, y, x, tangent);
    }
  });
}

template <bool kTangent, typename T>
void launch_backward(BlockBackward<T> p, Stream stream) {
  p.shape = with_windows(p.shape);
  constexpr std::size_t kBytes = sizeof(SumShared<T, kSums<kTangent>>);
  const int64_t slices = slices_of<T>(p.shape, Cells(p.shape).count(p.shape.images));
  with_side<T>(p.shape, [&]<int kSide>() {
    if (p.shape.norm) {
      launch_kernel(
          {"block_gradient_sums", grid_of_slices<T>(p.shape, p.shape.parts()), kMapThreads, kBytes, stream},
          block_gradient_sums<kSide, kTangent, T>, p);
    }
    launch_kernel({"block_backward", grid_of_slices<T>(p.shape, slices), kMapThreads, kBytes, stream},
                  block_backward<kSide, kTangent, T>, SlicedBackward<T>{p, static_cast<unsigned>(slices)});
  });
}

}  // namespace

template <typename T>
void launch(const BlockBackward<T>& p, Stream stream) {
  if (p.thin.z != nullptr) return p.tangent() ? launch_thin<true>(p, stream) : launch_thin<false>(p, stream);
  if (p.tangent()) return launch_backward<true>(p, stream);
  launch_backward<false>(p, stream);
}

}  // namespace metafast::cuda
