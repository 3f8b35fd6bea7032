// What a job takes of a worker, as the coordinator is told: the dry run's bytes beside what serving
// takes there, as an EstimateReply's JSON. Pure but for time and the cost model's file; any thread.
#pragma once

#include "kernels/device_profile.h"
#include "protocol/job_spec.h"
#include "worker/memory/estimator.h"
#include "worker/runtime/model_host.h"

#include <string>
#include <vector>

namespace tandem::worker::runtime {

/// Of a job in the engine itself, of one over several ranks (each beside the engine of its slot),
/// or, with layout auto, of the fastest layout that fits. `data_directory` may hold a cost model.
/// Errors as memory::estimate_training and estimate_gang; refused_error: another dtype than this
/// worker's.
Result<std::string> estimate_job(const kernels::DeviceProfile& profile,
                                 const model::ModelConfig& config, const ModelHostOptions& options,
                                 const protocol::TrainSettings& settings, bool evaluates,
                                 const std::string& data_directory);

/// Device memory of an engine with a job of one rank in it, while that trains and the engine goes
/// on serving, adapters of others apart: the session's dry run, and what serving has beside the
/// base.
struct EngineWithJob {
  memory::Estimate job;
  std::int64_t serving = 0;
  [[nodiscard]] std::int64_t total() const { return job.peak_total + serving; }
};
Result<EngineWithJob> estimate_engine_with_job(const kernels::DeviceProfile& profile,
                                               const model::ModelConfig& config,
                                               const ModelHostOptions& options,
                                               const protocol::TrainSettings& settings,
                                               bool evaluates);

/// The reply about a gang: its largest rank, that rank's process and the engine of its slot must
/// fit together.
Result<std::string> gang_reply(const kernels::DeviceProfile& profile,
                               const model::ModelConfig& config, const ModelHostOptions& options,
                               const comm::Layout& layout,
                               const std::vector<memory::Estimate>& ranks);

}  // namespace tandem::worker::runtime
