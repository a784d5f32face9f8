// The kernels of convolutional networks whose tasks have parameters of their own: one struct each. T tasks, B
// images of a task, [C, H, W] an image. Scalars T are float or double.
//
// Maps are channels last: the channels of a pixel lie one behind the other, `pitch(C)` of them, those behind
// C zero; pixels, rows, images and tasks have strides. What convolutions read has a border of zeros around
// each image, so that no kernel asks whether it is inside. A network is a chain of blocks,
//
//   z = W * in + b,   y = gamma (z - mean) / sqrt(var + eps) + beta,   out = pool(activation(y)),
//
// with the mean and variance of the task's batch; norm, activation and pooling may be absent, and the last
// two stand in either order. A linear layer is a convolution whose kernel is as large as the map. With
// max-pooling a window gives its first largest pixel, in rows; NaN is largest.
//
// Maps of pitch(C) channels, weights, biases and the vectors of a norm begin at multiples of 16 bytes, with
// strides that are multiples of kChannelBlock. Images of a dense C may lie anywhere.
//
// "Tangent" is the derivative along a direction in the parameters: a second set of maps beside the first.
// With it the same kernels give products with the Hessian of a loss, forward over reverse.
#pragma once

#include "common/kernel.h"
#include "common/math.h"

namespace metafast {

constexpr int64_t kChannelBlock = 16;  // what pitches are multiples of: a vector of any instruction set

METAFAST_HD int64_t pitch_of(int64_t channels) {
  return (channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
}

// `wanted`, or as many as there may be; at least one.
METAFAST_HD int64_t few(int64_t wanted, int64_t most) {
  const int64_t count = wanted < most ? wanted : most;
  return count < 1 ? 1 : count;
}

// Images of all tasks: data points at the first channel of the first pixel of the first image of the first
// task, behind the border. The strides are in elements.
template <typename T>
struct Maps {
  T* data;
  int64_t task, image, row, pixel;

  METAFAST_HD T* at(int64_t t, int64_t b, int64_t y, int64_t x) const {
    return data + t * task + b * image + y * row + x * pixel;
  }
};

// What a product of float32 on CUDA may round its factors to, for the tensor cores. Sums are float32; images
// of few channels stay as they are.
//
// Pairs are factors that were rounded to bfloat16 when they were written, half as many numbers as there were:
// each holds two neighbours, the first in its lower half. They are neighbours along the sum that a
// convolution adds up: channels of a pixel of a map, whose channels are a multiple of 2 kChannelBlock, and
// rows of weights, which have as many columns as ever.
enum class Rounding { none, tf32, bfloat16, pairs };

// out[t, b, y, x, o] (+)= bias[o] + the sum over factors, taps (i, j) and d < depth of
//   source[t, b, y, x, i tap_row + j tap_pixel + d] * weights[t, i, j, d, o],   o < pitch.
// Forward a tap is a place of the kernel. Backward it is one as well, from the last on, and o are the
// channels of the input; with a stride the pixels that see the same taps are a call of their own. Neighbours
// in a row whose channels are dense count as one tap of more depth.
template <typename T>
struct Convolve {
  static constexpr int kMaxFactors = 2;

  struct Factor {
    Maps<const T> source;  // the strides of the pixels that belong to neighbouring pixels of the result
    const T* weights;      // of tap (0, 0)
    int64_t weights_task;  // stride; 0: the tasks share them
  };
  Factor factors[kMaxFactors];           // sources and weights of the same strides, but for weights_task
  int count;                             // of factors
  int64_t tasks, images, height, width;  // of the result, without what lies between its pixels
  int64_t pitch;                         // of the result, a multiple of kChannelBlock
  int64_t taps_y, taps_x, depth;
  int64_t tap_row, tap_pixel;          // in source, may be negative
  int64_t weights_row, weights_pixel;  // of a tap; may be negative. weights [depth, pitch] are dense
  const T* bias;                       // [pitch] or null
  int64_t bias_task;
  Maps<T> out;
  bool adds;  // to what is in out
  Rounding rounding = Rounding::none;

  METAFAST_HD int64_t pixels() const { return images * height * width; }  // of a task
  int64_t terms() const { return taps_y * taps_x * depth; }               // of a sum
  // On the CPU a work item is a run of a task's pixels.
  static constexpr int64_t kItemPixels = 14 * 16;
  METAFAST_HD int64_t chunks() const { return (pixels() + kItemPixels - 1) / kItemPixels; }
  int64_t items() const { return tasks * chunks(); }
  int64_t item_cost() const {
    const int64_t most = pixels() < kItemPixels ? pixels() : kItemPixels;
    return most * pitch * (count * taps_y * taps_x * depth + 1) / 8;
  }
};

// out[t, i, j, d, o] = the sum over factors, images and pixels of
//   source[t, b, y, x, i tap_row + j tap_pixel + d] * grad[t, b, y, x, o],
// and the same of the first factor's grad alone: the gradients of a convolution's weights and bias.
template <typename T>
struct ConvolveWeights {
  static constexpr int kMaxFactors = 2;

  struct Factor {
    Maps<const T> source;  // as in Convolve
    Maps<const T> grad;
  };
  Factor factors[kMaxFactors];  // with the same strides
  int count;
  int64_t tasks, images, height, width;  // of grad
  int64_t pitch;                         // of grad
  int64_t taps_y, taps_x, depth;
  int64_t tap_row, tap_pixel;
  T* out;  // [T, taps_y, taps_x, depth, pitch], tasks `out_task` apart
  int64_t out_task;
  T* out_bias;  // [T, pitch], tasks `out_task` apart, or null
  Rounding rounding = Rounding::none;
  T* workspace = nullptr;  // on CUDA: workspace_size() elements
  int64_t wanted_items = 1;

  METAFAST_HD int64_t rows() const { return taps_y * taps_x * depth * (rounding == Rounding::pairs ? 2 : 1); }
  METAFAST_HD int64_t pixels() const { return images * height * width; }
  // On the CPU a work item is some rows of a task's gradient. Each goes through all pixels, so there are no
  // more than the threads want; how many changes no sum.
  METAFAST_HD int64_t chunks() const {
    constexpr int64_t kFewRows = 48;
    return few((wanted_items + tasks - 1) / (tasks < 1 ? 1 : tasks), (rows() + kFewRows - 1) / kFewRows);
  }
  int64_t items() const { return tasks * chunks(); }
  int64_t item_cost() const { return count * rows() / chunks() * pixels() * pitch / 8; }
  // On CUDA the pixels of a task are taken in parts, where there are too few tiles of the results to keep a
  // device busy; their sums are then added in order. The number follows from the shapes alone, so that every
  // device gives the same bits.
  METAFAST_HD int64_t parts() const {
    constexpr int64_t kTile = 64, kTiles = 512, kLeastPixels = 256;
    const int64_t tiles = tasks * ((rows() + kTile - 1) / kTile) * ((pitch + kTile - 1) / kTile);
    return few(tiles < kTiles ? (kTiles + tiles - 1) / (tiles < 1 ? 1 : tiles) : 1, pixels() / kLeastPixels);
  }
  int64_t workspace_size() const { return parts() > 1 ? tasks * parts() * (rows() + 1) * pitch : 0; }
};

// Of a sum: those take less time than a vector from memory.
constexpr int64_t kFewTerms = 36;

// Where the input of the first block has few channels, z is not kept: it is found again, an image or a window
// at a time, whenever it is read, in less time than memory would take. Null: z is where the maps say.
template <typename T>
struct ThinInput {
  const Convolve<T>*z, *z_tangent;
  const double* moments;  // of the input, as ThinMoments has them; with norm
};

// Of a thin input: the sums over the pixels of the numbers x_k that the places of the kernel meet and, behind
// them, of the products x_k x_j, j <= k, by k. All that norm asks of z over all pixels follows from these. On
// CUDA the kernel is of 3 x 3 places of one channel, and the sums are those of kParts parts of the pixels.
template <typename T>
struct ThinMoments {
  static constexpr int kTaps = 9, kSums = kTaps + kTaps * (kTaps + 1) / 2, kParts = 4;  // on CUDA
  Maps<const T> source;                                                                 // as in Convolve
  int64_t tasks, images, height, width;
  int64_t taps_y, taps_x, depth, tap_row, tap_pixel;
  double* moments;  // [T, parts, sums()]

  int64_t terms() const { return taps_y * taps_x * depth; }
  static int64_t sums(int64_t terms) { return terms + terms * (terms + 1) / 2; }
  // On the CPU a work item is a task.
  int64_t items() const { return tasks; }
  int64_t item_cost() const { return images * height * width * sums(terms()) / 8; }
};

enum class MapActivation { none, relu, tanh };
enum class Pool { none, max, average };

// What follows the convolution of a block.
struct BlockShape {
  int64_t tasks, images, height, width, pitch;  // of z
  bool norm;
  double eps;
  MapActivation activation;
  Pool pool;
  bool pools_first;  // before the activation
  int64_t pool_height, pool_width, pool_stride_y, pool_stride_x, pool_padding_y, pool_padding_x;
  int64_t out_height, out_width;  // of the result

  METAFAST_HD int64_t pixels() const { return images * height * width; }
  METAFAST_HD int64_t blocks() const { return pitch / kChannelBlock; }
  // On CUDA the statistics are sums over parts of the pixels, kept in a workspace.
  static constexpr int64_t kStatistics = 4;
  METAFAST_HD int64_t parts() const {
    constexpr int64_t kMostParts = 32, kLeastPixels = 64;
    return few(kMostParts, pixels() / kLeastPixels);
  }
  int64_t workspace_size(int64_t statistics = kStatistics) const {
    return norm ? tasks * parts() * statistics * pitch : 0;
  }
};

// A block's result, with its statistics. With a tangent (tangent() says) that of the result as well, and
// the statistics are read, not written.
template <typename T>
struct BlockForward {
  BlockShape shape;
  Maps<const T> z, z_tangent;
  const T *gamma, *beta;  // [T, pitch], tasks `affine_task` apart; or null: 1 and 0
  int64_t affine_task;
  const T *gamma_tangent, *beta_tangent;  // the same, tasks `tangent_task` apart; or null: 0
  int64_t tangent_task;
  // Of the batch, [T, pitch]; with norm: mean, 1 / sqrt(var + eps), var (divided by the number of pixels),
  // and of a tangent, with n = (z - mean) rstd: mean(dz) and mean(n dz).
  T *mean, *rstd, *var;
  T *mean_tangent, *scale_tangent;
  Maps<T> out, out_tangent;  // the border is not touched; out is not written where there is a tangent
  bool pairs = false;        // whether these are of pairs, on CUDA
  T* workspace = nullptr;    // on CUDA: workspace_size() elements
  ThinInput<T> thin = {};

  int64_t workspace_size() const { return thin.z ? 0 : shape.workspace_size(); }
  bool tangent() const { return z_tangent.data != nullptr || thin.z_tangent != nullptr; }
  // On the CPU a work item is a block of a task's channels.
  int64_t items() const { return shape.tasks * shape.blocks(); }
  int64_t item_cost() const {
    return shape.pixels() * kChannelBlock * (tangent() ? 3 : 2) * (thin.z ? thin.z->terms() : 1);
  }
};

// The gradient of z from that of the result, and those of gamma and beta. With a tangent those of all, and
// the gradients of gamma and beta are the tangents' alone.
template <typename T>
struct BlockBackward {
  BlockShape shape;
  Maps<const T> z, z_tangent;
  const T *gamma, *beta, *gamma_tangent, *beta_tangent;  // as in BlockForward
  int64_t affine_task, tangent_task;
  const T *mean, *rstd, *mean_tangent, *scale_tangent;
  Maps<const T> grad, grad_tangent;  // of the result
  Maps<T> grad_z, grad_z_tangent;    // the border is not touched
  bool pairs = false;                // whether these are of pairs, on CUDA
  T *grad_gamma, *grad_beta;         // [T, pitch], tasks `grad_task` apart, or null
  int64_t grad_task;
  T* workspace = nullptr;  // on CUDA: workspace_size() elements
  ThinInput<T> thin = {};
  // With a thin input: its gradient, or its tangent, goes to the weights' at once. grad_z and grad_z_tangent
  // may then be absent; on CUDA grad_z may be wherever there is a tangent.
  const ConvolveWeights<T>* weights = nullptr;

  bool tangent() const { return z_tangent.data != nullptr || thin.z_tangent != nullptr; }
  int64_t workspace_size() const {
    constexpr int64_t kThin = 2 + ThinMoments<T>::kTaps;  // and as many of tangents
    return thin.z ? shape.workspace_size(tangent() ? 2 * kThin : kThin) : shape.workspace_size();
  }
  int64_t items() const { return shape.tasks * shape.blocks(); }
  int64_t item_cost() const {
    return shape.pixels() * kChannelBlock * (tangent() ? 6 : 3) * (thin.z ? thin.z->terms() : 1);
  }
};

// The loss of a task from the last block's results: mse, the mean over examples and outputs, or cross
// entropy, the mean over examples that are not left out; with shares the sum of what they make of the
// examples' losses, squares summed over outputs. Its gradient; or, with a tangent, that of the gradient. A
// task without an example has gradient 0.
template <typename T>
struct OutputGradient {
  int64_t tasks, images, outputs;
  Maps<const T> out, out_tangent;  // a pixel each; out_tangent.data may be null
  const T* y;                      // [T, B, outputs], or null with labels
  const int64_t* labels;           // [T, B] or null
  const T* shares;                 // [T, B], 0 leaves one out, or null: equal ones
  Maps<T> grad;                    // of out, or its tangent
  T* grad_y;                       // [T, B, outputs], with a tangent: minus it is added; or null

  // On the CPU a work item is a task.
  int64_t items() const { return tasks; }
  int64_t item_cost() const { return images * outputs * 16; }
};

// Copies between layouts, given the strides of both; 0 for size[4] <= e < pad. Parameters and images come
// from torch's layouts so, and weights are transposed for the way back.
template <typename T>
struct Permute {
  static constexpr int kDims = 5;
  int64_t size[kDims];  // the last one is the fastest in out
  int64_t in_stride[kDims], out_stride[kDims];
  int64_t pad;  // elements of the last dimension of out, those behind size[4] zero
  const T* in;
  T* out;

  // A work item is an index of the first two dimensions.
  int64_t items() const { return size[0] * size[1]; }
  int64_t item_cost() const { return size[2] * size[3] * pad; }
};

// On CUDA: rows of numbers as rows of pairs, [tasks, pairs, 2, columns] -> [tasks, pairs, columns], each
// dense but for tasks, which are in_task and out_task apart.
template <typename T>
struct PairRows {
  int64_t tasks, pairs, columns;  // columns: a multiple of kChannelBlock
  int64_t in_task, out_task;
  const T* in;
  T* out;
};

METAFAST_DECLARE_KERNEL(Convolve)
METAFAST_DECLARE_KERNEL(ConvolveWeights)
METAFAST_DECLARE_KERNEL(BlockForward)
METAFAST_DECLARE_KERNEL(BlockBackward)
METAFAST_DECLARE_KERNEL(ThinMoments)
METAFAST_DECLARE_KERNEL(OutputGradient)
METAFAST_DECLARE_KERNEL(Permute)
METAFAST_DECLARE_KERNEL(PairRows)

}  // namespace metafast
