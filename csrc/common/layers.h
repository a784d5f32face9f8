// What the ops of single layers have in common, which torch computes too: its dtypes, under autocast as well.
#pragma once

#include <ATen/autocast_mode.h>

#include "common/checks.h"

namespace metafast {

// Whether autocast brings x to its dtype.
inline bool casts(const at::Tensor& x) {
  const c10::DeviceType device = x.device().type();
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device) &&
         x.scalar_type() != at::kDouble;  // which autocast leaves alone
}

inline at::ScalarType layer_dtype(const at::Tensor& x) {
  return casts(x) ? at::autocast::get_autocast_dtype(x.device().type()) : x.scalar_type();
}

inline void check_layer(const Arg& x, std::initializer_list<Arg> others) {
  for (const Arg& arg : others) {
    const bool one = casts(x.tensor) && casts(arg.tensor);  // autocast brings the product's arguments to one
    if (!one) check_same_dtype(x, {arg});
    check_same_device(x, {arg});
  }
}

}  // namespace metafast
