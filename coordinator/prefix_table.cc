#include "coordinator/prefix_table.h"

#include <algorithm>
#include <span>
#include <string>
#include <string_view>

namespace tandem::coordinator {
namespace {

constexpr std::size_t kPieceBytes = 1024;

Digest chain(const Digest& previous, std::string_view role, std::string_view content) {
  Hasher hasher;
  hasher.update(std::as_bytes(std::span(previous.bytes)));
  // Lengths first: ("ab", "c") and ("a", "bc") are different messages.
  hasher.update(std::to_string(role.size()) + ":" + std::to_string(content.size()) + ":");
  hasher.update(role).update(content);
  return hasher.finish();
}

}  // namespace

std::vector<Digest> prefix_chain(const Digest& model, const Digest& adapter,
                                 const protocol::PromptInput& input, std::size_t depth_max) {
  std::vector<Digest> digests;
  Digest last = chain(model, "adapter", adapter.hex());
  const auto add = [&](std::string_view role, std::string_view content) {
    if (digests.size() >= depth_max) return;
    last = chain(last, role, content);
    digests.push_back(last);
  };
  const auto add_pieces = [&](std::string_view role, std::string_view text) {
    // Only whole pieces: the last one would differ as soon as the text grows.
    for (std::size_t at = 0; at + kPieceBytes <= text.size(); at += kPieceBytes)
      add(role, text.substr(at, kPieceBytes));
  };
  for (const protocol::ChatMessage& message : input.messages) add(message.role, message.content);
  add_pieces(input.raw ? "raw" : "prompt", input.prompt);
  add_pieces("tokens", std::string_view(reinterpret_cast<const char*>(input.tokens.data()),
                                        input.tokens.size() * sizeof(std::int32_t)));
  return digests;
}

void PrefixTable::record(const std::vector<Digest>& chain_digests, const WorkerId& worker) {
  for (const Digest& digest : chain_digests) {
    if (const auto found = index_.find(digest); found != index_.end()) {
      found->second->second = worker;
      entries_.splice(entries_.begin(), entries_, found->second);
      continue;
    }
    entries_.emplace_front(digest, worker);
    index_[digest] = entries_.begin();
    if (index_.size() > entries_max_) {
      index_.erase(entries_.back().first);
      entries_.pop_back();
    }
  }
}

std::map<WorkerId, std::size_t> PrefixTable::depths(
    const std::vector<Digest>& chain_digests) const {
  std::map<WorkerId, std::size_t> depths;
  std::size_t depth = 0;
  for (const Digest& digest : chain_digests) {
    const auto found = index_.find(digest);
    if (found == index_.end()) break;
    depths[found->second->second] = ++depth;
  }
  return depths;
}

void PrefixTable::forget(const WorkerId& worker) {
  for (auto entry = entries_.begin(); entry != entries_.end();) {
    if (entry->second != worker) {
      ++entry;
      continue;
    }
    index_.erase(entry->first);
    entry = entries_.erase(entry);
  }
}

}  // namespace tandem::coordinator
