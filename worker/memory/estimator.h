// How much device memory a job or a server will take, before anything runs: the same objects built
// on the meta backend, told the profile of the device that is planned for, and its ledger read. The
// promise, which a test keeps: byte for byte the peak of the real backend's ledger for the same
// bounds. Pure but for time; any thread (each call makes its own backend).
#pragma once

#include "kernels/device_profile.h"
#include "kernels/memory_ledger.h"
#include "protocol/base/result.h"
#include "protocol/job_spec.h"
#include "worker/model/model_config.h"
#include "worker/train/batch_source.h"

#include <array>
#include <string>

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

/// One LoRA job on an engine of its own: base weights, `adapter_slots` slots, the session, one step
/// and (when `with_eval`) one evaluation micro-batch of the same size. Errors as
/// TrainSession::create.
Result<Estimate> estimate_training(const kernels::DeviceProfile& profile,
                                   const model::ModelConfig& config, DType dtype,
                                   const protocol::TrainSettings& settings,
                                   const train::BatchBounds& bounds, std::int64_t adapter_slots = 1,
                                   bool with_eval = false);

}  // namespace tandem::worker::memory
