// task_conv2d and its products on CPU and CUDA: check the arguments, allocate the result, run the kernels for
// some tasks at a time. What each op computes is stated in library.cpp.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "common/layers.h"
#include "convolutional/arguments.h"
#include "convolutional/layer_ops.h"

namespace metafast {
namespace {

// ---- between torch's layouts and the kernels' ----

// A tensor of five dimensions, the first of them tasks. One that all tasks share has a stride of 0.
template <typename T>
struct View {
  T* data;
  std::array<int64_t, 5> stride;

  explicit View(const Tensor& tensor) {
    if constexpr (std::is_const_v<T>) {
      data = tensor.const_data_ptr<std::remove_const_t<T>>();
    } else {
      data = tensor.mutable_data_ptr<T>();
    }
    std::copy_n(tensor.strides().begin(), 5, stride.begin());
    if (tensor.size(0) == 1) stride[0] = 0;
  }
  bool shared() const { return stride[0] == 0; }
};

template <typename T>
class Layouts {
 public:
  Layouts(const Layer& layer, const Tensor& like) : l_(layer), like_(like) {}

  // Maps of height x width, whose channels are dense or, with `pad`, pitch of them.
  Maps<const T> load_maps(const View<const T>& from, int64_t channels, std::array<int64_t, 2> size,
                          Maps<T> maps, int64_t pad = 0) const {
    if (from.shared()) maps.task = 0;
    const auto& s = from.stride;
    const int64_t tasks = from.shared() ? 1 : l_.tasks, H = size[0], W = size[1];
    if (channels == 1 && pad == 0) {  // the longer rows
      permute<T>(like_, from.data, maps.data, {tasks, l_.images, 1, H, W}, {s[0], s[1], 0, s[3], s[4]},
                 {maps.task, maps.image, 0, maps.row, 1});
    } else if (s[3] == W * s[4] && maps.row == W * maps.pixel) {
      permute<T>(like_, from.data, maps.data, {tasks, l_.images, 1, H * W, channels},
                 {s[0], s[1], 0, s[4], s[2]}, {maps.task, maps.image, 0, maps.pixel, 1}, pad);
    } else {
      permute<T>(like_, from.data, maps.data, {tasks, l_.images, H, W, channels},
                 {s[0], s[1], s[3], s[4], s[2]}, {maps.task, maps.image, maps.row, maps.pixel, 1}, pad);
    }
    return as_const(maps);
  }

  // Maps without a border, into a dense tensor.
  void store_maps(const Maps<T>& maps, int64_t channels, const View<T>& to) const {
    const auto& s = to.stride;
    permute<T>(like_, maps.data, to.data, {l_.tasks, l_.images, 1, channels, s[2]},
               {maps.task, maps.image, 0, 1, maps.pixel}, {s[0], s[1], 0, s[2], 1});
  }

  // [kh, kw, C, pitch(O)]. -> the stride of tasks.
  int64_t load_weights(const View<const T>& from, T* to) const {
    const auto& s = from.stride;
    const int64_t place = l_.channels * l_.out_pitch();
    return load_places(from, to, {l_.channels, s[2], l_.out_pitch()}, {l_.outputs, s[1]}, place,
                       l_.out_pitch());
  }

  // [kh, kw, O, pitch(C)], the last place first. -> the stride of tasks.
  int64_t load_weights_reversed(const View<const T>& from, T* to) const {
    const auto& s = from.stride;
    const int64_t place = l_.outputs * l_.in_pitch();
    return load_places(from, to + (l_.places() - 1) * place, {l_.outputs, s[1], l_.in_pitch()},
                       {l_.channels, s[2]}, -place, l_.in_pitch());
  }

  // Into a dense tensor.
  void store_weights(const T* from, const View<T>& to) const {
    const auto& s = to.stride;
    const int64_t place = l_.channels * l_.out_pitch();
    permute<T>(like_, from, to.data, {l_.tasks, l_.channels, 1, l_.outputs, l_.places()},
               {l_.places() * place, l_.out_pitch(), 0, 1, place}, {s[0], s[2], 0, s[1], 1});
  }

