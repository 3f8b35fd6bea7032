// One base model on one device with everything that runs on it: arenas, weights, tokenizer, chat
// template, adapter slots and the serving engine. Training borrows the same weights and slots.
// Built and used by the device thread; destroying it returns all memory.
#pragma once

#include "kernels/ops.h"
#include "protocol/messages.h"
#include "worker/comm/communicator.h"
#include "worker/data/dataset.h"
#include "worker/model/model_loader.h"
#include "worker/model/transformer.h"
#include "worker/runtime/job_model.h"
#include "worker/runtime/served_model.h"
#include "worker/train/train_session.h"

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tandem::worker::runtime {

struct ModelHostOptions {
  DType dtype = DType::kBF16;
  kernels::Numerics numerics = kernels::Numerics::kReplay;
  std::int64_t memory_bytes_max = 0;  ///< of this worker, all kinds
  std::int64_t kv_bytes_max = 0;
  std::int64_t adapter_slots = 32;  ///< for serving; training has one more
  std::int64_t batch_tokens_max = 512;
  std::int64_t running_max = 64, waiting_max = 1024;
};

/// How its serving engine is built.
serve::ServeOptions serve_options(const ModelHostOptions& options);

class ModelHost final : public JobModel, public ServedModel {
 public:
  /// Everything that can be wrong with the model at `path` (verified before by the caller), before
  /// any device memory is taken: another model may still be there. Errors: those of the loader, the
  /// tokenizer and the chat template; refused_error when what serving needs does not fit
  /// memory_bytes_max less `gang_bytes` (names the numbers), which are as leave_to_gang() says.
  static Result<std::unique_ptr<ModelHost>> open(kernels::Backend& backend,
                                                 const protocol::ModelRef& model,
                                                 const std::string& path,
                                                 const ModelHostOptions& options,
                                                 std::int64_t gang_bytes = 0);
  /// The same of a model that was loaded before; `path` begins errors of its tokenizer.
  static Result<std::unique_ptr<ModelHost>> adopt(
      kernels::Backend& backend, const protocol::ModelRef& model, model::LoadedModel loaded,
      const std::string& path, const ModelHostOptions& options, std::int64_t gang_bytes = 0);
  /// Takes the device memory, once; nothing else may be called before.
  /// `yield` is called between blocks of training's passes, and again while the device is busy with
  /// them; true: the next block is to be issued when the device has done all that was.
  Status start(const Clock& clock, std::function<bool()> yield);
  ~ModelHost() override;
  ModelHost(const ModelHost&) = delete;
  ModelHost& operator=(const ModelHost&) = delete;

  [[nodiscard]] const protocol::ModelRef& ref() const override { return ref_; }
  [[nodiscard]] const model::ModelConfig& config() const override { return loaded_.config; }
  [[nodiscard]] const ModelHostOptions& options() const { return options_; }
  [[nodiscard]] const data::Encoder& encoder() const override { return *encoder_; }
  [[nodiscard]] DType dtype() const override { return options_.dtype; }
  [[nodiscard]] const model::GenerationDefaults& generation() const override {
    return loaded_.generation;
  }
  serve::ServeEngine& serve() override { return *serve_; }
  /// Of memory_bytes_max, by the dry run, for all but adapters and a job.
  [[nodiscard]] std::int64_t serving_bytes() const { return serving_bytes_; }
  /// Of memory_bytes_max so much is a gang's, whose rank runs beside this engine; 0: none does.
  /// Adapters make room, as ServeEngine::set_adapter_bytes_max says.
  void leave_to_gang(std::int64_t bytes);
  /// From the next op on, training leaves so many of a GPU's multiprocessors to serving.
  void spare_multiprocessors(int count);

  /// Borrows weights, activations and the slot beyond serving's.
  Result<std::unique_ptr<JobSession>> open_session(const protocol::TrainSettings& settings,
                                                   std::shared_ptr<const data::Dataset> train,
                                                   std::shared_ptr<const data::Dataset> eval,
                                                   const ResumeFrom& from) override;
  [[nodiscard]] bool stores_in_parts() const override { return false; }
  Status load_adapter(const Digest& digest,
                      const std::vector<model::HostAdapterTensor>& tensors) override;
  Status install_adapter(const Digest& digest,
                         std::shared_ptr<const model::AdapterWeights> weights) override;

  [[nodiscard]] Result<std::vector<std::int32_t>> tokenize(
      const protocol::PromptInput& input) const override;

 private:
  ModelHost(kernels::Backend& backend, const ModelHostOptions& options);
  [[nodiscard]] Status check_fit();
  void limit_adapters();

  kernels::Backend& backend_;
  const ModelHostOptions options_;
  protocol::ModelRef ref_;
  model::LoadedModel loaded_;
  std::int64_t serving_bytes_ = 0;  ///< of all but adapters, at most
  std::int64_t taken_bytes_ = 0;    ///< the same now, with that of a job in this engine
  std::int64_t gang_bytes_ = 0;
  /// Snapshots of a job here that are not installed, for their checkpoints are being stored.
  std::vector<std::weak_ptr<const model::AdapterWeights>> unnamed_;
  std::unique_ptr<data::Encoder> encoder_;
  // Arenas first: what lies in them is destroyed before them.
  struct Memory;
  std::unique_ptr<Memory> memory_;
  std::unique_ptr<comm::Communicator> comm_;
  std::shared_ptr<const model::BaseWeights> base_;
  std::unique_ptr<model::WeightSource> weights_;           ///< serving's
  std::unique_ptr<model::WeightSource> yielding_weights_;  ///< training's: yields between blocks
  std::unique_ptr<model::AdapterTable> adapters_;
  std::unique_ptr<serve::ServeEngine> serve_;
};

}  // namespace tandem::worker::runtime
