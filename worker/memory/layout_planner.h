// `layout: auto`: which layout of at most so many ranks trains fastest and fits, found by dry runs
// of every rank and a cost model. Pure but for time; any thread.
#pragma once

#include "worker/memory/estimator.h"

#include <string>
#include <vector>

namespace tandem::worker::memory {

/// What the job may have: ranks on one host, each with so much memory beside what its device's
/// serving engine takes.
struct LayoutLimits {
  int ranks_max = 1;
  std::int64_t bytes_max = 0;  ///< of a rank
};

struct PlannedLayout {
  comm::Layout layout;
  std::int64_t peak_bytes = 0;  ///< of the largest stage's first rank
  bool fits = false;
  SimulatedStep step;
  double tokens_per_second = 0.0;  ///< of the whole gang, rows at their bounds
};

/// Layouts that the model and the settings allow (a model's heads and layers divide, micro-batches
/// are dealt evenly), in a fixed order: fewer ranks first.
std::vector<comm::Layout> possible_layouts(const model::ModelConfig& config,
                                           const protocol::TrainSettings& settings, int ranks_max);

/// All of them, those that fit first, fastest first; before them, of those within 1 % of the
/// fastest, the one with the fewest ranks, then the least tp, pp and zero. The settings' own dp,
/// tp, pp, zero and virtual_pipeline_size are not looked at. Evaluations of a job that `evaluates`
/// count for memory, not for speed. Errors as estimate_training.
Result<std::vector<PlannedLayout>> plan_layouts(const kernels::DeviceProfile& profile,
                                                const model::ModelConfig& config, DType dtype,
                                                const protocol::TrainSettings& settings,
                                                const train::BatchBounds& bounds,
                                                const LayoutLimits& limits, const CostModel& model,
                                                bool evaluates = false);

/// The settings with that layout.
protocol::TrainSettings with_layout(protocol::TrainSettings settings, const comm::Layout& layout);

/// [{"dp": 2, ..., "tokens_per_second": ..., "peak_bytes": ..., "fits": true}, ...], at most
/// `most`.
std::string to_json(const std::vector<PlannedLayout>& layouts, std::size_t most);

}  // namespace tandem::worker::memory
