#include "common/reserve.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <vector>

#include "common/dispatch.h"

namespace metafast {
namespace {

class Reserve final : public c10::Allocator {
 public:
  static constexpr size_t kLeast = 1 << 20;  // bytes; the library keeps smaller ones itself

  c10::DataPtr allocate(size_t size) override {
    Block* const block = new Block(take(size));
    return {block->data, block, &give_back, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }

  // Never destroyed: tensors may outlive what is.
  static Reserve& instance() {
    static Reserve* const reserve = new Reserve;
    return *reserve;
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };

  // The smallest that is large enough and not half empty.
  Block take(size_t size) {
    {
      // A call that cannot have the lock does not wait for it: in the child of a fork it may never come.
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (lock) {
        auto best = blocks_.end();
        for (auto it = blocks_.begin(); it != blocks_.end(); ++it) {
          if (it->size < size || it->size / 2 > size) continue;
          if (best == blocks_.end() || it->size < best->size) best = it;
        }
        if (best != blocks_.end()) {
          const Block block = *best;
          blocks_.erase(best);
          size_ -= block.size;
          return block;
        }
      }
    }
    size = (size + kHugePage - 1) / kHugePage * kHugePage;
    void* const data = std::aligned_alloc(kHugePage, size);
    if (data == nullptr) throw std::bad_alloc();
    ask_for_huge_pages(data, size);
    return {data, size};
  }

  void keep(const Block& block) {
    constexpr size_t kMost = 512 << 20;  // what lies here longest goes first
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.size > kMost) return std::free(block.data);
    let_go(block.data, block.size);
    blocks_.push_back(block);
    size_ += block.size;
    while (size_ > kMost) {
      size_ -= blocks_.front().size;
      std::free(blocks_.front().data);
      blocks_.erase(blocks_.begin());
    }
  }

  static void give_back(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    instance().keep(*block);
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t size_ = 0;  // of all
};

}  // namespace

at::Tensor reserved(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  const size_t size = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  if (!options.device().is_cpu() || size < Reserve::kLeast) return empty(sizes, options);
  return at::detail::empty_generic(sizes, &Reserve::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   dtype, std::nullopt);
}

}  // namespace metafast
