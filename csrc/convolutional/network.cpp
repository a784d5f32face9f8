#include "convolutional/network.h"

#include <algorithm>

#include "common/dispatch.h"

namespace metafast {
namespace {

int64_t pooled(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return (size + 2 * padding - kernel) / stride + 1;
}

// Whether z of the first block is not kept (ThinInput in params.h).
bool is_thin(const NetworkBlock& b, bool on_cuda) {
  const BlockShape& s = b.shape;
  if (b.linear) return false;
  if (!on_cuda) return b.kernel_y * b.kernel_x * b.channels <= kFewTerms;
  const auto are = [](int64_t wanted, auto... sizes) { return ((sizes == wanted) && ...); };
  return are(1, b.channels, b.stride_y, b.stride_x) && are(3, b.kernel_y, b.kernel_x) && s.norm &&
         s.pool == Pool::max && are(2, s.pool_height, s.pool_width, s.pool_stride_y, s.pool_stride_x) &&
         are(0, s.pool_padding_y, s.pool_padding_x);
}

}  // namespace

Network::Network(at::IntArrayRef numbers, at::ArrayRef<double> eps, at::TensorList params, const Tensor& x,
                 Rounding rounding)
    : rounding_(rounding) {
  TORCH_CHECK_VALUE(
      !numbers.empty() && numbers.size() % kNumbers == 0 && eps.size() == numbers.size() / kNumbers,
      "network: expected ", kNumbers, " numbers and an eps for each block, got ", numbers.size(), " and ",
      eps.size());
  TORCH_CHECK_VALUE(x.dim() == 5, "x: expected shape [T, B, C, H, W], got ", x.sizes());
  TORCH_CHECK_VALUE(!params.empty(), "params: expected the parameters of ", eps.size(), " blocks, got none");
  const int64_t tasks = x.size(0);
  const int64_t weight_dim = numbers[0] == 0 ? 2 : 4;
  TORCH_CHECK_VALUE(params[0].dim() == weight_dim || params[0].dim() == weight_dim + 1,
                    "params[0]: expected a weight of ", weight_dim,
                    " dimensions, or one for each task, got shape ", params[0].sizes());
  shared_ = params[0].dim() == weight_dim;
  int64_t channels = x.size(2), height = x.size(3), width = x.size(4);
  for (size_t i = 0; i < eps.size(); ++i) {
    const int64_t* n = numbers.data() + i * kNumbers;
    NetworkBlock block{};
    block.linear = n[0] == 0;
    block.channels = channels;
    block.height = height;
    block.width = width;
    block.kernel_y = block.linear ? height : n[0];
    block.kernel_x = block.linear ? width : n[1];
    block.stride_y = n[2];
    block.stride_x = n[3];
    block.padding_y = n[4];
    block.padding_x = n[5];
    const bool fits =
        block.kernel_y <= height + 2 * block.padding_y && block.kernel_x <= width + 2 * block.padding_x;
    TORCH_CHECK_VALUE(fits && height > 0 && width > 0 && block.stride_y > 0 && block.stride_x > 0,
                      "x: expected images on which the kernel of block ", i, ", ", block.kernel_y, " x ",
                      block.kernel_x, ", fits, got maps of ", height, " x ", width, " there");
    block.z_height = pooled(height, block.kernel_y, block.stride_y, block.padding_y);
    block.z_width = pooled(width, block.kernel_x, block.stride_x, block.padding_x);
    const size_t first = shapes_.size();
    TORCH_CHECK_VALUE(first < params.size(), "params: expected a weight of block ", i, ", got ",
                      params.size(), " tensors in all");
    block.first_param = static_cast<int64_t>(first);
    block.outputs = params[first].dim() > !shared_ ? params[first].size(!shared_) : 0;
    TORCH_CHECK_VALUE(block.outputs > 0 && channels > 0, "params[", first,
                      "]: expected a weight with outputs, got ", params[first].sizes());
    const at::DimVector weight = block.linear
                                     ? at::DimVector{block.outputs, channels * height * width}
                                     : at::DimVector{block.outputs, channels, block.kernel_y, block.kernel_x};
    const at::DimVector vector{block.outputs};
    block.weight =
        add_param(params, weight, block.linear ? "[O, I]" : "[O, C, kh, kw]", i, block.weight_size(), tasks);
    block.bias = n[6] ? add_param(params, vector, "[O]", i, block.pitch(), tasks) : -1;
    block.gamma = n[7] == 2 ? add_param(params, vector, "[O]", i, block.pitch(), tasks) : -1;
    block.beta = n[7] == 2 ? add_param(params, vector, "[O]", i, block.pitch(), tasks) : -1;
    BlockShape& shape = block.shape;
    shape.height = block.z_height;
    shape.width = block.z_width;
    shape.pitch = block.pitch();
    shape.norm = n[7] != 0;
    shape.eps = eps[i];
    shape.activation = static_cast<MapActivation>(n[8]);
    shape.pool = static_cast<Pool>(n[9]);
    shape.pool_height = n[10] ? n[10] : block.z_height;
    shape.pool_width = n[11] ? n[11] : block.z_width;
    shape.pool_stride_y = std::max<int64_t>(1, n[12]);
    shape.pool_stride_x = std::max<int64_t>(1, n[13]);
    shape.pool_padding_y = n[14];
    shape.pool_padding_x = n[15];
    shape.pools_first = n[16] != 0;
    const bool pools = shape.pool != Pool::none;
    block.out_height = shape.out_height =
        pools ? pooled(shape.height, shape.pool_height, shape.pool_stride_y, shape.pool_padding_y)
              : shape.height;
    block.out_width = shape.out_width =
        pools ? pooled(shape.width, shape.pool_width, shape.pool_stride_x, shape.pool_padding_x)
              : shape.width;
    TORCH_CHECK_VALUE(!pools || (shape.pool_height <= shape.height + 2 * shape.pool_padding_y &&
                                 shape.pool_width <= shape.width + 2 * shape.pool_padding_x),
                      "x: expected images on which the pooling of block ", i, ", ", shape.pool_height, " x ",
                      shape.pool_width, ", fits, got maps of ", shape.height, " x ", shape.width, " there");
    channels = block.outputs;
    height = block.out_height;
    width = block.out_width;
    blocks_.push_back(block);
  }
  thin_ = is_thin(blocks_[0], runs_cuda(x));
  TORCH_CHECK_VALUE(height == 1 && width == 1,
                    "network: expected a linear layer as its last block, got maps of ", height, " x ", width);
  TORCH_CHECK_VALUE(shapes_.size() == params.size(), "params: expected ", shapes_.size(), " tensors, got ",
                    params.size());
}

int64_t Network::add_param(at::TensorList params, at::IntArrayRef shape, const char* kind, size_t block,
                           int64_t size, int64_t tasks) {
  const size_t i = shapes_.size();
  TORCH_CHECK_VALUE(i < params.size(), "params: expected ", kind, " of block ", block, " at ", i, ", got ",
                    params.size(), " tensors in all");
  at::DimVector expected;
  if (!shared_) expected.push_back(tasks);
  expected.append(shape.begin(), shape.end());
  const std::string name = indexed("params", i),
                    described = shared_ ? kind : std::string("[T, ") + (kind + 1);
  check_sizes({params[i], name.c_str()}, expected, described.c_str());
  shapes_.emplace_back(shape);
  block_of_.push_back(block);
  place_.push_back(size_);
  size_ += size;
  return place_.back();
}

int64_t Network::norm_channels() const {
  int64_t sum = 0;
  for (const NetworkBlock& block : blocks_) sum += block.shape.norm ? block.outputs : 0;
  return sum;
}

int64_t Network::image_cost() const {
  int64_t sum = 0;
  for (const NetworkBlock& block : blocks_) sum += block.weight_size() * block.z_height * block.z_width;
  return sum;
}

Rounding Network::rounding(size_t i) const {
  if (rounding_ != Rounding::bfloat16 || i == 0 || i >= blocks_.size()) return rounding_;
  const NetworkBlock& b = blocks_[i];
  const bool pairs = (b.channels | b.outputs) % (2 * kChannelBlock) == 0;
  return pairs ? Rounding::pairs : rounding_;
}

Border Network::input_border(size_t i) const {
  return i == blocks_.size() ? Border{} : blocks_[i].layer(0, 0).image_border();
}

Border Network::grad_border(size_t i) const { return blocks_[i].layer(0, 0).map_border(); }

}  // namespace metafast
