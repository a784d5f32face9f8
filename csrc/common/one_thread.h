// Matrix products of torch's library that share nothing out.
#pragma once

// Of MKL, where torch is built with it; else null.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

namespace metafast {

// While one lives, a product runs on the thread that calls it. Within a parallel region it would anyway, but
// cut into as many parts as torch has threads, and so added in an order that depends on them.
class OneThreadedProducts {
 public:
  OneThreadedProducts() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThreadedProducts() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  OneThreadedProducts(const OneThreadedProducts&) = delete;
  OneThreadedProducts& operator=(const OneThreadedProducts&) = delete;

 private:
  int before_;
};

}  // namespace metafast