 private:
  const Layer& l_;
  const Tensor& like_;

  struct Dimension {
    int64_t size, in_stride, out_stride = 1;
  };

  // Weights whose `lines`, of which each place of the kernel has some, are `pad` long.
  int64_t load_places(const View<const T>& from, T* to, Dimension lines, Dimension last, int64_t place,
                      int64_t pad) const {
    const auto& s = from.stride;
    const int64_t tasks = from.shared() ? 1 : l_.tasks;
    const int64_t task = from.shared() ? 0 : l_.places() * std::abs(place);
    if (l_.places() == 1) {
      permute<T>(like_, from.data, to, {tasks, 1, 1, lines.size, last.size},
                 {s[0], 0, 0, lines.in_stride, last.in_stride}, {task, 0, 0, lines.out_stride, 1}, pad);
    } else if (s[3] == l_.kernel[1] * s[4]) {
      permute<T>(like_, from.data, to, {tasks, lines.size, 1, l_.places(), last.size},
                 {s[0], lines.in_stride, 0, s[4], last.in_stride}, {task, lines.out_stride, 0, place, 1},
                 pad);
    } else {
      permute<T>(like_, from.data, to, {tasks, lines.size, l_.kernel[0], l_.kernel[1], last.size},
                 {s[0], lines.in_stride, s[3], s[4], last.in_stride},
                 {task, lines.out_stride, l_.kernel[1] * place, place, 1}, pad);
    }
    return task;
  }
};

// ---- the products ----

// One of them, whose operands and result are views of all tasks.
template <typename T>
class Product {
 public:
  Product(const Layer& layer, const Tensor& like)
      : layer_(layer), like_(like), rounding_(rounding_of(like, like.scalar_type())) {}

  void to_maps(const View<const T>& x, const View<const T>& weight, const View<T>& out) const {
    in_groups(
        true,
        [this](const Layer& l, Workspace<T>& space) {
          return Parts{images(l, space, l.channels, l.image_border()), maps(l, space, l.out_pitch(), {}),
                       space.take(l.tasks * l.places() * l.channels * l.out_pitch())};
        },
        [&, task = int64_t{}](const Layer& l, int64_t first, int64_t image, const Parts& parts) mutable {
          const Layouts<T> layouts(l, like_);
          const Maps<const T> source =
              layouts.load_maps(from(x, first, image), l.channels, l.size, parts.images);
          if (image == 0) task = layouts.load_weights(from(weight, first), parts.weights);
          launch(metafast::to_maps<T>(l, source, parts.weights, task, parts.maps));
          layouts.store_maps(parts.maps, l.outputs, from(out, first, image));
        });
  }

  void to_images(const View<const T>& grad, const View<const T>& weight, const View<T>& out) const {
    in_groups(
        true,
        [this](const Layer& l, Workspace<T>& space) {
          return Parts{images(l, space, l.in_pitch(), {}), maps(l, space, l.outputs, l.map_border()),
                       space.take(l.tasks * l.places() * l.outputs * l.in_pitch())};
        },
        [&, task = int64_t{}](const Layer& l, int64_t first, int64_t image, const Parts& parts) mutable {
          const Layouts<T> layouts(l, like_);
          const Maps<const T> source =
              layouts.load_maps(from(grad, first, image), l.outputs, l.out_size, parts.maps);
          if (image == 0) task = layouts.load_weights_reversed(from(weight, first), parts.weights);
          metafast::to_images<T>(l, {{source, parts.weights, task}}, parts.images, false,
                                 [this](const Convolve<T>& p) { launch(p); });
          layouts.store_maps(parts.images, l.channels, from(out, first, image));
        });
  }

