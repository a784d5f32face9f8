// metafast._C. Importing it registers torch.ops.metafast (library.cpp); what is bound here is what a torch op
// cannot carry. pybind11 is torch's own copy, see cmake/torch.cmake.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <array>
#include <string>

#include "common/checks.h"
#include "common/isa.h"
#include "common/threads.h"
#include "convolutional/ops.h"
#include "inner_loop/ops.h"
#include "learned_optimizer/ops.h"
#include "pairwise/ops.h"

#ifdef METAFAST_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace metafast {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

py::dict build_info() {
  py::list isas;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa_built(isa)) isas.append(isa_name(isa));
  }
  py::dict info;
  info["version"] = METAFAST_VERSION;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = compiler();
  info["isas"] = py::tuple(isas);
#ifdef METAFAST_WITH_CUDA
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["cuda_architectures"] = py::tuple(py::str(METAFAST_CUDA_ARCHITECTURES).attr("split")(","));
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

unsigned long g_main_thread = 0;  // the one that Python's signals come to

// Within a call that takes long: handlers of signals that have come run now, and what one raises ends it.
void look_for_signals() {
  if (PyThread_get_thread_ident() != g_main_thread) return;
  const py::gil_scoped_acquire gil;
  // The handler is a program of its own: autograd sees what it computes, though it does not see the kernel.
  c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  keys.excluded_ = keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  const c10::impl::ForceDispatchKeyGuard guard(keys);
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Whether the tensors of an episode have the same leading dimensions. In Python, where shapes are sliced and
// compared, this was a seventh of what a small call costs.
bool leading_dims_agree(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                        const OptionalTensor& query_labels, const OptionalTensor& ways) {
  if (support.dim() < 2) return false;
  const auto wanted = leading(support, 2);
  const auto agrees = [&](const Tensor& tensor, int64_t event_dims) {
    return tensor.dim() >= event_dims && leading(tensor, event_dims) == wanted;
  };
  return agrees(query, 2) && agrees(support_labels, 1) && (!query_labels || agrees(*query_labels, 1)) &&
         (!ways || agrees(*ways, 0));
}

// Whether relation_scores takes the tensors as they are: shapes that agree, one dtype that is no half, one
// device.
bool relation_agrees(const Tensor& query, const Tensor& prototypes, const Tensor& weight, const Tensor& bias,
                     const Tensor& out_weight, const Tensor& out_bias) {
  const auto dtype = query.scalar_type();
  if ((dtype != at::kFloat && dtype != at::kDouble) || query.dim() < 2 || weight.dim() != 2) return false;
  const int64_t features = query.size(-1), hidden = weight.size(0);
  for (const Tensor& other : {prototypes, weight, bias, out_weight, out_bias}) {
    if (other.scalar_type() != dtype || other.device() != query.device()) return false;
  }
  return prototypes.dim() == query.dim() && leading(prototypes, 2) == leading(query, 2) &&
         prototypes.size(-1) == features && weight.size(1) == 2 * features && bias.dim() == 1 &&
         bias.size(0) == hidden && out_weight.numel() == hidden &&
         (out_weight.dim() == 1 || (out_weight.dim() == 2 && out_weight.size(0) == 1)) &&
         out_bias.numel() == 1 && out_bias.dim() <= 1;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  active_isa();  // a METAFAST_CPU_ISA that cannot be honoured fails the import
  g_main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  set_interrupts(&look_for_signals);
  m.def("build_info", &build_info);
  m.def("active_isa", [] { return isa_name(active_isa()); });
  m.def("detected_isa", [] { return isa_name(detected_isa()); });
  m.def("leading_dims_agree", &leading_dims_agree);
  m.def("relation_agrees", &relation_agrees);
  m.def("get_trajectory_bytes", &get_trajectory_bytes);
  m.def("set_trajectory_bytes", &set_trajectory_bytes);

  // The ops again, typed: torch.ops.metafast.<op> costs microseconds more per call, in Python's argument
  // parsing (bench/overhead.py). The same dispatcher sees the call.
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def(
      "prototypes",
      [](const Tensor& embeddings, const Tensor& labels, int64_t num_classes) {
        return prototypes(embeddings, labels, num_classes);
      },
      release);
  m.def("pairwise", &pairwise, release);
  m.def("relation_scores", &relation_scores, release);
  m.def(
      "classify",
      [](const Tensor& support, const Tensor& support_labels, const Tensor& query,
         const OptionalTensor& query_labels, const OptionalTensor& ways, int64_t num_classes,
         std::string_view method, std::string_view metric, double scale, int64_t reduction) {
        return std::get<0>(classify(support, support_labels, query, query_labels, ways, num_classes, method,
                                    metric, scale, reduction));
      },
      release);
  using Tensors = std::vector<Tensor>;  // pybind11 fills no reference to a list
  m.def(
      "inner_sgd",
      [](const Tensors& params, const Tensor& x, const Tensor& y, const Tensors& lr,
         const OptionalTensor& example_weights, std::string_view loss, int64_t steps,
         std::string_view activation, double momentum, bool first_order) {
        return inner_sgd(params, x, y, lr, example_weights, loss, steps, activation, momentum, first_order);
      },
      release);
  m.def(
      "maml_loss",
      [](const Tensors& params, const Tensor& support_x, const Tensor& support_y, const Tensor& query_x,
         const Tensor& query_y, const Tensors& lr, const OptionalTensor& step_weights,
         const OptionalTensor& support_weights, const OptionalTensor& query_weights, std::string_view loss,
         int64_t steps, std::string_view activation, double momentum, bool first_order, bool mean) {
        return maml_loss(params, support_x, support_y, query_x, query_y, lr, step_weights, support_weights,
                         query_weights, loss, steps, activation, momentum, first_order, mean);
      },
      release);
  m.def(
      "maml_loss_backward",
      [](const Tensor& grad, const Tensors& params, const Tensor& support_x, const Tensor& support_y,
         const Tensor& query_x, const Tensor& query_y, const Tensors& lr, const OptionalTensor& step_weights,
         const OptionalTensor& support_weights, const OptionalTensor& query_weights, std::string_view loss,
         int64_t steps, std::string_view activation, double momentum, bool first_order, bool mean,
         std::array<bool, 9> wanted) {
        return maml_loss_backward(grad, params, support_x, support_y, query_x, query_y, lr, step_weights,
                                  support_weights, query_weights, loss, steps, activation, momentum,
                                  first_order, mean, wanted);
      },
      release);
  using Numbers = std::vector<int64_t>;
  using Epsilons = std::vector<double>;
  m.def(
      "conv_inner_sgd",
      [](const Tensors& params, const Tensor& x, const Tensor& y, const Tensors& lr,
         const OptionalTensor& example_weights, const Numbers& network, const Epsilons& eps,
         std::string_view loss, int64_t steps, double momentum, bool first_order,
         std::optional<at::ScalarType> product_dtype, int64_t keep) {
        return conv_inner_sgd(params, x, y, lr, example_weights, network, eps, loss, steps, momentum,
                              first_order, product_dtype, keep);
      },
      release);
  m.def(
      "conv_forward",
      [](const Tensors& params, const Tensor& x, const Numbers& network, const Epsilons& eps,
         std::optional<at::ScalarType> product_dtype,
         bool keep) { return conv_forward(params, x, network, eps, product_dtype, keep); },
      release);
  m.def(
      "sgd_update",
      [](const Tensors& params, const Tensors& grads, const Tensors& lr, const Tensors& momentum_buffers,
         double momentum, double weight_decay, bool nesterov) {
        return sgd_update(params, grads, lr, momentum_buffers, momentum, weight_decay, nesterov);
      },
      release);
  m.def(
      "lstm_unroll",
      [](const Tensors& grads, const Tensors& params, const OptionalTensor& losses, const Tensor& state,
         const Tensors& weights, std::string_view head, std::string_view preprocess, double p, double scale,
         bool unrolled) {
        return lstm_unroll(grads, params, losses, state, weights, head, preprocess, p, scale, unrolled);
      },
      release);
  m.def(
      "lstm_step_",
      [](const Tensors& params, const Tensors& grads, const OptionalTensor& loss, const Tensor& state,
         const Tensors& weights, std::string_view head, std::string_view preprocess, double p,
         double scale) { lstm_step_(params, grads, loss, state, weights, head, preprocess, p, scale); },
      release);
}

}  // namespace metafast
