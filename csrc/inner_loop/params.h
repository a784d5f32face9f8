// The inner-loop kernels: one struct each. T tasks, S support and Q query examples per task, K steps, an MLP
// of L layers with widths D = d_0, d_1, ..., d_L = O. All arrays are dense and row-major. Scalars T are float
// or double.
#pragma once

#include "common/kernel.h"
#include "common/math.h"

namespace metafast {

enum class Activation { relu, tanh, none };
enum class Loss { mse, cross_entropy };

constexpr int kMaxLayers = 8;

// The MLP and its parameters in nn.Linear layout: parameter 2l is W of layer l, parameter 2l + 1 its b.
template <typename T>
struct Mlp {
  int layers;
  int64_t widths[kMaxLayers + 1];
  Activation activation;
  Loss loss;
  bool shared;                      // one set of parameters for all tasks, or one for each
  const T* params[2 * kMaxLayers];  // shared: [O, I], [O]; else [T, O, I], [T, O]

  // Elements of parameter i of one task.
  METAFAST_HD int64_t size(int i) const { return widths[i / 2 + 1] * (i % 2 ? 1 : widths[i / 2]); }
  METAFAST_HD int64_t size() const {
    int64_t sum = 0;
    for (int i = 0; i < 2 * layers; ++i) sum += size(i);
    return sum;
  }
};

// Examples of every task, and where their gradients go.
template <typename T>
struct Examples {
  int64_t count;          // per task
  const T* x;             // [T, count, D]
  const T* y;             // [T, count, O], or null with cross_entropy
  const int64_t* labels;  // [T, count], kIgnoreLabel allowed, or null with mse
  T* grad_x;              // [T, count, D] or null
  T* grad_y;              // [T, count, O] or null
};

// theta_{k+1} = theta_k - lr m_{k+1},  m_{k+1} = momentum m_k + grad of the support loss at theta_k,  m_0 =
// 0.
template <typename T>
struct Sgd {
  int64_t steps;
  T momentum;
  bool first_order;  // in the backward, gradients count as constants
  // lr of layer l in step k: rates[k * step_stride + l * layer_stride]; or, if that is null, one for each
  // element: elements[i] has the shape of parameter i of one task.
  const T* rates;
  int64_t step_stride, layer_stride;
  const T* elements[2 * kMaxLayers];
};

// Sums over tasks, as columns of one row: the gradient of the shared parameters, of lr, and the loss. Each
// work item leaves its partial sum in a row of its own, so that they are always added in the same order.
template <typename T>
struct Sums {
  T* rows;  // [items, columns]
  int64_t columns;
  int64_t params, lr, loss;  // the first column of each, or -1: not wanted
};

// Adapts every task to its support examples. With query examples it evaluates sum_k step_weights[k-1]
// query_loss(theta_k) (without step_weights the loss at theta_K alone); with `backward` it differentiates
// that, or <grad_adapted, theta_K>, back through all steps.
template <typename T>
struct InnerLoop {
  Mlp<T> mlp;
  Sgd<T> sgd;
  int64_t tasks;
  Examples<T> support, query;  // query.count = 0: none
  const T* step_weights;       // [K] or null
  const T* task_weights;       // gradient of each task's loss: element t * task_weight_stride
  int64_t task_weight_stride;
  T loss_scale;  // times task_weights, if those are not null, it weighs each task's loss
  bool backward;
  const T* grad_adapted[2 * kMaxLayers];  // [T, ...] or null
  T* adapted[2 * kMaxLayers];             // [T, ...], theta_K, or null
  T* grad_params[2 * kMaxLayers];         // [T, ...] or null
  T* losses;                              // [T] or null
  Sums<T> sums;

  METAFAST_HD bool has_query() const { return query.x != nullptr; }
  METAFAST_HD bool lr_gradient() const { return sums.lr >= 0; }
  // Whether the backward returns to earlier parameters; else they are overwritten step by step.
  METAFAST_HD bool keeps_trajectory() const {
    return backward && sgd.steps > 0 && (!sgd.first_order || lr_gradient());
  }

  // The CPU kernel has tasks in the lanes of its vectors. Where these are too few to fill them, or the
  // parameters of so many tasks would not stay in the cache, it takes tasks one by one and has their examples
  // in the lanes. This and how tasks are dealt to work items follow from the shapes alone, never from the
  // number of threads.
  METAFAST_HD bool task_by_task() const {
    constexpr int64_t kFewTasks = 12, kCacheBytes = 4 << 20;
    const int64_t copies = keeps_trajectory() ? (lr_gradient() ? 2 : 1) * sgd.steps + 3 : 2;
    return tasks <= kFewTasks || copies * mlp.size() * kGroup * static_cast<int64_t>(sizeof(T)) > kCacheBytes;
  }
  static constexpr int64_t kGroup = 16;  // a multiple of every number of lanes
  METAFAST_HD int64_t tasks_per_item() const {
    constexpr int64_t kMaxItems = 256;
    const int64_t unit = task_by_task() ? 1 : kGroup;
    const int64_t units = (tasks + unit - 1) / unit;
    return (units + kMaxItems - 1) / kMaxItems * unit;
  }
  int64_t items() const { return tasks == 0 ? 0 : (tasks + tasks_per_item() - 1) / tasks_per_item(); }
  int64_t item_cost() const {
    return tasks_per_item() * mlp.size() *
           (sgd.steps * support.count * (keeps_trajectory() ? 11 : 3) + query.count * (backward ? 3 : 1));
  }
};

// One step of SGD on up to kMaxTensors tensors in one launch:
//   step = grad + weight_decay param;  buffer = momentum buffer + step;  param = param - lr (buffer, or with
//   nesterov step + momentum buffer, or without momentum step)
template <typename T>
struct SgdUpdate {
  static constexpr int kMaxTensors = 64;
  static constexpr int64_t kChunk = 1 << 14;  // elements of a work item

  struct Item {
    int64_t size;
    const T *param, *grad;  // [size]
    const T* lr;            // [size] or, with stride 0, [1]
    int64_t lr_stride;
    const T* buffer;  // [size], or null: zeros
    T* new_param;     // [size]
    T* new_buffer;    // [size], or null without momentum
  };

  Item list[kMaxTensors];
  int64_t first_chunk[kMaxTensors + 1];  // work items of tensor i: first_chunk[i] to first_chunk[i + 1]
  int count;
  T momentum, weight_decay;
  bool nesterov;

  void add(const Item& item) {
    list[count] = item;
    first_chunk[count + 1] = first_chunk[count] + (item.size + kChunk - 1) / kChunk;
    ++count;
  }
  int64_t items() const { return first_chunk[count]; }
  int64_t item_cost() const { return 4 * kChunk; }
};

METAFAST_DECLARE_KERNEL(InnerLoop)
METAFAST_DECLARE_KERNEL(SgdUpdate)

}  // namespace metafast
