// Answers of deterministic requests, kept by digest: exact, bounded in bytes, oldest use out first.
// A new version under an alias has another digest, so it is never answered from the old one.
// Pure data structure; the caller persists what insert() and clear() report. One thread.
#pragma once

#include "coordinator/records.h"
#include "protocol/messages.h"

#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace tandem::coordinator {

/// True when equal requests must get equal answers: greedy, or with a seed of its own.
[[nodiscard]] bool is_deterministic(const protocol::Generate& request);

/// Identity of a request's answer: base, adapter, tenant, and all that is asked but id, stream,
/// deadline and position.
Digest result_key(const Digest& model, const Digest& adapter, const std::string& tenant,
                  const protocol::Generate& request);

struct ResultCacheStats {
  std::uint64_t hits = 0, misses = 0, inserted = 0, evicted = 0, expired = 0;
  std::size_t entries = 0, bytes = 0, bytes_max = 0;
};

class ResultCache {
 public:
  ResultCache(std::size_t bytes_max, std::size_t entry_bytes_max)
      : bytes_max_(bytes_max), entry_bytes_max_(entry_bytes_max) {}

  /// The whole answer (index 0), or null. Counts a hit or a miss and refreshes the entry's use.
  const protocol::GenerateChunk* find(const Digest& key, std::int64_t unix_ms);
  /// Returns the record to persist, or nothing when the answer is too large; `evicted` gets the
  /// keys that had to go.
  std::optional<ResultRecord> insert(const Digest& key, const std::string& tenant,
                                     const protocol::GenerateChunk& answer, std::int64_t unix_ms,
                                     std::int64_t ttl_ms, std::vector<Digest>& evicted);
  /// Takes in a record read at start; those that do not decode or expired are reported in
  /// `dropped`.
  void load(const ResultRecord& record, std::int64_t unix_ms, std::vector<Digest>& dropped);
  /// Removes everything and returns the keys.
  std::vector<Digest> clear();
  [[nodiscard]] ResultCacheStats stats() const;

 private:
  struct Entry {
    Digest key;
    protocol::GenerateChunk answer;
    std::int64_t expires_unix_ms = 0;
    std::size_t bytes = 0;
  };
  void erase(std::list<Entry>::iterator entry);
  void shrink(std::vector<Digest>& evicted);

  const std::size_t bytes_max_, entry_bytes_max_;
  std::list<Entry> entries_;  // most recently used first
  std::map<Digest, std::list<Entry>::iterator> index_;
  std::size_t bytes_ = 0;
  ResultCacheStats counters_;
};

}  // namespace tandem::coordinator
