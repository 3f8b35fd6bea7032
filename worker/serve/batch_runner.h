// The device side of a step: turns scheduled rows into the device tensors that the model and the
// sampler want, runs them, and brings back what was drawn. All buffers are taken once, for the
// largest batch there can be. One device thread.
#pragma once

#include "worker/model/transformer.h"
#include "worker/serve/batch_scheduler.h"
#include "worker/serve/replica.h"
#include "worker/serve/request.h"
#include "worker/serve/staging.h"

#include <span>
#include <vector>

namespace tandem::worker::serve {

/// Batches of at most this many rows are recorded and replayed where the device can.
inline constexpr std::int64_t kReplayTokensMax = 256;

struct RunnerLimits {
  std::int64_t tokens_max = 0, sequences_max = 0, slots = 0, context_max = 0, block_size = 0,
               rank_max = 0, history_max = 0, top_logprobs_max = 0;
  std::int64_t vocab = 0;                   ///< the whole one
  std::vector<std::int64_t> token_buckets;  ///< see ServeOptions
};

/// Rows of one sequence with all that the device needs to know. Pointers outlive run().
struct RunRows {
  BatchRows rows;
  std::int32_t slot = -1;  ///< of its adapter; rows of one slot are neighbours
  const SamplingParams* sampling = nullptr;
  std::uint64_t seed = 0;
  std::span<const std::int32_t> banned;  ///< tokens that may not be drawn now
  std::int64_t score_from = -1;          ///< prompt tokens from here on are scored; -1: none
};

/// Rows [first, first + count) of the group's tokens give log-probabilities that are wanted.
struct ScoredRows {
  std::int64_t first = 0, count = 0;
};
ScoredRows scored_rows(const RunRows& run);

/// Reused between steps.
struct RunResult {
  std::vector<std::int32_t> ids;      ///< [sampled rows], in the order of the rows
  std::vector<float> logprobs;        ///< [sampled rows]
  std::int64_t top_count = 0;         ///< n, the largest that any row asked for
  std::vector<std::int32_t> top_ids;  ///< [sampled rows, n]
  std::vector<float> top_logprobs;
  /// Log-probabilities of scored prompt tokens, row group by row group, ascending.
  std::vector<float> scores;
};

class BatchRunner {
 public:
  /// Takes its buffers from `arena` (kActivations), which must hold at least bytes_needed(). With
  /// `ranks` (may be null) every rank of the replica makes the same calls.
  BatchRunner(model::Context& context, kernels::Arena& arena, model::WeightSource& weights,
              const model::AdapterTable* adapters, const std::vector<kernels::KvCache>& caches,
              const RunnerLimits& limits, const ReplicaRanks* ranks);
  static std::int64_t bytes_needed(const model::ModelConfig& config, DType dtype,
                                   const RunnerLimits& limits);

  /// Issues the forward of all rows and one draw for every row group with `sample`. `rank_max`: of
  /// the adapters named. No other call but passed() until finish().
  void start(std::span<const RunRows> rows, std::int64_t rank_max);
  /// The device has done what start() issued: finish() does not wait for it.
  [[nodiscard]] bool passed() const { return context_.ops.passed(started_); }
  /// What came out of the same rows. `result` is overwritten.
  void finish(std::span<const RunRows> rows, RunResult& result);
  /// The largest batch, inert: every op is called with the largest shapes. A device that records
  /// steps also runs it without adapters and with one, so that their kernels are loaded.
  void run_worst_case();

 private:
  /// The padded sizes of one batch.
  struct Extent {
    std::int64_t tokens, sequences, segments, blocks, samples;
  };
  Extent extent(std::span<const RunRows> rows, std::int64_t tokens, std::int64_t samples) const;
  /// A step of the largest batch, all rows inert, with so many segments and adapters of such a rank
  /// (0: none); its extent.
  Extent run_inert(std::int64_t segments, std::int64_t rank_max);
  /// True for a batch that is worth recording: few rows, so that issuing its ops takes longer than
  /// running them, and shapes that come back.
  [[nodiscard]] bool replays(const Extent& e) const;
  /// All that the host puts into the ops of forward_and_sample().
  [[nodiscard]] std::uint64_t replay_key(const Extent& e) const;
  void stage_rows(std::span<const RunRows> rows, const Extent& e, std::int64_t rank_max);
  void stage_segments(std::span<const RunRows> rows, const Extent& e, std::int64_t rank_max);
  void stage_sampling(std::span<const RunRows> rows, const Extent& e);
  void stage_history(std::span<const RunRows> rows, const Extent& e);
  /// Through this rank's blocks, with the stages before and behind it.
  void forward();
  /// Forward, the sampled rows' logits and the draw; the results are on the device then, of all
  /// ranks. `banned`: rows with tokens that may not be drawn; empty: none.
  void forward_and_sample(const Extent& e, std::span<const RunRows> banned = {});
  void ban(std::span<const RunRows> rows);
  void stage_outputs(const Extent& e);
  void sample();
  /// The last stage's outputs_ to all stages.
  void share_outputs();
  [[nodiscard]] bool has_head() const { return stage_.last == layers_; }
  void download_samples(std::int64_t real, RunResult& result);
  void score(std::span<const RunRows> rows, RunResult& result);

  const std::uint64_t runner_;  ///< its number in this process
  model::Context& context_;
  const RunnerLimits limits_;
  const ReplicaRanks* const ranks_;
  const model::Stage stage_;
  const std::int64_t layers_;  ///< of the whole model
  const model::Transformer transformer_;
  kernels::Tensor hidden_;    ///< [tokens_max, C] cd
  kernels::Tensor gathered_;  ///< [sequences_max, C] cd
  kernels::Tensor logits_;    ///< [sequences_max, V] f32
  Staging inputs_, outputs_;
  model::TokenBatch batch_;
  model::PagedKv paged_;
  kernels::Tensor sample_index_;  ///< [samples] i32
  kernels::SampleArgs sample_args_;
  std::uint64_t started_ = 0;  ///< the mark behind what start() issued
  /// Host sides of what sample() left.
  std::span<const std::int32_t> sampled_ids_, top_ids_;
  std::span<const float> sampled_logprobs_, top_logprobs_;
};

}  // namespace tandem::worker::serve
