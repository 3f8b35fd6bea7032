// Which full KV blocks hold which tokens, so that a prompt that starts like an earlier one reuses
// its blocks. A block's key is a chained digest: sha256(parent key, the block's tokens), and the
// root of a chain is sha256(base digest, adapter digest): adapters never share KV, and the same
// adapter under another name does. Pure bookkeeping; one thread.
//
// The cache holds one reference on every block it knows. A block that nobody else holds is idle:
// it stays for reuse until memory is needed, least recently used first (within one sequence its
// later blocks first, because a chain is useless without its beginning).
#pragma once

#include "protocol/base/digest.h"
#include "worker/serve/block_allocator.h"

#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

namespace tandem::worker::serve {

/// Key of the empty prefix.
Digest prefix_root(const Digest& base, const Digest& adapter);
/// Key of the block that follows `parent` and holds `tokens`.
Digest prefix_key(const Digest& parent, std::span<const std::int32_t> tokens);

/// The allocator and the cache as one pool: what a scheduler takes blocks from.
class KvBlocks {
 public:
  /// `reuse` false: nothing is ever cached.
  KvBlocks(std::int64_t blocks, bool reuse);

  /// A block with one reference, evicting the least recently used idle one when none is free.
  std::optional<std::int32_t> allocate();
  /// Takes references on the longest known prefix of `keys` and returns its blocks.
  std::vector<std::int32_t> match(std::span<const Digest> keys);
  /// Makes `block`, full and computed, known under `key`. Ignored when the key is known already
  /// (the caller keeps its private copy) or the block lies beyond the limit.
  void insert(const Digest& key, std::int32_t block);
  void release(std::int32_t block);

  /// See BlockAllocator::set_limit; idle blocks beyond it are forgotten, known ones unlearned.
  void set_limit(std::int64_t limit);

  /// Blocks that allocate() could return one after the other.
  [[nodiscard]] std::int64_t available() const { return allocator_.free_blocks() + idle_; }
  [[nodiscard]] std::int64_t idle() const { return idle_; }
  [[nodiscard]] std::int64_t limit() const { return allocator_.limit(); }
  [[nodiscard]] const BlockAllocator& allocator() const { return allocator_; }

 private:
  struct Entry {
    Digest key;
    bool known = false;  ///< in the map
    bool idle = false;   ///< in the list
    std::int32_t newer = kNone, older = kNone;
  };
  static constexpr std::int32_t kNone = -1;
  Entry& entry(std::int32_t block) { return entries_[static_cast<std::size_t>(block)]; }
  void link_idle(std::int32_t block);
  void unlink_idle(std::int32_t block);
  void forget(std::int32_t block);

  BlockAllocator allocator_;
  const bool reuse_;
  std::unordered_map<Digest, std::int32_t> known_;
  std::vector<Entry> entries_;  ///< [blocks]
  std::int32_t newest_ = kNone, oldest_ = kNone;
  std::int64_t idle_ = 0;
};

}  // namespace tandem::worker::serve
