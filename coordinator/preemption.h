// Which running jobs are to give their ranks to a waiting one of higher priority. Pure functions
// over the tables.
#pragma once

#include "coordinator/placement.h"

#include <optional>
#include <vector>

namespace tandem::coordinator {

/// Victims looked at, and taken for one job, at most: what is tried stays a few hundred placements.
inline constexpr std::size_t kPreemptCandidatesMax = 12, kPreemptVictimsMax = 3;

struct PreemptionRules {
  std::int64_t now_unix_ms = 0;
  /// A job that gave its ranks away keeps what it then gets for so long.
  TimeMs spare_ms = 0;
};

/// The running jobs to be checkpointed and queued again so that `job`, which waits, can start: all
/// of strictly lower priority; the fewest; of these the lowest priority, then the youngest. Jobs
/// that are being stopped count as gone already. Nothing: it fits without, will fit when these are
/// gone, or no choice helps.
std::vector<JobId> choose_victims(const Job& job, const Tables& tables, const WorkerTable& workers,
                                  const std::set<WorkerId>& reserved, const PreemptionRules& rules);

/// The larger size that a running elastic job could go on with now; nothing: none.
std::optional<std::int64_t> could_grow(const Job& job, const Tables& tables,
                                       const WorkerTable& workers);

}  // namespace tandem::coordinator
