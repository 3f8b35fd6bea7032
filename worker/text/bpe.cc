#include "worker/text/bpe.h"

#include "protocol/base/random.h"
#include "worker/text/byte_level.h"
#include "worker/text/utf8.h"

#include <algorithm>
#include <bit>
#include <queue>

namespace tandem::worker::text {
namespace {

constexpr std::uint64_t kEmptySlot = ~std::uint64_t{0};
/// Up to this many symbols a scan per merge beats a queue.
constexpr std::size_t kShortPieceSymbols = 32;

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) |
         static_cast<std::uint32_t>(right);
}

}  // namespace

std::string byte_token(unsigned byte) {
  constexpr const char* kDigits = "0123456789ABCDEF";
  return str("<0x", kDigits[byte / 16], kDigits[byte % 16], ">");
}

MergeTable::MergeTable(std::size_t pairs)
    : slots_(std::bit_ceil(pairs * 2 + 2), Slot{kEmptySlot, {0, 0}}), mask_(slots_.size() - 1) {}

void MergeTable::add(std::int32_t left, std::int32_t right, Merge merge) {
  const std::uint64_t key = pair_key(left, right);
  std::size_t i = mix64(key) & mask_;
  while (slots_[i].key != kEmptySlot && slots_[i].key != key) i = (i + 1) & mask_;
  slots_[i] = {key, merge};
}

const MergeTable::Merge* MergeTable::find(std::int32_t left, std::int32_t right) const {
  const std::uint64_t key = pair_key(left, right);
  for (std::size_t i = mix64(key) & mask_; slots_[i].key != kEmptySlot; i = (i + 1) & mask_)
    if (slots_[i].key == key) return &slots_[i].merge;
  return nullptr;
}

Bpe::Bpe(StringMap<std::int32_t> vocabulary, std::size_t merges, BpeOptions options)
    : vocabulary_(std::move(vocabulary)), merges_(merges), options_(options) {
  for (unsigned b = 0; b < 256; ++b) {
    const auto found =
        vocabulary_.find(options.characters ? byte_token(b) : std::string(1, static_cast<char>(b)));
    byte_ids_[b] = found == vocabulary_.end() ? -1 : found->second;
  }
}

Result<std::unique_ptr<Bpe>> Bpe::create(
    StringMap<std::int32_t> vocabulary,
    const std::vector<std::pair<std::string, std::string>>& merges, BpeOptions options) {
  std::unique_ptr<Bpe> bpe(new Bpe(std::move(vocabulary), merges.size(), options));
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    const auto a = bpe->vocabulary_.find(left), b = bpe->vocabulary_.find(right),
               merged = bpe->vocabulary_.find(left + right);
    const auto end = bpe->vocabulary_.end();
    if (a == end || b == end || merged == end)
      return invalid_error(str("merge ", rank, " of the tokenizer, \"",
                               options.characters ? left : spelling_of_bytes(left), " ",
                               options.characters ? right : spelling_of_bytes(right),
                               "\": ", a == end || b == end ? "a part" : "the result",
                               " is not in the vocabulary"));
    bpe->merges_.add(a->second, b->second, {static_cast<std::int32_t>(rank), merged->second});
  }
  return bpe;
}

void Bpe::encode(std::string_view piece, std::vector<std::int32_t>& ids) const {
  if (options_.ignore_merges) {
    if (const auto found = vocabulary_.find(piece); found != vocabulary_.end()) {
      ids.push_back(found->second);
      return;
    }
  }
  const bool cached = piece.size() <= kPieceCacheBytesMax;
  CacheShard& shard = cache_[StringHash{}(piece) % kPieceCacheShards];
  if (cached) {
    std::lock_guard lock(shard.mutex);
    if (const auto found = shard.pieces.find(piece); found != shard.pieces.end()) {
      ids.insert(ids.end(), found->second.begin(), found->second.end());
      return;
    }
  }
  std::vector<std::int32_t> symbols;
  if (options_.characters)
    split_characters(piece, symbols);
  else
    split_bytes(piece, symbols);
  if (symbols.size() <= kShortPieceSymbols)
    merge_short(symbols);
  else
    merge_long(symbols);
  ids.insert(ids.end(), symbols.begin(), symbols.end());
  if (cached) {
    std::lock_guard lock(shard.mutex);
    if (shard.pieces.size() < kPieceCacheEntriesPerShard)
      shard.pieces.emplace(std::string(piece), std::move(symbols));
  }
}

