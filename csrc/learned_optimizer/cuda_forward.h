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
  const LstmUnroll<T>& p_;
  const Plan<T>& plan_;
  const Layout<T>& at_;
  Chunk<kMemory, T> chunk_;

  __device__ __forceinline__ void run_chunk() const {
    chunk_.for_each_h([&](int l, int u, int c) {
      store_quad(chunk_.h_before(l, 0) + u * at_.pitch + c, chunk_.load_state(p_.lstm.h_row(l) + u, c));
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

  // Cells come from the state and go to the new one; between steps they are kept by the thread that has them,
  // in rows that nobody else reads.
  __device__ __forceinline__ void run_layer(int l, int64_t k, int shift) const {
    const bool is_first = k == 0, is_last = k + 1 == p_.steps;
    const auto cells = [&](int l, int unit, int c) {
      return is_first ? chunk_.load_state(p_.lstm.c_row(l) + unit, c)
                      : load_quad<T>(chunk_.row(at_.c, l * at_.hidden + unit) + c);
    };
    chunk_.template layer<kForwardUnits<T>>(
        l, k, shift, cells, [&](int l, int unit, int c, const Unit<T>& result) {
          store_quad(chunk_.h_after(l, shift) + unit * at_.pitch + c, result.h);
          if (!is_last) {
            store_quad(chunk_.row(at_.c, l * at_.hidden + unit) + c, result.c);
          } else if (p_.new_state != nullptr) {
            store_state(p_.lstm.h_row(l) + unit, c, result.h);
            store_state(p_.lstm.c_row(l) + unit, c, result.c);
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
    const bool stores_gates = p_.lstm.head == Head::gates && k + 1 == p_.steps && p_.new_state != nullptr;
    if (!stores_gates || !chunk_.has_place(c)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t index = chunk_.packed_index(p_.lstm.gate_row() + r, c);
      const T value = where.inside ? values.gates[r] : T(0);
      if (p_.bfloat16_state) {
        convert(value, static_cast<__nv_bfloat16*>(p_.new_state)[index]);
      } else {
        static_cast<T*>(p_.new_state)[index] = value;
      }
    }
  }

  __device__ __forceinline__ void store_state(int64_t row, int c, const Quad<T>& quad) const {
    if (p_.bfloat16_state) {
      chunk_.store_packed(static_cast<__nv_bfloat16*>(p_.new_state), row, c, quad);
    } else {
      chunk_.store_packed(static_cast<T*>(p_.new_state), row, c, quad);
    }
  }
};

}  // namespace

}  // namespace metafast::cuda
