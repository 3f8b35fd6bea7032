// Execution: engines are chosen, chunks come back and go to subscribers, engines die.
#include "coordinator/requests.h"

#include "protocol/answer_size.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace tandem::coordinator {

using protocol::FinishReason;
using protocol::GenerateChunk;

namespace {

/// Worth another engine, or the same one later: not the request's fault.
bool is_retryable(StatusCode code) {
  return code == StatusCode::kUnavailable || code == StatusCode::kBusy;
}

/// A model that these engines cannot load will not load later either.
bool is_permanent(StatusCode code) {
  return code == StatusCode::kInvalid || code == StatusCode::kNotFound ||
         code == StatusCode::kRefused || code == StatusCode::kCorrupt;
}

/// Serves, is about to, or did a short while ago and is started again.
bool is_or_was_there(const Replica& replica, const Context& context) {
  return replica.state == ReplicaState::kStarting || replica.state == ReplicaState::kServing ||
         (replica.epoch > 0 &&
          context.now().unix_ms - replica.updated_unix_ms < context.limits().no_engine_wait_ms);
}

/// The chunks from `position` on, put together into as few as `bytes_max` allows; the last one ends
/// the answer.
std::vector<GenerateChunk> join(const std::vector<GenerateChunk>& chunks, std::size_t position,
                                std::int64_t bytes_max) {
  std::vector<GenerateChunk> parts;
  std::int64_t bytes = 0;
  for (std::size_t i = position; i < chunks.size(); ++i) {
    const GenerateChunk& next = chunks[i];
    const std::int64_t more = protocol::answer_bytes(next);
    if (parts.empty() || bytes + more > bytes_max) {
      parts.push_back(next);
      bytes = more;
      continue;
    }
    bytes += more;
    GenerateChunk& part = parts.back();
    part.text += next.text;
    part.tokens.insert(part.tokens.end(), next.tokens.begin(), next.tokens.end());
    part.logprobs.insert(part.logprobs.end(), next.logprobs.begin(), next.logprobs.end());
    if (!next.prompt_logprobs.empty()) part.prompt_logprobs = next.prompt_logprobs;
    part.finish = next.finish;
    part.status = next.status;
    part.usage = next.usage;
    part.first_token_us = next.first_token_us;
  }
  return parts;
}

constexpr TimeMs kRetryDelayMs = 50;  // after kBusy and kUnavailable of an engine
constexpr double kServiceWeight = 0.1;

}  // namespace

void Requests::dispatch() {
  if (queue_.empty()) return;
  std::vector<RequestId> waiting;
  waiting.reserve(queue_.size());
  for (const auto& [order, id] : queue_) waiting.push_back(id);
  std::map<Digest, std::int64_t> credits;
  const auto count = [&](const Engine& engine) {
    if (engine.free_credits() > 0) credits[engine.model] += engine.free_credits();
  };
  for (const auto& [id, worker] : workers_.all()) {
    if (workers_.usable(worker)) count(worker.engine);
    if (workers_.serves(worker)) count(worker.gang);
  }
  for (const RequestId& id : waiting) {
    Execution& execution = executions_.at(id);
    const auto free = credits.find(execution.target.model.digest);
    if (free == credits.end() || free->second <= 0) continue;
    if (execution.not_before_ms > context_.now().ms) continue;
    Engine* engine = choose_engine(execution);
    if (engine == nullptr) continue;
    --free->second;
    send_to(*engine, execution);
  }
}

bool Requests::may_fit_elsewhere(const Execution& execution) {
  const Digest& model = execution.target.model.digest;
  for (const Engine* engine : workers_.serving(model))
    if (!execution.refused_by.contains(engine->name)) return true;
  for (const auto& [id, replica] : context_.tables().replicas)
    if (replica.model == model && !replica.removing && replica.state != ReplicaState::kServing &&
        is_or_was_there(replica, context_))
      return true;
  return false;
}

