#include "coordinator/result_cache.h"

#include "protocol/codec.h"

#include <span>

namespace tandem::coordinator {

bool is_deterministic(const protocol::Generate& request) {
  const protocol::SamplingParams& sampling = request.sampling;
  return (sampling.temperature && *sampling.temperature == 0.0f) || sampling.seed.has_value();
}

Digest result_key(const Digest& model, const Digest& adapter, const std::string& tenant,
                  const protocol::Generate& request) {
  protocol::Generate canonical = request;
  canonical.id = {};
  canonical.model.clear();
  canonical.stream = false;
  canonical.no_cache = false;
  canonical.next_index = 0;
  canonical.deadline_ms = 0;
  // The codec's encoding is deterministic and covers every field, so a field added later is in
  // the key without anybody remembering it.
  const protocol::Bytes bytes = protocol::encode(protocol::ClientMessage{std::move(canonical)});
  Hasher hasher;
  hasher.update(std::as_bytes(std::span(model.bytes)));
  hasher.update(std::as_bytes(std::span(adapter.bytes)));
  hasher.update(sha256(tenant).hex());
  hasher.update(bytes);
  return hasher.finish();
}

const protocol::GenerateChunk* ResultCache::find(const Digest& key, std::int64_t unix_ms) {
  const auto found = index_.find(key);
  if (found == index_.end()) {
    ++counters_.misses;
    return nullptr;
  }
  if (found->second->expires_unix_ms <= unix_ms) {
    // The record on disk goes with the next garbage collection.
    erase(found->second);
    ++counters_.expired;
    ++counters_.misses;
    return nullptr;
  }
  ++counters_.hits;
  entries_.splice(entries_.begin(), entries_, found->second);
  return &found->second->answer;
}

std::optional<ResultRecord> ResultCache::insert(const Digest& key, const std::string& tenant,
                                                const protocol::GenerateChunk& answer,
                                                std::int64_t unix_ms, std::int64_t ttl_ms,
                                                std::vector<Digest>& evicted) {
  const protocol::Bytes bytes = protocol::encode(protocol::ServerMessage{answer});
  if (bytes.size() > entry_bytes_max_ || bytes.size() > bytes_max_) return std::nullopt;
  if (const auto old = index_.find(key); old != index_.end()) erase(old->second);
  ResultRecord record;
  record.key = key;
  record.target = answer.adapter.empty() ? answer.model : answer.adapter;
  record.created_unix_ms = unix_ms;
  record.expires_unix_ms = unix_ms + ttl_ms;
  record.bytes = static_cast<std::int64_t>(bytes.size());
  record.payload.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  record.tenant = tenant;
  entries_.push_front({key, answer, record.expires_unix_ms, bytes.size()});
  index_[key] = entries_.begin();
  bytes_ += bytes.size();
  ++counters_.inserted;
  shrink(evicted);
  return record;
}

void ResultCache::load(const ResultRecord& record, std::int64_t unix_ms,
                       std::vector<Digest>& dropped) {
  auto decoded = protocol::decode_server(std::as_bytes(std::span(record.payload)));
  const auto* answer =
      decoded.ok() ? std::get_if<protocol::GenerateChunk>(&decoded.value()) : nullptr;
  if (answer == nullptr || record.expires_unix_ms <= unix_ms || index_.contains(record.key)) {
    dropped.push_back(record.key);
    return;
  }
  entries_.push_back({record.key, *answer, record.expires_unix_ms, record.payload.size()});
  index_[record.key] = std::prev(entries_.end());
  bytes_ += record.payload.size();
  shrink(dropped);
}

std::vector<Digest> ResultCache::clear() {
  std::vector<Digest> keys;
  for (const auto& [key, entry] : index_) keys.push_back(key);
  entries_.clear();
  index_.clear();
  bytes_ = 0;
  return keys;
}

ResultCacheStats ResultCache::stats() const {
  ResultCacheStats stats = counters_;
  stats.entries = index_.size();
  stats.bytes = bytes_;
  stats.bytes_max = bytes_max_;
  return stats;
}

void ResultCache::erase(std::list<Entry>::iterator entry) {
  bytes_ -= entry->bytes;
  index_.erase(entry->key);
  entries_.erase(entry);
}

void ResultCache::shrink(std::vector<Digest>& evicted) {
  while (bytes_ > bytes_max_) {
    evicted.push_back(entries_.back().key);
    erase(std::prev(entries_.end()));
    ++counters_.evicted;
  }
}

}  // namespace tandem::coordinator
