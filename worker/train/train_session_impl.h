// Private to worker/train: what a TrainSession is made of. train_session.cc has its slices,
// train_session_state.cc its checkpoints and the probe.
#pragma once

#include "worker/model/stream_rows.h"
#include "worker/train/device_batch.h"
#include "worker/train/pipeline_run.h"
#include "worker/train/train_session.h"
#include "worker/train/trainable.h"

#include <memory>
#include <optional>
#include <vector>

namespace tandem::worker::train {

class TrainSession::Impl {
 public:
  Impl(const SessionParts& parts, SessionOptions options, model::LoraConfig lora,
       std::unique_ptr<Trainable> params, model::Recompute recompute,
       std::unique_ptr<BatchSource> batches)
      : parts_(parts),
        options_(std::move(options)),
        lora_(std::move(lora)),
        recompute_(recompute),
        batches_(std::move(batches)),
        params_owner_(std::move(params)),
        params_(*params_owner_),
        transformer_(params_.weights(), &parts.adapters,
                     parts.weights.base().shard().stages.back()) {
    make_room();
    if (pipelined())
      pipeline_.emplace(parts.allocator, parts.ledger, parts_.context, params_.weights(),
                        parts.adapters, *parts.ranks, recompute);
    scaler_ = options_.loss_scaling ? LossScaler(*options_.loss_scaling)
                                    : LossScaler::of(parts.context.compute_dtype);
    phase_ = options_.eval_base_first && has_eval() ? Phase::kBaseEval : Phase::kTrain;
  }
  ~Impl() { parts_.adapters.clear(parts_.context.exec, parts_.slot); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  Status initialise() {
    if (options_.initial != nullptr) {
      TANDEM_RETURN_IF_ERROR(params_.initialise_from(*options_.initial));
    } else {
      params_.initialise(static_cast<std::uint64_t>(options_.settings.seed));
    }
    options_.initial = nullptr;
    params_.attach(parts_.adapters, parts_.slot);
    return {};
  }

  Result<SliceEvent> run_slice() {
    started_ = true;
    switch (phase_) {
      case Phase::kBaseEval:
      case Phase::kEval:
        return eval_slice();
      case Phase::kTrain:
        return train_slice();
      case Phase::kCheckpoint: {
        const bool last = step_ == batches_->total_steps();
        phase_ = last ? Phase::kFinished : Phase::kTrain;
        return SliceEvent(CheckpointDue{step_, last});
      }
      case Phase::kFinished:
        return SliceEvent(Finished{step_});
    }
    return internal_error("unreachable");
  }

  [[nodiscard]] TrainState export_state() const;
  Status read_state(const std::string& text, const StateSource& tensors);
  void take_state();
  double probe(const std::vector<std::int32_t>& prompt,
               std::shared_ptr<const model::AdapterWeights> other);
  double probe_published(const std::vector<std::int32_t>& prompt,
                         const model::TensorSource& published);

  enum class Phase { kBaseEval, kTrain, kEval, kCheckpoint, kFinished };

  [[nodiscard]] bool has_eval() const { return !batches_->eval_batches().empty(); }

  SessionParts parts_;
  SessionOptions options_;
  const model::LoraConfig lora_;
  const model::Recompute recompute_;
  const std::unique_ptr<BatchSource> batches_;
  const std::unique_ptr<Trainable> params_owner_;
  Trainable& params_;
  const model::Transformer transformer_;  ///< the model; of a pipeline, this rank's last stage
  std::unique_ptr<kernels::Arena> room_arena_;
  std::optional<model::StreamRoom> room_;  ///< with sequence parallelism on a GPU
  std::optional<PipelineRunner> pipeline_;
  PhaseTimes times_;

  Phase phase_ = Phase::kTrain;
  bool started_ = false;
  std::int64_t step_ = 0;  ///< optimizer steps done
  LossScaler scaler_;
  std::int64_t read_step_ = 0;  ///< of a state that was read and is to be taken
  LossScaler read_scaler_;
  bool read_eval_due_ = false;

 private:
  std::vector<float> prompt_logits(const std::vector<std::int32_t>& prompt);
  Result<SliceEvent> train_slice();
  Result<SliceEvent> finish_step();
  Result<SliceEvent> eval_slice();
  Status begin_step();
  /// A micro-batch of this rank: what it is and which of the step's.
  struct LocalBatch {
    const data::MicroBatch* batch = nullptr;
    std::int64_t index = 0;
  };
  double run_micro_batch(const LocalBatch& batch);
  double run_pipeline();
  void deal_micro_batches();
  [[nodiscard]] DeviceBatch upload(model::Context& ctx, const LocalBatch& batch) const;
  [[nodiscard]] float gradient_scale() const {
    return static_cast<float>(scaler_.scale() / static_cast<double>(current_->trained_tokens));
  }
  [[nodiscard]] Status check_step(double loss, double norm) const;
  [[nodiscard]] bool pipelined() const {
    return parts_.ranks != nullptr && parts_.ranks->layout.pp > 1;
  }
  /// Of the residual stream, see Ranks.
  [[nodiscard]] std::int64_t row_parts() const {
    return parts_.ranks ? parts_.ranks->row_parts() : 1;
  }
  [[nodiscard]] std::int64_t dp_size() const { return parts_.ranks ? parts_.ranks->layout.dp : 1; }
  [[nodiscard]] std::int64_t dp_rank() const { return parts_.ranks ? parts_.ranks->dp_rank() : 0; }
  void phase_after_step();
  void make_room();

  // The step in progress.
  std::optional<data::OptimizerStep> current_;
  data::MicroBatch idle_;  ///< what a rank does while the others do a round that it has no share in
  std::vector<LocalBatch> local_;
  std::size_t next_micro_batch_ = 0;
  double loss_sum_ = 0.0, step_seconds_ = 0.0;
  // The evaluation in progress.
  std::size_t next_eval_batch_ = 0;
  double eval_loss_ = 0.0, eval_correct_ = 0.0, eval_seconds_ = 0.0;
  std::int64_t eval_tokens_ = 0;
};

}  // namespace tandem::worker::train