Engine* Requests::choose_engine(const Execution& execution) {
  const bool elsewhere = !execution.refused_by.empty() && may_fit_elsewhere(execution);
  const auto depths = prefixes_.depths(execution.prefixes);
  Engine* best = nullptr;
  std::tuple<int, int, int, std::size_t, std::int64_t> best_score;
  for (Engine* const candidate : workers_.serving(execution.target.model.digest)) {
    const Engine& engine = *candidate;
    if (elsewhere && execution.refused_by.contains(engine.name)) continue;
    const auto& job = execution.target.job;
    const bool trains_it =
        !job.empty() && std::any_of(engine.jobs.begin(), engine.jobs.end(),
                                    [&](const protocol::RunningJob& r) { return r.job == job; });
    // Whoever has its adapter or its prefix, and was too busy for it, would be chosen again.
    const bool failed_here = execution.last_engine == engine.name && execution.tries > 0;
    if (engine.free_credits() <= 0) {
      if (trains_it && !failed_here) return nullptr;  // it has the tensors: wait
      continue;
    }
    const bool resident =
        execution.target.adapter.empty() || engine.adapters.contains(execution.target.adapter);
    const auto depth = depths.find(engine.name);
    const bool trains = !engine.jobs.empty() && !is_replica(engine.jobs.front().job);
    const std::int64_t load = static_cast<std::int64_t>(engine.requests.size()) + (trains ? 4 : 0);
    const std::tuple score{failed_here ? 0 : 1, trains_it ? 1 : 0, resident ? 1 : 0,
                           depth == depths.end() ? std::size_t{0} : depth->second, -load};
    if (best == nullptr || score > best_score) {
      best = candidate;
      best_score = score;
    }
  }
  return best;
}

void Requests::send_to(Engine& engine, Execution& execution) {
  if (attempts_ == 0) {
    // Later starts of the coordinator count from higher numbers, so a chunk of an attempt before
    // the restart is never taken for one of now.
    constexpr std::int64_t kOrigin = 1'700'000'000;
    attempts_ = static_cast<std::uint32_t>((context_.now().unix_ms / 1000 - kOrigin) * 8);
  }
  queue_.erase(execution.order);
  execution.attempt = ++attempts_;
  execution.engine = engine.name;
  execution.last_engine = engine.name;
  ++execution.tries;
  execution.dispatched_ms = execution.heard_ms = context_.now().ms;
  execution.dispatched_us = context_.now().us;
  engine.requests.insert(execution.id);
  prefixes_.record(execution.prefixes, engine.name);

  protocol::Infer infer;
  infer.request = execution.request;
  infer.request.id = execution.id;
  infer.request.stream = std::any_of(execution.subscribers.begin(), execution.subscribers.end(),
                                     [](const Subscriber& s) { return s.stream; });
  infer.request.next_index = execution.next_index;
  infer.request.deadline_ms = 0;
  const bool all_timed = std::all_of(execution.subscribers.begin(), execution.subscribers.end(),
                                     [](const Subscriber& s) { return s.deadline_ms > 0; });
  if (all_timed)
    for (const Subscriber& s : execution.subscribers)
      infer.request.deadline_ms = std::max(infer.request.deadline_ms,
                                           std::max<TimeMs>(s.deadline_ms - context_.now().ms, 1));
  infer.attempt = execution.attempt;
  infer.model = execution.target.model;
  infer.adapter = execution.target.adapter;
  infer.adapter_manifest = execution.target.manifest;
  infer.job = execution.target.job;
  context_.send_worker(engine.peer, std::move(infer));
}

void Requests::chunk(Engine& engine, const protocol::InferChunk& message) {
  const auto found = executions_.find(message.chunk.id);
  if (found == executions_.end() || found->second.engine != engine.name) {
    context_.send_worker(engine.peer, protocol::InferCancel{message.chunk.id});
    return;
  }
  Execution& execution = found->second;
  if (execution.attempt != message.attempt) return;
  execution.heard_ms = context_.now().ms;
  const GenerateChunk& chunk = message.chunk;
  if (!chunk.status.ok()) {
    if (is_retryable(chunk.status.code())) return reroute(execution, chunk.status);
    if (chunk.status.code() == StatusCode::kRefused) {
      // An engine and a replica of one base do not hold the same number of tokens.
      execution.refused_by.insert(engine.name);
      if (may_fit_elsewhere(execution)) return reroute(execution, chunk.status);
    }
    return fail(execution, chunk.status, chunk.retry_after_ms);
  }
  if (chunk.finish == FinishReason::kCancelled)
    return reroute(execution, unavailable_error("the engine gave the request up"));
  const auto count = static_cast<std::int64_t>(chunk.tokens.size());
  if (chunk.index != execution.next_index) {
    if (chunk.index + count <= execution.next_index && chunk.finish == FinishReason::kNone)
      return;  // a repeat
    context_.send_worker(engine.peer, protocol::InferCancel{execution.id});
    return reroute(execution, unavailable_error(str("a part of the answer was lost: token ",
                                                    execution.next_index, " expected, ",
                                                    chunk.index, " came")));
  }
  execution.chunks.push_back(chunk);
  execution.next_index += count;
  stats_.tokens += static_cast<std::uint64_t>(count);
  if (!execution.target.adapter.empty()) engine.adapters.insert(execution.target.adapter);
  if (chunk.finish == FinishReason::kError)
    return fail(execution, internal_error("the engine ended the answer with an error"));
  for (Subscriber& subscriber : execution.subscribers) deliver(execution, subscriber);
  if (chunk.finish != FinishReason::kNone) finish(execution);
}

