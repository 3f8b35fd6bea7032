#include "worker/serve/prefix_cache.h"

#include "protocol/base/check.h"

namespace tandem::worker::serve {

Digest prefix_root(const Digest& base, const Digest& adapter) {
  Hasher hasher;
  hasher.update("tandem kv prefix");
  hasher.update(std::as_bytes(std::span(base.bytes)));
  hasher.update(std::as_bytes(std::span(adapter.bytes)));
  return hasher.finish();
}

Digest prefix_key(const Digest& parent, std::span<const std::int32_t> tokens) {
  Hasher hasher;
  hasher.update(std::as_bytes(std::span(parent.bytes)));
  hasher.update(std::as_bytes(tokens));
  return hasher.finish();
}

KvBlocks::KvBlocks(std::int64_t blocks, bool reuse)
    : allocator_(blocks), reuse_(reuse), entries_(static_cast<std::size_t>(blocks)) {}

std::optional<std::int32_t> KvBlocks::allocate() {
  if (allocator_.free_blocks() == 0 && oldest_ != kNone) forget(oldest_);
  return allocator_.allocate();
}

std::vector<std::int32_t> KvBlocks::match(std::span<const Digest> keys) {
  std::vector<std::int32_t> blocks;
  if (!reuse_) return blocks;
  for (const Digest& key : keys) {
    const auto found = known_.find(key);
    if (found == known_.end()) break;
    if (entry(found->second).idle) unlink_idle(found->second);
    allocator_.retain(found->second);
    blocks.push_back(found->second);
  }
  return blocks;
}

void KvBlocks::insert(const Digest& key, std::int32_t block) {
  if (!reuse_ || block >= allocator_.limit()) return;
  TANDEM_CHECK_GT(allocator_.count(block), 0, "a free block cannot be cached: ", block);
  if (entry(block).known || !known_.try_emplace(key, block).second) return;
  entry(block).key = key;
  entry(block).known = true;
  allocator_.retain(block);
}

void KvBlocks::release(std::int32_t block) {
  if (allocator_.release(block) == 1 && entry(block).known) link_idle(block);
}

void KvBlocks::set_limit(std::int64_t limit) {
  for (std::int64_t b = limit; b < allocator_.blocks(); ++b)
    if (entry(static_cast<std::int32_t>(b)).known) forget(static_cast<std::int32_t>(b));
  allocator_.set_limit(limit);
}

void KvBlocks::link_idle(std::int32_t block) {
  Entry& e = entry(block);
  e.idle = true;
  e.older = newest_;
  e.newer = kNone;
  (newest_ == kNone ? oldest_ : entry(newest_).newer) = block;
  newest_ = block;
  ++idle_;
}

void KvBlocks::unlink_idle(std::int32_t block) {
  Entry& e = entry(block);
  (e.older == kNone ? oldest_ : entry(e.older).newer) = e.newer;
  (e.newer == kNone ? newest_ : entry(e.newer).older) = e.older;
  e.idle = false;
  e.newer = e.older = kNone;
  --idle_;
}

void KvBlocks::forget(std::int32_t block) {
  Entry& e = entry(block);
  if (e.idle) unlink_idle(block);
  known_.erase(e.key);
  e.known = false;
  allocator_.release(block);
}

}  // namespace tandem::worker::serve
