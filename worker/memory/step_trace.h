// What each rank of a gang does in one optimizer step, and how long that takes them together: the
// dry run's ops and collectives in order, and a simulation that lets every rank wait for those it
// depends on. Whatever the schedule, its bubble is what ranks are seen to wait for. Pure; any
// thread.
#pragma once

#include "worker/memory/cost_model.h"

#include <optional>
#include <vector>

namespace tandem::worker::memory {

struct TraceEvent {
  double seconds = 0.0;                ///< of ops before the call
  std::optional<comm::CommCall> call;  ///< none: the trace ends here
};
using StepTrace = std::vector<TraceEvent>;

struct SimulatedStep {
  double seconds = 0.0;  ///< until the last rank has finished
  /// Mean over ranks: in ops; in collectives, waiting for other ranks included; in exchanges
  /// between stages, waiting included, and idle after the rank's own end (the bubble).
  double compute_seconds = 0.0, collective_seconds = 0.0, bubble_seconds = 0.0;
};

/// `traces`: of each rank, in rank order; or of ranks that stand for others that do the same at the
/// same time: `trace_of[rank]` says which. Calls of a group must match between its members, as they
/// must when they are run (a check).
SimulatedStep simulate(const std::vector<StepTrace>& traces, const CostModel& model,
                       const std::vector<int>& trace_of = {});

}  // namespace tandem::worker::memory