void Requests::deliver(Execution& execution, Subscriber& subscriber) {
  if (subscriber.orphan_since_ms >= 0) return;
  const bool ended =
      !execution.chunks.empty() && execution.chunks.back().finish != FinishReason::kNone;
  if (!subscriber.stream) {
    if (ended) send_whole(execution, subscriber);
    return;
  }
  while (subscriber.position < execution.chunks.size()) {
    GenerateChunk chunk = execution.chunks[subscriber.position++];
    decorate(execution, subscriber, chunk.index == subscriber.next_index, chunk);
    context_.send_client(subscriber.peer, std::move(chunk));
  }
}

void Requests::send_whole(const Execution& execution, const Subscriber& subscriber) {
  bool first = true;
  for (GenerateChunk& part :
       join(execution.chunks, subscriber.position, protocol::kAnswerPartBytesMax)) {
    decorate(execution, subscriber, std::exchange(first, false), part);
    context_.send_client(subscriber.peer, std::move(part));
  }
}

void Requests::decorate(const Execution& execution, const Subscriber& subscriber, bool first,
                        GenerateChunk& chunk) {
  chunk.id = subscriber.id;
  if (first || chunk.finish != FinishReason::kNone) {
    chunk.model = execution.target.model.digest;
    chunk.adapter = execution.target.adapter;
  }
  if (chunk.finish != FinishReason::kNone)
    chunk.queue_us = std::max<std::int64_t>(execution.dispatched_us - subscriber.arrival_us, 0);
}

void Requests::finish(Execution& execution) {
  keep_result(execution);
  const auto took = static_cast<double>(context_.now().ms - execution.dispatched_ms);
  service_ms_ += kServiceWeight * (took - service_ms_);
  stats_.finished += execution.subscribers.size();
  keep_finished(execution);
  forget(execution.id);
}

void Requests::fail(Execution& execution, const Status& status, std::int64_t retry_after_ms) {
  for (const Subscriber& subscriber : execution.subscribers) {
    GenerateChunk chunk;
    chunk.id = subscriber.id;
    chunk.index = execution.next_index;
    chunk.finish = FinishReason::kError;
    chunk.status = status;
    chunk.retry_after_ms = retry_after_ms;
    context_.send_client(subscriber.peer, std::move(chunk));
  }
  stats_.failed += execution.subscribers.size();
  forget(execution.id);
}

void Requests::keep_result(const Execution& execution) {
  if (execution.key.empty() || execution.start_index != 0) return;
  const FinishReason reason = execution.chunks.back().finish;
  if (reason != FinishReason::kStop && reason != FinishReason::kLength) return;
  // Without max_tokens an engine goes on as far as its own KV cache allows; another's may hold
  // more.
  if (reason == FinishReason::kLength && !execution.request.sampling.max_tokens) return;
  std::vector<GenerateChunk> parts = join(execution.chunks, 0, protocol::kAnswerPartBytesMax);
  if (parts.size() != 1) return;  // a cached answer is one message
  GenerateChunk& whole = parts.front();
  whole.id = {};
  whole.model = execution.target.model.digest;
  whole.adapter = execution.target.adapter;
  whole.queue_us = whole.first_token_us = 0;
  const std::string tenant =
      execution.subscribers.empty() ? "" : execution.subscribers.front().user;
  std::vector<Digest> evicted;
  auto record = cache_.insert(execution.key, tenant, whole, context_.now().unix_ms,
                              context_.limits().result_ttl_ms, evicted);
  for (const Digest& key : evicted) context_.put_lazy(EraseResult{key});
  if (record) context_.put_lazy(std::move(*record));
}

void Requests::release_engine(Execution& execution, bool tell_engine) {
  if (execution.engine.empty()) return;
  if (Engine* engine = workers_.engine(execution.engine)) {
    engine->requests.erase(execution.id);
    if (tell_engine && engine->alive)
      context_.send_worker(engine->peer, protocol::InferCancel{execution.id});
  }
  execution.engine = {};
}

void Requests::reroute(Execution& execution, const Status& why) {
  release_engine(execution, false);
  execution.last_error = why;
  ++stats_.rerouted;
  if (execution.tries >= context_.limits().request_attempts_max)
    return fail(execution, Status(why.code(), str("given up after ", execution.tries,
                                                  " engines or tries: ", why.message())));
  if (is_retryable(why.code())) execution.not_before_ms = context_.now().ms + kRetryDelayMs;
  queue_[execution.order] = execution.id;
}

