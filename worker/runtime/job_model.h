// What a training job needs of whoever holds its base model: an engine (one rank, ModelHost) or a
// gang's first rank, which speaks for all of them (gang_model.h). JobHost knows only this. Device
// thread.
#pragma once

#include "storage/peft.h"
#include "worker/data/dataset.h"
#include "worker/model/adapter_layout.h"
#include "worker/train/train_session.h"

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tandem::worker::runtime {

/// A session of one rank or of all ranks of a gang; see train::TrainSession for each call.
class JobSession {
 public:
  virtual ~JobSession() = default;
  virtual Result<train::SliceEvent> run_slice() = 0;
  [[nodiscard]] virtual std::int64_t step() const = 0;
  [[nodiscard]] virtual std::int64_t total_steps() const = 0;
  [[nodiscard]] virtual const model::LoraConfig& lora() const = 0;
  /// The whole state, of all ranks.
  virtual Result<train::TrainState> export_state() = 0;
  /// Where JobModel::stores_in_parts(): every rank copies its pieces of the state and stores them
  /// in the background.
  virtual void begin_checkpoint() = 0;
  /// The manifest of what was stored; nothing while it is being stored. `config` null: of a full
  /// fine-tune.
  virtual std::optional<Result<std::string>> stored_checkpoint(
      const Digest& base_model, const storage::PeftConfig* config) = 0;
  /// Null where the adapter lies on many ranks, or older ones that requests use leave no room.
  virtual std::shared_ptr<const model::AdapterWeights> snapshot_adapter() = 0;
  virtual Result<model::FlatAdapter> flat_adapter(DType dtype) = 0;
  /// On this device, to be served, in room that was made when the session was opened; once. Null
  /// where nothing is served.
  virtual std::shared_ptr<const model::AdapterWeights> build_adapter(
      const model::FlatAdapter& adapter) = 0;
  /// How far what is published is from what was trained: of one rank, the largest difference of
  /// logits between the trained adapter and `served`; of a gang, of any value that a rank trained
  /// and `published`. 0 when nothing was lost.
  virtual double probe(const std::vector<std::int32_t>& prompt, const model::FlatAdapter& published,
                       std::shared_ptr<const model::AdapterWeights> served) = 0;

  // -- full fine-tuning, which runs in gangs alone
  /// The trained model in `dtype` as a Hugging Face folder, made anew.
  virtual Status write_model(const std::string& folder, DType dtype) = 0;
  /// How far that folder's weights are from the trained ones: the largest difference of any value
  /// of any rank and, on one rank, whose weights then become the folder's, of logits of `prompt`.
  virtual Result<double> probe_model(const std::vector<std::int32_t>& prompt,
                                     const std::string& folder, DType dtype) = 0;
};

class JobModel {
 public:
  virtual ~JobModel() = default;
  [[nodiscard]] virtual const data::Encoder& encoder() const = 0;
  [[nodiscard]] virtual DType dtype() const = 0;
  /// Whether sessions store their checkpoints themselves, and read them; else the job does, whole.
  [[nodiscard]] virtual bool stores_in_parts() const = 0;
  /// What a session resumes from: a checkpoint that was read, or its manifest; or nothing.
  struct ResumeFrom {
    const train::TrainState* state = nullptr;
    Digest base_model;
    std::string manifest;
  };
  /// Errors: those of make_packed_batches, TrainSession::create and import_state.
  virtual Result<std::unique_ptr<JobSession>> open_session(
      const protocol::TrainSettings& settings, std::shared_ptr<const data::Dataset> train,
      std::shared_ptr<const data::Dataset> eval, const ResumeFrom& from) = 0;
  /// Makes it answer requests here; ok where nothing is served.
  virtual Status install_adapter(const Digest& digest,
                                 std::shared_ptr<const model::AdapterWeights> weights) = 0;
};

}  // namespace tandem::worker::runtime
