#include "coordinator/replicas.h"

#include "coordinator/resolve.h"
#include "protocol/base/units.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace tandem::coordinator {
namespace {

/// Adapters that a replica is told of when it begins to serve, the newest ones.
constexpr std::size_t kAnnouncedMax = 16;

TimeMs backoff(const Limits& limits, int attempts) {
  if (attempts <= 1) return 0;
  const int doublings = std::min(attempts - 2, 16);
  return std::min(limits.retry_backoff_ms << doublings, limits.retry_backoff_max_ms);
}

std::string layout_json(const Replica& replica) {
  return nlohmann::ordered_json{{"tp", replica.tp}, {"pp", replica.pp}}.dump();
}

}  // namespace

Status Replicas::check_count(const Wanted& wanted) const {
  const std::size_t there = context_.tables().replicas.size();
  if (there + static_cast<std::size_t>(wanted.count) <= context_.limits().replicas_max) return {};
  return refused_error(str("there are ", there, " replicas of at most ",
                           context_.limits().replicas_max, "; ", wanted.count,
                           " more do not fit; remove some (tandem replica rm)"));
}

/// After the dry run: a part of a layout that cuts the model cuts it too.
Status Replicas::check_pool(const Wanted& wanted) const {
  const std::int64_t ranks = wanted.tp * wanted.pp;
  const GangRoom cpus = gang_room(workers_, "cpu"), gpus = gang_room(workers_, "cuda");
  const GangRoom& room = gpus.ranks > cpus.ranks ? gpus : cpus;
  // Right after a start of the coordinator nobody knows how many slots there are.
  if (static_cast<std::int64_t>(room.ranks) >= ranks ||
      context_.now().ms - loaded_ms_ < context_.limits().adoption_ms)
    return {};
  const NearestLayout nearest = nearest_layout({1}, wanted.tp, wanted.pp, room.ranks);
  return refused_error(str("a replica of tp ", wanted.tp, " x pp ", wanted.pp, " has ", ranks,
                           " ranks, one worker each, and ", room.description,
                           "; start more (tandem up --workers ", ranks, ") or use fewer ranks",
                           nearest.tp * nearest.pp < 2
                               ? std::string()
                               : str("; the nearest layout with as many workers: tp ", nearest.tp,
                                     ", pp ", nearest.pp)));
}

Result<std::vector<JobId>> Replicas::add(const Wanted& wanted, const std::string& estimate_json) {
  TANDEM_RETURN_IF_ERROR(check_count(wanted));
  TANDEM_RETURN_IF_ERROR(check_pool(wanted));
  const auto json = nlohmann::json::parse(estimate_json, nullptr, false);
  if (!json.is_object()) return internal_error("the dry run's answer is not a JSON object");
  const auto number = [&](const char* name) {
    const auto found = json.find(name);
    return found != json.end() && found->is_number_integer() ? found->get<std::int64_t>() : 0;
  };
  const std::int64_t peak = number("peak_bytes"), limit = number("limit_bytes");
  const auto fits = json.find("fits");
  if (fits != json.end() && fits->is_boolean() && !fits->get<bool>())
    return refused_error(str("its largest rank and the engine of its slot need ",
                             format_bytes(peak), " (", peak, " bytes) and a worker has ",
                             format_bytes(limit), " (", limit,
                             " bytes, memory_bytes_max); use more ranks or lower kv_bytes_max"));
  std::vector<JobId> ids;
  for (std::int64_t i = 0; i < wanted.count; ++i) {
    Replica replica;
    do replica.id = JobId("replica-" + context_.random_hex(12));
    while (context_.tables().replicas.contains(replica.id));
    replica.tenant = wanted.tenant;
    replica.model = wanted.model;
    replica.tp = wanted.tp;
    replica.pp = wanted.pp;
    replica.peak_bytes = peak;
    replica.engine_bytes = estimated_bytes(estimate_json).engine;
    replica.device = estimated_device(estimate_json);
    replica.created_unix_ms = context_.now().unix_ms;
    ids.push_back(replica.id);
    context_.log(LogLevel::kInfo, replica.id, " is asked for: tp ", replica.tp, ", pp ",
                 replica.pp);
    save(std::move(replica));
  }
  return ids;
}

Status Replicas::remove(const JobId& id) {
  const auto found = context_.tables().replicas.find(id);
  if (found == context_.tables().replicas.end()) return not_found_error(str("no replica ", id));
  Replica replica = found->second;
  replica.removing = true;
  if (!replica.placed()) {
    over(std::move(replica), "removed", false);
    return {};
  }
  stop(std::move(replica), "removed");
  return {};
}

