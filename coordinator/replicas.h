// Replicas: bases that gangs serve over several workers, from `replica.add` to `replica.rm`. The
// state machine of records.h, every state on disk before anybody is told; epochs and incarnations
// are committed before they are used, messages of an old epoch are refused with kConflict. One that
// dies is started again under the next epoch, after a back-off, for as long as it stands in the
// tables; what it was answering goes on elsewhere. Messages may be lost or repeated: what is to
// happen follows from the tables and is sent again until it has happened. Owned by the core, one
// thread.
#pragma once

#include "coordinator/context.h"
#include "coordinator/placement.h"
#include "coordinator/requests.h"
#include "coordinator/workers.h"

#include <map>
#include <string>
#include <vector>

namespace tandem::coordinator {

class Replicas {
 public:
  Replicas(Context& context, WorkerTable& workers, Requests& requests)
      : context_(context), workers_(workers), requests_(requests) {}

  /// After a start: replicas that served wait adoption_ms for their gangs.
  void load() { loaded_ms_ = context_.now().ms; }

  // -- from clients; the dry run was made
  struct Wanted {
    std::string tenant;
    Digest model;
    std::int64_t tp = 1, pp = 1, count = 1;
  };
  /// The refusal that needs no dry run: too many replicas.
  [[nodiscard]] Status check_count(const Wanted& wanted) const;
  /// `estimate_json`: of the dry run. kRefused when a rank does not fit, or there are more ranks
  /// than slots.
  Result<std::vector<JobId>> add(const Wanted& wanted, const std::string& estimate_json);
  /// It ends for good, after what it answers.
  Status remove(const JobId& id);
  /// The worker is to be empty: its replica ends after what it answers, and waits for others.
  void drain(const WorkerId& worker);

  // -- from gangs and their agents
  void ended(const Runner& runner, const protocol::JobEnded& message);
  /// A hello: returns the replicas the process must end. A gang that holds its model now serves.
  std::vector<JobId> adopt(const Runner& runner, protocol::WorkerRole role);
  /// A heartbeat names what runs.
  void seen(const Runner& runner, protocol::WorkerRole role);
  void gang_lost(const EngineLost& lost);

  /// Starts replicas that wait where there is room.
  void schedule();
  /// Repeats and time-outs.
  void tick();
  /// Bases that replicas wait for, as Jobs::demand() has those of jobs.
  [[nodiscard]] std::vector<BaseDemand> demand() const;

  /// Why it does not serve, for people; "" when it does.
  [[nodiscard]] std::string reason(const Replica& replica) const;
  /// Who answers for it now, or null.
  [[nodiscard]] const Engine* engine(const Replica& replica) const;
  /// Whether a gang of any replica is still to end.
  [[nodiscard]] bool any_placed() const;

 private:
  /// What is not on disk: when things were last sent or seen.
  struct Timers {
    TimeMs sent_ms = -1, started_ms = 0, served_ms = -1, not_before_ms = 0;
  };

  void save(Replica replica);
  void set_state(Replica& replica, ReplicaState state, const std::string& why);
  void start(Replica replica, const Placement& placement);
  [[nodiscard]] Status check_pool(const Wanted& wanted) const;
  /// What adapters may take of each rank of it, as placed; less than 0: its workers do not say.
  [[nodiscard]] std::int64_t adapter_share(const Replica& replica) const;
  void send_start(const Replica& replica);
  void send_stop(const Replica& replica);
  void stop(Replica replica, const std::string& why);
  /// Its gang is over: it waits again, or is gone. `failed`: nobody asked for that.
  void over(Replica replica, const std::string& why, bool failed);
  void tick_placed(const Replica& replica);
  /// What is published for its base, so that it takes its share of those requests too.
  void announce_adapters(const Engine& engine) const;
  Process* process_of(const Replica& replica);
  [[nodiscard]] const Replica* claimed(const Runner& runner,
                                       const protocol::RunningJob& claim) const;

  Context& context_;
  WorkerTable& workers_;
  Requests& requests_;
  TimeMs loaded_ms_ = 0;
  std::map<JobId, Timers> timers_;
};

}  // namespace tandem::coordinator
