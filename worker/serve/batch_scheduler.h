// Decides which rows run next: pure host logic over sequences and KV blocks, no device and no time,
// so the same calls always give the same batches. One thread.
//
// Order is `Sequence::age`. A step takes one row of every decoding sequence, then prefill chunks,
// oldest first, up to the token budget. When a step may name fewer adapters than run, those served
// longest ago go first. When KV is short the youngest running sequence gives its blocks back and
// waits again under its old age; the oldest is never preempted, so something always finishes. A
// waiting sequence that does not fit yet is not overtaken by younger ones.
#pragma once

#include "worker/serve/prefix_cache.h"
#include "worker/serve/sequence.h"

#include <vector>

namespace tandem::worker::serve {

struct BatchLimits {
  std::int64_t token_budget = 0;       ///< rows of a step; more than running_max
  std::int64_t prefill_chunk_max = 0;  ///< rows of one sequence; 0: no limit of its own
  std::int64_t running_max = 0;        ///< sequences that hold blocks
  std::int64_t adapters_max = 0;       ///< distinct adapters in one step
  std::int64_t history_max = 0;        ///< penalty history entries in one step
  std::int64_t block_size = 16;
};

struct BatchRows {
  Sequence* sequence = nullptr;
  std::int64_t begin = 0, count = 0;  ///< its tokens [begin, begin + count)
  bool sample = false;                ///< the last row's logits give its next token
};

struct Batch {
  /// Sequences of one adapter are neighbours; those without one come first.
  std::vector<BatchRows> rows;
  std::int64_t tokens = 0;  ///< sum of counts
  std::int64_t prefill_tokens = 0;
  /// Sequences that need more blocks than there are at all; removed from the scheduler.
  std::vector<Sequence*> too_large;
  std::int64_t preempted = 0;
};

class BatchScheduler {
 public:
  BatchScheduler(KvBlocks& kv, BatchLimits limits, Digest base);

  /// Starts waiting. The sequence stays where it is until remove() or too_large.
  void add(Sequence* sequence);
  /// Gives its blocks back, whatever its state; it must have been added.
  void remove(Sequence* sequence);

  /// The next batch; `batch` is overwritten (its memory reused). Admits and preempts on the way.
  void next(Batch& batch);
  /// The batch ran: its rows count as computed, full blocks become reusable. Call before the drawn
  /// tokens are appended.
  void commit(const Batch& batch);

  void set_token_budget(std::int64_t tokens) { limits_.token_budget = tokens; }
  /// KvBlocks::set_limit, and running sequences that hold blocks beyond it wait again.
  void set_kv_limit(std::int64_t blocks);

  [[nodiscard]] std::int64_t running() const { return static_cast<std::int64_t>(running_.size()); }
  [[nodiscard]] std::int64_t waiting() const { return static_cast<std::int64_t>(waiting_.size()); }
  /// Something could run now: next() would not come back empty-handed.
  [[nodiscard]] bool has_runnable() const;
  [[nodiscard]] const std::vector<Sequence*>& waiting_list() const { return waiting_; }
  [[nodiscard]] std::int64_t preemptions() const { return preemptions_; }
  /// Whole blocks of admitted sequences that could have come from the prefix cache, and that did.
  [[nodiscard]] std::int64_t prefix_queries() const { return prefix_queries_; }
  [[nodiscard]] std::int64_t prefix_hits() const { return prefix_hits_; }

 private:
  void grow_running(Batch& batch);
  void admit_waiting(Batch& batch);
  bool admit(Sequence* sequence, bool alone);
  void choose_adapters();
  void choose_histories();
  [[nodiscard]] bool chosen(const Digest& adapter) const;
  void pick_rows(Batch& batch);
  void preempt(Sequence* sequence);
  void give_back(Sequence* sequence);
  void extend_keys(Sequence* sequence, std::int64_t full_blocks);
  [[nodiscard]] std::int64_t blocks_for(std::int64_t tokens) const {
    return (tokens + limits_.block_size - 1) / limits_.block_size;
  }

  KvBlocks& kv_;
  BatchLimits limits_;
  const Digest base_;
  std::vector<Sequence*> waiting_, running_;  ///< ascending age
  std::int64_t step_ = 0, preemptions_ = 0, prefix_queries_ = 0, prefix_hits_ = 0;
  struct Service {
    Digest adapter;
    std::int64_t last_step, age;
  };
  std::vector<Service> service_;  ///< adapters of this step, in the order they may be served
  std::vector<Sequence*> order_;  ///< scratch
};

}  // namespace tandem::worker::serve