void Replicas::drain(const WorkerId& worker) {
  const Replica* held = replica_on(context_.tables(), worker);
  if (held != nullptr) stop(*held, str("worker ", worker, " drains"));
}

void Replicas::stop(Replica replica, const std::string& why) {
  if (replica.state != ReplicaState::kStopping) set_state(replica, ReplicaState::kStopping, why);
  send_stop(replica);
  save(std::move(replica));
}

void Replicas::save(Replica replica) {
  replica.updated_unix_ms = context_.now().unix_ms;
  context_.put(std::move(replica));
}

void Replicas::set_state(Replica& replica, ReplicaState state, const std::string& why) {
  context_.log(LogLevel::kInfo, replica.id, " ", replica_state_name(replica.state), " -> ",
               replica_state_name(state), why.empty() ? "" : ": ", why);
  replica.state = state;
}

void Replicas::schedule() {
  const Tables& tables = context_.tables();
  std::vector<JobId> waiting;
  for (const auto& [id, replica] : tables.replicas)
    if (!replica.placed()) waiting.push_back(id);
  std::set<WorkerId> reserved;
  for (const JobId& id : waiting) {
    const Replica& replica = tables.replicas.at(id);
    const Placement placement = place_replica(replica, tables, workers_, reserved);
    reserved.insert(placement.wanted.begin(), placement.wanted.end());
    if (placement.worker.empty()) continue;
    if (const auto timers = timers_.find(id);
        timers != timers_.end() && timers->second.not_before_ms > context_.now().ms)
      reserved.insert(placement.members.begin(), placement.members.end());
    else
      start(replica, placement);
  }
}

std::vector<BaseDemand> Replicas::demand() const {
  std::vector<BaseDemand> demand;
  std::set<WorkerId> reserved;
  for (const auto& [id, replica] : context_.tables().replicas) {
    if (replica.placed()) continue;
    Placement placement = place_replica(replica, context_.tables(), workers_, reserved);
    reserved.insert(placement.wanted.begin(), placement.wanted.end());
    if (!placement.load_on.empty()) demand.push_back({replica.model, std::move(placement.load_on)});
  }
  return demand;
}

void Replicas::start(Replica replica, const Placement& placement) {
  ++replica.epoch;
  ++replica.attempts;
  replica.worker = placement.worker;
  replica.members = placement.members;
  replica.gang = context_.random_incarnation();
  replica.adapter_bytes = adapter_share(replica);
  timers_[replica.id] = {context_.now().ms, context_.now().ms, -1, 0};
  set_state(replica, ReplicaState::kStarting,
            str("on ", replica.worker, " and ", replica.members.size() - 1, " more, epoch ",
                replica.epoch));
  send_start(replica);
  save(std::move(replica));
}

std::int64_t Replicas::adapter_share(const Replica& replica) const {
  std::int64_t share = -1;
  for (const WorkerId& id : replica.members) {
    const Worker* member = workers_.find(id);
    if (member == nullptr || member->memory_bytes == 0) continue;
    const std::int64_t left = std::max<std::int64_t>(
        member->memory_bytes - bytes_together(*member, replica.peak_bytes, replica.engine_bytes),
        0);
    share = share < 0 ? left / 2 : std::min(share, left / 2);
  }
  return share;
}

void Replicas::send_start(const Replica& replica) {
  timers_[replica.id].sent_ms = context_.now().ms;
  const Worker* worker = workers_.find(replica.worker);
  const ModelRecord* model = context_.tables().model_by_digest(replica.model);
  if (worker == nullptr || model == nullptr) return;
  protocol::StartJob message;
  message.job = replica.id;
  message.epoch = replica.epoch;
  message.model = model_ref(*model);
  message.gang = replica.gang;
  message.members = replica.members;
  message.serve_json = layout_json(replica);
  message.adapter_bytes = replica.adapter_bytes;
  context_.send_worker(worker->agent.peer, std::move(message));
}

void Replicas::send_stop(const Replica& replica) {
  timers_[replica.id].sent_ms = context_.now().ms;
  const Worker* worker = workers_.find(replica.worker);
  if (worker == nullptr) return;
  const Process* process = process_of(replica);
  // A gang that has not said hello answers nothing: its agent ends it.
  if (process == nullptr) process = &worker->agent;
  if (!process->alive) return;
  context_.send_worker(process->peer,
                       protocol::StopJob{replica.id, replica.epoch, protocol::StopMode::kPause});
}

