// The registered ops of the inner loop family as C++ functions: each call goes through torch's dispatcher, so
// it sees autograd and every other layer. library.cpp states what they compute.
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

std::vector<Tensor> inner_sgd(at::TensorList params, const Tensor& x, const Tensor& y, at::TensorList lr,
                              const OptionalTensor& example_weights, std::string_view loss, int64_t steps,
                              std::string_view activation, double momentum, bool first_order);
std::vector<Tensor> inner_sgd_backward(at::TensorList grads, at::TensorList params, const Tensor& x,
                                       const Tensor& y, at::TensorList lr,
                                       const OptionalTensor& example_weights, std::string_view loss,
                                       int64_t steps, std::string_view activation, double momentum,
                                       bool first_order, std::array<bool, 5> wanted);

Tensor maml_loss(at::TensorList params, const Tensor& support_x, const Tensor& support_y,
                 const Tensor& query_x, const Tensor& query_y, at::TensorList lr,
                 const OptionalTensor& step_weights, const OptionalTensor& support_weights,
                 const OptionalTensor& query_weights, std::string_view loss, int64_t steps,
                 std::string_view activation, double momentum, bool first_order, bool mean);
std::tuple<Tensor, std::vector<Tensor>> maml_loss_backward(
    const Tensor& grad, at::TensorList params, const Tensor& support_x, const Tensor& support_y,
    const Tensor& query_x, const Tensor& query_y, at::TensorList lr, const OptionalTensor& step_weights,
    const OptionalTensor& support_weights, const OptionalTensor& query_weights, std::string_view loss,
    int64_t steps, std::string_view activation, double momentum, bool first_order, bool mean,
    std::array<bool, 9> wanted);

std::tuple<std::vector<Tensor>, std::vector<Tensor>> sgd_update(at::TensorList params, at::TensorList grads,
                                                                at::TensorList lr,
                                                                at::TensorList momentum_buffers,
                                                                double momentum, double weight_decay,
                                                                bool nesterov);

// The most memory of earlier parameters that a thread of a backward keeps, before it recomputes some of them
// instead. It changes no result.
int64_t get_trajectory_bytes();
void set_trajectory_bytes(int64_t limit);

}  // namespace metafast
