// Reference-counted KV blocks of fixed size: pure bookkeeping by block id, no memory. A block is
// free at count 0. The lowest free id is given out first, so that the tail of the range is what
// stays unused and can be returned when KV shrinks. One thread.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace tandem::worker::serve {

class BlockAllocator {
 public:
  explicit BlockAllocator(std::int64_t blocks);

  /// A block with count 1; nothing when all below the limit are taken.
  std::optional<std::int32_t> allocate();
  void retain(std::int32_t block);
  /// The count after it; at 0 the block is free.
  std::int32_t release(std::int32_t block);

  /// Only ids below `limit` (at most the number of blocks) are given out from now on. Higher ones
  /// in use stay so until they are released.
  void set_limit(std::int64_t limit);

  [[nodiscard]] std::int32_t count(std::int32_t block) const { return at(block); }
  [[nodiscard]] std::int64_t free_blocks() const { return static_cast<std::int64_t>(free_.size()); }
  [[nodiscard]] std::int64_t limit() const { return limit_; }
  [[nodiscard]] std::int64_t blocks() const { return static_cast<std::int64_t>(counts_.size()); }

 private:
  [[nodiscard]] const std::int32_t& at(std::int32_t block) const;
  std::int32_t& at(std::int32_t block);

  std::vector<std::int32_t> counts_;  ///< [blocks]
  std::vector<std::int32_t> free_;    ///< min-heap
  std::int64_t limit_;
};

}  // namespace tandem::worker::serve
