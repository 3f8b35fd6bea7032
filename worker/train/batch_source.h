// What a training session eats: micro-batches as a pure function of the step, so that a checkpoint
// needs to remember nothing but how many steps were done.
#pragma once

#include "protocol/job_spec.h"
#include "worker/data/dataset.h"
#include "worker/data/packing.h"

#include <memory>
#include <vector>

namespace tandem::worker::train {

/// What the device tensors of a session must hold; the memory of a session follows from them.
struct BatchBounds {
  std::int64_t micro_batch_tokens = 0;     ///< T, largest
  std::int64_t micro_batch_sequences = 0;  ///< S, largest
  std::int64_t sequence_tokens = 0;        ///< longest document
  /// Widens the bounds so that `batch` fits.
  void include(const data::MicroBatch& batch);
};

/// One thread at a time.
class BatchSource {
 public:
  virtual ~BatchSource() = default;
  /// Optimizer steps of the whole job.
  [[nodiscard]] virtual std::int64_t total_steps() const = 0;
  /// Steps of one pass over the data (of the first, where passes differ); for reports.
  [[nodiscard]] virtual std::int64_t steps_per_epoch() const = 0;
  /// Step `index` in [0, total_steps). Called in ascending order but for a resume.
  virtual Result<data::OptimizerStep> step(std::int64_t index) = 0;
  /// The evaluation set, already cut; empty: none.
  [[nodiscard]] virtual const std::vector<data::MicroBatch>& eval_batches() const = 0;
  [[nodiscard]] virtual const BatchBounds& bounds() const = 0;
};

/// Batches of a data set under the job's settings: the evaluation split (by seed, when
/// `eval` is null and eval_split > 0), packing, shuffling, epochs (fractions of one included),
/// max_steps. The data sets are kept alive. invalid_error: nothing left to train on, a document
/// longer than a micro-batch.
Result<std::unique_ptr<BatchSource>> make_packed_batches(std::shared_ptr<const data::Dataset> train,
                                                         std::shared_ptr<const data::Dataset> eval,
                                                         const protocol::TrainSettings& settings);

/// Batches that are given, each an optimizer step, passed over `epochs` times: tests, goldens, dry
/// runs.
std::unique_ptr<BatchSource> make_fixed_batches(std::vector<data::OptimizerStep> steps,
                                                std::vector<data::MicroBatch> eval,
                                                std::int64_t epochs = 1);

}  // namespace tandem::worker::train
