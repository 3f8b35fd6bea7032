// A training run of a bench on one rank: the model, its adapters or masters, a session on random
// tokens, and what the estimator says of it.
#pragma once

#include "tools/bench_device.h"
#include "worker/memory/estimator.h"
#include "worker/model/weight_door.h"
#include "worker/train/ranks.h"
#include "worker/train/train_session.h"

#include <memory>
#include <string>
#include <vector>

namespace tandem::tools {

struct TrainingCase {
  std::string dtype = "bf16", recompute = "none", method = "lora";
  std::int64_t rank = 16, rows = 8, length = 512, micro_batches = 1;
  std::int64_t ragged = 0;  ///< documents of ragged to length tokens; 0: of length tokens each
  std::int64_t steps = 4, warmup = 1;

  /// The option's check has admitted the word.
  [[nodiscard]] DType compute_dtype() const { return *parse_dtype(dtype); }
  /// Tokens of an optimizer step, over all ranks.
  [[nodiscard]] double tokens() const { return static_cast<double>(rows * length * micro_batches); }
  [[nodiscard]] protocol::TrainSettings settings(const worker::comm::Layout& layout) const;
};

/// Random tokens, all trained, in micro-batches of rows * length: `rows` documents of `length`, or
/// as many of ragged lengths as fill it.
std::vector<worker::data::OptimizerStep> random_steps(const TrainingCase& c, std::int64_t vocab);

/// Of all layouts over exactly so many ranks the one that layout auto's default cost model finds
/// fastest among those that fit. refused_error: none fits.
Result<worker::comm::Layout> fastest_layout(const TrainingCase& c,
                                            const kernels::DeviceProfile& profile,
                                            const worker::model::ModelConfig& config, int ranks);

/// Operations per second of one large product through the engine's own linear op.
double product_rate(worker::model::Context& context, kernels::Backend& backend);

/// Time inside the calls of each group (tools::timed_communicator).
struct CommunicationNs {
  std::int64_t tp = 0, dp = 0, pp = 0;
};

class TrainingRig {
 public:
  /// `comm` is the gang of layout.ranks(); it, `backend` and `exec` outlive the rig. Full
  /// fine-tuning reads `loaded`'s weights again when it starts, and they must outlive the rig too.
  /// `inside`, where given, is counted up and outlives it as well.
  static Result<std::unique_ptr<TrainingRig>> create(kernels::Backend& backend, kernels::Exec& exec,
                                                     worker::comm::Communicator& comm,
                                                     const worker::comm::Layout& layout,
                                                     const worker::model::LoadedModel& loaded,
                                                     const TrainingCase& c,
                                                     CommunicationNs* inside = nullptr);

  [[nodiscard]] const worker::train::Ranks& ranks() const { return ranks_; }
  [[nodiscard]] worker::train::TrainSession& session() { return *session_; }
  [[nodiscard]] worker::model::Context& context() { return *context_; }
  [[nodiscard]] const worker::memory::Estimate& estimate() const { return estimate_; }

 private:
  TrainingRig() = default;

  // Arenas first, what lies in them after them.
  std::unique_ptr<kernels::Arena> weight_arena_, table_arena_, activations_;
  worker::train::Ranks ranks_;
  std::unique_ptr<worker::model::Context> context_;
  worker::model::HeldWeights held_;
  std::unique_ptr<worker::model::AdapterTable> adapters_;
  worker::memory::Estimate estimate_;
  std::unique_ptr<worker::train::TrainSession> session_;
};

}  // namespace tandem::tools