void Bpe::split_bytes(std::string_view piece, std::vector<std::int32_t>& symbols) const {
  symbols.reserve(piece.size());
  bool after_unknown = false;
  for (const char c : piece) {
    const std::int32_t id = byte_ids_[static_cast<unsigned char>(c)];
    if (id >= 0) {
      symbols.push_back(id);
    } else if (options_.unk_id && !(after_unknown && options_.fuse_unk)) {
      symbols.push_back(*options_.unk_id);
    }
    after_unknown = id < 0;
  }
}

/// False: not every byte has a token, or they are not to be used.
bool Bpe::add_bytes(std::string_view character, std::vector<std::int32_t>& symbols) const {
  if (!options_.byte_fallback) return false;
  for (const char c : character)
    if (byte_ids_[static_cast<unsigned char>(c)] < 0) return false;
  for (const char c : character) symbols.push_back(byte_ids_[static_cast<unsigned char>(c)]);
  return true;
}

void Bpe::split_characters(std::string_view piece, std::vector<std::int32_t>& symbols) const {
  bool unknown = false;  // seen, and not yet among the symbols
  const auto add_unknown = [&] {
    if (unknown) symbols.push_back(*options_.unk_id);
    unknown = false;
  };
  for (std::size_t at = 0; at < piece.size();) {
    const std::string_view character =
        piece.substr(at, utf8_length(static_cast<unsigned char>(piece[at])));
    at += character.size();
    if (const auto found = vocabulary_.find(character); found != vocabulary_.end()) {
      add_unknown();
      symbols.push_back(found->second);
    } else if (!add_bytes(character, symbols) && options_.unk_id) {
      if (!options_.fuse_unk) add_unknown();
      unknown = true;
    }
  }
  add_unknown();
}

void Bpe::merge_short(std::vector<std::int32_t>& symbols) const {
  while (symbols.size() > 1) {
    const MergeTable::Merge* best = nullptr;
    std::size_t at = 0;
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      const MergeTable::Merge* merge = merges_.find(symbols[i], symbols[i + 1]);
      if (merge != nullptr && (best == nullptr || merge->rank < best->rank)) {
        best = merge;
        at = i;
      }
    }
    if (best == nullptr) return;
    symbols[at] = best->id;
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

void Bpe::merge_long(std::vector<std::int32_t>& symbols) const {
  constexpr std::int32_t kNone = -1;
  struct Node {
    std::int32_t id, previous, next;
  };
  struct Candidate {
    std::int32_t rank, position, left_id, right_id, merged_id;
    bool operator<(const Candidate& other) const {  // the queue's top is the largest
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  const auto count = static_cast<std::int32_t>(symbols.size());
  std::vector<Node> nodes(symbols.size());
  for (std::int32_t i = 0; i < count; ++i)
    nodes[static_cast<std::size_t>(i)] = {symbols[static_cast<std::size_t>(i)], i - 1,
                                          i + 1 < count ? i + 1 : kNone};
  const auto node = [&](std::int32_t i) -> Node& { return nodes[static_cast<std::size_t>(i)]; };
  std::priority_queue<Candidate> queue;
  const auto consider = [&](std::int32_t left) {
    if (left == kNone || node(left).next == kNone) return;
    const std::int32_t a = node(left).id, b = node(node(left).next).id;
    if (const MergeTable::Merge* merge = merges_.find(a, b))
      queue.push({merge->rank, left, a, b, merge->id});
  };
  for (std::int32_t i = 0; i + 1 < count; ++i) consider(i);
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Node& left = node(top.position);
    // A candidate is stale once either side has merged with something else.
    if (left.id != top.left_id || left.next == kNone || node(left.next).id != top.right_id)
      continue;
    Node& right = node(left.next);
    left.id = top.merged_id;
    right.id = kNone;
    left.next = right.next;
    if (left.next != kNone) node(left.next).previous = top.position;
    consider(left.previous);
    consider(top.position);
  }
  symbols.clear();
  for (std::int32_t i = 0; i != kNone; i = node(i).next) symbols.push_back(node(i).id);
}

}  // namespace tandem::worker::text
