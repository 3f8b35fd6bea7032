// Which engine gets which job, and why a job waits. Pure functions over the tables.
#pragma once

#include "coordinator/records.h"
#include "coordinator/workers.h"

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace tandem::coordinator {

struct Placement {
  WorkerId worker;                ///< empty: none now
  std::vector<WorkerId> members;  ///< of a gang: all its workers, `worker` first
  std::vector<WorkerId> wanted;   ///< a gang that waits for these: jobs behind it leave them alone
  std::set<WorkerId> load_on;     ///< it waits for its base to be loaded on one of these
  std::string waiting;            ///< why, for people
};

/// A base that is waited for.
struct BaseDemand {
  Digest model;
  std::set<WorkerId> on;  ///< it helps on these alone; empty: on any
  [[nodiscard]] bool helps(const WorkerId& worker) const {
    return on.empty() || on.contains(worker);
  }
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

/// Workers for a queued job of several ranks: all at once, one per rank, slots with the device of
/// the job's estimate, of one kind (device name), that train nothing and have memory for a rank
/// beside their engine, whichever base that holds; where it holds too large a one, the job's, which
/// fits, is loaded first. On one host where one has as many slots; else
/// over several, members of a host next to each other. The agent of the first member of each host
/// must be there, all of one program version: each host's ranks are its own program. Of an elastic
/// job's sizes the largest that fits. Deterministic.
Placement place_gang(const Job& job, const Tables& tables, const WorkerTable& workers,
                     const std::set<WorkerId>& reserved, const Without& without = {});

/// The same for a replica that waits.
Placement place_replica(const Replica& replica, const Tables& tables, const WorkerTable& workers,
                        const std::set<WorkerId>& reserved);

/// What replicas that wait keep for themselves; jobs leave it alone.
std::set<WorkerId> reserved_for_replicas(const Tables& tables, const WorkerTable& workers);

/// The queue as people see it: each job's place, and what replicas and the gangs before it keep.
struct QueueView {
  std::map<JobId, std::size_t> positions;                                ///< from 1
  std::vector<std::pair<std::size_t, std::set<WorkerId>>> reservations;  ///< from a position on
  [[nodiscard]] const std::set<WorkerId>& reserved_at(std::size_t position) const;
};
QueueView view_queue(const Tables& tables, const WorkerTable& workers);

/// What stands in the way of a job on one engine, by its estimate too; "" when nothing does.
std::string obstacle(const Job& job, const Worker& worker, const Tables& tables,
                     const WorkerTable& workers, const std::set<WorkerId>& reserved,
                     const Without& without = {});

/// The most slots of one kind that a host is known to have; count 0: no worker is known.
struct HostSlots {
  std::size_t count = 0;
  std::string name, device = "cpu";
  std::string kind{};  ///< device name
  /// "4 CPU workers"
  [[nodiscard]] std::string to_string() const;
};
/// Of all hosts with this device.
HostSlots largest_host(const WorkerTable& workers, const std::string& device);
/// How many ranks on one device a gang can have: as many as the pool has slots of one kind.
struct GangRoom {
  std::size_t ranks = 0;
  /// "there are 3 CPU workers, 2 of them on HOST"; the kinds, where there are several.
  std::string description;
};
GangRoom gang_room(const WorkerTable& workers, const std::string& device);
/// Where a gang of so many ranks is to run: on GPUs, where the pool has as many, else on CPUs.
std::string gang_device(const WorkerTable& workers, std::int64_t ranks);
/// Of the layouts with at most `ranks` ranks that cut no axis more than the asked one, so that a
/// model that takes this takes them, the one with most; all zero: there is none. `dps`: what dp may
/// be.
struct NearestLayout {
  std::int64_t dp = 0, tp = 0, pp = 0;
};
NearestLayout nearest_layout(const std::vector<std::int64_t>& dps, std::int64_t tp, std::int64_t pp,
                             std::size_t ranks);
/// The device that a job's dry run was made for.
std::string estimated_device(const std::string& estimate_json);

/// The job a worker is reserved for by the tables, or null.
const Job* job_on(const Tables& tables, const WorkerId& worker, const Without& without = {});
/// The replica that has a rank on it, or null.
const Replica* replica_on(const Tables& tables, const WorkerId& worker);
/// What the rank of a gang that holds the worker may take of its memory beside the engine, by the
/// dry run: a job's, or a replica's with its adapters. 0: none does.
std::int64_t gang_bytes(const Tables& tables, const WorkerId& worker);
/// What such a rank and the engine of its slot take together: by the dry run (`peak`, of which
/// `engine`), or with the base that the engine holds, where that takes more.
std::int64_t bytes_together(const Worker& worker, std::int64_t peak, std::int64_t engine);

}  // namespace tandem::coordinator
