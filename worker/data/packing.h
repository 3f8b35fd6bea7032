// Packs examples into micro-batches of at most T tokens without padding, and cuts epochs into
// optimizer steps. Documents are never split and never see each other: each is one sequence with
// its own offsets and its own positions from 0. Everything is a pure function of (examples,
// options, epoch), so {epoch, step} is all that a checkpoint needs to resume.
#pragma once

#include "protocol/base/result.h"
#include "worker/data/dataset.h"

#include <cstdint>
#include <vector>

namespace tandem::worker::data {

/// Examples that are shuffled together before best-fit packing; bounds how far packing by length
/// departs from a random order.
inline constexpr std::int64_t kPackingWindow = 4096;

struct PackingOptions {
  std::int64_t micro_batch_tokens = 4096;        ///< T, tokens of one micro-batch at most
  std::int64_t gradient_accumulation_steps = 1;  ///< micro-batches of one optimizer step
  std::uint64_t seed = 42;
  bool shuffle = true;  ///< false: the file's order, still packed by best fit
  bool pack = true;     ///< false: one example per micro-batch
};

/// One packed micro-batch. T' = tokens.size() <= micro_batch_tokens.
struct MicroBatch {
  std::vector<std::int32_t> tokens;      ///< [T']
  std::vector<std::int32_t> labels;      ///< [T'] next tokens or kIgnore
  std::vector<std::int32_t> positions;   ///< [T'] from 0 in each document
  std::vector<std::int32_t> cu_seqlens;  ///< [documents + 1] offsets, 0 first, T' last
  std::vector<std::int64_t> examples;    ///< [documents] indices into Dataset::examples
  std::int64_t trained_tokens = 0;       ///< labels that are not kIgnore
};

/// One optimizer step. The loss is the sum over all labels divided by trained_tokens of the whole
/// step, so the gradient does not depend on how the step was cut into micro-batches.
struct OptimizerStep {
  std::vector<MicroBatch> micro_batches;  ///< gradient_accumulation_steps, fewer at an epoch's end
  std::int64_t trained_tokens = 0;
};

/// Where training stands: the next step to run. The whole data state of a checkpoint.
struct DataCursor {
  std::int64_t epoch = 0;
  std::int64_t step = 0;  ///< within the epoch
  bool operator==(const DataCursor&) const = default;
};

/// Which examples share which micro-batch in one epoch, in training order.
using EpochPlan = std::vector<std::vector<std::int64_t>>;

/// Plans epochs over examples of the given lengths. One thread at a time (it keeps the plan of the
/// epoch asked for last); the data set must outlive it.
class Packer {
 public:
  /// Invalid: no examples, an example longer than micro_batch_tokens (with its line), options that
  /// are not positive.
  static Result<Packer> create(const Dataset& dataset, PackingOptions options);

  /// The micro-batches of an epoch.
  const EpochPlan& plan(std::int64_t epoch);
  /// Optimizer steps of an epoch; differs a little between epochs because packing does.
  std::int64_t steps_in_epoch(std::int64_t epoch);
  /// Steps of the first `epochs` epochs together. Invalid: epochs not in [1, kEpochsMax].
  Result<std::int64_t> total_steps(std::int64_t epochs);

  /// The step at `cursor`. Invalid: a cursor outside the epoch (another data set or seed).
  Result<OptimizerStep> step(DataCursor cursor);
  /// The cursor after `cursor`.
  DataCursor next(DataCursor cursor);

  /// Builds one micro-batch from examples; for evaluation too.
  [[nodiscard]] MicroBatch assemble(const std::vector<std::int64_t>& examples) const;

 private:
  Packer(const Dataset& dataset, PackingOptions options) : dataset_(&dataset), options_(options) {}
  const Dataset* dataset_;
  PackingOptions options_;
  std::int64_t planned_epoch_ = -1;
  EpochPlan plan_;
};

/// Most epochs of one job.
inline constexpr std::int64_t kEpochsMax = 10'000;

}  // namespace tandem::worker::data