  void to_weights(const View<const T>& x, const View<const T>& grad, const View<T>& out) const {
    in_groups(
        false,
        [this](const Layer& l, Workspace<T>& space) {
          return Parts{images(l, space, l.channels, l.image_border()), maps(l, space, l.out_pitch(), {}),
                       space.take(l.tasks * l.places() * l.channels * l.out_pitch())};
        },
        [&](const Layer& l, int64_t first, int64_t, const Parts& parts) {
          const Layouts<T> layouts(l, like_);
          const Maps<const T> source = layouts.load_maps(from(x, first), l.channels, l.size, parts.images);
          const Maps<const T> grads =
              layouts.load_maps(from(grad, first), l.outputs, l.out_size, parts.maps, l.out_pitch());
          launch(metafast::to_weights<T>(l, source, grads, parts.weights,
                                         l.places() * l.channels * l.out_pitch()));
          layouts.store_weights(parts.weights, from(out, first));
        });
  }

 private:
  const Layer& layer_;
  const Tensor& like_;
  const Rounding rounding_;

  // What some tasks hold in memory, in the kernels' layouts.
  struct Parts {
    Maps<T> images, maps;
    T* weights;
  };

  Maps<T> images(const Layer& l, Workspace<T>& space, int64_t pixel, Border border) const {
    return maps_of(l, space, l.size, pixel, border);
  }
  Maps<T> maps(const Layer& l, Workspace<T>& space, int64_t pixel, Border border) const {
    return maps_of(l, space, l.out_size, pixel, border);
  }
  Maps<T> maps_of(const Layer& l, Workspace<T>& space, std::array<int64_t, 2> size, int64_t pixel,
                  Border border) const {
    const Maps<T> maps = space.take_maps(l.tasks, l.images, size[0], size[1], pixel, border);
    const bool counts = maps.data == nullptr;
    if (!counts && !runs_cuda(like_)) clear_border(maps, l.tasks, l.images, size[0], size[1], border);
    return maps;
  }
  template <typename U>
  static View<U> from(View<U> view, int64_t task, int64_t image = 0) {
    view.data += task * view.stride[0] + image * view.stride[1];
    return view;
  }

  // build(layer, space) -> the parts of the layer's tasks and images; run(layer, task, image, parts) for
  // those from there on, as many as leave what they hold in the cache of each thread, or in a GPU's memory:
  // some tasks, or if it `splits` them some of a task's images.
  template <class Build, class Run>
  void in_groups(bool splits, const Build& build, Run&& run) const {
    const int64_t bytes = runs_cuda(like_) ? int64_t{512} << 20 : int64_t{at::get_num_threads()} << 20;
    Layer l = layer_;
    const auto count = [&](int64_t tasks, int64_t images) {
      l.tasks = tasks;
      l.images = images;
      Workspace<T> space;
      build(l, space);
      return space;
    };
    const auto fitting = [&](const Workspace<T>& one, int64_t most) {
      const int64_t size = one.elements() * static_cast<int64_t>(sizeof(T));
      return std::clamp<int64_t>(bytes / std::max<int64_t>(1, size), 1, most);
    };
    const int64_t tasks = fitting(count(1, layer_.images), layer_.tasks);
    const int64_t images = splits && tasks == 1 ? fitting(count(1, 1), layer_.images) : layer_.images;
    const Workspace<T> counted = count(tasks, images);
    const Tensor memory = counted.allocate(like_.options().dtype(c10::CppTypeToScalarType<T>::value));
    Workspace<T> space(memory.mutable_data_ptr<T>(), counted);
    const Parts parts = build(l, space);
    for (int64_t task = 0; task < layer_.tasks; task += tasks) {
      l.tasks = std::min(tasks, layer_.tasks - task);
      for (int64_t image = 0; image < layer_.images; image += images) {
        l.images = std::min(images, layer_.images - image);
        run(l, task, image, parts);
      }
    }
  }

