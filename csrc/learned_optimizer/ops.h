// The registered ops of the learned optimizer family as C++ functions: each call goes through torch's
// dispatcher, so it sees autograd, autocast and every other layer. library.cpp states what they compute.
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

std::tuple<std::vector<Tensor>, Tensor> lstm_unroll(at::TensorList grads, at::TensorList params,
                                                    const OptionalTensor& losses, const Tensor& state,
                                                    at::TensorList weights, std::string_view head,
                                                    std::string_view preprocess, double p, double scale,
                                                    bool unrolled);
std::vector<Tensor> lstm_unroll_backward(at::TensorList grad_out, const OptionalTensor& grad_state,
                                         at::TensorList grads, at::TensorList params,
                                         const OptionalTensor& losses, const Tensor& state,
                                         at::TensorList weights, std::string_view head,
                                         std::string_view preprocess, double p, double scale, bool unrolled,
                                         std::array<bool, 5> wanted);
void lstm_step_(at::TensorList params, at::TensorList grads, const OptionalTensor& loss, const Tensor& state,
                at::TensorList weights, std::string_view head, std::string_view preprocess, double p,
                double scale);

}  // namespace metafast
