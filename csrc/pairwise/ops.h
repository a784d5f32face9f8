// The registered ops of the pairwise family as C++ functions: each call goes through torch's dispatcher, so
// it sees autograd, autocast and every other layer. library.cpp states what they compute.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace metafast {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor prototypes(const Tensor& embeddings, const Tensor& labels, c10::SymInt num_classes);
Tensor prototypes_backward(const Tensor& grad, const Tensor& labels);

Tensor pairwise(const Tensor& x, const Tensor& y, const OptionalTensor& weight, const OptionalTensor& bias,
                std::string_view metric);
std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_backward(const Tensor& grad, const Tensor& x,
                                                             const Tensor& y, const OptionalTensor& weight,
                                                             const OptionalTensor& bias, const Tensor& out,
                                                             std::string_view metric);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pairwise_double_backward(
    const Tensor& gg_x, const Tensor& gg_y, const OptionalTensor& gg_weight, const OptionalTensor& gg_bias,
    const Tensor& grad, const Tensor& x, const Tensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& out, std::string_view metric);

std::tuple<Tensor, Tensor> relation_layer(const Tensor& query, const Tensor& prototypes, const Tensor& weight,
                                          const Tensor& bias);
Tensor relation_scores(const Tensor& query, const Tensor& prototypes, const Tensor& weight,
                       const Tensor& bias, const Tensor& out_weight, const Tensor& out_bias,
                       std::string_view metric);

std::tuple<Tensor, Tensor, Tensor> classify(const Tensor& support, const Tensor& support_labels,
                                            const Tensor& query, const OptionalTensor& query_labels,
                                            const OptionalTensor& ways, c10::SymInt num_classes,
                                            std::string_view method, std::string_view metric, double scale,
                                            int64_t reduction);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> classify_with_gradients(
    const Tensor& support, const Tensor& support_labels, const Tensor& query, const Tensor& query_labels,
    const OptionalTensor& ways, c10::SymInt num_classes, std::string_view method, std::string_view metric,
    double scale, int64_t reduction);
std::tuple<Tensor, Tensor> classify_backward(const Tensor& grad, const Tensor& support,
                                             const Tensor& support_labels, const Tensor& query,
                                             const OptionalTensor& query_labels, const OptionalTensor& ways,
                                             const Tensor& rows, const Tensor& valid, c10::SymInt num_classes,
                                             std::string_view method, std::string_view metric, double scale,
                                             int64_t reduction);
std::tuple<Tensor, Tensor, Tensor> classify_double_backward(
    const Tensor& gg_support, const Tensor& gg_query, const Tensor& grad, const Tensor& support,
    const Tensor& support_labels, const Tensor& query, const OptionalTensor& query_labels,
    const OptionalTensor& ways, const Tensor& rows, const Tensor& valid, c10::SymInt num_classes,
    std::string_view method, std::string_view metric, double scale, int64_t reduction);

}  // namespace metafast
