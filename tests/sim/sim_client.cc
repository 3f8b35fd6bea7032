#include "tests/sim/sim_client.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <functional>
#include <memory>

namespace tandem::sim {
namespace {

constexpr TimeMs kTickMs = 100, kRepeatMs = 1500, kSilentMs = 3000;

}  // namespace

SimClient::SimClient(Network& network, SimCoordinator& coordinator, int number, std::string model)
    : network_(network),
      coordinator_(coordinator),
      peer_(str("client", number)),
      model_(std::move(model)) {
  coordinator_.connect_client(peer_, [this](const auto& message) { hear(message); });
  const auto again = std::make_shared<std::function<void()>>();
  *again = [this, weak = std::weak_ptr(again)] {
    tick();
    if (auto next = weak.lock()) network_.after(kTickMs, [next] { (*next)(); });
  };
  network_.after(1, [again] { (*again)(); });
}

void SimClient::submit(std::string adapter, int ranks, bool elastic, int priority) {
  Submission submission;
  submission.key = str(peer_, "-key-", ++counter_);
  const nlohmann::json train =
      elastic ? nlohmann::json{{"dp", ranks}, {"dp_min", 1}, {"gradient_accumulation_steps", ranks}}
              : nlohmann::json{{"tp", ranks}};
  const nlohmann::json spec{{"model", model_},
                            {"dataset", "rows"},
                            {"adapter", adapter},
                            {"priority", priority},
                            {"train", train}};
  submission.params = nlohmann::json{{"spec", spec}}.dump();
  submissions_[submission.key] = std::move(submission);
}

void SimClient::generate(const std::string& name, const std::string& prompt) {
  Request request;
  request.generate.id = RequestId(str(peer_, "-request-", ++counter_));
  request.generate.model = name;
  request.generate.input.prompt = prompt;
  request.generate.sampling.temperature = 0.0f;
  request.generate.stream = counter_ % 3 != 0;
  request.generate.no_cache = counter_ % 4 == 0;
  requests_[request.generate.id.value] = std::move(request);
}

void SimClient::cancel_a_job() {
  for (auto& [key, submission] : submissions_)
    if (!submission.job.empty() && !submission.cancel) {
      submission.cancel = true;
      return;
    }
}

void SimClient::add_replica() {
  Replica replica;
  replica.key = str(peer_, "-replica-", ++counter_);
  replicas_[replica.key] = std::move(replica);
}

void SimClient::remove_a_replica() {
  for (auto& [key, replica] : replicas_)
    if (!replica.id.empty() && !replica.remove) {
      replica.remove = true;
      return;
    }
}

void SimClient::remove_replicas() {
  for (auto& [key, replica] : replicas_) replica.remove = true;
}

bool SimClient::idle() const {
  return std::all_of(replicas_.begin(), replicas_.end(),
                     [](const auto& r) {
                       return !r.second.id.empty() && (!r.second.remove || r.second.gone);
                     }) &&
         std::all_of(
             submissions_.begin(), submissions_.end(),
             [](const auto& s) { return !s.second.job.empty() || !s.second.refused.empty(); }) &&
         std::all_of(requests_.begin(), requests_.end(),
                     [](const auto& r) { return r.second.done; });
}

void SimClient::tick() {
  const TimeMs now = network_.now();
  if (now - heard_ms_ > kSilentMs) greeted_ = false;
  if (!greeted_ && now - hello_ms_ >= 500) {
    hello_ms_ = now;
    coordinator_.from_client(peer_, protocol::ClientHello{{}, "sim"});
  }
  if (!greeted_) return;
  if (now % 1000 < kTickMs) coordinator_.from_client(peer_, protocol::Ping{1});
  for (auto& [key, s] : submissions_) {
    if (now - s.sent_ms < kRepeatMs) continue;
    s.sent_ms = now;
    if (s.job.empty() && s.refused.empty())
      coordinator_.from_client(peer_, protocol::Call{key, key, "job.submit", s.params});
    else if (s.cancel)
      coordinator_.from_client(peer_, protocol::Call{key + "-cancel", key + "-cancel", "job.cancel",
                                                     nlohmann::json{{"job", s.job}}.dump()});
  }
  for (auto& [key, r] : replicas_) {
    if (now - r.sent_ms < kRepeatMs) continue;
    r.sent_ms = now;
    if (r.id.empty())
      coordinator_.from_client(peer_,
                               protocol::Call{key, key, "replica.add",
                                              nlohmann::json{{"model", model_}, {"tp", 2}}.dump()});
    else if (r.remove && !r.gone)
      coordinator_.from_client(peer_, protocol::Call{key, str(key, "-rm-", now), "replica.rm",
                                                     nlohmann::json{{"replica", r.id}}.dump()});
  }
  for (auto& [id, r] : requests_) {
    if (r.done || now - r.moved_ms < kRepeatMs) continue;
    r.moved_ms = now;
    r.generate.next_index = static_cast<std::int64_t>(r.tokens.size());
    // The version it began with, whatever the alias means by now.
    if (!r.tokens.empty() && !r.adapter.empty()) r.generate.model = r.adapter.hex();
    coordinator_.from_client(peer_, r.generate);
  }
}

void SimClient::hear(const protocol::ServerMessage& message) {
  heard_ms_ = network_.now();
  if (const auto* hello = std::get_if<protocol::ServerHello>(&message)) {
    greeted_ = hello->status.ok();
    if (server_ != hello->incarnation)
      for (auto& [id, r] : requests_) r.moved_ms = -100'000;
    server_ = hello->incarnation;
  } else if (const auto* reply = std::get_if<protocol::CallReply>(&message)) {
    on_reply(*reply);
  } else if (const auto* chunk = std::get_if<protocol::GenerateChunk>(&message)) {
    on_chunk(*chunk);
  }
}

void SimClient::on_replica_reply(Replica& replica, const protocol::CallReply& reply) {
  const auto json = nlohmann::json::parse(reply.result_json, nullptr, false);
  if (reply.status.ok() && json.contains("replicas")) {
    const auto id = json["replicas"].at(0)["replica"].get<std::string>();
    if (!replica.id.empty() && replica.id != id)
      coordinator_.violation(str(replica.key, " answered with ", replica.id, " and ", id));
    replica.id = id;
  }
  // Only when it is not there any more is it gone.
  replica.gone = replica.gone || (replica.remove && !replica.id.empty() &&
                                  reply.status.code() == StatusCode::kNotFound);
}

void SimClient::on_reply(const protocol::CallReply& reply) {
  if (const auto replica = replicas_.find(reply.call_id); replica != replicas_.end())
    return on_replica_reply(replica->second, reply);
  const auto found = submissions_.find(reply.call_id);
  if (found == submissions_.end()) return;
  Submission& s = found->second;
  if (reply.status.ok()) {
    const auto job = nlohmann::json::parse(reply.result_json)["job"].get<std::string>();
    if (!s.job.empty() && s.job != job)
      coordinator_.violation(str("submission ", s.key, " answered with ", s.job, " and ", job));
    s.job = job;
  } else if (reply.status.code() == StatusCode::kInvalid ||
             reply.status.code() == StatusCode::kNotFound) {
    s.refused = reply.status.message();
  }
}

void SimClient::on_chunk(const protocol::GenerateChunk& chunk) {
  const auto found = requests_.find(chunk.id.value);
  if (found == requests_.end() || found->second.done) return;
  Request& r = found->second;
  r.moved_ms = network_.now();
  if (!chunk.status.ok()) {
    const StatusCode code = chunk.status.code();
    if (code == StatusCode::kBusy || code == StatusCode::kUnavailable) return;  // again later
    r.failed = chunk.status;
    r.done = true;
    return;
  }
  const auto have = static_cast<std::int64_t>(r.tokens.size());
  const auto count = static_cast<std::int64_t>(chunk.tokens.size());
  if (chunk.index > have || chunk.index + count < have) return;  // a part is missing: ask again
  if (!chunk.adapter.empty()) r.adapter = chunk.adapter;
  for (std::int64_t i = have - chunk.index; i < count; ++i)
    r.tokens.push_back(chunk.tokens[static_cast<std::size_t>(i)]);
  r.cached = r.cached || chunk.cached;
  if (chunk.finish != protocol::FinishReason::kNone) r.done = true;
}

}  // namespace tandem::sim
