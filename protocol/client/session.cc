#include "protocol/client/session.h"

#include "protocol/base/log.h"
#include "protocol/base/str.h"
#include "protocol/version.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <limits>

namespace tandem::protocol::client {
namespace {

constexpr TimeMs kHelloRepeatMs = 2'000;  // schema/client.capnp
constexpr TimeMs kTickMs = 100;           // the longest wait of the I/O thread
constexpr TimeMs kFarewellMs = 100;       // a closed socket drops what it has not written yet
constexpr TimeMs kSendAgainMs = 10;       // the socket's own queue was full
constexpr TimeMs kGapMs = 50;             // between two requests for what is missing
constexpr TimeMs kRepeatMsMax = 60'000;
constexpr TimeMs kBusyDefaultMs = 250, kBusyMsMax = 30'000;
constexpr int kSilencesMax = 3;  // heartbeats without a word before the hello is said again
constexpr std::size_t kFarewellsMax = 1024;
constexpr TimeMs kNever = std::numeric_limits<TimeMs>::max();

/// The "seq" of a stream's reply, or 0 when it has none.
std::int64_t seq_of(const std::string& result_json) {
  const auto json = nlohmann::json::parse(result_json, nullptr, false);
  if (!json.is_object()) return 0;
  const auto it = json.find("seq");
  return it != json.end() && it->is_number_integer() ? it->get<std::int64_t>() : 0;
}

/// A streaming call's parameters with "after" moved to what has arrived.
std::string params_after(const std::string& params_json, std::int64_t last_seq) {
  auto json = nlohmann::json::parse(params_json, nullptr, false);
  if (last_seq == 0 || !json.is_object()) return params_json;
  json["after"] = last_seq;
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace

const std::string& Operation::id() const {
  if (const auto* generate = std::get_if<Generate>(&request)) return generate->id.value;
  return std::get<Call>(request).call_id;
}

Session::Session(std::unique_ptr<ClientEndpoint> endpoint, const ClientOptions& options)
    : endpoint_(std::move(endpoint)), options_(options) {
  away_since_ms_ = now();
  thread_ = std::thread([this] { run(); });
}

Session::~Session() {
  stopping_ = true;
  endpoint_->wake();
  thread_.join();
  std::lock_guard lock(mutex_);
  for (auto& [id, operation] : open_) fail(*operation, cancelled_error("the client was closed"));
}

// -- calling threads ------------------------------------------------------------------------------

Status Session::wait_ready() {
  std::unique_lock lock(mutex_);
  ready_changed_.wait_for(lock, std::chrono::milliseconds(scaled_ms(options_.connect_ms)), [&] {
    return ready_ || fatal_.has_value() || trouble_.code() == StatusCode::kRefused;
  });
  if (fatal_.has_value()) return *fatal_;
  return ready_ ? Status() : unreachable();
}

Result<std::shared_ptr<Operation>> Session::open(std::variant<Generate, Call> request,
                                                 bool streaming) {
  auto operation = std::make_shared<Operation>();
  operation->request = std::move(request);
  operation->streaming = streaming;
  operation->opened_ms = now();
  operation->repeat_ms = scaled_ms(options_.repeat_ms);
  if (const auto* generate = std::get_if<Generate>(&operation->request)) {
    operation->next_index = generate->next_index;
    if (generate->deadline_ms > 0)
      operation->deadline_ms = operation->opened_ms + generate->deadline_ms;
  }
  {
    std::lock_guard lock(mutex_);
    if (fatal_.has_value()) return *fatal_;
    if (open_.size() >= kOpenOperationsMax)
      return busy_error(str("this client has ", open_.size(), " operations open, the limit is ",
                            kOpenOperationsMax, ": wait for some to end"));
    if (!open_.emplace(operation->id(), operation).second)
      return conflict_error(str("an operation with the id ", operation->id(), " is open already"));
    next_due_ms_ = 0;
  }
  endpoint_->wake();
  return operation;
}

Result<std::optional<ServerMessage>> Session::next(Operation& operation, TimeMs deadline_ms) {
  std::unique_lock lock(mutex_);
  const auto has_news = [&] {
    return !operation.unread.empty() || operation.ended || operation.failed.has_value();
  };
  const auto interrupted = [&] {
    return options_.interrupted != nullptr && options_.interrupted->load();
  };
  while (!has_news()) {
    if (interrupted()) return cancelled_error(str("request ", operation.id(), " was interrupted"));
    if (deadline_ms > 0 && now() >= deadline_ms)
      return timeout_error(str("no answer from ", options_.endpoint, " in time"));
    TimeMs wait = deadline_ms > 0 ? deadline_ms - now() : kNever;
    if (options_.interrupted != nullptr) wait = std::min(wait, kTickMs);
    if (wait == kNever)
      operation.changed.wait(lock, has_news);
    else
      operation.changed.wait_for(lock, std::chrono::milliseconds(std::max<TimeMs>(wait, 0)));
  }
  if (!operation.unread.empty()) {
    ServerMessage message = std::move(operation.unread.front());
    operation.unread.pop_front();
    if (operation.resync && operation.unread.empty()) {
      operation.resync = false;
      make_due(operation, 0);
      endpoint_->wake();
    }
    return std::optional(std::move(message));
  }
  if (operation.failed.has_value()) return *operation.failed;
  return std::optional<ServerMessage>();
}

void Session::close(const std::shared_ptr<Operation>& operation) {
  {
    std::lock_guard lock(mutex_);
    open_.erase(operation->id());
    const bool over = operation->ended || !ready_ || farewells_.size() >= kFarewellsMax;
    if (over) return;
    if (std::holds_alternative<Generate>(operation->request)) {
      farewells_.emplace_back(Cancel{RequestId(operation->id())});
    } else if (operation->streaming) {
      farewells_.emplace_back(CallCancel{operation->id()});
    } else {
      return;
    }
  }
  endpoint_->wake();
}

void Session::cancel(const RequestId& id) {
  std::lock_guard lock(mutex_);
  const auto it = open_.find(id.value);
  if (it != open_.end() && std::holds_alternative<Generate>(it->second->request))
    fail(*it->second, cancelled_error(str("request ", id, " was cancelled")));
}

ServerHello Session::server() const {
  std::lock_guard lock(mutex_);
  return server_;
}

// -- the I/O thread -------------------------------------------------------------------------------

void Session::run() {
  while (!stopping_) {
    auto envelope = endpoint_->receive(wait_ms());
    std::lock_guard lock(mutex_);
    follow_connection();
    if (envelope.has_value()) take(*envelope);
    watch_silence();
    if (now() >= next_due_ms_ || !farewells_.empty()) send_due();
  }
  say_farewells();
}

void Session::say_farewells() {
  {
    std::lock_guard lock(mutex_);
    const bool said_just_now = last_farewell_ms_ >= 0 && now() - last_farewell_ms_ < kFarewellMs;
    if (!ready_ || (farewells_.empty() && !said_just_now)) return;
    for (; !farewells_.empty(); farewells_.pop_front())
      static_cast<void>(endpoint_->send(encode(farewells_.front())));
  }
  const TimeMs end = now() + kFarewellMs;
  for (TimeMs left = kFarewellMs; left > 0; left = end - now())
    if (const auto answer = endpoint_->receive(left); answer.has_value()) {
      const auto message = decode_server(answer->frame);
      const auto* chunk = message.ok() ? std::get_if<GenerateChunk>(&*message) : nullptr;
      if (chunk != nullptr && chunk->finish == FinishReason::kCancelled) return;
    }
}

TimeMs Session::wait_ms() const {
  std::lock_guard lock(mutex_);
  return std::clamp<TimeMs>(next_due_ms_ - now(), 0, kTickMs);
}

void Session::follow_connection() {
  const bool same = endpoint_->connections() == connections_seen_;
  if (same && endpoint_->connected()) return;
  trouble_ = endpoint_->trouble();
  if (trouble_.code() == StatusCode::kRefused) ready_changed_.notify_all();
  if (ready_) {
    ready_ = false;
    away_since_ms_ = now();
  }
  connections_seen_ = endpoint_->connections();
  if (!same) {
    hello_sent_ms_ = -1;
    say_hello();
  }
}

void Session::say_hello() {
  if (!endpoint_->connected()) return;
  if (hello_sent_ms_ >= 0 && now() - hello_sent_ms_ < scaled_ms(kHelloRepeatMs)) return;
  hello_sent_ms_ = now();
  const Status sent =
      endpoint_->send(encode(ClientMessage(ClientHello{saying_, options_.program})));
  if (!sent.ok()) hello_sent_ms_ = -1;
}

void Session::take(const Envelope& envelope) {
  auto message = decode_server(envelope.frame);
  if (!message.ok()) {
    log_warn("dropped from ", options_.endpoint, ": ", message.status().message());
    return;
  }
  heard_ms_ = now();
  if (auto* hello = std::get_if<ServerHello>(&*message)) {
    take_hello(*hello);
  } else if (auto* chunk = std::get_if<GenerateChunk>(&*message)) {
    take_chunk(std::move(*chunk));
  } else if (auto* reply = std::get_if<CallReply>(&*message)) {
    take_reply(std::move(*reply));
  }
}

void Session::take_hello(const ServerHello& hello) {
  const auto agreed = agree_version(hello.version, str("coordinator ", hello.server));
  if (!hello.status.ok() && agreed.ok() && agreed->minor != saying_.minor) {
    saying_ = *agreed;  // refused, but it speaks a version that this side understands too
    hello_sent_ms_ = -1;
    say_hello();
    return;
  }
  if (!hello.status.ok() || !agreed.ok()) {
    fatal_ = hello.status.ok() ? agreed.status() : hello.status;
    for (auto& [id, operation] : open_) fail(*operation, *fatal_);
  } else {
    server_ = hello;
    if (!ready_)
      for (auto& [id, operation] : open_) make_due(*operation, 0);
    ready_ = true;
  }
  ready_changed_.notify_all();
}

void Session::take_chunk(GenerateChunk chunk) {
  const auto it = open_.find(chunk.id.value);
  if (it == open_.end() || it->second->ended) return;
  Operation& operation = *it->second;
  if (chunk.status.code() == StatusCode::kBusy &&
      retry_busy(operation, chunk.status, chunk.retry_after_ms))
    return;
  const auto size = static_cast<std::int64_t>(chunk.tokens.size());
  const bool failed = chunk.finish == FinishReason::kError;
  if (!failed && chunk.index + size <= operation.next_index &&
      (size > 0 || chunk.index < operation.next_index) && chunk.finish == FinishReason::kNone)
    return;  // a repeat
  if (!failed && chunk.index != operation.next_index) {
    if (operation.resync) return;
    // A gap, or a chunk that begins before what is missing: ask for exactly the next token, once
    // for all the chunks that come meanwhile.
    const TimeMs when = now() + kGapMs;
    if (operation.due_ms <= when) return;
    if (++operation.repeats > kRepeatsWithoutProgressMax) {
      fail(operation,
           corrupt_error(str("request ", chunk.id, ": token ", operation.next_index,
                             " did not come after ", operation.repeats - 1, " requests for it")));
      return;
    }
    make_due(operation, when);
    return;
  }
  operation.busy_since_ms = -1;
  const std::int64_t next = operation.next_index + size;
  const bool last = chunk.finish != FinishReason::kNone;
  if (!last && operation.unread.size() >= kUnreadRepliesMax) {
    operation.resync = true;
    return;
  }
  operation.next_index = next;
  // Asked for again, it must be the version it began with, whatever the alias means by then.
  if (auto* generate = std::get_if<Generate>(&operation.request); generate && !chunk.model.empty())
    generate->model = (chunk.adapter.empty() ? chunk.model : chunk.adapter).hex();
  deliver(operation, std::move(chunk), last);
}

void Session::take_reply(CallReply reply) {
  const auto it = open_.find(reply.call_id);
  if (it == open_.end() || it->second->ended) return;
  Operation& operation = *it->second;
  if (reply.status.code() == StatusCode::kBusy &&
      retry_busy(operation, reply.status, reply.retry_after_ms))
    return;
  operation.busy_since_ms = -1;
  const bool last = !(operation.streaming && reply.more && reply.status.ok());
  if (operation.streaming && !last) {
    const std::int64_t seq = seq_of(reply.result_json);
    if (seq != 0 && seq <= operation.last_seq) return;  // a repeat
    if (operation.unread.size() >= kUnreadRepliesMax) {
      operation.resync = true;
      return;
    }
    if (operation.resync) return;
    operation.last_seq = std::max(operation.last_seq, seq);
  }
  deliver(operation, std::move(reply), last);
}

bool Session::retry_busy(Operation& operation, const Status& status, std::int64_t retry_after_ms) {
  if (retry_after_ms == 0) retry_after_ms = retry_after_from_text(status.message());  // a 1.0 peer
  const TimeMs delay =
      retry_after_ms == 0 ? kBusyDefaultMs : std::min<TimeMs>(retry_after_ms, kBusyMsMax);
  if (operation.busy_since_ms < 0) operation.busy_since_ms = now();
  if (now() + delay - operation.busy_since_ms > scaled_ms(options_.busy_ms_max)) return false;
  make_due(operation, now() + delay);
  return true;
}

void Session::deliver(Operation& operation, ServerMessage message, bool last) {
  operation.repeats = 0;
  operation.repeat_ms = scaled_ms(options_.repeat_ms);
  make_due(operation, now() + operation.repeat_ms);
  operation.unread.push_back(std::move(message));
  operation.ended = last;
  operation.changed.notify_all();
}

void Session::watch_silence() {
  const TimeMs time = now();
  if (!ready_) {
    if (!fatal_.has_value()) say_hello();
    return;
  }
  const TimeMs heartbeat = server_.heartbeat_ms;  // scaled by the coordinator
  if (open_.empty() || heartbeat == 0) {
    heard_ms_ = time;
    return;
  }
  if (time - heard_ms_ > kSilencesMax * heartbeat) {
    ready_ = false;
    away_since_ms_ = time;
    hello_sent_ms_ = -1;
    say_hello();
  } else if (time - std::max(heard_ms_, pinged_ms_) > heartbeat) {
    pinged_ms_ = time;
    static_cast<void>(
        endpoint_->send(encode(ClientMessage(Ping{static_cast<std::uint64_t>(time)}))));
  }
}

void Session::send_due() {
  const TimeMs time = now();
  next_due_ms_ = kNever;
  for (; ready_ && !farewells_.empty(); farewells_.pop_front()) {
    static_cast<void>(endpoint_->send(encode(farewells_.front())));
    last_farewell_ms_ = time;
  }
  for (auto& [id, operation] : open_) {
    if (operation->ended || operation->failed.has_value()) continue;
    const TimeMs away_ms = time - std::max(away_since_ms_, operation->opened_ms);
    if (operation->deadline_ms > 0 && time > operation->deadline_ms + scaled_ms(1000)) {
      fail(*operation, timeout_error(str("request ", id, ": its deadline passed")));
      continue;
    }
    if (!ready_ && away_ms > scaled_ms(options_.reconnect_ms)) {
      fail(*operation, unreachable());
      continue;
    }
    if (ready_ && time >= operation->due_ms && !send_operation(*operation))
      operation->due_ms = time + kSendAgainMs;
    // While away, times are checked at every tick.
    next_due_ms_ = std::min(next_due_ms_, ready_ ? operation->due_ms : time + kTickMs);
  }
}

bool Session::send_operation(Operation& operation) {
  ClientMessage message;
  if (const auto* generate = std::get_if<Generate>(&operation.request)) {
    Generate again = *generate;
    again.next_index = operation.next_index;
    if (operation.deadline_ms > 0)
      again.deadline_ms = std::max<TimeMs>(1, operation.deadline_ms - now());
    message = std::move(again);
  } else {
    Call again = std::get<Call>(operation.request);
    if (operation.streaming)
      again.params_json = params_after(again.params_json, operation.last_seq);
    message = std::move(again);
  }
  const Status sent = endpoint_->send(encode(message));
  if (sent.code() == StatusCode::kInvalid) fail(operation, sent);
  if (!sent.ok()) return false;
  operation.due_ms = now() + operation.repeat_ms;
  operation.repeat_ms = std::min<TimeMs>(operation.repeat_ms * 2, scaled_ms(kRepeatMsMax));
  return true;
}

void Session::fail(Operation& operation, Status status) {
  if (operation.ended || operation.failed.has_value()) return;
  operation.failed = std::move(status);
  operation.changed.notify_all();
}

void Session::make_due(Operation& operation, TimeMs when_ms) {
  operation.due_ms = when_ms;
  next_due_ms_ = std::min(next_due_ms_, when_ms);
}

Status Session::unreachable() const {
  if (trouble_.code() == StatusCode::kRefused) return trouble_;
  const std::string& met = trouble_.message();
  const auto why = met.find(" (");
  return unavailable_error(str("no coordinator answers at ", options_.endpoint,
                               ": is it running? Start one with: tandem up",
                               why == std::string::npos ? "" : met.substr(why)));
}

}  // namespace tandem::protocol::client
