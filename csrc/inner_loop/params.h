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

enum class Lanes { tasks, pairs, samples, features };  // of the CPU kernel, see lanes.h

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
  const T* weights;       // [T, count], of the examples in their task's mean, 0 leaves one out; null: all 1
  T* grad_weights;        // [T, count] or null
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
  int64_t params, lr, step_weights, loss;  // the first column of each, or -1: not wanted
};

// The dual form of the first layer. Its inputs never change, so gradient descent moves its W only within the
// span of the task's E = S + Q examples X (here each with a last feature 1, for the bias b):
//
//   [W b]_k = [W b]_0 + P_k^T X,   P_k [E, H], P_0 = 0, zero in the rows of queries,
//
// exactly, as long as all elements of the layer have the same lr. Its outputs are X [W b]_0^T + (X X^T) P_k,
// its gradient has the coordinates dloss/doutputs, and all else is as if P were the layer's parameters and
// rows of X X^T its inputs. So W exists once, or once per task, and never again in each of K steps. What is
// left of its size are two products over all tasks, which are the caller's: before, X [W b]_0^T; after, with
// the coordinates V of the gradient, V^T X. sums.params then has the columns of the other layers alone, and
// grad_params[0] and [1] are null. All null: the direct form.
template <typename T>
struct DualFirstLayer {
  const T *support, *query;      // [T, S, H], [T, Q, H]: X [W b]_0^T
  T *grad_support, *grad_query;  // [T, S, H], [T, Q, H]: coordinates of the gradient; or null, not wanted
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
  DualFirstLayer<T> dual;
  int64_t trajectory_bytes;  // of a CPU thread: more of earlier parameters is not kept but recomputed
  T* workspace;              // scratch memory of the CUDA kernel (cuda::needs below)

  METAFAST_HD bool has_query() const { return query.x != nullptr; }
  METAFAST_HD bool lr_gradient() const { return sums.lr >= 0; }
  // Whether the backward returns to earlier parameters; else they are overwritten step by step.
  METAFAST_HD bool keeps_trajectory() const {
    return backward && sgd.steps > 0 && (!sgd.first_order || lr_gradient());
  }

  // Whether the gradient M of the momentum buffer is -lr v with one number lr, so that v serves as M (on the
  // CPU adaptation.h has the formulas); the products with it that go to the examples need M itself.
  METAFAST_HD bool m_is_v_scaled() const {
    return sgd.momentum == 0 && sgd.rates != nullptr && sgd.layer_stride == 0 && support.grad_x == nullptr &&
           support.grad_y == nullptr && support.grad_weights == nullptr;
  }

  // What follows holds for the CPU kernel. It is decided by the shapes alone, never by the number of threads,
  // so the order of every sum is too.

  // Large are networks of which a group of this many tasks would not stay in the cache with all their steps.
  static constexpr int64_t kGroup = 16;  // a multiple of every number of lanes
  METAFAST_HD bool large() const {
    constexpr int64_t kCacheBytes = 4 << 20;
    const int64_t copies = keeps_trajectory() ? (lr_gradient() ? 2 : 1) * sgd.steps + 3 : 2;
    return copies * mlp.size() * kGroup * static_cast<int64_t>(sizeof(T)) > kCacheBytes;
  }
  // Of the lanes of small networks, pairs of examples keep less in the cache than as many tasks, and share
  // few tasks out among more threads; but the last of a few and odd examples leaves half of a pair empty.
  // Few tasks fill too few lanes and are better off one by one.
  METAFAST_HD Lanes lanes() const {
    constexpr int64_t kFewTasks = 6;
    if (large()) return Lanes::features;
    if (tasks <= kFewTasks) return Lanes::samples;
    const bool paired = support.count % 2 == 0 || support.count > 8;
    return paired || tasks <= kGroup ? Lanes::pairs : Lanes::tasks;
  }

  // Whether the dual form of the first layer is exact, gives all that is wanted, and pays: the multiply-adds
  // of the layer and a task, as often as each form goes through all of W [H, D], or of X X^T.
  METAFAST_HD bool dual_pays() const {
    const int64_t S = support.count, Q = query.count, D = mlp.widths[0], H = mlp.widths[1], K = sgd.steps;
    const bool exact = sgd.rates != nullptr, has_all = adapted[0] == nullptr && grad_adapted[0] == nullptr &&
                                                       support.grad_x == nullptr && query.grad_x == nullptr;
    if (!exact || !has_all || !has_query() || !large() || S == 0) return false;
    const bool reverses = keeps_trajectory() && !sgd.first_order;
    const int64_t direct = D * H * (K * S * (reverses ? 5 : 2) + Q * (backward ? 2 : 1));
    const int64_t dual = D * H * (S + Q) * (backward ? 2 : 1) + D * S * (S + 2 * Q) +
                         H * (K * S * (reverses ? 3 * S + Q : S) + Q * S);
    return dual < direct;
  }

  METAFAST_HD int64_t tasks_per_item() const {
    constexpr int64_t kMaxItems = 64;  // each leaves a row of sums
    const int64_t unit = lanes() == Lanes::tasks ? kGroup : (lanes() == Lanes::pairs ? kGroup / 2 : 1);
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

namespace cuda {

// What the CUDA kernel asks of its caller: how many rows of sums, and how many elements of workspace. It
// follows from all but the addresses, and from the current device.
struct Needs {
  int64_t items, workspace;
};
template <typename T>
Needs needs(const InnerLoop<T>& params);

}  // namespace cuda

}  // namespace metafast
