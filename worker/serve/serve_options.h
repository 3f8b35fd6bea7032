// What an engine makes of its options: checks, defaults, and the limits of its parts. Pure but for
// what the ranks of a sharded replica agree on. One device thread.
#pragma once

#include "worker/serve/batch_runner.h"
#include "worker/serve/batch_scheduler.h"
#include "worker/serve/serve_engine.h"

namespace tandem::worker::serve {

/// The blocks that this rank holds.
model::Stage stage_of(const ServeParts& parts);

/// invalid_error names the option, its limit and its value. The same on all ranks of a replica.
Status check_options(const ServeParts& parts, const ServeOptions& options);
/// Checked options with defaults in place. All ranks of a replica call it at once: they take as
/// many KV blocks as the rank that can hold the fewest. invalid_error: too few.
Result<ServeOptions> fill_options(const ServeParts& parts, const ServeOptions& options);

RunnerLimits runner_limits(const model::ModelConfig& whole, const ServeParts& parts,
                           const ServeOptions& options);
BatchLimits batch_limits(const ServeParts& parts, const ServeOptions& options,
                         const RunnerLimits& limits);

}  // namespace tandem::worker::serve