std::vector<RequestId> Requests::adopt(Engine& engine, const std::vector<RequestId>& running) {
  const std::set<RequestId> named(running.begin(), running.end());
  std::vector<RequestId> stop;
  for (const RequestId& id : named)
    if (!engine.requests.contains(id)) stop.push_back(id);
  const std::set<RequestId> sent = engine.requests;
  for (const RequestId& id : sent)
    if (const auto found = executions_.find(id); found != executions_.end() && !named.contains(id))
      reroute(found->second, unavailable_error("the engine does not have the request any more"));
  return stop;
}

void Requests::engine_lost(const WorkerId& name, const std::string& reason) {
  prefixes_.forget(name);
  // By what was sent, not by what the engine's entry lists: that may be another process's by now.
  std::vector<RequestId> sent;
  for (const auto& [id, execution] : executions_)
    if (execution.engine == name) sent.push_back(id);
  for (const RequestId& id : sent)
    if (const auto found = executions_.find(id); found != executions_.end())
      reroute(found->second, unavailable_error(str("engine ", name, ": ", reason)));
}

Status Requests::may_wait(const Execution& execution) const {
  const Digest& model = execution.target.model.digest;
  bool any = false, all_refuse = true;
  Status refusal;
  for (const auto& [id, replica] : context_.tables().replicas)
    if (replica.model == model && !replica.removing && is_or_was_there(replica, context_))
      return {};
  for (const auto& [id, worker] : workers_.all()) {
    if (!worker.engine.alive) continue;
    if (worker.engine.model == model || worker.engine.loading == model) return {};
    any = true;
    // What failed before this request and may be tried again by now is tried again.
    const FailedLoad* failed = worker.engine.failed_load(model);
    if (failed != nullptr) refusal = failed->status;
    const bool refuses =
        failed != nullptr && is_permanent(failed->status.code()) &&
        (failed->at_ms >= execution.queued_ms || context_.now().ms < failed->not_before_ms);
    all_refuse = all_refuse && refuses;
  }
  if (any && all_refuse)
    return Status(refusal.code(), str("base ", execution.target.model.name,
                                      " cannot be loaded by any engine: ", refusal.message()));
  if (context_.now().ms - execution.queued_ms < context_.limits().no_engine_wait_ms) return {};
  if (!any)
    return unavailable_error(
        "no engine is connected; start workers with: tandem up, or "
        "mpirun -np N tandem-worker");
  return unavailable_error(
      str("no engine holds base ", execution.target.model.name, " and none is free to load it",
          refusal.ok() ? "" : str("; the last try ended with: ", refusal.message())));
}

void Requests::tick() {
  const TimeMs now = context_.now().ms;
  while (!finished_order_.empty() &&
         now - finished_order_.front().first > context_.limits().finished_kept_ms) {
    finished_.erase(finished_order_.front().second);
    finished_order_.pop_front();
  }
  std::vector<std::pair<RequestId, Status>> ended;
  std::vector<RequestId> orphans, forgotten;
  std::vector<std::pair<RequestId, Status>> hopeless;
  for (auto& [id, execution] : executions_) {
    for (const Subscriber& s : execution.subscribers) {
      if (s.deadline_ms > 0 && now >= s.deadline_ms)
        ended.emplace_back(s.id, timeout_error("the request's deadline passed"));
      else if (s.orphan_since_ms >= 0 && now - s.orphan_since_ms > context_.limits().orphan_ms)
        orphans.push_back(s.id);
    }
    if (execution.engine.empty()) {
      if (Status status = may_wait(execution); !status.ok()) hopeless.emplace_back(id, status);
      continue;
    }
    const Engine* engine = workers_.engine(execution.engine);
    const TimeMs idle_since = engine == nullptr ? -1 : engine->idle_since_ms;
    if (idle_since < 0) continue;
    const TimeMs since = std::max({idle_since, execution.dispatched_ms, execution.heard_ms});
    if (now - since > context_.limits().idle_engine_ms) forgotten.push_back(id);
  }
  for (const auto& [id, status] : ended) {
    drop_subscriber(id, &status);
    ++stats_.failed;
  }
  for (const RequestId& id : orphans) {
    drop_subscriber(id, nullptr);
    ++stats_.cancelled;
  }
  for (const auto& [id, status] : hopeless)
    if (const auto found = executions_.find(id); found != executions_.end())
      fail(found->second, status);
  for (const RequestId& id : forgotten)
    if (const auto found = executions_.find(id); found != executions_.end())
      reroute(found->second, unavailable_error("the engine forgot the request"));
}

}  // namespace tandem::coordinator