void Replicas::over(Replica replica, const std::string& why, bool failed) {
  requests_.engine_lost(replica_name(replica.id, replica.epoch), why);
  const Limits& limits = context_.limits();
  const TimeMs now = context_.now().ms;
  const TimeMs served = timers_[replica.id].served_ms;
  timers_.erase(replica.id);
  if (replica.removing) {
    context_.log(LogLevel::kInfo, replica.id, " is gone: ", why);
    return context_.put(EraseReplica{replica.id});
  }
  if (!failed)
    replica.attempts = std::max(replica.attempts - 1, 0);
  else if (served >= 0 && now - served >= limits.replica_stable_ms)
    replica.attempts = 1;
  const TimeMs wait = backoff(limits, replica.attempts);
  timers_[replica.id].not_before_ms = now + wait;
  replica.gang = 0;
  replica.error = why;
  set_state(replica, ReplicaState::kWaiting,
            str(why, wait > 0 ? str("; next try in ", wait, " ms") : ""));
  save(std::move(replica));
}

Process* Replicas::process_of(const Replica& replica) {
  Worker* worker = workers_.find(replica.worker);
  const bool known = worker != nullptr && worker->gang.incarnation == replica.gang;
  return known ? &worker->gang : nullptr;
}

const Engine* Replicas::engine(const Replica& replica) const {
  const Worker* worker = workers_.find(replica.worker);
  const bool known = replica.placed() && worker != nullptr && worker->gang.alive &&
                     worker->gang.incarnation == replica.gang;
  return known ? &worker->gang : nullptr;
}

void Replicas::ended(const Runner& runner, const protocol::JobEnded& message) {
  const auto& [worker, process] = runner;
  protocol::JobAck ack{message.job, message.epoch, "ended", {}, {}, ""};
  const auto found = context_.tables().replicas.find(message.job);
  if (found != context_.tables().replicas.end()) {
    const Replica& replica = found->second;
    if (replica.epoch != message.epoch || replica.worker != worker.id)
      ack.status =
          conflict_error(str(replica.id, " is at epoch ", replica.epoch, " on ", replica.worker,
                             "; epoch ", message.epoch, " on ", worker.id, " must stop"));
    else if (replica.placed())
      over(replica, message.status.message(), message.status.code() != StatusCode::kCancelled);
  }
  context_.send_worker(process.peer, std::move(ack));
}

const Replica* Replicas::claimed(const Runner& runner, const protocol::RunningJob& claim) const {
  const auto found = context_.tables().replicas.find(claim.job);
  if (found == context_.tables().replicas.end()) return nullptr;
  const Replica& replica = found->second;
  const bool current =
      replica.placed() && replica.epoch == claim.epoch && replica.worker == runner.worker.id;
  return current ? &replica : nullptr;
}

std::vector<JobId> Replicas::adopt(const Runner& runner, protocol::WorkerRole role) {
  const auto& [worker, process] = runner;
  std::vector<JobId> stop;
  for (const protocol::RunningJob& claim : process.jobs) {
    if (!is_replica(claim.job)) continue;
    const Replica* replica = claimed(runner, claim);
    const bool gang = role == protocol::WorkerRole::kGang;
    if (replica == nullptr || (gang && replica->gang != process.incarnation)) {
      stop.push_back(claim.job);
      continue;
    }
    if (!gang) continue;
    Timers& timers = timers_[replica->id];
    if (timers.started_ms == 0) timers.started_ms = context_.now().ms;
    if (worker.gang.model != replica->model) continue;  // it still loads
    if (timers.served_ms < 0) timers.served_ms = context_.now().ms;
    if (replica->state != ReplicaState::kStarting) continue;
    Replica serving = *replica;
    set_state(serving, ReplicaState::kServing, str("on ", worker.id));
    save(std::move(serving));
    announce_adapters(worker.gang);
  }
  return stop;
}

void Replicas::announce_adapters(const Engine& engine) const {
  const Tables& tables = context_.tables();
  std::vector<const AdapterVersionRecord*> published;
  for (const auto& [name, alias] : tables.aliases)
    if (const auto* adapter = tables.current_adapter(name);
        adapter != nullptr && adapter->base_model == engine.model)
      published.push_back(adapter);
  std::sort(published.begin(), published.end(), [](const auto* a, const auto* b) {
    return std::pair(-a->created_unix_ms, a->name) < std::pair(-b->created_unix_ms, b->name);
  });
  if (published.size() > kAnnouncedMax) published.resize(kAnnouncedMax);
  for (const auto* adapter : published)
    context_.send_worker(engine.peer, protocol::Announce{str(adapter->name, "@", adapter->version),
                                                         adapter->base_model, adapter->digest,
                                                         tables.manifest(adapter->digest)});
}