  void launch(Convolve<T> p) const {
    p.rounding = rounding_;
    run_kernel(p, like_);
  }
  void launch(ConvolveWeights<T> p) const {
    p.rounding = rounding_;
    p.wanted_items = at::get_num_threads() > 1 ? 4 * at::get_num_threads() : 1;
    Tensor workspace;
    if (runs_cuda(like_)) {
      workspace = empty({p.workspace_size()}, like_.options().dtype(c10::CppTypeToScalarType<T>::value));
      p.workspace = workspace.mutable_data_ptr<T>();
    }
    run_kernel(p, like_);
  }
};

// ---- the ops ----

Layer layer_of(const Arg& first, const Arg& second, int64_t tasks, int64_t images, int64_t channels,
               int64_t outputs, at::IntArrayRef size, at::IntArrayRef kernel, at::IntArrayRef stride,
               at::IntArrayRef padding) {
  check_floating(first);
  check_same_dtype(first, {second});
  check_same_device(first, {second});
  Layer l{tasks, images, channels, outputs, {}, {}, {}, {}, {}};
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(stride[i] > 0 && padding[i] >= 0,
                      "stride, padding: expected numbers > 0 and >= 0, got ", stride, " and ", padding);
    const int64_t padded = size[i] + 2 * padding[i];
    TORCH_CHECK_VALUE(kernel[i] > 0 && kernel[i] <= padded, second.name, ": expected a kernel of 1 to ",
                      padded, " pixels, got ", kernel[i]);
    l.size[i] = size[i];
    l.kernel[i] = kernel[i];
    l.stride[i] = stride[i];
    l.padding[i] = padding[i];
    l.out_size[i] = (padded - kernel[i]) / stride[i] + 1;
  }
  return l;
}

void check_five(const Arg& arg) {
  TORCH_CHECK_VALUE(arg.tensor.dim() == 5, arg.name, ": expected 5 dimensions, got shape ",
                    arg.tensor.sizes());
}

// What run(product, first, second, result) writes; zeros where it would add up nothing.
template <class F>
Tensor computed(const Layer& layer, const Tensor& first, const Tensor& second, at::IntArrayRef sizes,
                const F& run) {
  const at::TensorOptions options = first.options().requires_grad(false);
  if (layer.tasks * layer.images * layer.channels * layer.outputs == 0) return at::zeros(sizes, options);
  const LongCall call;
  const c10::OptionalDeviceGuard guard(first.device());
  return with_scalar(first, [&]<typename T>() {
    const at::ScalarType dtype = compute_type(first);
    const Tensor one = to_dtype(first, dtype), other = to_dtype(second, dtype);
    const Tensor result = empty(sizes, options.dtype(dtype));
    run(Product<T>(layer, first), View<const T>(one), View<const T>(other), View<T>(result));
    return to_dtype(result, first.scalar_type());
  });
}

Tensor task_conv2d_maps_op(const Tensor& x, const Tensor& weight, at::IntArrayRef stride,
                           at::IntArrayRef padding) {
  const Arg first{x, "x"}, second{weight, "weight"};
  check_five(first);
  check_five(second);
  check_sizes(second, {x.size(0), weight.size(1), x.size(2), weight.size(3), weight.size(4)},
              "[T, O, C, kh, kw]");
  const Layer l = layer_of(first, second, x.size(0), x.size(1), x.size(2), weight.size(1), x.sizes().slice(3),
                           weight.sizes().slice(3), stride, padding);
  return computed(l, x, weight, {l.tasks, l.images, l.outputs, l.out_size[0], l.out_size[1]},
                  [](const auto& product, const auto& x, const auto& weight, const auto& out) {
                    product.to_maps(x, weight, out);
                  });
}

Tensor task_conv2d_images_op(const Tensor& grad, const Tensor& weight, at::IntArrayRef size,
                             at::IntArrayRef stride, at::IntArrayRef padding) {
  const Arg first{grad, "grad"}, second{weight, "weight"};
  check_five(first);
  check_five(second);
  const Layer l = layer_of(first, second, grad.size(0), grad.size(1), weight.size(2), weight.size(1), size,
                           weight.sizes().slice(3), stride, padding);
  check_sizes(first, {weight.size(0), l.images, l.outputs, l.out_size[0], l.out_size[1]},
              "[T, B, O, H', W']");
  return computed(l, grad, weight, {l.tasks, l.images, l.channels, l.size[0], l.size[1]},
                  [](const auto& product, const auto& grad, const auto& weight, const auto& out) {
                    product.to_images(grad, weight, out);
                  });
}

Tensor task_conv2d_weight_op(const Tensor& x, const Tensor& grad, at::IntArrayRef size,
                             at::IntArrayRef stride, at::IntArrayRef padding) {
  const Arg first{x, "x"}, second{grad, "grad"};
  check_five(first);
  check_five(second);
  const Layer l = layer_of(first, second, x.size(0), x.size(1), x.size(2), grad.size(2), x.sizes().slice(3),
                           size, stride, padding);
  check_sizes(second, {l.tasks, l.images, l.outputs, l.out_size[0], l.out_size[1]}, "[T, B, O, H', W']");
  return computed(l, x, grad, {l.tasks, l.outputs, l.channels, l.kernel[0], l.kernel[1]},
                  [](const auto& product, const auto& x, const auto& grad, const auto& out) {
                    product.to_weights(x, grad, out);
                  });
}

void implement(torch::Library& m) {
  m.impl("task_conv2d_maps", task_conv2d_maps_op);
  m.impl("task_conv2d_images", task_conv2d_images_op);
  m.impl("task_conv2d_weight", task_conv2d_weight_op);
}

// Made of the product onto maps. Under autocast the result is in its dtype; on a CPU computed in float32 from
// what the arguments were.
Tensor task_conv2d_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      c10::SymIntArrayRef stride, c10::SymIntArrayRef padding) {
  const Arg ax{x, "x"}, aw{weight, "weight"};
  check_layer(ax, {aw});
  TORCH_CHECK_VALUE(x.dim() == 5, "x: expected shape [T, B, C, H, W], got ", x.sym_sizes());
  const c10::SymInt tasks = x.sym_size(0), channels = x.sym_size(2);
  TORCH_CHECK_VALUE(weight.dim() == 5 && weight.sym_size(0) == tasks && weight.sym_size(2) == channels,
                    "weight: expected shape [T, O, C, kh, kw] with T = ", tasks, ", C = ", channels, ", got ",
                    weight.sym_sizes());
  if (bias) {
    const c10::SymInt outputs = weight.sym_size(1);
    check_layer(ax, {{*bias, "bias"}});
    TORCH_CHECK_VALUE(bias->dim() == 2 && bias->sym_size(0) == tasks && bias->sym_size(1) == outputs,
                      "bias: expected shape [T, O] = [", tasks, ", ", outputs, "], got ", bias->sym_sizes());
  }
  TORCH_CHECK_VALUE(stride.size() == 2, "stride: expected a number or two, got ", stride);
  TORCH_CHECK_VALUE(padding.size() == 2, "padding: expected a number or two, got ", padding);
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(stride[i] > 0, "stride: expected numbers > 0, got ", stride);
    TORCH_CHECK_VALUE(padding[i] >= 0, "padding: expected numbers >= 0, got ", padding);
    const c10::SymInt kernel = weight.sym_size(3 + i), padded = x.sym_size(3 + i) + padding[i] * 2;
    TORCH_CHECK_VALUE(kernel > 0 && kernel <= padded, "weight: expected a kernel of 1 to ", padded,
                      " pixels, the size of x and its padding, got ", kernel);
  }
  const at::ScalarType dtype = layer_dtype(x);
  const bool widens = x.is_cpu() && at::isReducedFloatingType(dtype);  // for the sum of product and bias
  const at::ScalarType computed = widens ? at::kFloat : dtype;
  const LayerSizes sizes(x.sym_sizes().slice(3), weight.sym_sizes().slice(3), stride, padding);
  Tensor out = task_product(kMaps, {x.to(computed), weight.to(computed), Tensor()}, sizes);
  if (bias) out = out + bias->to(computed).unsqueeze(1).unsqueeze(-1).unsqueeze(-1);
  return out.to(dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CompositeImplicitAutograd, m) {
  m.impl("task_conv2d", task_conv2d_op);
}
// Else vmap would call it once for each of its elements.
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, FuncTorchBatchedDecomposition, m) {
  m.impl("task_conv2d", task_conv2d_op);
}
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CPU, m) { implement(m); }
#ifdef METAFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(METAFAST_NAMESPACE, CUDA, m) { implement(m); }
#endif

}  // namespace metafast
