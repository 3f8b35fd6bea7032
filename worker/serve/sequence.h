// The scheduling side of one request: its tokens, how far they are computed and which blocks hold
// them. Plain host state, owned by the engine's request; the scheduler only borrows it.
#pragma once

#include "protocol/base/digest.h"

#include <cstdint>
#include <limits>
#include <span>
#include <unordered_map>
#include <vector>

namespace tandem::worker::serve {

/// Distinct tokens that penalties see, with how often they stand in prompt and output; kept as the
/// arrays that kernels::SampleArgs wants.
class PenaltyHistory {
 public:
  void add_prompt(std::span<const std::int32_t> ids) {
    for (std::int32_t id : ids) ++prompt_counts_[slot(id)];
  }
  void add_output(std::int32_t id) { ++output_counts_[slot(id)]; }
  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(ids_.size()); }
  [[nodiscard]] const std::vector<std::int32_t>& ids() const { return ids_; }
  [[nodiscard]] const std::vector<std::int32_t>& prompt_counts() const { return prompt_counts_; }
  [[nodiscard]] const std::vector<std::int32_t>& output_counts() const { return output_counts_; }

 private:
  std::size_t slot(std::int32_t id) {
    const auto [at, added] = index_.try_emplace(id, ids_.size());
    if (added) {
      ids_.push_back(id);
      prompt_counts_.push_back(0);
      output_counts_.push_back(0);
    }
    return at->second;
  }
  std::vector<std::int32_t> ids_, prompt_counts_, output_counts_;
  std::unordered_map<std::int32_t, std::size_t> index_;
};

struct Sequence {
  // Set once, before the scheduler sees it.
  Digest adapter;           ///< empty: base
  std::int64_t age = 0;     ///< order of service, lower first; distinct
  std::int64_t prompt = 0;  ///< tokens of the prompt
  /// Leading tokens whose outputs nobody needs, so that a cached prefix may cover them (the last
  /// token is always computed).
  std::int64_t reusable = std::numeric_limits<std::int64_t>::max();
  bool wants_token = true;  ///< false: only scored
  bool penalized = false;   ///< `history` counts

  bool adapter_ready = true;         ///< its adapter is installed (or it has none)
  std::vector<std::int32_t> tokens;  ///< prompt, then what was drawn
  PenaltyHistory history;

  // The scheduler's.
  std::int64_t computed = 0;         ///< leading tokens whose keys and values stand in `blocks`
  std::vector<std::int32_t> blocks;  ///< of the tokens, in order
  std::vector<Digest> keys;          ///< [0] root, [i] of the i-th full block; grown as needed
  std::int64_t published = 0;        ///< leading full blocks offered to the prefix cache
  std::int64_t cached_tokens = 0;    ///< taken from the prefix cache at the first admission
  std::int64_t last_step = -1;       ///< in which it had rows
  bool admitted_before = false;
  bool held_back = false;  ///< not in this step: its penalty history did not fit

  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(tokens.size()); }
  /// Known tokens not computed yet: 1 while decoding.
  [[nodiscard]] std::int64_t pending() const { return size() - computed; }
};

}  // namespace tandem::worker::serve
