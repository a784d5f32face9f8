// The convolutional ops on CPU and CUDA: check the arguments (arguments.h), allocate the results, run the
// kernels. What each op computes is stated in library.cpp.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "convolutional/adaptation.h"

namespace metafast {
namespace {

// Tensors of size 0, for gradients that are not wanted.
std::vector<Tensor> nothing(size_t count, const at::TensorOptions& options) {
  std::vector<Tensor> none;
  for (size_t i = 0; i < count; ++i) none.push_back(empty({0}, options));
  return none;
}

void append(std::vector<Tensor>& to, std::vector<Tensor> tensors) {
  to.insert(to.end(), std::make_move_iterator(tensors.begin()), std::make_move_iterator(tensors.end()));
}

// Of the input of the first block.
template <typename T>
Maps<T> gradient_images(const Network& network, int64_t tasks, int64_t images, Workspace<T>& space) {
  const NetworkBlock& b = network.blocks()[0];
  return space.take_maps(tasks, images, b.height, b.width, pitch_of(b.channels), {});
}

// ---- conv_inner_sgd ----

std::tuple<std::vector<Tensor>, Tensor, Tensor> conv_inner_sgd_op(
    at::TensorList params, const Tensor& x, const Tensor& y, at::TensorList lr,
    const OptionalTensor& example_weights, at::IntArrayRef numbers, at::ArrayRef<double> eps,
    std::string_view loss, int64_t steps, double momentum, bool first_order,
    std::optional<at::ScalarType> product_dtype, int64_t keep) {
  const Problem problem(params, x, y, lr, example_weights, numbers, eps, loss, steps, momentum, first_order,
                        product_dtype);
  const LongCall call;
  const Network& network = problem.network;
  const c10::OptionalDeviceGuard guard(x.device());
  return with_scalar(x, [&]<typename T>() -> std::tuple<std::vector<Tensor>, Tensor, Tensor> {
    const int64_t tasks = problem.tasks(), P = network.size();
    const at::TensorOptions options = problem.options();
    const Tensor statistics = empty({steps, 2, tasks, network.norm_channels()}, options);
    const Tensor kept = keep ? reserved({keep, steps, tasks, P}, options) : empty({0}, options);
    PackedOutput<T> adapted(network, tasks, false, options);
    if (tasks == 0) return {adapted.finish(), statistics, kept};
    const Adaptation<T> adaptation(problem, Sweep::forth, false);
    const Groups& groups = adaptation.groups();
    const PackedInput<T> start(network, params, !network.shared(), groups.size());
    // What is not kept: of two steps, which take turns.
    const Tensor turns = empty({2, 2, groups.size(), P}, options);
    groups.run([&](Some some) {
      const Steps<T> of_some = adaptation.of(some);
      const auto of = [&](int64_t what, int64_t k) {  // 0: theta_k, 1: m_k
        return what < keep ? some.of_all(kept.select(0, what).select(0, k - 1))
                           : some.of_group(turns.select(0, what).select(0, k % 2));
      };
      Tensor theta = start.load(some);
      for (int64_t k = 0; k < steps; ++k) {
        of_some.step(k, theta, k > 0 ? of(1, k) : Tensor(), of(1, k + 1), of(0, k + 1),
                     network.norm_channels() ? statistics[k] : Tensor());
        theta = of(0, k + 1);
      }
      adapted.store(some.first, theta.expand({some.count, P}));
    });
    return {adapted.finish(), statistics, kept};
  });
}

std::vector<Tensor> conv_inner_sgd_backward_op(at::TensorList grads, at::TensorList params, const Tensor& x,
                                               const Tensor& y, at::TensorList lr,
                                               const OptionalTensor& example_weights, const Tensor& kept,
                                               at::IntArrayRef numbers, at::ArrayRef<double> eps,
                                               std::string_view loss, int64_t steps, double momentum,
                                               bool first_order, std::optional<at::ScalarType> product_dtype,
                                               std::array<bool, 5> wanted) {
  const Problem problem(params, x, y, lr, example_weights, numbers, eps, loss, steps, momentum, first_order,
                        product_dtype);
  const LongCall call;
  const Network& network = problem.network;
  const int64_t tasks = problem.tasks(), P = network.size();
  check_sizes({kept, "kept"}, {wanted[1] ? 2 : kept.size(0), steps, tasks, P}, "[1 or 2, K, T, P]");
  TORCH_CHECK_VALUE(grads.size() == params.size(), "grads: expected ", params.size(), " tensors, got ",
                    grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::string name = indexed("grads", i);
    at::DimVector sizes{tasks};
    sizes.append(network.shape(i).begin(), network.shape(i).end());
    check_same_dtype({x, "x"}, {{grads[i], name.c_str()}});
    check_same_device({x, "x"}, {{grads[i], name.c_str()}});
    check_sizes({grads[i], name.c_str()}, sizes, "of the adapted parameter");
  }
  const c10::OptionalDeviceGuard guard(x.device());
  return with_scalar(x, [&]<typename T>() {
    const at::TensorOptions options = problem.options();
    const bool of_x = wanted[2], of_y = wanted[3] && !problem.labels,
               of_weights = wanted[4] && problem.shares;
    const Tensor grad_x = of_x ? at::zeros(x.sizes(), options) : empty({0}, options);
    const Tensor grad_y = of_y ? at::zeros(problem.y.sizes(), options) : empty({0}, options);
    const Tensor changes = of_weights ? at::zeros({tasks, problem.images()}, options) : Tensor();
    const bool reverses = !first_order && steps > 0;
    const PackedOutput<T> grad_params(network, tasks, network.shared(), options);
    std::optional<Adaptation<T>> adaptation;
    if (reverses && tasks > 0) adaptation.emplace(problem, Sweep::back, of_x);
    const Groups groups = adaptation ? adaptation->groups() : problem.groups<T>(network.size());
    const RateGradient<T> grad_rates(problem, wanted[1], groups.size());
    const PackedInput<T> start(network, params, !network.shared(), groups.size()),
        end(network, grads, true, groups.size());
    const Tensor directions = empty({reverses ? groups.size() : 0, P}, options),
                 products = at::empty_like(directions);
    Tensor image_memory;
    const Maps<T> image_maps = in_memory<T>(image_memory, options, [&](Workspace<T>& space) {
      return gradient_images(network, of_x && reverses ? groups.size() : 0, problem.images(), space);
    });
    groups.run(
        [&](Some some) {
          const auto of = [&](int64_t what, int64_t k) {  // 0: theta_k, 1: m_k
            return some.of_all(kept.select(0, what).select(0, k - 1));
          };
          const Tensor v = end.load(some);
          if (!reverses) {
            for (int64_t k = steps - 1; wanted[1] && k >= 0; --k) grad_rates.add(some, k, v, of(1, k + 1));
            if (wanted[0]) grad_params.store(some.first, v);
            return;
          }
          const Steps<T> of_some = adaptation->of(some);
          const Tensor theta = start.load(some), direction = some.of_group(directions),
                       product = some.of_group(products);
          const Maps<T> maps = maps_from(image_maps, some.slot);
          if (of_x) image_memory.narrow(0, some.slot * maps.task, some.count * maps.task).zero_();
          for (int64_t k = steps - 1; k >= 0; --k) {
            if (wanted[1]) grad_rates.add(some, k, v, of(1, k + 1));
            of_some.turn(k, v, direction);
            of_some.step_back(k > 0 ? of(0, k) : theta, direction, product, v, of_x ? &maps : nullptr,
                              of_y ? grad_y.mutable_data_ptr<T>() : nullptr, changes);
          }
          if (wanted[0]) grad_params.store(some.first, v);
          if (of_x) {
            store_images<T>(network, x, maps, some.count, problem.images(),
                            grad_x.mutable_data_ptr<T>() + some.first * (x.numel() / tasks));
          }
        },
        [&](int64_t, int64_t count) {
          if (wanted[0]) grad_params.add(end.loaded(count));
          grad_rates.end_group(count);
        });
    std::vector<Tensor> all = wanted[0] ? grad_params.finish() : nothing(params.size(), options);
    append(all, wanted[1] ? grad_rates.finish() : nothing(lr.size(), options));
    append(all, {grad_x, grad_y, of_weights ? problem.shares->gradient(changes) : empty({0}, options)});
    return all;
  });
}

// ---- conv_forward ----

template <typename T>
void store_outputs(const Network& network, const Activations<T>& of, int64_t tasks, int64_t images,
                   const Tensor& like, T* out) {
  const Maps<T>& maps = of.back().out;
  permute<T>(like, maps.data, out, {tasks, images, 1, 1, network.outputs()}, {maps.task, maps.image, 0, 0, 1},
             {images * network.outputs(), network.outputs(), 0, 0, 1});
}

std::tuple<Tensor, Tensor> conv_forward_op(at::TensorList params, const Tensor& x, at::IntArrayRef numbers,
                                           at::ArrayRef<double> eps,
                                           std::optional<at::ScalarType> product_dtype, bool keep) {
  check_params(params, x);
  const Network network(numbers, eps, params, x, checked_rounding(x, product_dtype));
  const LongCall call;
  const c10::OptionalDeviceGuard guard(x.device());
  return with_scalar(x, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    const at::TensorOptions options = x.options().requires_grad(false);
    const int64_t tasks = x.size(0), images = x.size(1), outputs = network.outputs();
    const Tensor out = empty({tasks, images, outputs}, options);
    const auto activations_of = [&](int64_t count) {
      return [&network, images, count](Workspace<T>& space) {
        return Activations<T>(network, count, images, space);
      };
    };
    const Groups groups =
        Groups::of<T>(tasks, network.image_cost() * images, elements_of<T>(activations_of(1)), x);
    Tensor kept;
    const Activations<T> activations =
        in_memory<T>(kept, options, activations_of(keep ? tasks : groups.size()));
    if (out.numel() == 0) return {out, keep ? kept : empty({0}, options)};
    Tensor image_memory;
    const Maps<const T> maps = load_images<T>(network, x, image_memory);
    const PackedInput<T> theta(network, params, !network.shared(), groups.size());
    groups.run([&](Some some) {
      const Activations<T> of_some = activations.from(keep ? some.first : some.slot);
      if (!runs_cuda(x)) of_some.clear_borders(network, some.count, images);
      Pass<T>(network, x, some.count, images, maps_from(maps, some.first))
          .forward(packed_view<const T>(theta.load(some)), of_some);
      store_outputs<T>(network, of_some, some.count, images, x,
                       out.mutable_data_ptr<T>() + some.first * images * outputs);
    });
    return {out, keep ? kept : empty({0}, options)};
  });
}

std::vector<Tensor> conv_forward_backward_op(const Tensor& grad, at::TensorList params, const Tensor& x,
                                             const Tensor& kept, at::IntArrayRef numbers,
                                             at::ArrayRef<double> eps,
                                             std::optional<at::ScalarType> product_dtype,
                                             std::array<bool, 2> wanted) {
  check_params(params, x);
  const Network network(numbers, eps, params, x, checked_rounding(x, product_dtype));
  const LongCall call;
  const int64_t tasks = x.size(0), images = x.size(1), outputs = network.outputs();
  check_same_dtype({x, "x"}, {{grad, "grad"}, {kept, "kept"}});
  check_same_device({x, "x"}, {{grad, "grad"}, {kept, "kept"}});
  check_sizes({grad, "grad"}, {tasks, images, outputs}, "[T, B, O]");
  const c10::OptionalDeviceGuard guard(x.device());
  return with_scalar(x, [&]<typename T>() {
    const at::TensorOptions options = x.options().requires_grad(false);
    Workspace<T> counted;
    Activations<T>(network, tasks, images, counted);
    check_sizes({kept, "kept"}, {counted.elements()}, "that conv_forward keeps");
    Workspace<T> space(kept.mutable_data_ptr<T>(), counted);
    const Activations<T> activations(network, tasks, images, space);
    PackedOutput<T> grad_params(network, tasks, network.shared(), options);
    const Tensor grad_x = wanted[1] ? at::zeros(x.sizes(), options) : empty({0}, options);
    if (grad.numel() > 0) {
      struct Parts {
        Gradients<T> gradients;
        Maps<T> images;
      };
      const auto parts_of = [&](int64_t count) {
        return [&, count](Workspace<T>& space) {
          const Gradients<T> gradients(network, count, images, wanted[1], space);
          return Parts{gradients, gradient_images(network, wanted[1] ? count : 0, images, space)};
        };
      };
      const Groups groups =
          Groups::of<T>(tasks, 2 * network.image_cost() * images, elements_of<T>(parts_of(1)), x);
      Tensor memory;
      const Parts parts = in_memory<T>(memory, options, parts_of(groups.size()));
      const Tensor dense = grad.contiguous();
      const PackedInput<T> theta(network, params, !network.shared(), groups.size());
      const Tensor of_theta = empty({groups.size(), network.size()}, options);
      Tensor image_memory;
      const Maps<const T> maps = load_images<T>(network, x, image_memory);
      groups.run(
          [&](Some some) {
            const Gradients<T> gradients = parts.gradients.from(some.slot);
            if (!runs_cuda(x)) gradients.clear_borders(network, some.count, images);
            const Maps<T>& top = gradients.blocks.back().out;
            const Maps<T> of_images = maps_from(parts.images, some.slot);
            const Tensor of_some = some.of_group(of_theta);
            permute<T>(x, dense.const_data_ptr<T>() + some.first * images * outputs, top.data,
                       {some.count, images, 1, 1, outputs}, {images * outputs, outputs, 0, 0, 1},
                       {top.task, top.image, 0, 0, 1});
            Pass<T>(network, x, some.count, images, maps_from(maps, some.first))
                .backward(packed_view<const T>(theta.load(some)), activations.from(some.first), gradients,
                          packed_view<T>(of_some), wanted[1] ? &of_images : nullptr);
            if (wanted[0]) grad_params.store(some.first, of_some);
            if (wanted[1]) {
              store_images<T>(network, x, of_images, some.count, images,
                              grad_x.mutable_data_ptr<T>() + some.first * (x.numel() / tasks));
            }
          },
          [&](int64_t, int64_t count) {
            if (wanted[0]) grad_params.add(of_theta.narrow(0, 0, count));
          });
    } else {
      grad_params.clear();
    }
    std::vector<Tensor> all = wanted[0] ? grad_params.finish() : nothing(params.size(), options);
    append(all, {grad_x});
    return all;
  });
}

void implement(torch::Library& m) {
  m.impl("conv_inner_sgd", conv_inner_sgd_op);
  m.impl("conv_inner_sgd_backward", conv_inner_sgd_backward_op);
  m.impl("conv_forward", conv_forward_op);
  m.impl("conv_forward_backward", conv_forward_backward_op);
}

}  // namespace

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CPU, m) { implement(m); }
#ifdef METAFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CUDA, m) { implement(m); }
#endif

}  // namespace metafast
