#include "coordinator/core.h"

#include "coordinator/placement.h"
#include "coordinator/resolve.h"
#include "protocol/version.h"

#include <algorithm>
#include <set>

namespace tandem::coordinator {

namespace {

bool is_inference(const Input& input) {
  if (const auto* client = std::get_if<ClientInput>(&input))
    return !std::holds_alternative<protocol::Call>(client->message);
  const auto* worker = std::get_if<WorkerInput>(&input);
  return worker != nullptr && std::holds_alternative<protocol::InferChunk>(worker->message);
}

}  // namespace

Coordinator::Coordinator(Options options, Snapshot snapshot, const Now& now)
    : context_(std::move(options)),
      workers_(context_),
      estimates_(context_, workers_),
      jobs_(context_, workers_, estimates_),
      requests_(context_, workers_),
      replicas_(context_, workers_, requests_),
      daemons_(context_, workers_),
      calls_({context_, workers_, estimates_, jobs_, requests_, replicas_}) {
  context_.begin(now);
  context_.load(std::move(snapshot.tables));
  jobs_.load(snapshot.events);
  replicas_.load();
  requests_.load(snapshot.results);
}

std::vector<Effect> Coordinator::step(const Now& now, const Input& input) {
  context_.begin(now);
  if (!std::holds_alternative<CommitFailed>(input)) context_.settle();
  std::visit([this](const auto& i) { on(i); }, input);
  const bool failing = context_.now().ms < quiet_until_ms_;  // after a failed commit
  // A token or a request moves no job: the next tick looks, however long the queue of jobs is.
  if (!calls_.ending() && !failing && !is_inference(input)) {
    replicas_.schedule();
    jobs_.schedule();
  }
  requests_.dispatch();
  calls_.after_step();
  return context_.take();
}

void Coordinator::on(const Tick& tick) {
  calls_.count_refused(tick.refused_frames, dropped_before_hello_);
  probe_silent_clients();
  for (const EngineLost& lost : workers_.expire()) engine_lost(lost);
  workers_.tick();
  jobs_.tick();
  replicas_.tick();
  requests_.tick();
  route_estimates(estimates_.tick());
  calls_.tick();
  assign_models();
}

void Coordinator::probe_silent_clients() {
  const TimeMs now = context_.now().ms, every = context_.limits().probe_ms;
  if (now < next_probe_ms_) return;
  next_probe_ms_ = now + every / 4;
  std::set<std::string> waiting = requests_.peers();
  waiting.merge(calls_.watchers());
  for (const std::string& peer : waiting) {
    const auto session = sessions_.find(peer);
    if (session == sessions_.end()) continue;
    Session& known = session->second;
    if (now - std::max(known.last_seen_ms, known.probed_ms) < every) continue;
    known.probed_ms = now;
    context_.send_client(peer, protocol::Pong{});
  }
}

void Coordinator::on(const ClientInput& input) {
  if (const auto* greeting = std::get_if<protocol::ClientHello>(&input.message))
    return hello(input.peer, input.user, *greeting);
  const auto session = sessions_.find(input.peer);
  if (session == sessions_.end()) {
    ++dropped_before_hello_;
    return;
  }
  session->second.last_seen_ms = context_.now().ms;
  const std::string& user = session->second.user;
  if (const auto* request = std::get_if<protocol::Generate>(&input.message))
    requests_.generate(input.peer, user, *request,
                       input.received_us > 0 ? input.received_us : context_.now().us);
  else if (const auto* cancel = std::get_if<protocol::Cancel>(&input.message))
    requests_.cancel(user, *cancel);
  else if (const auto* call = std::get_if<protocol::Call>(&input.message))
    calls_.handle(input.peer, user, *call, input.admin);
  else if (const auto* stop = std::get_if<protocol::CallCancel>(&input.message))
    calls_.cancel(input.peer, *stop);
  else if (const auto* ping = std::get_if<protocol::Ping>(&input.message))
    context_.send_client(input.peer, protocol::Pong{ping->nonce});
  route_estimates(estimates_.tick());
  assign_models();
}

void Coordinator::hello(const std::string& peer, const std::string& user,
                        const protocol::ClientHello& message) {
  protocol::ServerHello reply;
  reply.server = str("tandem-coordinator/", context_.options().version);
  reply.incarnation = context_.options().incarnation;
  reply.heartbeat_ms = context_.limits().heartbeat_ms;
  const auto version = protocol::agree_version(message.version, str("client ", message.client));
  if (!version.ok()) {
    reply.status = version.status();
    return context_.send_client(peer, std::move(reply));
  }
  reply.version = *version;
  if (!sessions_.contains(peer) && sessions_.size() >= context_.limits().sessions_max) {
    const auto oldest = std::min_element(
        sessions_.begin(), sessions_.end(),
        [](const auto& a, const auto& b) { return a.second.last_seen_ms < b.second.last_seen_ms; });
    requests_.client_gone(oldest->first);
    calls_.client_gone(oldest->first);
    sessions_.erase(oldest);
  }
  sessions_[peer] = {user, message.client, context_.now().ms, 0};
  context_.send_client(peer, std::move(reply));
}

void Coordinator::on(const ClientGone& gone) {
  requests_.client_gone(gone.peer);
  calls_.client_gone(gone.peer);
  sessions_.erase(gone.peer);
}

void Coordinator::on(const WorkerInput& input) {
  if (const auto* greeting = std::get_if<protocol::WorkerHello>(&input.message)) {
    hello(input.peer, *greeting);
  } else if (const auto* beat = std::get_if<protocol::Heartbeat>(&input.message)) {
    heartbeat(input.peer, *beat);
  } else if (const auto* bye = std::get_if<protocol::WorkerBye>(&input.message)) {
    if (const auto lost = workers_.bye(*bye)) engine_lost(*lost);
  } else if (const auto known = workers_.process_of(input.peer)) {
    known->process.last_seen_ms = context_.now().ms;
    if (known->role == protocol::WorkerRole::kEngine) engine_message(known->worker, input.message);
    if (const auto* chunk = std::get_if<protocol::InferChunk>(&input.message);
        chunk != nullptr && known->role != protocol::WorkerRole::kAgent)
      requests_.chunk(
          known->role == protocol::WorkerRole::kGang ? known->worker.gang : known->worker.engine,
          *chunk);
    if (known->role != protocol::WorkerRole::kAgent)
      job_message({known->worker, known->process}, input.message);
    else
      agent_message({known->worker, known->process}, input.message);
  }
  // Else: a process we do not know (any more). Silence makes it say hello again.
  route_estimates(estimates_.tick());
  assign_models();
}

void Coordinator::engine_message(Worker& worker, const protocol::WorkerMessage& message) {
  if (const auto* loaded = std::get_if<protocol::ModelLoaded>(&message))
    model_loaded(worker, *loaded);
  else if (const auto* estimate = std::get_if<protocol::EstimateReply>(&message))
    route_estimates(estimates_.reply(*estimate));
}

void Coordinator::agent_message(const Runner& runner, const protocol::WorkerMessage& message) {
  if (const auto* over = std::get_if<protocol::JobEnded>(&message))
    ended(runner, *over);
  else if (const auto* launch = std::get_if<protocol::LaunchDaemon>(&message))
    daemons_.launch(runner.worker, *launch);
  else if (const auto* launched = std::get_if<protocol::DaemonLaunched>(&message))
    daemons_.launched(runner.worker, *launched);
}

void Coordinator::job_message(const Runner& runner, const protocol::WorkerMessage& message) {
  if (const auto* progress = std::get_if<protocol::JobProgress>(&message))
    jobs_.progress(runner, *progress);
  else if (const auto* checkpoint = std::get_if<protocol::CheckpointReady>(&message))
    jobs_.checkpoint(runner, *checkpoint);
  else if (const auto* publish = std::get_if<protocol::Publish>(&message))
    jobs_.publish(runner, *publish);
  else if (const auto* over = std::get_if<protocol::JobEnded>(&message))
    ended(runner, *over);
}

void Coordinator::ended(const Runner& runner, const protocol::JobEnded& message) {
  if (is_replica(message.job))
    replicas_.ended(runner, message);
  else
    jobs_.ended(runner, message);
}

void Coordinator::hello(const std::string& peer, const protocol::WorkerHello& message) {
  protocol::WorkerHelloReply reply;
  reply.coordinator = context_.options().incarnation;
  reply.heartbeat_ms = context_.limits().heartbeat_ms;
  reply.lease_ms = context_.limits().lease_ms;
  std::optional<EngineLost> lost;
  reply.status = workers_.hello(peer, message, lost);
  if (!reply.status.ok()) {
    context_.log(LogLevel::kWarn, "refused ", message.worker, ": ", reply.status.message());
    return context_.send_worker(peer, std::move(reply));
  }
  if (lost) engine_lost(*lost);
  const auto known = workers_.process_of(peer);
  reply.stop_jobs = jobs_.adopt({known->worker, known->process}, known->role);
  for (const JobId& id : replicas_.adopt({known->worker, known->process}, known->role))
    reply.stop_jobs.push_back(id);
  if (message.role != protocol::WorkerRole::kAgent)
    reply.stop_requests = requests_.adopt(
        message.role == protocol::WorkerRole::kGang ? known->worker.gang : known->worker.engine,
        message.requests);
  if (message.role == protocol::WorkerRole::kEngine)
    reply.gang_bytes = gang_bytes(context_.tables(), message.worker);
  context_.log(LogLevel::kInfo, role_name(message.role), " ", message.worker, " pid ", message.pid,
               " is here, ", message.jobs.size(), " jobs");
  context_.send_worker(peer, std::move(reply));
}

void Coordinator::heartbeat(const std::string& peer, const protocol::Heartbeat& message) {
  const Status status = workers_.heartbeat(peer, message);
  if (status.code() == StatusCode::kConflict) {
    protocol::WorkerHelloReply reply;
    reply.status = status;
    reply.coordinator = context_.options().incarnation;
    return context_.send_worker(peer, std::move(reply));
  }
  if (!status.ok()) return;  // it says hello again when nobody answers
  protocol::HeartbeatReply reply{message.seq};
  if (message.role == protocol::WorkerRole::kEngine)
    reply.gang_bytes = gang_bytes(context_.tables(), message.worker);
  context_.send_worker(peer, std::move(reply));
  const auto known = workers_.process_of(peer);
  jobs_.seen({known->worker, known->process}, known->role);
  replicas_.seen({known->worker, known->process}, known->role);
}

void Coordinator::engine_lost(const EngineLost& lost) {
  context_.log(LogLevel::kWarn, lost.gang ? "gang " : "engine ", lost.worker,
               " is lost: ", lost.reason);
  jobs_.engine_lost(lost);
  if (!lost.name.empty()) {
    if (lost.gang) replicas_.gang_lost(lost);
    requests_.engine_lost(lost.name, lost.reason);
  }
}

void Coordinator::on(const WorkDone& done) {
  if (!jobs_.verified(done)) calls_.work_done(done);
  route_estimates(estimates_.tick());
  assign_models();
}

void Coordinator::on(const CommitFailed& failed) {
  context_.undo();
  jobs_.reset();
  quiet_until_ms_ = context_.now().ms + context_.limits().resend_ms;
  context_.log(LogLevel::kError, "the registry refused a transaction, nothing of it was done: ",
               failed.status.message());
}

void Coordinator::route_estimates(const std::vector<EstimateOutcome>& outcomes) {
  for (const EstimateOutcome& outcome : outcomes) {
    jobs_.estimated(outcome);
    calls_.estimated(outcome);
  }
}

}  // namespace tandem::coordinator
