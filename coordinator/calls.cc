// The frame of every call: which verb, whose, answered before, answered when.
#include "coordinator/calls.h"

#include "coordinator/views.h"

#include <algorithm>

namespace tandem::coordinator {
namespace {

constexpr std::size_t kRepeatsMax = 16;  // different calls of one idempotency key that wait

}  // namespace

const std::map<std::string, Calls::Verb>& Calls::verbs() {
  static const std::map<std::string, Verb> table{
      {"status", {&Calls::status, false}},
      {"model.add", {&Calls::model_add, true}},
      {"model.list", {&Calls::model_list, false}},
      {"model.show", {&Calls::model_show, false}},
      {"model.rm", {&Calls::model_rm, true}},
      {"data.add", {&Calls::data_add, true}},
      {"data.list", {&Calls::data_list, false}},
      {"data.show", {&Calls::data_show, false}},
      {"data.rm", {&Calls::data_rm, true}},
      {"job.submit", {&Calls::job_submit, true}},
      {"job.list", {&Calls::job_list, false}},
      {"job.show", {&Calls::job_show, false}},
      {"job.watch", {&Calls::job_watch, false}},
      {"job.logs", {&Calls::job_logs, false}},
      {"job.cancel", {&Calls::job_cancel, true}},
      {"job.pause", {&Calls::job_pause, true}},
      {"job.resume", {&Calls::job_resume, true}},
      {"job.rm", {&Calls::job_rm, true}},
      {"job.restore", {&Calls::job_restore, true}},
      {"adapter.list", {&Calls::adapter_list, false}},
      {"adapter.show", {&Calls::adapter_show, false}},
      {"adapter.alias", {&Calls::adapter_alias, true}},
      {"adapter.rollback", {&Calls::adapter_rollback, true}},
      {"adapter.rm", {&Calls::adapter_rm, true}},
      {"adapter.import", {&Calls::adapter_import, true}},
      {"adapter.manifest", {&Calls::adapter_manifest, false}},
      {"estimate", {&Calls::estimate, false}},
      {"replica.add", {&Calls::replica_add, true}},
      {"replica.list", {&Calls::replica_list, false}},
      {"replica.rm", {&Calls::replica_rm, true}},
      {"worker.list", {&Calls::worker_list, false}},
      {"worker.drain", {&Calls::worker_drain, true}},
      {"worker.resume", {&Calls::worker_resume, true}},
      {"worker.restart", {&Calls::worker_restart, true}},
      {"cache.stats", {&Calls::cache_stats, false}},
      {"cache.clear", {&Calls::cache_clear, true}},
      {"registry.check", {&Calls::registry_check, false}},
      {"registry.gc", {&Calls::registry_gc, true}},
      {"registry.backup", {&Calls::registry_backup, true}},
      {"key.create", {&Calls::key_create, true, true}},
      {"key.list", {&Calls::key_list, false}},
      {"key.revoke", {&Calls::key_revoke, true, true}},
      {"config.show", {&Calls::config_show, false}},
      {"shutdown", {&Calls::shutdown, true, true}},
  };
  return table;
}

Calls::Calls(const Parts& parts)
    : context_(parts.context),
      workers_(parts.workers),
      estimates_(parts.estimates),
      jobs_(parts.jobs),
      requests_(parts.requests),
      replicas_(parts.replicas) {}

void Calls::handle(const std::string& peer, const std::string& user, const protocol::Call& call,
                   bool admin) {
  if (started_ms_ < 0) started_ms_ = context_.now().ms;
  Ask ask{peer,         user,
          call.call_id, call.idempotency_key,
          call.method,  sha256(str(call.method, "\n", call.params_json))};
  const auto verb = verbs().find(call.method);
  if (verb == verbs().end()) {
    std::vector<std::string> known;
    for (const auto& [name, entry] : verbs()) known.push_back(name);
    const std::string nearest = nearest_name(call.method, known);
    return reply(ask,
                 invalid_error(str("no method ", call.method,
                                   nearest.empty() ? "" : str("; did you mean ", nearest, "?"))));
  }
  if (verb->second.admin && !admin)
    return send_reply(ask,
                      refused_error(str(call.method, " needs a key of role admin; ", user,
                                        "'s is client: ask an administrator")),
                      "", false);
  if (verb->second.changes && ask.key.empty())
    return reply(ask, invalid_error(str(call.method,
                                        " changes something, so it needs an idempotency "
                                        "key: one that comes twice is done once")));
  if (!verb->second.changes) ask.key.clear();
  if (!ask.key.empty() && replay(ask)) return;
  if (ending() && verb->second.changes)
    return reply(ask, unavailable_error("the coordinator is shutting down"));
  if (pending_.size() >= context_.limits().pending_calls_max)
    return reply(ask, busy_error(str("all ", context_.limits().pending_calls_max,
                                     " places for waiting calls are taken; retry after ",
                                     context_.limits().retry_after_ms, " ms")));
  Params params(call.method, call.params_json);
  (this->*verb->second.handler)(ask, params);
}

bool Calls::replay(const Ask& ask) {
  const auto known = context_.tables().idempotency.find(std::pair(ask.user, ask.key));
  if (known != context_.tables().idempotency.end()) {
    if (known->second.request != ask.request) {
      reply(Ask{ask.peer, ask.user, ask.call_id, "", ask.method, {}},
            conflict_error(str("idempotency key ", ask.key,
                               " was used for another call; use a new key for a new call")));
      return true;
    }
    if (ask.method == "job.submit") {
      const JobId id(parse_object(known->second.result).value("job", std::string()));
      if (context_.tables().jobs.contains(id)) {
        const bool waits = std::any_of(submit_asks_.begin(), submit_asks_.end(),
                                       [&](const auto& one) { return one.second.repeats(ask); });
        if (waits) return true;
        if (submit_asks_.size() >= context_.limits().pending_calls_max)
          send_reply(ask,
                     busy_error(str("too many calls wait; retry after ",
                                    context_.limits().retry_after_ms, " ms")),
                     "", false);
        else
          submit_asks_.emplace_back(id, ask);
        return true;
      }
    }
    if (ask.method == "key.create") {
      reply(Ask{ask.peer, ask.user, ask.call_id, "", ask.method, {}},
            conflict_error("this key was created already and its secret is kept nowhere; revoke it "
                           "and create another"));
      return true;
    }
    send_reply(ask, {}, known->second.result, false);
    return true;
  }
  const auto running = pending_keys_.find(std::pair(ask.user, ask.key));
  if (running == pending_keys_.end()) return false;
  Pending& pending = pending_.at(running->second);
  if (pending.asks.front().request != ask.request) {
    send_reply(ask, conflict_error(str("idempotency key ", ask.key, " is in use by another call")),
               "", false);
    return true;
  }
  wait_too(pending.asks, ask);
  return true;
}

void Calls::wait_too(std::vector<Ask>& asks, const Ask& ask) {
  if (std::any_of(asks.begin(), asks.end(), [&](const Ask& one) { return one.repeats(ask); }))
    return;
  if (asks.size() >= kRepeatsMax)
    return send_reply(ask,
                      busy_error(str(asks.size(), " calls with this idempotency key wait; ",
                                     "retry after ", context_.limits().retry_after_ms, " ms")),
                      "", false);
  asks.push_back(ask);
}

void Calls::remember(const Ask& ask, const std::string& result) {
  if (ask.key.empty()) return;
  const auto& known = context_.tables().idempotency;
  if (known.contains(std::pair(ask.user, ask.key))) return;
  if (known.size() >= context_.limits().idempotency_max) {
    const auto oldest =
        std::min_element(known.begin(), known.end(), [](const auto& a, const auto& b) {
          return a.second.created_unix_ms < b.second.created_unix_ms;
        });
    context_.put(EraseIdempotency{oldest->second.tenant, oldest->second.key});
  }
  context_.put(IdempotencyRecord{ask.user, ask.key, ask.request, result, context_.now().unix_ms});
}

void Calls::reply(const Ask& ask, const Status& status, const Json& result) {
  const std::string text = status.ok() ? dump(result.is_null() ? Json::object() : result) : "";
  if (status.ok()) remember(ask, text);
  send_reply(ask, status, text, false);
}

void Calls::send_reply(const Ask& ask, const Status& status, const std::string& result, bool more) {
  if (static_cast<std::int64_t>(result.size()) > protocol::kCallJsonBytesMax)
    return send_reply(
        ask,
        refused_error(str("the answer to ", ask.method, " takes ", result.size(),
                          " bytes, and an answer may have ", protocol::kCallJsonBytesMax)),
        "", false);
  const std::int64_t retry =
      status.code() == StatusCode::kBusy ? context_.limits().retry_after_ms : 0;
  protocol::CallReply message;
  message.call_id = ask.call_id;
  message.status = status;
  message.result_json = result;
  message.more = more;
  message.retry_after_ms = retry;
  context_.send_client(ask.peer, std::move(message));
}

void Calls::start(const Ask& ask, WorkRequest request,
                  std::function<void(const Ask&, const WorkResult&)> finish) {
  const std::uint64_t id = context_.start_work(std::move(request));
  pending_[id] = {{ask}, std::move(finish)};
  if (!ask.key.empty()) pending_keys_[std::pair(ask.user, ask.key)] = id;
}

bool Calls::work_done(const WorkDone& done) {
  if (done.id == gc_work_) {
    gc_work_ = 0;
    const auto* result = std::get_if<JsonDone>(&done.result);
    context_.log(done.status.ok() ? LogLevel::kInfo : LogLevel::kWarn,
                 "garbage collection: ", result != nullptr ? result->json : done.status.message());
    return true;
  }
  const auto found = pending_.find(done.id);
  if (found == pending_.end()) return false;
  const Pending pending = std::move(found->second);
  pending_.erase(found);
  const Ask& first = pending.asks.front();
  if (!first.key.empty()) pending_keys_.erase(std::pair(first.user, first.key));
  if (!done.status.ok()) {
    for (const Ask& ask : pending.asks) reply(ask, done.status);
    return true;
  }
  pending.finish(first, done.result);
  for (std::size_t i = 1; i < pending.asks.size(); ++i)
    if (!replay(pending.asks[i]))
      reply(pending.asks[i], unavailable_error("the first call of this key failed; repeat it"));
  return true;
}

void Calls::cancel(const std::string& peer, const protocol::CallCancel& cancel) {
  streams_.erase(std::pair(peer, cancel.call_id));
}

void Calls::client_gone(const std::string& peer) {
  std::erase_if(streams_, [&](const auto& s) { return s.first.first == peer; });
}

std::set<std::string> Calls::watchers() const {
  std::set<std::string> peers;
  for (const auto& [key, stream] : streams_) peers.insert(key.first);
  return peers;
}

std::string Calls::start_dry_run(const Ask& ask,
                                 std::function<Result<Json>(const std::string&)> finish) {
  for (auto& [id, run] : dry_runs_) {
    const Ask& first = run.asks.front();
    if (ask.key.empty() || first.user != ask.user || first.key != ask.key) continue;
    if (first.request == ask.request)
      wait_too(run.asks, ask);
    else
      send_reply(ask,
                 conflict_error(str("idempotency key ", ask.key, " is in use by another call")), "",
                 false);
    return "";
  }
  if (dry_runs_.size() >= context_.limits().pending_calls_max) {
    reply(ask, busy_error(str("all ", context_.limits().pending_calls_max,
                              " places for dry runs are taken; retry after ",
                              context_.limits().retry_after_ms, " ms")));
    return "";
  }
  std::string id = str("call:", ++estimate_ids_);
  dry_runs_[id] = {{ask}, std::move(finish)};
  return id;
}

void Calls::estimated(const EstimateOutcome& outcome) {
  const auto found = dry_runs_.find(outcome.id);
  if (found == dry_runs_.end()) return;
  const DryRun run = std::move(found->second);
  dry_runs_.erase(found);
  const auto result = [&]() -> Result<Json> {
    TANDEM_RETURN_IF_ERROR(outcome.status);
    if (ending()) return unavailable_error("the coordinator is shutting down");
    return run.finish(outcome.result_json);
  }();
  for (const Ask& ask : run.asks) result.ok() ? answer(ask, *result) : reply(ask, result.status());
}

void Calls::after_step() {
  for (const JobEventRecord& event : jobs_.take_new_events())
    for (auto& [key, stream] : streams_)
      if (stream.job.value == event.job && !stream.loading) stream_event(stream, event);
  std::erase_if(streams_, [&](const auto& entry) {
    const Stream& stream = entry.second;
    const auto job = context_.tables().jobs.find(stream.job);
    const bool over = job == context_.tables().jobs.end() || is_terminal(job->second.state);
    if (!over || stream.loading) return false;
    end_stream(stream);
    return true;
  });
  std::vector<std::pair<JobId, Ask>> waiting;
  for (auto& [id, ask] : std::exchange(submit_asks_, {})) {
    const auto job = context_.tables().jobs.find(id);
    const bool settled =
        job != context_.tables().jobs.end() && (job->second.state != JobState::kEstimating);
    if (settled)
      answer_submit(ask, job->second);
    else if (job != context_.tables().jobs.end())
      waiting.emplace_back(id, ask);
    else
      send_reply(ask, internal_error("the job could not be stored; submit it again"), "", false);
  }
  submit_asks_ = std::move(waiting);
}

void Calls::tick() {
  if (started_ms_ < 0) started_ms_ = context_.now().ms;
  if (gc_ms_ < 0) gc_ms_ = context_.now().ms;
  const std::int64_t oldest = context_.now().unix_ms - context_.limits().idempotency_ttl_ms;
  std::vector<EraseIdempotency> old;
  for (const auto& [key, record] : context_.tables().idempotency)
    if (record.created_unix_ms < oldest) old.push_back({record.tenant, record.key});
  for (EraseIdempotency& erase : old) context_.put_lazy(std::move(erase));
  // Checkpoints that newer ones replaced, what interrupted uploads left: nobody else removes them.
  if (context_.now().ms - gc_ms_ >= context_.limits().gc_ms && gc_work_ == 0) {
    gc_ms_ = context_.now().ms;
    gc_work_ = context_.start_work(Maintain{Maintenance::kGc, "", false});
  }
  if (!ending()) return;
  const bool busy = replicas_.any_placed() ||
                    std::any_of(context_.tables().jobs.begin(), context_.tables().jobs.end(),
                                [](const auto& j) { return holds_engine(j.second.state); });
  if (busy && context_.now().ms < ending_deadline_ms_) return;
  send_reply(ending_ask_, {}, "{}", false);
  context_.shutdown();
}

}  // namespace tandem::coordinator
