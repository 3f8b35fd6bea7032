#include "worker/serve/block_allocator.h"

#include "protocol/base/check.h"

#include <algorithm>
#include <functional>

namespace tandem::worker::serve {

BlockAllocator::BlockAllocator(std::int64_t blocks)
    : counts_(static_cast<std::size_t>(blocks), 0), limit_(0) {
  set_limit(blocks);
}

const std::int32_t& BlockAllocator::at(std::int32_t block) const {
  TANDEM_CHECK(block >= 0 && block < blocks(), "block ", block, " of ", blocks());
  return counts_[static_cast<std::size_t>(block)];
}
std::int32_t& BlockAllocator::at(std::int32_t block) {
  return const_cast<std::int32_t&>(std::as_const(*this).at(block));
}

std::optional<std::int32_t> BlockAllocator::allocate() {
  if (free_.empty()) return std::nullopt;
  std::pop_heap(free_.begin(), free_.end(), std::greater<>());
  const std::int32_t block = free_.back();
  free_.pop_back();
  at(block) = 1;
  return block;
}

void BlockAllocator::retain(std::int32_t block) {
  TANDEM_CHECK_GT(at(block), 0, "retained a free block ", block);
  ++at(block);
}

std::int32_t BlockAllocator::release(std::int32_t block) {
  TANDEM_CHECK_GT(at(block), 0, "released a free block ", block);
  const std::int32_t left = --at(block);
  if (left == 0 && block < limit_) {
    free_.push_back(block);
    std::push_heap(free_.begin(), free_.end(), std::greater<>());
  }
  return left;
}

void BlockAllocator::set_limit(std::int64_t limit) {
  TANDEM_CHECK(limit >= 0 && limit <= blocks(), "limit ", limit, " of ", blocks(), " blocks");
  limit_ = limit;
  free_.clear();
  for (std::int32_t b = 0; b < static_cast<std::int32_t>(limit); ++b)
    if (at(b) == 0) free_.push_back(b);  // ascending: already a min-heap
}

}  // namespace tandem::worker::serve
