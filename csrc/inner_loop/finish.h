// What becomes of the sums of a product with the parameters of a layer before anything else reads them. With
// its activation a = f(z) they are turned into activations, or, as gradients and tangents, taken behind its
// slope.
#pragma once

#include "inner_loop/lanes.h"
#include "inner_loop/math.h"
#include "inner_loop/params.h"

namespace metafast::METAFAST_ISA {

template <class F>
METAFAST_HD void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::relu:
      return f.template operator()<Relu>();
    case Activation::tanh:
      return f.template operator()<Tanh>();
    case Activation::none:
      return f.template operator()<Identity>();
  }
}

// Of the sum z at row r and column c, either f(z), or with a, slope(a) z, and with a tangent R a as well,
// slope(a) z + bend(a, R a) g for what was `kept` before.
template <typename T>
struct Finish {
  Activation activation = Activation::none;
  const T* a = nullptr;
  const T* tangent = nullptr;  // R a
  T* kept = nullptr;           // g: the sums themselves, where there is no tangent yet; null: not needed
  int64_t pitch = 0, kept_pitch = 0;  // of a and its tangent, of `kept`, in vectors

  // The sums of a tile, from registers. tanh takes too many instructions to have them in every tile.
  template <int kRows, int kCols>
  METAFAST_HD void store_tile(const Vec<T> (&sums)[kRows][kCols], int64_t row, int64_t col, T* out,
                              int64_t out_pitch) const {
    const Finish self = *this;  // which the stores cannot change
    const auto store_each = [&](const auto& of) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < kCols; ++c) {
          store(out + ((row + r) * out_pitch + col + c) * kLanes<T>, of(sums[r][c], row + r, col + c));
        }
      }
    };
    if (activation == Activation::relu && a == nullptr) {
      store_each([](Vec<T> z, int64_t, int64_t) { return Relu::value(z); });
    } else if (activation == Activation::relu) {
      store_each([&](Vec<T> z, int64_t r, int64_t c) { return self.template behind_slope<Relu>(z, r, c); });
    } else {
      store_each([](Vec<T> z, int64_t, int64_t) { return z; });
      if (activation == Activation::tanh) finish_block(out, out_pitch, row, kRows, col, kCols);
    }
  }

  // Sums that have been stored in out [rows, out_pitch].
  __attribute__((noinline)) void finish_block(T* out, int64_t out_pitch, int64_t row, int64_t rows,
                                              int64_t col, int64_t cols) const {
    const Finish self = *this;  // which the stores cannot change
    with_activation(activation, [&]<class A>() {
      for (int64_t r = row; r < row + rows; ++r) {
        for (int64_t c = col; c < col + cols; ++c) {
          T* const z = out + (r * out_pitch + c) * kLanes<T>;
          store(z, self.a == nullptr ? A::value(load(z)) : self.template behind_slope<A>(load(z), r, c));
        }
      }
    });
  }

 private:
  template <class A>
  METAFAST_HD Vec<T> behind_slope(Vec<T> z, int64_t r, int64_t c) const {
    const int64_t i = (r * pitch + c) * kLanes<T>, k = (r * kept_pitch + c) * kLanes<T>;
    const Vec<T> out = load(a + i);
    Vec<T> result = A::through(z, out);
    if constexpr (A::kCurved) {
      if (kept == nullptr) return result;
      if (tangent == nullptr) {
        store(kept + k, z);
      } else {
        result += load(kept + k) * A::bend(out, load(tangent + i));
      }
    }
    return result;
  }
};

}  // namespace metafast::METAFAST_ISA
