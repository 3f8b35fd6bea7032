// What an engine makes of its options: checks, defaults, and the limits of its parts. Pure: all
// ranks of a sharded replica come to the same.
#pragma once

#include "worker/serve/batch_runner.h"
#include "worker/serve/batch_scheduler.h"
#include "worker/serve/serve_engine.h"

namespace tandem::worker::serve {

/// The blocks that this rank holds.
model::Stage stage_of(const ServeParts& parts);

/// invalid_error names the option, its limit and its value. The same on all ranks of a replica.
Status check_options(const ServeParts& parts, const ServeOptions& options);
/// Checked options with defaults in place, and of a replica as many KV blocks on each rank as the
/// largest stage can hold. invalid_error: too few.
Result<ServeOptions> fill_options(const ServeParts& parts, const ServeOptions& options);

RunnerLimits runner_limits(const model::ModelConfig& whole, const ServeParts& parts,
                           const ServeOptions& options);
BatchLimits batch_limits(const ServeParts& parts, const ServeOptions& options,
                         const RunnerLimits& limits);

}  // namespace tandem::worker::serve
