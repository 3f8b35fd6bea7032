// A worker process's side of its conversation with the coordinator: hello, heartbeats, and finding
// out that the coordinator went away or came back as another one. Used by agents and engines alike;
// one thread owns it. Losing the coordinator stops nothing: the owner goes on and is adopted after
// the next hello.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/messages.h"
#include "protocol/transport.h"

#include <functional>
#include <memory>
#include <optional>

namespace tandem::worker::runtime {

class CoordinatorLink {
 public:
  struct Callbacks {
    std::function<std::optional<protocol::WorkerHello>()>
        hello;  ///< what to say now; nothing: stay silent
    std::function<std::optional<protocol::Heartbeat>(std::uint64_t seq)> heartbeat;
  };

  CoordinatorLink(std::unique_ptr<protocol::ClientEndpoint> endpoint, const Clock& clock,
                  Callbacks callbacks);

  /// Receives for up to `timeout_ms`, says hello and heartbeats when they are due. Returns the next
  /// message for the owner; a WorkerHelloReply is returned after it was acted upon.
  std::optional<protocol::ControlMessage> poll(TimeMs timeout_ms);

  /// kUnavailable / kBusy: nothing was sent; the owner repeats what matters after the next hello.
  Status send(const protocol::WorkerMessage& message);
  /// Said hello, was accepted, and replies still come.
  [[nodiscard]] bool connected() const { return state_ == State::kReady; }
  void wake() { endpoint_->wake(); }
  /// Says hello again at the next poll (what is running changed in a way the coordinator must
  /// adopt).
  void rehello();

 private:
  enum class State { kGreeting, kReady };
  void tick();

  std::unique_ptr<protocol::ClientEndpoint> endpoint_;
  const Clock& clock_;
  Callbacks callbacks_;
  State state_ = State::kGreeting;
  TimeMs next_hello_ms_ = 0, next_heartbeat_ms_ = 0, heard_ms_ = 0;
  /// As the coordinator says them, which has scaled them.
  TimeMs heartbeat_ms_ = scaled_ms(1000), lease_ms_ = scaled_ms(5000);
  std::uint64_t seq_ = 0, connections_seen_ = 0;
};

}  // namespace tandem::worker::runtime
