// Argument checks. Every message names the argument, what was expected and what came.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>

#include <initializer_list>
#include <string>

namespace metafast {

struct Arg {
  const at::Tensor& tensor;
  const char* name;
};

// How a tensor of a list is called. Not by c10::str, whose stream takes half a microsecond: a small call has
// dozens of names.
inline std::string indexed(const char* name, size_t i) {
  return std::string(name) + '[' + std::to_string(i) + ']';
}

inline void check_floating(const Arg& arg) {
  const auto type = arg.tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
                   arg.name, ": expected a tensor of dtype float32, float64, float16 or bfloat16, got ",
                   type);
}

// Of an op that computes in the dtype of its arguments alone.
inline void check_real(const Arg& arg) {
  const auto type = arg.tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, arg.name,
                   ": expected a tensor of dtype float32 or float64, got ", type);
}

inline void check_labels_dtype(const Arg& arg) {
  TORCH_CHECK_TYPE(arg.tensor.scalar_type() == at::kLong, arg.name,
                   ": expected a tensor of dtype int64, got ", arg.tensor.scalar_type());
}

// `shape` is how the argument is documented, with '...' for leading dimensions.
inline void check_min_dim(const Arg& arg, int64_t dim, const char* shape) {
  TORCH_CHECK_VALUE(arg.tensor.dim() >= dim, arg.name, ": expected shape ", shape, ", got ",
                    arg.tensor.sizes());
}

inline void check_sizes(const Arg& arg, at::IntArrayRef expected, const char* shape) {
  TORCH_CHECK_VALUE(arg.tensor.sizes() == expected, arg.name, ": expected shape ", shape, " = ", expected,
                    ", got ", arg.tensor.sizes());
}

inline void check_same_dtype(const Arg& like, std::initializer_list<Arg> args) {
  for (const Arg& arg : args) {
    TORCH_CHECK_TYPE(arg.tensor.scalar_type() == like.tensor.scalar_type(), arg.name,
                     ": expected the dtype of ", like.name, ", ", like.tensor.scalar_type(), ", got ",
                     arg.tensor.scalar_type());
  }
}

inline void check_same_device(const Arg& like, std::initializer_list<Arg> args) {
  for (const Arg& arg : args) {
    TORCH_CHECK_VALUE(arg.tensor.device() == like.tensor.device(), arg.name,
                      ": expected a tensor on the device of ", like.name, ", ", like.tensor.device(),
                      ", got one on ", arg.tensor.device());
  }
}

// Of an argument that changes in place. Like torch, it sees elements that share memory where a stride is 0.
inline void check_writable(const Arg& arg) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(arg.tensor) != at::MemOverlap::Yes, arg.name,
                    ": expected a tensor to write to, got one whose elements share memory, of strides ",
                    arg.tensor.strides());
}

// The leading dimensions of a tensor whose last `event_dims` belong to one task.
inline at::IntArrayRef leading(const at::Tensor& tensor, int64_t event_dims) {
  return tensor.sizes().slice(0, tensor.dim() - event_dims);
}

inline void check_same_leading(const Arg& like, int64_t like_dims, const Arg& arg, int64_t arg_dims) {
  TORCH_CHECK_VALUE(leading(like.tensor, like_dims) == leading(arg.tensor, arg_dims), arg.name,
                    ": expected the leading dimensions of ", like.name, ", ", leading(like.tensor, like_dims),
                    ", got ", leading(arg.tensor, arg_dims));
}

}  // namespace metafast
