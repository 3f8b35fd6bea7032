// Admission: validation, names, cache, sharing, the queue, and what clients do to their requests.
#include "coordinator/requests.h"

#include "protocol/base/sampling_limits.h"

#include <algorithm>
#include <cmath>

namespace tandem::coordinator {
namespace {

using protocol::FinishReason;
using protocol::GenerateChunk;

constexpr std::size_t kRequestIdBytesMax = 64;

/// The index in `chunks` from which a client that has `next_index` tokens goes on, or nothing when
/// that is inside a chunk (text cannot be cut by tokens) or beyond what there is.
std::optional<std::size_t> position_of(const std::vector<GenerateChunk>& chunks,
                                       std::int64_t start_index, std::int64_t next_index) {
  std::int64_t index = start_index;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    if (index == next_index) return i;
    index += static_cast<std::int64_t>(chunks[i].tokens.size());
  }
  if (index == next_index) return chunks.size();
  return std::nullopt;
}

Status bad(const char* field, const std::string& range, double value) {
  return invalid_error(str(field, " must be ", range, ", not ", value));
}

}  // namespace

Status validate_request(const protocol::Generate& request) {
  if (request.id.empty() || request.id.value.size() > kRequestIdBytesMax)
    return invalid_error(str("a request id must have 1 to ", kRequestIdBytesMax,
                             " characters, not ", request.id.value.size()));
  const int inputs = (request.input.messages.empty() ? 0 : 1) +
                     (request.input.prompt.empty() ? 0 : 1) +
                     (request.input.tokens.empty() ? 0 : 1);
  if (inputs != 1)
    return invalid_error(
        str("exactly one of messages, prompt and tokens must be given, not ", inputs));
  const protocol::SamplingParams& s = request.sampling;
  const auto outside = [](const std::optional<float>& value, double low, double high) {
    return value && !(*value >= low && *value <= high);  // true for NaN
  };
  const bool scores_only = s.max_tokens == 0 && s.prompt_logprobs_from >= 1;
  if (s.max_tokens && *s.max_tokens < 1 && !scores_only)
    return bad("max_tokens", "at least 1", static_cast<double>(*s.max_tokens));
  if (outside(s.temperature, 0, kTemperatureMax))
    return bad("temperature", str("in [0, ", kTemperatureMax, "]"), *s.temperature);
  if (outside(s.top_p, 0, 1) || (s.top_p && *s.top_p == 0.0f))
    return bad("top_p", "in (0, 1]", *s.top_p);
  if (outside(s.min_p, 0, 1)) return bad("min_p", "in [0, 1]", *s.min_p);
  if (s.top_k && *s.top_k < 0)
    return bad("top_k", "0 (off) or more", static_cast<double>(*s.top_k));
  if (outside(s.repetition_penalty, 0, kRepetitionPenaltyMax) || s.repetition_penalty == 0.0f)
    return bad("repetition_penalty", str("in (0, ", kRepetitionPenaltyMax, "]"),
               *s.repetition_penalty);
  const std::string penalties = str("in [-", kTokenPenaltyMax, ", ", kTokenPenaltyMax, "]");
  if (!(std::abs(s.presence_penalty) <= kTokenPenaltyMax))
    return bad("presence_penalty", penalties, s.presence_penalty);
  if (!(std::abs(s.frequency_penalty) <= kTokenPenaltyMax))
    return bad("frequency_penalty", penalties, s.frequency_penalty);
  if (s.stop.size() > kStopStringsMax)
    return bad("stop", str("at most ", kStopStringsMax, " strings"),
               static_cast<double>(s.stop.size()));
  if (s.logprobs < -1) return bad("logprobs", "-1 (none) or more", static_cast<double>(s.logprobs));
  if (s.prompt_logprobs_from < -1)
    return bad("prompt_logprobs_from", "-1 (none) or more",
               static_cast<double>(s.prompt_logprobs_from));
  if (s.min_tokens < 0) return bad("min_tokens", "0 or more", static_cast<double>(s.min_tokens));
  if (request.next_index < 0)
    return bad("next_index", "0 or more", static_cast<double>(request.next_index));
  if (request.deadline_ms < 0)
    return bad("deadline_ms", "0 (none) or more", static_cast<double>(request.deadline_ms));
  return {};
}

