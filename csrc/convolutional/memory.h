// What a pass through a network keeps of a group of tasks: maps, statistics, gradients and tangents of each
// block, dealt out from one piece of memory.
#pragma once

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/reserve.h"
#include "convolutional/network.h"

namespace metafast {

// Deals out memory; at first it only counts. What has to be zero at the start, as borders have, comes from
// the front part, all else from behind it. Each array is aligned to kChannelBlock elements. A GPU clears the
// front part at once. On the CPU whoever works on a task clears what is its (clear_borders()), so that each
// thread is the first to touch its memory and nothing is written twice.
template <typename T>
class Workspace {
 public:
  Workspace() = default;
  // The memory that `count` has counted.
  Workspace(T* memory, const Workspace& count) : cleared_(memory), rest_(memory + count.cleared_used_) {}

  T* take(int64_t elements) { return take(rest_, rest_used_, elements); }

  // Maps with a border, whose pixels are `pixel` elements apart.
  Maps<T> take_maps(int64_t tasks, int64_t images, int64_t height, int64_t width, int64_t pixel,
                    Border border, bool clears = false) {
    Maps<T> maps{};
    maps.pixel = pixel;
    maps.row = (border.left + width + border.right) * pixel;
    maps.image = (border.top + height + border.bottom) * maps.row;
    maps.task = pitch_of(images * maps.image);
    const int64_t size = tasks * maps.task;
    T* const data = clears || border.any() ? take(cleared_, cleared_used_, size) : take(size);
    maps.data = data ? data + border.top * maps.row + border.left * maps.pixel : nullptr;
    return maps;
  }

  int64_t elements() const { return cleared_used_ + rest_used_; }
  // New memory of elements().
  Tensor allocate(const at::TensorOptions& options) const {
    const Tensor memory = reserved({elements()}, options.requires_grad(false));
    if (runs_cuda(memory)) memory.narrow(0, 0, cleared_used_).zero_();
    return memory;
  }

 private:
  T *cleared_ = nullptr, *rest_ = nullptr;
  int64_t cleared_used_ = 0, rest_used_ = 0;

  static T* take(T* memory, int64_t& used, int64_t elements) {
    T* taken = memory ? memory + used : nullptr;
    used += pitch_of(elements);
    return taken;
  }
};

// Packed parameters of tasks, or a direction in them, or their gradient: vectors `task` apart.
template <typename T>
struct Packed {
  T* data;
  int64_t task;
  T* at(int64_t place) const { return place < 0 ? nullptr : data + place; }
  operator Packed<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {data, task};
  }
};

// What build(space) makes in memory of its own, which goes to `memory`.
template <typename T, class F>
auto in_memory(Tensor& memory, const at::TensorOptions& options, const F& build) {
  Workspace<T> count;
  build(count);
  memory = count.allocate(options);
  Workspace<T> space(memory.mutable_data_ptr<T>(), count);
  return build(space);
}

template <typename T>
Maps<const T> as_const(const Maps<T>& maps) {
  return {maps.data, maps.task, maps.image, maps.row, maps.pixel};
}

template <typename T>
void clear_border(const Maps<T>& maps, int64_t tasks, int64_t images, int64_t height, int64_t width,
                  const Border& border) {
  if (!border.any()) return;
  for (int64_t t = 0; t < tasks; ++t) {
    for (int64_t b = 0; b < images; ++b) {
      T* from = maps.at(t, b, -border.top, -border.left);
      T* const end = from + maps.image;
      for (int64_t y = 0; y < height; ++y) {
        std::fill(from, maps.at(t, b, y, 0), T(0));
        from = maps.at(t, b, y, width);
      }
      std::fill(from, end, T(0));
    }
  }
}

// Those of the tasks from `first` on; absent ones stay so.
template <typename T>
Maps<T> maps_from(Maps<T> maps, int64_t first) {
  if (maps.data != nullptr) maps.data += first * maps.task;
  return maps;
}

// Of maps from block b that the products of block i multiply: numbers of a pixel.
inline int64_t factor_pitch(const Network& network, size_t i, const NetworkBlock& b) {
  return network.pairs(i) ? b.pitch() / 2 : b.pitch();
}
// Of a block of pairs: its weights, or these transposed.
inline int64_t paired_size(const NetworkBlock& b) { return b.weight_size() / 2; }

// What a forward leaves for its backward: of each block z, unless its input is thin, the result and the
// statistics.
template <typename T>
class Activations {
 public:
  struct OfBlock {
    Maps<T> z, out;
    T *mean, *rstd, *var;
    T* paired;  // the weights, of a block of pairs
  };

  Activations(const Network& network, int64_t tasks, int64_t images, Workspace<T>& memory) {
    for (size_t i = 0; i < network.blocks().size(); ++i) {
      const NetworkBlock& b = network.blocks()[i];
      OfBlock of{};
      if (!network.thin(i)) of.z = memory.take_maps(tasks, images, b.z_height, b.z_width, b.pitch(), {});
      of.out = memory.take_maps(tasks, images, b.out_height, b.out_width, factor_pitch(network, i + 1, b),
                                network.input_border(i + 1));
      if (network.pairs(i)) of.paired = memory.take(tasks * paired_size(b));
      const int64_t statistics = b.shape.norm ? b.pitch() : 0;
      for (T** statistic : {&of.mean, &of.rstd, &of.var}) *statistic = memory.take(tasks * statistics);
      pitches_.push_back(statistics);
      paired_.push_back(paired_size(b));
      blocks_.push_back(of);
    }
  }

