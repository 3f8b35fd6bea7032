// Which engine saw which beginning of a conversation last: chained digests of canonical messages.
// The coordinator never tokenizes; an engine's prefix cache may still disagree, which costs time
// and nothing else. One thread.
#pragma once

#include "protocol/base/digest.h"
#include "protocol/base/ids.h"
#include "protocol/messages.h"

#include <list>
#include <map>
#include <utility>
#include <vector>

namespace tandem::coordinator {

/// d_0 = H(model, adapter), d_i = H(d_{i-1}, role, content); for a prompt, 1 KiB pieces. At most
/// `depth_max` digests, d_0 left out.
std::vector<Digest> prefix_chain(const Digest& model, const Digest& adapter,
                                 const protocol::PromptInput& input, std::size_t depth_max);

class PrefixTable {
 public:
  explicit PrefixTable(std::size_t entries_max) : entries_max_(entries_max) {}
  /// Each digest of the chain was last seen by `worker`.
  void record(const std::vector<Digest>& chain, const WorkerId& worker);
  /// How many leading digests of the chain each worker saw last.
  [[nodiscard]] std::map<WorkerId, std::size_t> depths(const std::vector<Digest>& chain) const;
  void forget(const WorkerId& worker);

 private:
  using Entry = std::pair<Digest, WorkerId>;
  const std::size_t entries_max_;
  std::list<Entry> entries_;  // newest first
  std::map<Digest, std::list<Entry>::iterator> index_;
};

}  // namespace tandem::coordinator
