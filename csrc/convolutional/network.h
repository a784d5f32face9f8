// A convolutional network as the kernels see it: its blocks, the sizes of their maps, and where each
// parameter lies in a packed vector of all of a task's.
//
// Packed are weights as [kh, kw, C, pitch(O)] and the others as [pitch(O)], one block behind the other: bias,
// gamma and beta follow the weight where there are any. So each is aligned, lanes go over outputs, and SGD is
// arithmetic on one vector.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "common/checks.h"
#include "convolutional/layer.h"

namespace metafast {

using at::Tensor;

struct NetworkBlock {
  int64_t channels, height, width;     // of the input
  int64_t outputs, z_height, z_width;  // of the convolution
  int64_t out_height, out_width;       // of the block
  int64_t kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x;
  bool linear;
  BlockShape shape;                   // without tasks and images
  int64_t first_param;                // its weight's place among the parameters
  int64_t weight, bias, gamma, beta;  // places in the packed vector; -1: none

  int64_t pitch() const { return pitch_of(outputs); }
  int64_t weight_size() const { return kernel_y * kernel_x * channels * pitch(); }
  // Its convolution, of so many tasks and images.
  Layer layer(int64_t tasks, int64_t images) const {
    return {tasks,
            images,
            channels,
            outputs,
            {height, width},
            {kernel_y, kernel_x},
            {stride_y, stride_x},
            {padding_y, padding_x},
            {z_height, z_width}};
  }
};

class Network {
 public:
  static constexpr size_t kNumbers = 17;

  // The network that `numbers` and eps describe (library.cpp says how), for x [T, B, C, H, W].
  Network(at::IntArrayRef numbers, at::ArrayRef<double> eps, at::TensorList params, const Tensor& x,
          Rounding rounding);

  const std::vector<NetworkBlock>& blocks() const { return blocks_; }
  int64_t size() const { return size_; }  // of the packed vector
  int64_t outputs() const { return blocks_.back().outputs; }
  bool shared() const { return shared_; }
  int64_t norm_channels() const;
  int64_t image_cost() const;  // multiply-adds of an image's forward
  // Whether z of block i is not kept but found again (ThinInput in params.h).
  bool thin(size_t i) const { return i == 0 && thin_; }

  // What the products of block i may round to: with Rounding::bfloat16 most blocks are of pairs, so that what
  // products alone read takes half the memory.
  Rounding rounding(size_t i) const;
  bool pairs(size_t i) const { return rounding(i) == Rounding::pairs; }

  // What the input of block i needs around it to be convolved, and what the gradient of its z needs on the
  // way back to that input.
  Border input_border(size_t i) const;
  Border grad_border(size_t i) const;

  // The shape of parameter i of one task.
  at::IntArrayRef shape(size_t i) const { return shapes_[i]; }
  size_t params() const { return shapes_.size(); }
  const NetworkBlock& block_of(size_t param) const { return blocks_[block_of_[param]]; }
  size_t block_number_of(size_t param) const { return block_of_[param]; }
  int64_t place_of(size_t param) const { return place_[param]; }

 private:
  std::vector<NetworkBlock> blocks_;
  std::vector<at::DimVector> shapes_;
  std::vector<size_t> block_of_;
  std::vector<int64_t> place_;
  int64_t size_ = 0;
  bool shared_ = true, thin_ = false;
  Rounding rounding_;

  int64_t add_param(at::TensorList params, at::IntArrayRef shape, const char* kind, size_t block,
                    int64_t size, int64_t tasks);
};

}  // namespace metafast
