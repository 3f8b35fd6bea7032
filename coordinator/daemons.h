// Gangs over several hosts: what a gang's mpirun wants started on another host goes to that host's
// agent, and the outcome back. Keeps nothing: every message is checked against the tables, so only
// the leader of a gang that is placed so, at this epoch, can have anything started, and only on
// hosts of its members. Owned by the core, one thread.
#pragma once

#include "coordinator/workers.h"

#include <optional>
#include <vector>

namespace tandem::coordinator {

class Daemons {
 public:
  Daemons(Context& context, WorkerTable& workers) : context_(context), workers_(workers) {}

  /// From the agent of `leader`. What cannot be passed on is answered at once.
  void launch(const Worker& leader, const protocol::LaunchDaemon& message);
  /// From the agent of `host`.
  void launched(const Worker& host, const protocol::DaemonLaunched& message);

 private:
  struct Gang {
    WorkerId leader;
    std::vector<WorkerId> members;
  };
  [[nodiscard]] std::optional<Gang> placed(const JobId& id, Epoch epoch) const;
  /// The agent that is to start it.
  Result<const Process*> target(const Worker& leader, const protocol::LaunchDaemon& message) const;

  Context& context_;
  WorkerTable& workers_;
};

}  // namespace tandem::coordinator