Requests::Requests(Context& context, WorkerTable& workers)
    : context_(context),
      workers_(workers),
      cache_(context.limits().results_bytes_max, context.limits().result_bytes_max),
      prefixes_(context.limits().prefixes_max) {}

void Requests::load(const std::vector<ResultRecord>& results) {
  std::vector<Digest> dropped;
  for (const ResultRecord& record : results) cache_.load(record, context_.now().unix_ms, dropped);
  for (const Digest& key : dropped) context_.put_lazy(EraseResult{key});
}

void Requests::generate(const std::string& peer, const std::string& user,
                        const protocol::Generate& request, std::int64_t received_us) {
  if (Status status = validate_request(request); !status.ok())
    return refuse(peer, request.id, status);
  if (rejoin(peer, user, request) || repeat_finished(peer, user, request)) return;
  auto target = resolve(context_.tables(), request.model);
  if (!target.ok()) return refuse(peer, request.id, target.status());
  if (!target->unservable.ok()) return refuse(peer, request.id, target->unservable);

  Execution execution;
  execution.id = request.id;
  execution.target = std::move(*target);
  execution.request = request;
  execution.signature =
      result_key(execution.target.model.digest, execution.target.adapter, user, request);
  // What a trainer serves as "latest" changes under one name, so it is neither shared nor kept.
  if (is_deterministic(request) && !request.no_cache && execution.target.job.empty())
    execution.key = execution.signature;
  execution.start_index = execution.next_index = request.next_index;
  Subscriber subscriber;
  subscriber.id = request.id;
  subscriber.peer = peer;
  subscriber.user = user;
  subscriber.next_index = request.next_index;
  subscriber.stream = request.stream;
  subscriber.arrival_us = received_us;
  if (request.deadline_ms > 0) subscriber.deadline_ms = context_.now().ms + request.deadline_ms;

  if (answer_from_cache(subscriber, execution)) return;
  if (Status status = admit(user); !status.ok()) {
    ++stats_.refused_busy;
    return refuse(peer, request.id, status, retry_after());
  }
  ++stats_.accepted;
  if (share(subscriber, execution)) return;
  if (Status status = may_queue(user); !status.ok()) {
    --stats_.accepted;
    ++stats_.refused_busy;
    return refuse(peer, request.id, status, retry_after());
  }
  execution.prefixes = prefix_chain(execution.target.model.digest, execution.target.adapter,
                                    request.input, context_.limits().prefix_depth_max);
  subscribe(execution, std::move(subscriber));
  enqueue(std::move(execution));
}

/// A client that sends its request again gets the rest of the running answer.
bool Requests::rejoin(const std::string& peer, const std::string& user,
                      const protocol::Generate& request) {
  const auto known = subscriptions_.find(request.id);
  if (known == subscriptions_.end()) return false;
  Execution& execution = executions_.at(known->second);
  for (Subscriber& subscriber : execution.subscribers) {
    if (subscriber.id != request.id) continue;
    const auto signature = result_key(execution.target.model.digest, execution.target.adapter,
                                      subscriber.user, request);
    if (signature != execution.signature || subscriber.user != user) {
      refuse(peer, request.id,
             conflict_error(
                 str("request ", request.id, " is running with another content; use a new id")));
      return true;
    }
    const auto position = position_of(execution.chunks, execution.start_index, request.next_index);
    if (!position) {
      // It lost more than this execution holds: computed again from where it stands.
      drop_subscriber(request.id, nullptr);
      return false;
    }
    subscriber.peer = peer;
    subscriber.orphan_since_ms = -1;
    subscriber.next_index = request.next_index;
    subscriber.position = *position;
    if (request.deadline_ms > 0) subscriber.deadline_ms = context_.now().ms + request.deadline_ms;
    deliver(execution, subscriber);
    return true;
  }
  return false;
}

bool Requests::repeat_finished(const std::string& peer, const std::string& user,
                               const protocol::Generate& request) {
  const auto known = finished_.find(request.id);
  if (known == finished_.end()) return false;
  Execution& execution = *known->second;
  const auto position = position_of(execution.chunks, execution.start_index, request.next_index);
  // All tokens but not the end: the last chunk is what the client lacks.
  const std::size_t last = execution.chunks.size() - 1;
  if (!position || execution.signature != result_key(execution.target.model.digest,
                                                     execution.target.adapter, user, request))
    return false;
  Subscriber subscriber;
  subscriber.id = request.id;
  subscriber.peer = peer;
  subscriber.next_index = request.next_index;
  subscriber.stream = request.stream;
  subscriber.arrival_us = execution.dispatched_us;
  subscriber.position = std::min(*position, last);
  deliver(execution, subscriber);
  return true;
}

