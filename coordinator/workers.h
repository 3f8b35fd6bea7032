// The agents and engines that said hello: leases, incarnations, what each engine holds. A table
// and its rules; what a lost engine means for jobs and requests is decided by their owners, told by
// the Coordinator. Owned by the core, one thread.
#pragma once

#include "coordinator/context.h"

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace tandem::coordinator {

/// One process: an agent, an engine, or the first rank of a gang.
struct Process {
  std::string peer;  ///< routing id
  Incarnation incarnation = 0;
  TimeMs last_seen_ms = 0;
  bool alive = false;
  std::int64_t pid = 0;
  protocol::Version version;
  std::string program;                     ///< version of an agent's programs
  std::vector<protocol::RunningJob> jobs;  ///< what it says it runs; an agent: its gang
  std::deque<Incarnation> superseded;      ///< replaced by a later one; their hellos are refused
};

/// A base that an engine could not load.
struct FailedLoad {
  Status status;
  int failures = 0;  ///< in a row
  TimeMs at_ms = 0, not_before_ms = 0;
};
constexpr std::size_t kFailedLoadsMax = 64;  ///< remembered per engine; then the oldest goes

/// Who answers requests: a worker's engine, or the first rank of a replica.
struct Engine : Process {
  /// What requests, prefixes and views know it by: the worker's id; of a replica "ID/EPOCH", so
  /// that what was sent to one that died is never taken for the next one's. Empty: a job's gang.
  WorkerId name;
  Digest model;  ///< the base it holds; empty: none
  /// Of the worker's memory, to serve that base, adapters apart; 0: none, or it did not say.
  std::int64_t base_bytes = 0;
  Digest loading;
  TimeMs load_sent_ms = 0;
  /// Each base waits out its own failures: one that cannot be loaded holds up no other.
  std::map<Digest, FailedLoad> failed_loads;
  Status load_status;  ///< of the last load; ok after one that succeeded
  std::int64_t credits = 0;
  std::set<RequestId> requests;  ///< sent to it and not finished
  std::set<Digest> adapters;     ///< resident, as it said
  TimeMs idle_since_ms = -1;     ///< since when its heartbeats name no request; -1: it has some
  protocol::Heartbeat heartbeat;
  /// Null: `model` did not fail, as far as is remembered.
  [[nodiscard]] const FailedLoad* failed_load(const Digest& failed) const {
    const auto found = failed_loads.find(failed);
    return found == failed_loads.end() ? nullptr : &found->second;
  }
  [[nodiscard]] std::int64_t free_credits() const {
    return credits - static_cast<std::int64_t>(requests.size());
  }
};

struct Worker {
  WorkerId id;
  std::string host, device, device_name;
  std::int32_t slot = 0;
  std::int64_t memory_bytes = 0;
  Process agent;
  Engine engine;
  Engine gang;                 ///< of the gang that this worker leads or led last
  Incarnation restarting = 0;  ///< the engine that its agent was told to end; 0: none
  TimeMs restart_sent_ms = 0;
  /// Since when its agent is here and its engine is not; -1: both are, or none.
  TimeMs engine_silent_ms = -1;
  TimeMs silence_told_ms = 0;  ///< when its agent was last told to end that engine
  [[nodiscard]] bool holds(const Digest& model) const {
    return engine.alive && engine.model == model;
  }
};

/// What a hello or the passage of time did to an engine or a gang; its jobs and requests must be
/// looked at.
struct EngineLost {
  WorkerId worker;
  std::string reason;
  bool gang = false;
  WorkerId name;                ///< who answered requests; empty: nobody
  Incarnation incarnation = 0;  ///< of the process that is gone
};

/// Who runs a job and speaks for it.
struct Runner {
  Worker& worker;
  Process& process;  ///< the worker's engine or gang; its agent for a gang that could not speak
};

/// "agent", "engine" or "gang".
const char* role_name(protocol::WorkerRole role);

/// A replica's name among those who answer requests.
WorkerId replica_name(const JobId& replica, Epoch epoch);

class WorkerTable {
 public:
  explicit WorkerTable(Context& context) : context_(context) {}

  /// Registers the process. Returns its refusal, or ok. `lost` is set when the hello replaced
  /// another incarnation of the engine.
  Status hello(const std::string& peer, const protocol::WorkerHello& hello,
               std::optional<EngineLost>& lost);
  /// Renews the lease. kConflict: an incarnation that was replaced, which must end; kUnavailable:
  /// unknown here, it must say hello.
  Status heartbeat(const std::string& peer, const protocol::Heartbeat& beat);
  /// The live process that this peer is, its worker and its role; nothing when it is unknown.
  struct Known {
    Worker& worker;
    Process& process;
    protocol::WorkerRole role;
  };
  std::optional<Known> process_of(const std::string& peer);
  /// A process that ends on purpose.
  std::optional<EngineLost> bye(const protocol::WorkerBye& bye);
  /// Engines and gangs whose lease ran out since the last call; agents too, silently.
  std::vector<EngineLost> expire();

  Worker* find(const WorkerId& id);
  [[nodiscard]] const Worker* find(const WorkerId& id) const;
  [[nodiscard]] std::map<WorkerId, Worker>& all() { return workers_; }
  [[nodiscard]] const std::map<WorkerId, Worker>& all() const { return workers_; }
  /// May its engine get new work: alive, not draining.
  [[nodiscard]] bool usable(const Worker& worker) const;
  /// The engine or replica of that name, dead ones too; null when it is forgotten.
  Engine* engine(const WorkerId& name);
  /// All that may be given requests for this base now; replicas first, for of two that are as good
  /// it is the one that was asked for.
  std::vector<Engine*> serving(const Digest& model);
  /// Whether the worker leads a replica that serves, as the tables want it.
  [[nodiscard]] bool serves(const Worker& worker) const;
  /// Draining is a wish of the operator and outlives restarts.
  [[nodiscard]] bool draining(const WorkerId& id) const;
  void set_draining(const WorkerId& id, bool draining);
  /// Why it does not serve: a base that it could not load, an engine that says nothing; else "".
  [[nodiscard]] std::string error(const Worker& worker) const;
  /// Tells the worker's agent to end its engine and start another, again and again until there is
  /// another; where none is here it is said once, of whichever the agent has.
  void restart(Worker& worker);
  /// Repeats restarts, and has engines ended that hang: their agents only see that they run.
  void tick();
  [[nodiscard]] std::size_t engines_alive() const;

 private:
  Process& process(Worker& worker, protocol::WorkerRole role);
  void send_restart(Worker& worker, Incarnation engine);  ///< 0: whichever there is
  void end_silent_engine(Worker& worker);
  void take_hello(Engine& engine, const protocol::WorkerHello& hello) const;
  void forget_old();

  Context& context_;
  std::map<WorkerId, Worker> workers_;
  std::map<std::string, std::pair<WorkerId, protocol::WorkerRole>> peers_;
  std::map<WorkerId, WorkerId> replicas_;  ///< name -> the worker that leads it
};

}  // namespace tandem::coordinator