  // Those of the tasks from `first` on.
  Activations from(int64_t first) const {
    Activations moved = *this;
    for (size_t i = 0; i < blocks_.size(); ++i) {
      OfBlock& of = moved.blocks_[i];
      of.z = maps_from(of.z, first);
      of.out = maps_from(of.out, first);
      for (T** statistic : {&of.mean, &of.rstd, &of.var}) *statistic += first * pitches_[i];
      if (of.paired != nullptr) of.paired += first * paired_[i];
    }
    return moved;
  }

  void clear_borders(const Network& network, int64_t tasks, int64_t images) const {
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const NetworkBlock& b = network.blocks()[i];
      clear_border(blocks_[i].out, tasks, images, b.out_height, b.out_width, network.input_border(i + 1));
    }
  }

  const OfBlock& operator[](size_t i) const { return blocks_[i]; }
  const OfBlock& back() const { return blocks_.back(); }

 private:
  std::vector<OfBlock> blocks_;
  std::vector<int64_t> pitches_, paired_;
};

// Of a backward: of each block the gradients of z and of the result, and its weights transposed.
template <typename T>
struct Gradients {
  struct OfBlock {
    Maps<T> z, out;
    T* transposed;  // null where nothing goes back to the block's input
    T* paired;      // the same, of a block of pairs
  };
  std::vector<OfBlock> blocks;

  Gradients(const Network& network, int64_t tasks, int64_t images, bool of_input, Workspace<T>& memory) {
    for (size_t i = 0; i < network.blocks().size(); ++i) {
      const NetworkBlock& b = network.blocks()[i];
      OfBlock of{};
      if (!network.thin(i) || of_input)
        of.z = memory.take_maps(tasks, images, b.z_height, b.z_width, factor_pitch(network, i, b),
                                network.grad_border(i));
      const bool last =
          i + 1 == network.blocks().size();  // of which the channels behind the outputs stay zero
      of.out = memory.take_maps(tasks, images, b.out_height, b.out_width, b.pitch(), {}, last);
      if (i > 0 || of_input) of.transposed = memory.take(tasks * transposed_size(b));
      if (network.pairs(i)) of.paired = memory.take(tasks * paired_size(b));
      sizes_.push_back(transposed_size(b));
      blocks.push_back(of);
    }
  }

  Gradients from(int64_t first) const {
    Gradients moved = *this;
    for (size_t i = 0; i < blocks.size(); ++i) {
      OfBlock& of = moved.blocks[i];
      of.z = maps_from(of.z, first);
      of.out = maps_from(of.out, first);
      if (of.transposed != nullptr) of.transposed += first * sizes_[i];
      if (of.paired != nullptr) of.paired += first * sizes_[i] / 2;
    }
    return moved;
  }

  void clear_borders(const Network& network, int64_t tasks, int64_t images) const {
    for (size_t i = 0; i < blocks.size(); ++i) {
      const NetworkBlock& b = network.blocks()[i];
      if (blocks[i].z.data != nullptr)
        clear_border(blocks[i].z, tasks, images, b.z_height, b.z_width, network.grad_border(i));
    }
    std::fill_n(blocks.back().out.data, tasks * blocks.back().out.task, T(0));
  }

  static int64_t transposed_size(const NetworkBlock& b) {
    return b.kernel_y * b.kernel_x * b.outputs * pitch_of(b.channels);
  }

 private:
  std::vector<int64_t> sizes_;
};

// The tangents of a forward, along a direction.
template <typename T>
struct Tangents {
  struct OfBlock {
    Maps<T> z, out;
    T *mean, *scale;
    T* paired;  // the direction in the weights, of a block of pairs
  };
  std::vector<OfBlock> blocks;

  Tangents(const Network& network, int64_t tasks, int64_t images, Workspace<T>& memory) {
    for (size_t i = 0; i < network.blocks().size(); ++i) {
      const NetworkBlock& b = network.blocks()[i];
      OfBlock of{};
      if (!network.thin(i)) of.z = memory.take_maps(tasks, images, b.z_height, b.z_width, b.pitch(), {});
      of.out = memory.take_maps(tasks, images, b.out_height, b.out_width, factor_pitch(network, i + 1, b),
                                network.input_border(i + 1));
      if (network.pairs(i)) of.paired = memory.take(tasks * paired_size(b));
      of.mean = memory.take(tasks * b.pitch());
      of.scale = memory.take(tasks * b.pitch());
      pitches_.push_back(b.pitch());
      paired_.push_back(paired_size(b));
      blocks.push_back(of);
    }
  }

  Tangents from(int64_t first) const {
    Tangents moved = *this;
    for (size_t i = 0; i < blocks.size(); ++i) {
      OfBlock& of = moved.blocks[i];
      of.z = maps_from(of.z, first);
      of.out = maps_from(of.out, first);
      of.mean += first * pitches_[i];
      of.scale += first * pitches_[i];
      if (of.paired != nullptr) of.paired += first * paired_[i];
    }
    return moved;
  }

  void clear_borders(const Network& network, int64_t tasks, int64_t images) const {
    for (size_t i = 0; i < blocks.size(); ++i) {
      const NetworkBlock& b = network.blocks()[i];
      clear_border(blocks[i].out, tasks, images, b.out_height, b.out_width, network.input_border(i + 1));
    }
  }

 private:
  std::vector<int64_t> pitches_, paired_;
};

}  // namespace metafast