void Requests::keep_finished(Execution& execution) {
  auto kept = std::make_shared<Execution>();
  kept->id = execution.id;
  kept->target.model.digest = execution.target.model.digest;
  kept->target.adapter = execution.target.adapter;
  kept->signature = execution.signature;
  kept->chunks = std::move(execution.chunks);
  kept->start_index = execution.start_index;
  kept->next_index = execution.next_index;
  kept->dispatched_us = execution.dispatched_us;
  for (const Subscriber& subscriber : execution.subscribers) {
    finished_[subscriber.id] = kept;
    finished_order_.emplace_back(context_.now().ms, subscriber.id);
  }
  while (finished_order_.size() > context_.limits().finished_max) {
    finished_.erase(finished_order_.front().second);
    finished_order_.pop_front();
  }
}

bool Requests::answer_from_cache(const Subscriber& subscriber, const Execution& execution) {
  if (execution.key.empty() || subscriber.next_index != 0) return false;
  const GenerateChunk* kept = cache_.find(execution.key, context_.now().unix_ms);
  if (kept == nullptr) return false;
  GenerateChunk chunk = *kept;
  chunk.id = subscriber.id;
  chunk.cached = true;
  chunk.queue_us = context_.now().us - subscriber.arrival_us;
  chunk.first_token_us = 0;
  context_.send_client(subscriber.peer, std::move(chunk));
  ++stats_.accepted;
  ++stats_.finished;
  return true;
}

bool Requests::share(const Subscriber& subscriber, const Execution& asked) {
  if (asked.key.empty()) return false;
  const auto flight = flights_.find(asked.key);
  if (flight == flights_.end()) return false;
  Execution& execution = executions_.at(flight->second);
  const auto position = position_of(execution.chunks, execution.start_index, subscriber.next_index);
  if (!position) return false;
  Subscriber joined = subscriber;
  joined.position = *position;
  subscribe(execution, std::move(joined));
  ++stats_.shared;
  deliver(execution, execution.subscribers.back());
  return true;
}

void Requests::subscribe(Execution& execution, Subscriber subscriber) {
  subscriptions_[subscriber.id] = execution.id;
  ++per_user_[subscriber.user];
  execution.subscribers.push_back(std::move(subscriber));
}

void Requests::unsubscribe(const Subscriber& subscriber) {
  subscriptions_.erase(subscriber.id);
  const auto count = per_user_.find(subscriber.user);
  if (count != per_user_.end() && --count->second == 0) per_user_.erase(count);
}

Status Requests::admit(const std::string& user) const {
  const auto count = per_user_.find(user);
  const std::size_t max = context_.limits().requests_per_user_max;
  if (count == per_user_.end() || count->second < max) return {};
  return busy_error(str("this user has ", count->second, " requests of at most ", max,
                        "; retry after ", retry_after(), " ms"));
}

Status Requests::may_queue(const std::string& user) const {
  const std::size_t all_max = context_.limits().queue_max,
                    user_max = context_.limits().queue_per_user_max;
  if (queue_.size() >= all_max)
    return busy_error(
        str("all ", all_max, " places in the queue are taken; retry after ", retry_after(), " ms"));
  if (user.empty() || queue_.size() < user_max) return {};
  const auto mine = std::count_if(queue_.begin(), queue_.end(), [&](const auto& waiting) {
    const auto& subscribers = executions_.at(waiting.second).subscribers;
    return std::any_of(subscribers.begin(), subscribers.end(),
                       [&](const Subscriber& one) { return one.user == user; });
  });
  if (static_cast<std::size_t>(mine) < user_max) return {};
  return busy_error(str("this user has ", mine, " requests in the queue of at most ", user_max,
                        "; retry after ", retry_after(), " ms"));
}

void Requests::enqueue(Execution execution) {
  execution.order = ++orders_;
  execution.queued_ms = context_.now().ms;
  // An execution whose first client left lives on for the others; the id is then taken.
  while (executions_.contains(execution.id)) execution.id.value += "+";
  for (const Subscriber& subscriber : execution.subscribers)
    subscriptions_[subscriber.id] = execution.id;
  queue_[execution.order] = execution.id;
  if (!execution.key.empty()) flights_.emplace(execution.key, execution.id);
  executions_.emplace(execution.id, std::move(execution));
}

