// How much device memory a job or a server will take, before anything runs: the same objects built
// on the meta backend, told the profile of the device that is planned for, and its ledger read. The
// promise, which a test keeps: byte for byte the peak of the real backend's ledger for the same
// bounds. Pure but for time; any thread (each call makes its own backend).
#pragma once

#include "kernels/device_profile.h"
#include "kernels/memory_ledger.h"
#include "protocol/base/result.h"
#include "protocol/job_spec.h"
#include "worker/comm/layout.h"
#include "worker/memory/step_trace.h"
#include "worker/model/model_config.h"
#include "worker/serve/serve_engine.h"
#include "worker/train/batch_source.h"

#include <array>
#include <string>
#include <vector>

namespace tandem::worker::memory {

struct Estimate {
  std::array<std::int64_t, kernels::kMemoryKindCount> peak_bytes{};  ///< by MemoryKind
  std::int64_t peak_total = 0;                                       ///< of all kinds at one moment
  [[nodiscard]] std::int64_t of(kernels::MemoryKind kind) const {
    return peak_bytes[static_cast<std::size_t>(kind)];
  }
  /// {"weights": bytes, ..., "peak_total": bytes}
  [[nodiscard]] std::string to_json() const;
};

/// Reads the peaks of a ledger, of a dry run's or of a real one.
Estimate read_ledger(const kernels::MemoryLedger& ledger);

/// The bounds that settings alone allow: what a job takes at most, whatever its data. Data known
/// (BatchSource::bounds()) gives the exact ones.
train::BatchBounds worst_case_bounds(const protocol::TrainSettings& settings);

/// What else a job does on the device beside its steps.
struct TrainingPlan {
  std::int64_t adapter_slots = 1;  ///< of the engine's table
  bool eval = false;               ///< evaluation micro-batches as large as the training ones
  /// A snapshot is held for serving while the finished adapter is loaded again and probed.
  bool publish = false;
  comm::Layout layout{};  ///< of the job's gang, and which of its ranks is asked about
  int rank = 0;
};

/// One job (LoRA or full) on an engine of its own: base weights, slots, the session, one step of
/// the largest micro-batches, and what the plan says. Of several ranks: the bytes of one (a
/// snapshot for serving is made on one rank only). Errors as TrainSession::create.
Result<Estimate> estimate_training(const kernels::DeviceProfile& profile,
                                   const model::ModelConfig& config, DType dtype,
                                   const protocol::TrainSettings& settings,
                                   const train::BatchBounds& bounds, const TrainingPlan& plan);
inline Result<Estimate> estimate_training(const kernels::DeviceProfile& profile,
                                          const model::ModelConfig& config, DType dtype,
                                          const protocol::TrainSettings& settings,
                                          const train::BatchBounds& bounds,
                                          std::int64_t adapter_slots = 1, bool with_eval = false) {
  return estimate_training(profile, config, dtype, settings, bounds,
                           TrainingPlan{adapter_slots, with_eval, false});
}

/// The same, and one optimizer step of that rank, with all of its micro-batches, as it would be
/// timed by `model`.
struct DryStep {
  Estimate estimate;
  StepTrace trace;
};
Result<DryStep> trace_training(const kernels::DeviceProfile& profile,
                               const model::ModelConfig& config, DType dtype,
                               const protocol::TrainSettings& settings,
                               const train::BatchBounds& bounds, const TrainingPlan& plan,
                               const CostModel& model);

/// What the process of a gang's rank takes of its slot's memory beside what its ledger counts.
struct BesideLedger {
  /// Copies of the masters and both moments, in f32, while they are stored. A GPU's are in host
  /// memory and not counted.
  std::int64_t checkpoint_copy = 0;
  std::int64_t context = 0;  ///< a GPU's: the driver's and the libraries'
  std::int64_t nccl = 0;     ///< NCCL's buffers
  [[nodiscard]] std::int64_t total() const { return checkpoint_copy + context + nccl; }
};
BesideLedger beside_ledger(const kernels::DeviceProfile& profile, const comm::Layout& layout,
                           const Estimate& rank);

/// Every rank of a job over several workers, in rank order, each on a process of its own
/// (tandem-rank). refused_error: the model cannot be cut so, with the nearest layout that it
/// allows.
Result<std::vector<Estimate>> estimate_gang(const kernels::DeviceProfile& profile,
                                            const model::ModelConfig& config, DType dtype,
                                            const protocol::TrainSettings& settings,
                                            const train::BatchBounds& bounds, bool evaluates);

/// Every rank of a replica that serves over several workers, in rank order. refused_error: the
/// model cannot be cut so, with the nearest layout of two ranks and more that it allows.
Result<std::vector<Estimate>> estimate_replica(const kernels::DeviceProfile& profile,
                                               const model::ModelConfig& config, DType dtype,
                                               const serve::ServeOptions& options,
                                               std::int64_t adapter_slots,
                                               const comm::Layout& layout);

/// A serving engine with its worst step (ServeEngine::reserve_worst_case): base weights, slots, KV,
/// batches. Adapters that are loaded later come on top: AdapterWeights::bytes each, rounded up to
/// kernels::kMapGranularity. Of a replica over several ranks (`layout` with tp and pp): the bytes
/// of one. Errors as ServeEngine::create.
Result<Estimate> estimate_serving(const kernels::DeviceProfile& profile,
                                  const model::ModelConfig& config, DType dtype,
                                  const serve::ServeOptions& options,
                                  std::int64_t adapter_slots = 1, const comm::Layout& layout = {},
                                  int rank = 0);

}  // namespace tandem::worker::memory
