// Chunks of coordinates through all steps. Part of cuda.cu.
#pragma once

#include "learned_optimizer/cuda_chunk.h"

namespace metafast::cuda {
namespace {

template <Memory kMemory, typename T>
class Unroll {
 public:
  __device__ __forceinline__ Unroll(const LstmUnroll<T>& p, const Plan<T>& plan, unsigned char* shared)
      : p_(p), plan_(plan), at_(plan.at), chunk_(p, plan, shared, nullptr) {}

  __device__ __forceinline__ void run() {
    chunk_.copy_weights();
    for (int64_t i = block_index(); i < plan_.chunks; i += plan_.grid) {
      chunk_.begin(i);
      run_chunk();
      __syncthreads();  // the next chunk overwrites all this
    }
  }

 private:
  using Place = typename Chunk<kMemory, T>::Place;

  const LstmUnroll<T>& p_;
  const Plan<T>& plan_;
  const Layout<T>& at_;
  Chunk<kMemory, T> chunk_;

  __device__ __forceinline__ void run_chunk() const {
    if (p_.steps == 0) return copy_state();
    chunk_.for_each_unit([&](int l, int unit, int c) {
      store_quad(chunk_.h_before(l, 0) + unit * at_.pitch + c,
                 chunk_.load_state(p_.lstm.h_row(l) + unit, chunk_.place(c)));
    });
    chunk_.for_each(at_.width, [&](int c) {
      chunk_.fill_head(c);
      chunk_.fill_inputs(0, c);
    });
    int shift = 0;
    for (int64_t k = 0; k < p_.steps; ++k) {
      __syncthreads();
      for (int l = 0; l < at_.layers; ++l) {
        run_layer(l, k, shift);
        __syncthreads();
      }
      chunk_.for_each(at_.width, [&](int c) {
        run_head(c, k, shift);
        if (k + 1 < p_.steps) chunk_.fill_inputs(k + 1, c);
      });
      shift = chunk_.next_shift(shift);
    }
  }

  // What no step leaves.
  __device__ __forceinline__ void copy_state() const {
    if (p_.new_state == nullptr) return;
    const int rows = static_cast<int>(p_.lstm.state_rows());
    chunk_.for_each(rows << at_.quad_bits, [&](int i) {
      const Place place = chunk_.place(chunk_.quad_of(i));
      store_state(i >> at_.quad_bits, place, chunk_.load_state(i >> at_.quad_bits, place));
    });
  }

  // Cells come from the state and go to the new one; between steps they are kept by the thread that has them,
  // in rows that nobody else reads.
  __device__ __forceinline__ void run_layer(int l, int64_t k, int shift) const {
    const bool is_first = k == 0, is_last = k + 1 == p_.steps;
    const int64_t h_row = p_.lstm.h_row(l), c_row = p_.lstm.c_row(l);
    T *const h = chunk_.h_after(l, shift), *const kept = chunk_.row(at_.c, l * at_.hidden);
    chunk_.template layer<kForwardUnits<T>>(
        l, shift,
        [&](int unit, int c, const Place& place) {
          return is_first ? chunk_.load_state(c_row + unit, place)
                          : load_quad<T>(kept + unit * at_.pitch + c);
        },
        [&](int unit, int c, const Place& place, const Unit<T>& result) {
          store_quad(h + unit * at_.pitch + c, result.h);
          if (!is_last) {
            store_quad(kept + unit * at_.pitch + c, result.c);
          } else if (p_.new_state != nullptr) {
            store_state(h_row + unit, place, result.h);
            store_state(c_row + unit, place, result.c);
          }
        });
  }

  __device__ __forceinline__ void run_head(int c, int64_t k, int shift) const {
    const Coordinate where = chunk_.coordinate(c);
    const HeadValues<T> values = chunk_.head(k, c, shift, where);
    if (where.inside) {
      const auto& item = p_.list[where.item];
      if (item.out != nullptr) item.out[k * item.size + where.index] = values.theta;
    }
    if (p_.lstm.head != Head::gates || k + 1 < p_.steps || p_.new_state == nullptr) return;
    const Place place = chunk_.place(c);
    if (place.first < 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t index = place.first + (p_.lstm.gate_row() + r) * kStateBlock;
      const T value = where.inside ? values.gates[r] : T(0);
      if (p_.bfloat16_state) {
        convert(value, static_cast<__nv_bfloat16*>(p_.new_state)[index]);
      } else {
        static_cast<T*>(p_.new_state)[index] = value;
      }
    }
  }

  __device__ __forceinline__ void store_state(int64_t row, const Place& place, const Quad<T>& quad) const {
    if (p_.bfloat16_state) {
      chunk_.store_packed(static_cast<__nv_bfloat16*>(p_.new_state), row, place, quad);
    } else {
      chunk_.store_packed(static_cast<T*>(p_.new_state), row, place, quad);
    }
  }
};

}  // namespace

}  // namespace metafast::cuda
