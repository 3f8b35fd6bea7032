#include "coordinator/coordinator_loop.h"

#include "protocol/codec.h"
#include "protocol/descriptor_limit.h"

#include <algorithm>
#include <charconv>
#include <csignal>
#include <utility>

namespace tandem::coordinator {
namespace {

/// What may still be sent when the step's transaction failed: it does not rest on it.
bool stands_alone(const protocol::ControlMessage& message) {
  return !std::holds_alternative<protocol::JobAck>(message) &&
         !std::holds_alternative<protocol::StartJob>(message) &&
         !std::holds_alternative<protocol::StopJob>(message) &&
         !std::holds_alternative<protocol::Announce>(message) &&
         !std::holds_alternative<protocol::WorkerHelloReply>(message);
}

/// Effects of a step whose commit failed: calls get the error, acknowledgements go.
std::vector<Effect> without_commit(std::vector<Effect> effects, const Status& status) {
  std::vector<Effect> kept;
  for (Effect& effect : effects) {
    if (std::holds_alternative<Persist>(effect)) continue;
    if (const auto* send = std::get_if<SendWorker>(&effect); send && !stands_alone(send->message))
      continue;
    if (auto* send = std::get_if<SendClient>(&effect))
      if (auto* reply = std::get_if<protocol::CallReply>(&send->message);
          reply != nullptr && reply->status.ok()) {
        reply->status =
            Status(StatusCode::kInternal, str("nothing was changed: ", status.message()));
        reply->result_json.clear();
        reply->more = false;
      }
    kept.push_back(std::move(effect));
  }
  return kept;
}

}  // namespace

Failpoint::Failpoint(const std::string& text) {
  const auto first = text.find(':');
  if (first == std::string::npos) return;
  const auto second = text.find(':', first + 1);
  const std::string action = text.substr(first + 1, second - first - 1);
  if (action != "kill" && action != "fail") return;
  kill_ = action == "kill";
  countdown_ = 1;
  if (second != std::string::npos)
    std::from_chars(text.data() + second + 1, text.data() + text.size(), countdown_);
  name_ = text.substr(0, first);
  log_warn("failpoint ", name_, " will ", action, " at pass ", countdown_);
}

bool Failpoint::hit(const char* name) {
  if (name_ != name || countdown_ <= 0 || --countdown_ > 0) return false;
  if (kill_) (void)std::raise(SIGKILL);
  return true;
}

Result<std::unique_ptr<CoordinatorLoop>> CoordinatorLoop::create(const LoopParts& parts,
                                                                 Options options,
                                                                 BackgroundOptions background,
                                                                 const std::string& failpoint) {
  RegistryStore store(parts.registry);
  TANDEM_ASSIGN_OR_RETURN(Snapshot snapshot, store.load());
  for (const auto& [name, model] : snapshot.tables.models) parts.files.add(model);
  log_info("registry: ", snapshot.tables.models.size(), " models, ",
           snapshot.tables.adapters.size(), " adapter versions, ", snapshot.tables.jobs.size(),
           " jobs, ", snapshot.results.size(), " cached results");
  return std::unique_ptr<CoordinatorLoop>(new CoordinatorLoop(
      parts, std::move(options), std::move(snapshot), std::move(background), failpoint));
}

CoordinatorLoop::CoordinatorLoop(const LoopParts& parts, Options options, Snapshot snapshot,
                                 BackgroundOptions background, const std::string& failpoint)
    : parts_(parts),
      store_(parts.registry),
      core_(std::move(options), std::move(snapshot), now()),
      failpoint_(failpoint),
      background_(parts.registry, std::move(background), [this](WorkDone done) {
        {
          std::lock_guard lock(done_mutex_);
          done_.push_back(std::move(done));
        }
        parts_.poller.wake();
      }) {}

Now CoordinatorLoop::now() const {
  return {parts_.clock.now_ms(), parts_.clock.unix_ms(), steady_ns() / 1000};
}

void CoordinatorLoop::run(const std::atomic<bool>& stop) {
  while (!stop && !ending_) {
    bool any = receive_workers();
    any = receive_clients() || any;
    any = take_done() || any;
    if (parts_.clock.now_ms() >= next_tick_ms_) {
      next_tick_ms_ = parts_.clock.now_ms() + kTickMs;
      step(Tick{refused_frames()});
    }
    flush(parts_.workers, worker_outbox_, false);
    flush(parts_.clients, client_outbox_, true);
    while (!inputs_.empty()) {
      const Input input = std::move(inputs_.front());
      inputs_.pop_front();
      step(input);
      if (const auto* gone = std::get_if<ClientGone>(&input)) gone_.erase(gone->peer);
    }
    if (any) continue;
    const bool owing = !client_outbox_.empty() || !worker_outbox_.empty();
    const TimeMs wait = next_tick_ms_ - parts_.clock.now_ms();
    parts_.poller.wait(std::clamp<TimeMs>(owing ? std::min<TimeMs>(wait, 2) : wait, 0, kTickMs));
  }
  // What was told to nobody yet (progress, cached results) is written before the end.
  step(Tick{refused_frames()});
}

std::uint64_t CoordinatorLoop::refused_frames() const {
  std::uint64_t refused = counters_.malformed + protocol::connections_turned_away();
  for (const protocol::ServerEndpoint* const endpoint : {&parts_.clients, &parts_.workers}) {
    const protocol::EndpointCounters counters = endpoint->counters();
    refused += counters.refused_frames + counters.refused_size + counters.refused_identity;
  }
  return refused;
}

bool CoordinatorLoop::receive_workers() {
  bool any = false;
  for (int i = 0; i < kWorkerMessagesPerTurn; ++i) {
    auto envelope = parts_.workers.receive(0);
    if (!envelope) break;
    any = true;
    auto message = protocol::decode_worker(envelope->frame);
    if (message.ok()) {
      step(WorkerInput{std::move(envelope->peer), std::move(envelope->user_id),
                       std::move(*message)});
    } else {
      ++counters_.malformed;
      log_warn("refused a worker's frame: ", message.status().message());
    }
  }
  return any;
}

bool CoordinatorLoop::receive_clients() {
  bool any = false;
  for (int i = 0; i < kClientMessagesPerTurn; ++i) {
    auto envelope = parts_.clients.receive(0);
    if (!envelope) break;
    any = true;
    const std::int64_t received_us = steady_ns() / 1000;
    auto message = protocol::decode_client(envelope->frame);
    if (message.ok()) {
      step(ClientInput{std::move(envelope->peer), std::move(envelope->user_id), std::move(*message),
                       received_us, envelope->admin});
    } else {
      ++counters_.malformed;
      log_debug("refused a client's frame: ", message.status().message());
    }
  }
  return any;
}

bool CoordinatorLoop::take_done() {
  std::deque<WorkDone> done;
  {
    std::lock_guard lock(done_mutex_);
    done.swap(done_);
  }
  for (WorkDone& work : done) step(std::move(work));
  return !done.empty();
}

void CoordinatorLoop::step(const Input& input) {
  const std::int64_t begin = steady_ns();
  carry_out(core_.step(now(), input));
  ++counters_.steps;
  counters_.step_us_max = std::max(counters_.step_us_max, (steady_ns() - begin) / 1000);
}

void CoordinatorLoop::carry_out(std::vector<Effect> effects) {
  bool persisted = false;
  if (!effects.empty())
    if (const auto* persist = std::get_if<Persist>(&effects.front())) {
      persisted = true;
      if (const Status status = commit(*persist); !status.ok()) {
        ++counters_.commit_failures;
        inputs_.emplace_back(CommitFailed{status});
        effects = without_commit(std::move(effects), status);
        // Before anything else is looked at: the tables must go back first.
        const Input failed = std::move(inputs_.back());
        inputs_.pop_back();
        std::vector<Effect> more = core_.step(now(), failed);
        std::move(more.begin(), more.end(), std::back_inserter(effects));
      } else {
        ++counters_.commits;
        serve_new_files(*persist);
        (void)failpoint_.hit("after_commit_before_send");
      }
    }
  for (Effect& effect : effects) {
    if (const auto* to_client = std::get_if<SendClient>(&effect))
      send_client(to_client->peer, to_client->message);
    else if (const auto* to_worker = std::get_if<SendWorker>(&effect))
      send_worker(to_worker->peer, to_worker->message);
    else if (auto* work = std::get_if<StartWork>(&effect))
      background_.start(std::move(*work));
    else if (const auto* line = std::get_if<LogLine>(&effect))
      log_line(line->level, line->text);
    else if (std::holds_alternative<Shutdown>(effect))
      ending_ = true;
  }
  if (persisted) (void)failpoint_.hit("after_send");
}

Status CoordinatorLoop::commit(const Persist& persist) {
  if (failpoint_.hit("before_commit")) return internal_error("failpoint before_commit");
  return store_.commit(persist.writes);
}

void CoordinatorLoop::serve_new_files(const Persist& persist) {
  for (const Write& write : persist.writes) {
    if (const auto* model = std::get_if<ModelRecord>(&write))
      parts_.files.add(*model);
    else if (const auto* erase = std::get_if<EraseModel>(&write))
      parts_.files.remove(erase->name);
  }
}

void CoordinatorLoop::send_client(const std::string& peer, const protocol::ServerMessage& message) {
  if (gone_.contains(peer)) return;
  if (!send(parts_.clients, client_outbox_, peer, protocol::encode(message))) client_gone(peer);
}

/// What follows lost messages would reach a client that reads again with a gap before it.
void CoordinatorLoop::client_gone(const std::string& peer) {
  if (gone_.insert(peer).second) inputs_.emplace_back(ClientGone{peer});
}

void CoordinatorLoop::send_worker(const std::string& peer,
                                  const protocol::ControlMessage& message) {
  (void)send(parts_.workers, worker_outbox_, peer, protocol::encode(message));
}

/// False when the peer is not there or reads nothing; its outbox is then gone.
bool CoordinatorLoop::send(protocol::ServerEndpoint& endpoint,
                           std::map<std::string, Outbox>& outboxes, const std::string& peer,
                           protocol::Bytes frame) {
  const auto waiting = outboxes.find(peer);
  if (waiting == outboxes.end()) {
    const Status sent = endpoint.send(peer, frame);
    if (sent.ok()) return true;
    if (sent.code() == StatusCode::kInvalid) {
      // Over the frame's limit: no retry can help; the message is ours, so this is worth a line.
      log_error("a message of ", frame.size(), " bytes could not be sent: ", sent.message());
      ++counters_.dropped;
      return true;
    }
    if (sent.code() != StatusCode::kBusy) return false;
  }
  Outbox& outbox = outboxes[peer];
  const auto bytes = static_cast<std::int64_t>(frame.size());
  if (outbox.frames.size() >= kOutboxMessagesMax || outbox.bytes + bytes > kOutboxBytesMax) {
    counters_.dropped += outbox.frames.size() + 1;
    log_warn("peer reads nothing: its ", outbox.frames.size(), " waiting messages are dropped");
    outboxes.erase(peer);
    return false;
  }
  outbox.bytes += bytes;
  outbox.frames.push_back(std::move(frame));
  return true;
}

void CoordinatorLoop::flush(protocol::ServerEndpoint& endpoint,
                            std::map<std::string, Outbox>& outboxes, bool clients) {
  for (auto peer = outboxes.begin(); peer != outboxes.end();) {
    Outbox& outbox = peer->second;
    bool gone = false;
    while (!outbox.frames.empty() && !gone) {
      const Status sent = endpoint.send(peer->first, outbox.frames.front());
      if (sent.code() == StatusCode::kBusy) break;
      gone = !sent.ok() && sent.code() != StatusCode::kInvalid;
      outbox.bytes -= static_cast<std::int64_t>(outbox.frames.front().size());
      outbox.frames.pop_front();
    }
    if (gone && clients) client_gone(peer->first);
    peer = gone || outbox.frames.empty() ? outboxes.erase(peer) : std::next(peer);
  }
}

}  // namespace tandem::coordinator
