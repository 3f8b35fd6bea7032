// Byte-pair encoding of one piece of text: the best-ranked adjacent pair merges first, the
// leftmost of equals, until none is left (Sennrich et al. 2016, as Hugging Face tokenizers does).
#pragma once

#include "protocol/base/result.h"

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace tandem::worker::text {

/// Limits of the cache of encoded pieces; pieces over the size are encoded each time.
inline constexpr std::size_t kPieceCacheShards = 16;
inline constexpr std::size_t kPieceCacheEntriesPerShard = 8192;
inline constexpr std::size_t kPieceCacheBytesMax = 48;

struct StringHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
};
template <class T>
using StringMap = std::unordered_map<std::string, T, StringHash, std::equal_to<>>;

/// (left id, right id) -> (rank, merged id): open addressing, twice as many slots as pairs.
class MergeTable {
 public:
  struct Merge {
    std::int32_t rank, id;
  };
  explicit MergeTable(std::size_t pairs);
  /// A pair added twice keeps its later rank, as in the reference.
  void add(std::int32_t left, std::int32_t right, Merge merge);
  [[nodiscard]] const Merge* find(std::int32_t left, std::int32_t right) const;

 private:
  struct Slot {
    std::uint64_t key;
    Merge merge;
  };
  std::vector<Slot> slots_;
  std::size_t mask_;
};

/// SentencePiece's spelling of a byte: <0x0A>.
std::string byte_token(unsigned byte);

struct BpeOptions {
  bool ignore_merges = false;            ///< a piece that is a token is that token
  std::optional<std::int32_t> unk_id{};  ///< stands for bytes without a token; absent: dropped
  bool fuse_unk = false;                 ///< neighbouring unknown bytes become one
  /// Symbols begin as characters, as SentencePiece has it, not as bytes.
  bool characters = false;
  bool byte_fallback = false;  ///< characters without a token become the tokens <0x00> to <0xFF>
};

/// Immutable but for its cache; any thread.
class Bpe {
 public:
  /// `vocabulary` maps bytes (with `characters`: spellings) to ids; `merges` are pairs of them,
  /// best first. Invalid: a merge whose parts or result are not in the vocabulary.
  static Result<std::unique_ptr<Bpe>> create(
      StringMap<std::int32_t> vocabulary,
      const std::vector<std::pair<std::string, std::string>>& merges, BpeOptions options);

  /// Appends the ids of `piece`. O(n log n) for n bytes.
  void encode(std::string_view piece, std::vector<std::int32_t>& ids) const;

 private:
  Bpe(StringMap<std::int32_t> vocabulary, std::size_t merges, BpeOptions options);
  void split_bytes(std::string_view piece, std::vector<std::int32_t>& symbols) const;
  void split_characters(std::string_view piece, std::vector<std::int32_t>& symbols) const;
  bool add_bytes(std::string_view character, std::vector<std::int32_t>& symbols) const;
  void merge_short(std::vector<std::int32_t>& symbols) const;
  void merge_long(std::vector<std::int32_t>& symbols) const;

  struct CacheShard {
    std::mutex mutex;
    StringMap<std::vector<std::int32_t>> pieces;
  };
  StringMap<std::int32_t> vocabulary_;
  /// Of each byte, or with byte_fallback of its token <0xNN>; -1: the vocabulary has none.
  std::array<std::int32_t, 256> byte_ids_{};
  MergeTable merges_;
  BpeOptions options_;
  mutable std::array<CacheShard, kPieceCacheShards> cache_;
};

}  // namespace tandem::worker::text
