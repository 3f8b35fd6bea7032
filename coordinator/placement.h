// Which engine gets which job, and why a job waits. Pure functions over the tables.
#pragma once

#include "coordinator/records.h"
#include "coordinator/workers.h"

#include <set>
#include <string>
#include <utility>
#include <vector>

namespace tandem::coordinator {

struct Placement {
  WorkerId worker;                ///< empty: none now
  std::vector<WorkerId> members;  ///< of a gang: all its workers, `worker` first
  std::vector<WorkerId> wanted;   ///< a gang that waits for these: jobs behind it leave them alone
  bool load = false;              ///< the job waits for its base to be loaded somewhere
  std::string waiting;            ///< why, for people
};

/// Queued jobs in the order they are to be started: priority, then submission.
std::vector<const Job*> queue_order(const Tables& tables);

/// Jobs that are thought away: as if they had given their workers back already.
using Without = std::set<JobId>;

/// The best engine for a queued job: alive, not draining, training nothing (one job per engine),
/// with enough memory by the job's estimate; its base loaded, fewest requests, not the one where it
/// failed last, not `reserved`. Deterministic.
Placement place(const Job& job, const Tables& tables, const WorkerTable& workers,
                const std::set<WorkerId>& reserved, const Without& without = {});

/// Workers for a queued job of several ranks: all at once, one per rank, CPU slots that train
/// nothing and have memory for a rank beside their engine (whose base does not matter). On one host
/// where one has as many slots, else over several, members of a host next to each other. The agent
/// of the first member of each host must be there. Of an elastic job's sizes the largest that fits.
/// Deterministic.
Placement place_gang(const Job& job, const Tables& tables, const WorkerTable& workers,
                     const std::set<WorkerId>& reserved, const Without& without = {});

/// The same for a replica that waits.
Placement place_replica(const Replica& replica, const Tables& tables, const WorkerTable& workers,
                        const std::set<WorkerId>& reserved);

/// What replicas that wait keep for themselves; jobs leave it alone.
std::set<WorkerId> reserved_for_replicas(const Tables& tables, const WorkerTable& workers);

/// What gangs before `job` in the queue keep for themselves.
std::set<WorkerId> reserved_before(const Job& job, const Tables& tables,
                                   const WorkerTable& workers);

/// What stands in the way of a job on one engine, by its estimate too; "" when nothing does.
std::string obstacle(const Job& job, const Worker& worker, const Tables& tables,
                     const WorkerTable& workers, const std::set<WorkerId>& reserved,
                     const Without& without = {});

/// The most CPU slots that one host is known to have, and its name.
std::pair<std::size_t, std::string> largest_host(const WorkerTable& workers);
/// All CPU slots that are known.
std::size_t pool_slots(const WorkerTable& workers);

/// The job a worker is reserved for by the tables, or null.
const Job* job_on(const Tables& tables, const WorkerId& worker, const Without& without = {});
/// The replica that has a rank on it, or null.
const Replica* replica_on(const Tables& tables, const WorkerId& worker);

}  // namespace tandem::coordinator
