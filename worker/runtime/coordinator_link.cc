#include "worker/runtime/coordinator_link.h"

#include "protocol/base/log.h"
#include "protocol/codec.h"

#include <algorithm>

namespace tandem::worker::runtime {
namespace {
constexpr TimeMs kHelloRetryMs = 250;
}

CoordinatorLink::CoordinatorLink(std::unique_ptr<protocol::ClientEndpoint> endpoint,
                                 const Clock& clock, Callbacks callbacks)
    : endpoint_(std::move(endpoint)), clock_(clock), callbacks_(std::move(callbacks)) {
  heard_ms_ = clock_.now_ms();
}

void CoordinatorLink::rehello() {
  state_ = State::kGreeting;
  next_hello_ms_ = 0;
}

void CoordinatorLink::tick() {
  const TimeMs now = clock_.now_ms();
  if (const std::uint64_t connections = endpoint_->connections();
      connections != connections_seen_) {
    connections_seen_ = connections;  // another connection, perhaps another coordinator
    rehello();
  }
  if (state_ == State::kReady && now - heard_ms_ > lease_ms_) {
    log_warn("no word from the coordinator for ", now - heard_ms_,
             " ms; saying hello until it answers");
    rehello();
  }
  if (state_ == State::kGreeting && now >= next_hello_ms_) {
    // Not connected is an expected answer here: the transport reconnects and we try again.
    if (auto hello = callbacks_.hello())
      (void)endpoint_->send(protocol::encode(protocol::WorkerMessage{std::move(*hello)}));
    next_hello_ms_ = now + scaled_ms(kHelloRetryMs);
  }
  if (state_ == State::kReady && now >= next_heartbeat_ms_) {
    if (auto beat = callbacks_.heartbeat(++seq_))
      (void)endpoint_->send(protocol::encode(protocol::WorkerMessage{std::move(*beat)}));
    next_heartbeat_ms_ = now + heartbeat_ms_;
  }
}

std::optional<protocol::ControlMessage> CoordinatorLink::poll(TimeMs timeout_ms) {
  tick();
  const TimeMs next = state_ == State::kReady ? next_heartbeat_ms_ : next_hello_ms_;
  const TimeMs wait = std::clamp<TimeMs>(next - clock_.now_ms(), 0, timeout_ms);
  auto envelope = endpoint_->receive(wait);
  if (!envelope) return std::nullopt;
  auto message = protocol::decode_control(envelope->frame);
  if (!message.ok()) {
    log_warn("dropped a malformed message of the coordinator: ", message.status().message());
    return std::nullopt;
  }
  heard_ms_ = clock_.now_ms();
  if (const auto* reply = std::get_if<protocol::WorkerHelloReply>(&*message)) {
    if (reply->status.ok()) {
      state_ = State::kReady;
      if (reply->heartbeat_ms > 0) heartbeat_ms_ = reply->heartbeat_ms;
      if (reply->lease_ms > 0) lease_ms_ = reply->lease_ms;
      next_heartbeat_ms_ = 0;
    } else {
      state_ = State::kGreeting;  // the owner decides whether to end
    }
  }
  return std::move(*message);
}

Status CoordinatorLink::send(const protocol::WorkerMessage& message) {
  if (state_ != State::kReady) return unavailable_error("not connected to the coordinator");
  return endpoint_->send(protocol::encode(message));
}

}  // namespace tandem::worker::runtime
