// Large memory of the CPU that goes from call to call. The maps of a group of tasks would be fresh memory in
// each call otherwise, which the system clears before it hands it out: some milliseconds of a call, and the
// caches are full of zeros.
#pragma once

#include <ATen/ATen.h>

namespace metafast {

// An uninitialised tensor: on the CPU in memory that a later one may get once nobody holds this one. What
// lies in reserve the system may take back where memory is short. Torch keeps a GPU's memory itself.
at::Tensor reserved(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace metafast
