// The coordinator's brain: a pure function of what happened. step() takes the time and one input
// and returns what is to be done; it does no I/O, reads no clock, starts no thread, and walks its
// tables in a fixed order, so a run is repeated exactly by its seed and its inputs.
//
// The caller's duty: carry the effects out in order, commit before sends. When the commit fails,
// send nothing of that step that rests on it (JobAck, WorkerHelloReply, StartJob and the like are
// state-driven and come again; CallReply becomes an error) and pass CommitFailed in: the tables
// then go back. One thread.
#pragma once

#include "coordinator/calls.h"
#include "coordinator/context.h"
#include "coordinator/daemons.h"
#include "coordinator/estimates.h"
#include "coordinator/jobs.h"
#include "coordinator/replicas.h"
#include "coordinator/requests.h"
#include "coordinator/workers.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace tandem::coordinator {

class Coordinator {
 public:
  /// Starts from what the registry holds at `now`. The first tick sends what that asks for.
  Coordinator(Options options, Snapshot snapshot, const Now& now);
  Coordinator(const Coordinator&) = delete;
  Coordinator& operator=(const Coordinator&) = delete;

  std::vector<Effect> step(const Now& now, const Input& input);

  [[nodiscard]] const Tables& tables() const { return context_.tables(); }
  [[nodiscard]] const WorkerTable& workers() const { return workers_; }
  [[nodiscard]] const Requests& requests() const { return requests_; }

 private:
  struct Session {
    std::string user, client;
    TimeMs last_seen_ms = 0, probed_ms = 0;
  };

  void on(const Tick& tick);
  /// A word to each client that waits and has long been silent: sending finds out who is gone.
  void probe_silent_clients();
  void on(const ClientInput& input);
  void on(const WorkerInput& input);
  void on(const ClientGone& gone);
  void on(const WorkDone& done);
  void on(const CommitFailed& failed);
  void hello(const std::string& peer, const std::string& user,
             const protocol::ClientHello& message);
  void hello(const std::string& peer, const protocol::WorkerHello& message);
  void heartbeat(const std::string& peer, const protocol::Heartbeat& message);
  void model_loaded(Worker& worker, const protocol::ModelLoaded& message);
  void engine_message(Worker& worker, const protocol::WorkerMessage& message);
  void agent_message(const Runner& runner, const protocol::WorkerMessage& message);
  void job_message(const Runner& runner, const protocol::WorkerMessage& message);
  void ended(const Runner& runner, const protocol::JobEnded& message);
  void engine_lost(const EngineLost& lost);
  void route_estimates(const std::vector<EstimateOutcome>& outcomes);
  void assign_models();
  void load_model(Worker& worker, const ModelRecord& model);
  [[nodiscard]] Digest wanted_model(const Worker& worker,
                                    const std::vector<BaseDemand>& demand) const;

  Context context_;
  WorkerTable workers_;
  Estimates estimates_;
  Jobs jobs_;
  Requests requests_;
  Replicas replicas_;
  Daemons daemons_;
  Calls calls_;
  std::map<std::string, Session> sessions_;
  std::uint64_t dropped_before_hello_ = 0;
  TimeMs quiet_until_ms_ = 0;  ///< nothing new is started before
  TimeMs next_probe_ms_ = 0;
};

}  // namespace tandem::coordinator
