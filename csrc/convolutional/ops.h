// The registered ops of the convolutional family as C++ functions: each call goes through torch's dispatcher,
// so it sees autograd and every other layer. library.cpp states what they compute.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace metafast {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<std::vector<Tensor>, Tensor, Tensor> conv_inner_sgd(
    at::TensorList params, const Tensor& x, const Tensor& y, at::TensorList lr,
    const OptionalTensor& example_weights, at::IntArrayRef network, at::ArrayRef<double> eps,
    std::string_view loss, int64_t steps, double momentum, bool first_order,
    std::optional<at::ScalarType> product_dtype, int64_t keep);
std::vector<Tensor> conv_inner_sgd_backward(at::TensorList grads, at::TensorList params, const Tensor& x,
                                            const Tensor& y, at::TensorList lr,
                                            const OptionalTensor& example_weights, const Tensor& kept,
                                            at::IntArrayRef network, at::ArrayRef<double> eps,
                                            std::string_view loss, int64_t steps, double momentum,
                                            bool first_order, std::optional<at::ScalarType> product_dtype,
                                            std::array<bool, 5> wanted);

std::tuple<Tensor, Tensor> conv_forward(at::TensorList params, const Tensor& x, at::IntArrayRef network,
                                        at::ArrayRef<double> eps, std::optional<at::ScalarType> product_dtype,
                                        bool keep);
std::vector<Tensor> conv_forward_backward(const Tensor& grad, at::TensorList params, const Tensor& x,
                                          const Tensor& kept, at::IntArrayRef network,
                                          at::ArrayRef<double> eps,
                                          std::optional<at::ScalarType> product_dtype,
                                          std::array<bool, 2> wanted);

}  // namespace metafast
