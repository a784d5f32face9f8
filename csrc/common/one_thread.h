// Operations of torch's library that share nothing out.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include "common/mkl.h"

namespace metafast {

// While one lives, the library's operations run on the thread that calls them. Else a product would be cut
// into as many parts as torch has threads, and added in an order that depends on them; and each helper
// would be given a team of its own.
class OneThreadedLibrary {
 public:
  OneThreadedLibrary()
      : threads_(
            at::get_num_threads()),  // which torch sets when a thread first asks, so before the next line
        mkl_threads_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {
    omp_set_num_threads(1);  // of this thread alone
  }
  ~OneThreadedLibrary() {
    omp_set_num_threads(threads_);
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(mkl_threads_);
  }
  OneThreadedLibrary(const OneThreadedLibrary&) = delete;
  OneThreadedLibrary& operator=(const OneThreadedLibrary&) = delete;

 private:
  int threads_, mkl_threads_;
};

}  // namespace metafast