void Replicas::seen(const Runner& runner, protocol::WorkerRole role) {
  const auto& [worker, process] = runner;
  for (const protocol::RunningJob& claim : process.jobs) {
    if (!is_replica(claim.job)) continue;
    const Replica* replica = claimed(runner, claim);
    const bool gang = role == protocol::WorkerRole::kGang;
    if (replica == nullptr || (gang && replica->gang != process.incarnation))
      context_.send_worker(process.peer,
                           protocol::StopJob{claim.job, claim.epoch, protocol::StopMode::kCancel});
  }
}

void Replicas::gang_lost(const EngineLost& lost) {
  const Worker* worker = workers_.find(lost.worker);
  if (worker == nullptr) return;
  for (const auto& [id, replica] : context_.tables().replicas)
    if (replica.placed() && replica_name(id, replica.epoch) == lost.name)
      return over(replica, str("the gang on ", lost.worker, ": ", lost.reason), true);
}

void Replicas::tick() {
  std::vector<JobId> placed;
  for (const auto& [id, replica] : context_.tables().replicas)
    if (replica.placed()) placed.push_back(id);
  for (const JobId& id : placed) tick_placed(context_.tables().replicas.at(id));
}

void Replicas::tick_placed(const Replica& replica) {
  const TimeMs now = context_.now().ms;
  const Limits& limits = context_.limits();
  const Worker* worker = workers_.find(replica.worker);
  const Process* process = process_of(replica);
  Timers& timers = timers_[replica.id];
  const TimeMs since = std::max(timers.started_ms, loaded_ms_);
  const bool starting = replica.state == ReplicaState::kStarting;
  const bool stopping = replica.state == ReplicaState::kStopping;
  if (process != nullptr && !process->alive)
    return over(replica, str("the gang on ", replica.worker, " did not come back"), true);
  if (process == nullptr) {
    // It has not said hello to this process: it is being started, or ran before this coordinator.
    const bool agent_gone = worker == nullptr
                                ? now - since > limits.adoption_ms
                                : !worker->agent.alive && (worker->agent.incarnation != 0 ||
                                                           now - since > limits.adoption_ms);
    const bool patient = now - since <= (starting ? limits.start_timeout_ms : limits.adoption_ms);
    if (!patient || (agent_gone && starting))
      return over(replica,
                  str("the gang on ", replica.worker,
                      starting ? " did not start in time" : " did not come back"),
                  true);
  } else if (starting && now - since > limits.start_timeout_ms) {
    return stop(replica, "it did not serve in time");
  }
  if (now - timers.sent_ms < limits.resend_ms) return;
  // One that drained before this coordinator was is told again when it has said hello: its agent
  // would end it at once.
  const bool drains_unseen = stopping && process == nullptr && timers.started_ms == 0;
  if (stopping && !drains_unseen)
    send_stop(replica);
  else if (starting && process == nullptr && worker != nullptr && worker->agent.alive)
    send_start(replica);
}

std::string Replicas::reason(const Replica& replica) const {
  const TimeMs now = context_.now().ms;
  switch (replica.state) {
    case ReplicaState::kServing:
      return "";
    case ReplicaState::kStarting:
      return str("the gang on ", replica.worker, " loads it");
    case ReplicaState::kStopping:
      return replica.removing ? "ends after what it answers" : "ends here after what it answers";
    case ReplicaState::kWaiting:
      break;
  }
  std::string reason;
  if (const auto timers = timers_.find(replica.id);
      timers != timers_.end() && timers->second.not_before_ms > now)
    reason = str("next try in ", timers->second.not_before_ms - now, " ms");
  else
    reason = place_replica(replica, context_.tables(), workers_, {}).waiting;
  if (!replica.error.empty())
    reason += str(reason.empty() ? "" : "; ", "it ended: ", replica.error);
  return reason;
}

bool Replicas::any_placed() const {
  return std::any_of(context_.tables().replicas.begin(), context_.tables().replicas.end(),
                     [](const auto& entry) { return entry.second.placed(); });
}

}  // namespace tandem::coordinator