void Requests::forget(const RequestId& id) {
  const auto found = executions_.find(id);
  Execution& execution = found->second;
  for (const Subscriber& subscriber : execution.subscribers) unsubscribe(subscriber);
  release_engine(execution, false);
  queue_.erase(execution.order);
  if (const auto flight = flights_.find(execution.key);
      flight != flights_.end() && flight->second == id)
    flights_.erase(flight);
  executions_.erase(found);
}

void Requests::refuse(const std::string& peer, const RequestId& id, const Status& status,
                      std::int64_t retry_after_ms) {
  GenerateChunk chunk;
  chunk.id = id;
  chunk.finish = FinishReason::kError;
  chunk.status = status;
  chunk.retry_after_ms = retry_after_ms;
  context_.send_client(peer, std::move(chunk));
}

void Requests::cancel(const std::string& user, const protocol::Cancel& cancel) {
  const auto known = subscriptions_.find(cancel.id);
  if (known == subscriptions_.end()) return;
  const auto& subscribers = executions_.at(known->second).subscribers;
  if (std::none_of(subscribers.begin(), subscribers.end(),
                   [&](const Subscriber& one) { return one.id == cancel.id && one.user == user; }))
    return;
  const Status status = cancelled_error("cancelled by the client");
  drop_subscriber(cancel.id, &status);
  ++stats_.cancelled;
}

void Requests::client_gone(const std::string& peer) {
  for (auto& [id, execution] : executions_)
    for (Subscriber& subscriber : execution.subscribers)
      if (subscriber.peer == peer && subscriber.orphan_since_ms < 0)
        subscriber.orphan_since_ms = context_.now().ms;
}

void Requests::drop_subscriber(const RequestId& id, const Status* tell) {
  const auto known = subscriptions_.find(id);
  if (known == subscriptions_.end()) return;
  Execution& execution = executions_.at(known->second);
  const auto subscriber = std::find_if(execution.subscribers.begin(), execution.subscribers.end(),
                                       [&](const Subscriber& s) { return s.id == id; });
  if (tell != nullptr) {
    GenerateChunk chunk;
    chunk.id = id;
    chunk.index = execution.next_index;
    chunk.finish =
        tell->code() == StatusCode::kCancelled ? FinishReason::kCancelled : FinishReason::kError;
    chunk.status = *tell;
    context_.send_client(subscriber->peer, std::move(chunk));
  }
  unsubscribe(*subscriber);
  execution.subscribers.erase(subscriber);
  if (!execution.subscribers.empty()) return;
  release_engine(execution, true);
  forget(execution.id);
}

std::int64_t Requests::retry_after() const {
  std::int64_t credits = 0;
  for (const auto& [id, worker] : workers_.all()) {
    if (workers_.usable(worker)) credits += worker.engine.credits;
    if (workers_.serves(worker)) credits += worker.gang.credits;
  }
  const double wait = service_ms_ * static_cast<double>(queue_.size()) /
                      static_cast<double>(std::max<std::int64_t>(credits, 1));
  return std::clamp(static_cast<std::int64_t>(wait), context_.limits().retry_after_ms,
                    context_.limits().no_engine_wait_ms);
}

std::map<Digest, std::size_t> Requests::demand() const {
  std::map<Digest, std::size_t> demand;
  for (const auto& [order, id] : queue_) ++demand[executions_.at(id).target.model.digest];
  return demand;
}

bool Requests::uses(const Digest& digest) const {
  return std::any_of(executions_.begin(), executions_.end(), [&](const auto& e) {
    return e.second.target.model.digest == digest || e.second.target.adapter == digest;
  });
}

RequestStats Requests::stats() const {
  RequestStats stats = stats_;
  stats.waiting = queue_.size();
  stats.running = executions_.size() - queue_.size();
  return stats;
}

std::set<std::string> Requests::peers() const {
  std::set<std::string> peers;
  for (const auto& [id, execution] : executions_)
    for (const Subscriber& subscriber : execution.subscribers) peers.insert(subscriber.peer);
  return peers;
}

std::size_t Requests::clear_cache() {
  const std::vector<Digest> keys = cache_.clear();
  for (const Digest& key : keys) context_.put(EraseResult{key});
  return keys.size();
}

}  // namespace tandem::coordinator
