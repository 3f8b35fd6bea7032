#include "coordinator/workers.h"

#include "protocol/version.h"

#include <algorithm>

namespace tandem::coordinator {
namespace {

using protocol::WorkerRole;

constexpr std::size_t kSupersededKept = 16;
constexpr TimeMs kSilentShownMs = 10'000;  ///< an engine that starts says hello before
const std::string kDrainPrefix = "drain/";

}  // namespace

const char* role_name(WorkerRole role) {
  return role == WorkerRole::kAgent ? "agent" : role == WorkerRole::kEngine ? "engine" : "gang";
}

WorkerId replica_name(const JobId& replica, Epoch epoch) {
  return WorkerId(str(replica, "/", epoch));
}

Process& WorkerTable::process(Worker& worker, WorkerRole role) {
  if (role == WorkerRole::kAgent) return worker.agent;
  if (role == WorkerRole::kGang) return worker.gang;
  return worker.engine;
}

Status WorkerTable::hello(const std::string& peer, const protocol::WorkerHello& hello,
                          std::optional<EngineLost>& lost) {
  const std::string who = str(role_name(hello.role), " ", hello.worker);
  if (auto version = protocol::agree_version(hello.version, who); !version.ok())
    return version.status();
  if (hello.worker.empty() || hello.worker.value.size() > context_.limits().name_bytes_max * 2)
    return invalid_error(str(who, ": the worker's id must have 1 to ",
                             context_.limits().name_bytes_max * 2, " bytes"));
  if (workers_.find(hello.worker) == workers_.end()) {
    forget_old();
    if (workers_.size() >= context_.limits().workers_max)
      return busy_error(
          str("all ", context_.limits().workers_max, " places for workers are taken"));
  }
  Worker& worker = workers_[hello.worker];
  worker.id = hello.worker;
  Process& known = process(worker, hello.role);
  if (std::find(known.superseded.begin(), known.superseded.end(), hello.incarnation) !=
      known.superseded.end())
    return conflict_error(str(who, " was replaced by another process; this one must end"));
  const bool replaced = known.incarnation != 0 && known.incarnation != hello.incarnation;
  if (replaced) {
    known.superseded.push_back(known.incarnation);
    if (known.superseded.size() > kSupersededKept) known.superseded.pop_front();
    if (hello.role != WorkerRole::kAgent && known.alive)
      lost = EngineLost{
          worker.id, str("the ", role_name(hello.role), " was replaced by a new process"),
          hello.role == WorkerRole::kGang,
          hello.role == WorkerRole::kGang ? worker.gang.name : worker.id, known.incarnation};
  }
  if (known.peer != peer) peers_.erase(known.peer);
  if (hello.role == WorkerRole::kGang) {
    Engine& gang = worker.gang;
    if (gang.incarnation != hello.incarnation) {
      Engine fresh;
      fresh.superseded = std::move(gang.superseded);
      replicas_.erase(gang.name);
      gang = std::move(fresh);
    }
    if (!hello.jobs.empty() && is_replica(hello.jobs.front().job)) {
      gang.name = replica_name(hello.jobs.front().job, hello.jobs.front().epoch);
      replicas_[gang.name] = worker.id;
    }
    take_hello(gang, hello);
  }
  if (hello.role == WorkerRole::kEngine) {
    Engine& engine = worker.engine;
    if (engine.incarnation != hello.incarnation) {
      Engine fresh;
      fresh.superseded = std::move(engine.superseded);
      // The requests stay until their owner has moved them.
      fresh.requests = std::move(engine.requests);
      fresh.failed_loads = std::move(engine.failed_loads);
      fresh.load_status = engine.load_status;
      engine = std::move(fresh);
    }
    engine.name = worker.id;
    engine.loading = {};
    take_hello(engine, hello);
    worker.device = hello.device;
    worker.device_name = hello.device_name;
    worker.memory_bytes = hello.memory_bytes;
  }
  if (hello.role != WorkerRole::kGang) {  // a gang speaks for its job, not for the slot
    worker.host = hello.host;
    worker.slot = hello.slot;
    if (worker.device.empty()) worker.device = hello.device;
    if (worker.device_name.empty()) worker.device_name = hello.device_name;
    if (worker.memory_bytes == 0) worker.memory_bytes = hello.memory_bytes;
  }
  Process& now = process(worker, hello.role);
  now.peer = peer;
  now.incarnation = hello.incarnation;
  now.pid = hello.pid;
  now.version = hello.version;
  now.program = hello.program;
  now.jobs = hello.jobs;
  now.last_seen_ms = context_.now().ms;
  now.alive = true;
  peers_[peer] = {hello.worker, hello.role};
  return {};
}

/// What a hello says of those who answer requests.
void WorkerTable::take_hello(Engine& engine, const protocol::WorkerHello& hello) const {
  engine.model = hello.model;
  engine.base_bytes = hello.base_bytes;
  engine.credits = hello.credits;
  engine.adapters = {hello.adapters.begin(), hello.adapters.end()};
  engine.idle_since_ms = hello.requests.empty() ? context_.now().ms : -1;
}

Status WorkerTable::heartbeat(const std::string& peer, const protocol::Heartbeat& beat) {
  Worker* worker = find(beat.worker);
  if (worker == nullptr) return unavailable_error("unknown worker");
  Process& known = process(*worker, beat.role);
  if (std::find(known.superseded.begin(), known.superseded.end(), beat.incarnation) !=
      known.superseded.end())
    return conflict_error(str(role_name(beat.role), " ", beat.worker,
                              " was replaced by another process; this one must end"));
  if (!known.alive || known.incarnation != beat.incarnation || known.peer != peer)
    return unavailable_error("unknown process");
  known.last_seen_ms = context_.now().ms;
  if (beat.role == WorkerRole::kAgent) {
    known.jobs = beat.jobs;
    return {};
  }
  Engine& engine = beat.role == WorkerRole::kGang ? worker->gang : worker->engine;
  if (beat.seq < engine.heartbeat.seq) return {};  // overtaken
  engine.heartbeat = beat;
  engine.jobs = beat.jobs;
  engine.adapters = {beat.adapters.begin(), beat.adapters.end()};
  if (beat.running + beat.waiting > 0)
    engine.idle_since_ms = -1;
  else if (engine.idle_since_ms < 0)
    engine.idle_since_ms = context_.now().ms;
  return {};
}

std::optional<WorkerTable::Known> WorkerTable::process_of(const std::string& peer) {
  const auto known = peers_.find(peer);
  if (known == peers_.end()) return {};
  const auto& [id, role] = known->second;
  Worker* worker = find(id);
  if (worker == nullptr) return {};
  Process& found = process(*worker, role);
  if (!found.alive || found.peer != peer) return {};
  return Known{*worker, found, role};
}

std::optional<EngineLost> WorkerTable::bye(const protocol::WorkerBye& bye) {
  Worker* worker = find(bye.worker);
  if (worker == nullptr) return {};
  Process& known = process(*worker, bye.role);
  if (!known.alive || known.incarnation != bye.incarnation) return {};
  known.alive = false;
  peers_.erase(known.peer);
  if (bye.role == WorkerRole::kAgent) return {};
  const bool gang = bye.role == WorkerRole::kGang;
  return EngineLost{bye.worker, str("the ", role_name(bye.role), " ended as it was asked to"), gang,
                    gang ? worker->gang.name : worker->id, known.incarnation};
}

std::vector<EngineLost> WorkerTable::expire() {
  std::vector<EngineLost> lost;
  const TimeMs now = context_.now().ms;
  const TimeMs lease = context_.limits().lease_ms;
  for (auto& [id, worker] : workers_) {
    for (const WorkerRole role : {WorkerRole::kAgent, WorkerRole::kEngine, WorkerRole::kGang}) {
      Process& known = process(worker, role);
      if (!known.alive || now - known.last_seen_ms <= lease) continue;
      known.alive = false;
      peers_.erase(known.peer);
      context_.log(LogLevel::kWarn, role_name(role), " ", id, " lost: silent for ",
                   now - known.last_seen_ms, " ms");
      if (role != WorkerRole::kAgent)
        lost.push_back(
            {id, str("no sign of the ", role_name(role), " for ", now - known.last_seen_ms, " ms"),
             role == WorkerRole::kGang, role == WorkerRole::kGang ? worker.gang.name : id,
             known.incarnation});
    }
  }
  return lost;
}

Worker* WorkerTable::find(const WorkerId& id) {
  const auto found = workers_.find(id);
  return found == workers_.end() ? nullptr : &found->second;
}
const Worker* WorkerTable::find(const WorkerId& id) const {
  const auto found = workers_.find(id);
  return found == workers_.end() ? nullptr : &found->second;
}

Engine* WorkerTable::engine(const WorkerId& name) {
  if (Worker* worker = find(name)) return &worker->engine;
  const auto leader = replicas_.find(name);
  Worker* worker = leader == replicas_.end() ? nullptr : find(leader->second);
  return worker == nullptr || worker->gang.name != name ? nullptr : &worker->gang;
}

std::vector<Engine*> WorkerTable::serving(const Digest& model) {
  std::vector<Engine*> replicas, engines;
  for (auto& [id, worker] : workers_) {
    if (worker.gang.model == model && serves(worker)) replicas.push_back(&worker.gang);
    if (worker.engine.model == model && usable(worker)) engines.push_back(&worker.engine);
  }
  replicas.insert(replicas.end(), engines.begin(), engines.end());
  return replicas;
}

bool WorkerTable::serves(const Worker& worker) const {
  const Engine& gang = worker.gang;
  if (!gang.alive || gang.model.empty() || gang.jobs.empty()) return false;
  const auto found = context_.tables().replicas.find(gang.jobs.front().job);
  if (found == context_.tables().replicas.end()) return false;
  const Replica& replica = found->second;
  return replica.state == ReplicaState::kServing && replica.gang == gang.incarnation &&
         replica.worker == worker.id;
}

bool WorkerTable::usable(const Worker& worker) const {
  return worker.engine.alive && !draining(worker.id);
}

bool WorkerTable::draining(const WorkerId& id) const {
  return context_.tables().settings.contains(kDrainPrefix + id.value);
}

void WorkerTable::set_draining(const WorkerId& id, bool draining) {
  if (draining)
    context_.put(SettingRecord{kDrainPrefix + id.value, "1"});
  else
    context_.put(EraseSetting{kDrainPrefix + id.value});
}

std::string WorkerTable::error(const Worker& worker) const {
  if (!worker.engine.load_status.ok()) return worker.engine.load_status.message();
  const TimeMs silent = context_.now().ms - worker.engine_silent_ms;
  if (worker.engine_silent_ms < 0 || silent < kSilentShownMs) return "";
  return str("no sign of its engine for ", silent / 1000,
             " s; its agent ends one that is silent for ",
             context_.limits().engine_silent_ms / 1000, " s");
}

void WorkerTable::restart(Worker& worker) {
  worker.restarting = worker.engine.alive ? worker.engine.incarnation : 0;
  send_restart(worker, worker.restarting);
}

void WorkerTable::send_restart(Worker& worker, Incarnation engine) {
  worker.restart_sent_ms = context_.now().ms;
  context_.send_worker(worker.agent.peer,
                       protocol::AgentCommand{protocol::AgentAction::kRestartEngine, engine});
}

/// An agent whose engine ended by itself starts another; one that stays away hangs. Said once in a
/// while: the next one needs some time to be here.
void WorkerTable::end_silent_engine(Worker& worker) {
  const TimeMs now = context_.now().ms;
  if (worker.engine.alive || !worker.agent.alive) {
    worker.engine_silent_ms = -1;
  } else if (worker.engine_silent_ms < 0) {
    worker.engine_silent_ms = worker.silence_told_ms = now;
  } else if (now - worker.silence_told_ms >= context_.limits().engine_silent_ms) {
    worker.silence_told_ms = now;
    context_.log(LogLevel::kWarn, "engine ", worker.id, " is silent; its agent is to end it");
    send_restart(worker, 0);
  }
}

void WorkerTable::tick() {
  for (auto& [id, worker] : workers_) {
    if (worker.restarting != worker.engine.incarnation) worker.restarting = 0;
    if (worker.restarting != 0 && worker.agent.alive &&
        context_.now().ms - worker.restart_sent_ms >= context_.limits().resend_ms)
      send_restart(worker, worker.restarting);
    end_silent_engine(worker);
  }
}

std::size_t WorkerTable::engines_alive() const {
  return static_cast<std::size_t>(std::count_if(
      workers_.begin(), workers_.end(), [](const auto& w) { return w.second.engine.alive; }));
}

void WorkerTable::forget_old() {
  if (workers_.size() < context_.limits().workers_max) return;
  auto oldest = workers_.end();
  for (auto w = workers_.begin(); w != workers_.end(); ++w) {
    if (w->second.engine.alive || w->second.agent.alive || w->second.gang.alive ||
        !w->second.engine.requests.empty() || !w->second.gang.requests.empty())
      continue;
    if (oldest == workers_.end() ||
        w->second.engine.last_seen_ms < oldest->second.engine.last_seen_ms)
      oldest = w;
  }
  if (oldest == workers_.end()) return;
  replicas_.erase(oldest->second.gang.name);
  workers_.erase(oldest);
}

}  // namespace tandem::coordinator
