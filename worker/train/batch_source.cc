#include "worker/train/batch_source.h"

#include <algorithm>

namespace tandem::worker::train {

void BatchBounds::include(const data::MicroBatch& batch) {
  micro_batch_tokens = std::max(micro_batch_tokens, static_cast<std::int64_t>(batch.tokens.size()));
  micro_batch_sequences =
      std::max(micro_batch_sequences, static_cast<std::int64_t>(batch.cu_seqlens.size()) - 1);
  for (std::size_t s = 0; s + 1 < batch.cu_seqlens.size(); ++s)
    sequence_tokens =
        std::max<std::int64_t>(sequence_tokens, batch.cu_seqlens[s + 1] - batch.cu_seqlens[s]);
}

namespace {

class FixedBatches final : public BatchSource {
 public:
  FixedBatches(std::vector<data::OptimizerStep> steps, std::vector<data::MicroBatch> eval,
               std::int64_t epochs)
      : steps_(std::move(steps)), eval_(std::move(eval)), epochs_(epochs) {
    TANDEM_CHECK(!steps_.empty() && epochs_ >= 1);
    for (const data::OptimizerStep& step : steps_)
      for (const data::MicroBatch& batch : step.micro_batches) bounds_.include(batch);
    for (const data::MicroBatch& batch : eval_) bounds_.include(batch);
  }
  [[nodiscard]] std::int64_t total_steps() const override { return steps_per_epoch() * epochs_; }
  [[nodiscard]] std::int64_t steps_per_epoch() const override {
    return static_cast<std::int64_t>(steps_.size());
  }
  Result<data::OptimizerStep> step(std::int64_t index) override {
    TANDEM_CHECK(index >= 0 && index < total_steps(), "step ", index, " of ", total_steps());
    return steps_[static_cast<std::size_t>(index % steps_per_epoch())];
  }
  [[nodiscard]] const std::vector<data::MicroBatch>& eval_batches() const override { return eval_; }
  [[nodiscard]] const BatchBounds& bounds() const override { return bounds_; }

 private:
  const std::vector<data::OptimizerStep> steps_;
  const std::vector<data::MicroBatch> eval_;
  const std::int64_t epochs_;
  BatchBounds bounds_;
};

}  // namespace

std::unique_ptr<BatchSource> make_fixed_batches(std::vector<data::OptimizerStep> steps,
                                                std::vector<data::MicroBatch> eval,
                                                std::int64_t epochs) {
  return std::make_unique<FixedBatches>(std::move(steps), std::move(eval), epochs);
}

}  // namespace tandem::worker::train
