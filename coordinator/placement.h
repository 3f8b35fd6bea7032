// Which engine gets which job, and why a job waits. Pure functions over the tables.
#pragma once

#include "coordinator/records.h"
#include "coordinator/workers.h"

#include <string>
#include <vector>

namespace tandem::coordinator {

struct Placement {
  WorkerId worker;      ///< empty: none now
  bool load = false;    ///< the job waits for its base to be loaded somewhere
  std::string waiting;  ///< why, for people
};

/// Queued jobs in the order they are to be started: priority, then submission.
std::vector<const Job*> queue_order(const Tables& tables);

/// The best engine for a queued job: alive, not draining, training nothing (one job per engine),
/// with enough memory by the job's estimate; its base loaded, fewest requests, not the one where it
/// failed last. Deterministic.
Placement place(const Job& job, const Tables& tables, const WorkerTable& workers);

/// The job an engine is reserved for by the tables, or null.
const Job* job_on(const Tables& tables, const WorkerId& worker);

}  // namespace tandem::coordinator
