#include "coordinator/daemons.h"

#include "protocol/version.h"

#include <algorithm>

namespace tandem::coordinator {

std::optional<Daemons::Gang> Daemons::placed(const JobId& id, Epoch epoch) const {
  const Tables& tables = context_.tables();
  if (is_replica(id)) {
    const auto found = tables.replicas.find(id);
    if (found == tables.replicas.end() || !found->second.placed() || found->second.epoch != epoch)
      return std::nullopt;
    return Gang{found->second.worker, found->second.members};
  }
  const auto found = tables.jobs.find(id);
  if (found == tables.jobs.end() || !holds_engine(found->second.state) ||
      found->second.epoch != epoch || !found->second.gang())
    return std::nullopt;
  return Gang{found->second.worker, found->second.members};
}

Result<const Process*> Daemons::target(const Worker& leader,
                                       const protocol::LaunchDaemon& message) const {
  const auto gang = placed(message.start.job, message.start.epoch);
  if (!gang || gang->leader != leader.id || gang->members != message.start.members)
    return conflict_error(str(leader.id, " leads no gang of ", message.start.job, " at epoch ",
                              message.start.epoch, " with these members"));
  const Worker* worker = workers_.find(message.worker);
  const auto first = std::find_if(gang->members.begin(), gang->members.end(), [&](const auto& id) {
    const Worker* member = workers_.find(id);
    return worker != nullptr && member != nullptr && member->host == worker->host;
  });
  if (first == gang->members.end() || *first != message.worker || worker->host == leader.host)
    return conflict_error(
        str(message.worker, " is not the first member of another host of ", message.start.job));
  if (!worker->agent.alive || !protocol::has_far_ranks(worker->agent.version))
    return unavailable_error(str("the agent of ", message.worker,
                                 worker->agent.alive
                                     ? " knows no gangs over several hosts: upgrade it"
                                     : " is not connected"));
  return &worker->agent;
}

void Daemons::launch(const Worker& leader, const protocol::LaunchDaemon& message) {
  const auto agent = target(leader, message);
  if (agent.ok()) return context_.send_worker((*agent)->peer, message);
  context_.log(LogLevel::kWarn, "refused a daemon on ", message.worker, ": ",
               agent.status().message());
  context_.send_worker(leader.agent.peer,
                       protocol::DaemonLaunched{message.start.job, message.start.epoch,
                                                message.worker, agent.status()});
}

void Daemons::launched(const Worker& host, const protocol::DaemonLaunched& message) {
  const auto gang = placed(message.job, message.epoch);
  if (!gang || host.id != message.worker) return;
  const bool member =
      std::find(gang->members.begin(), gang->members.end(), host.id) != gang->members.end();
  const Worker* leader = workers_.find(gang->leader);
  if (member && leader != nullptr && leader->agent.alive)
    context_.send_worker(leader->agent.peer, message);
}

}  // namespace tandem::coordinator
