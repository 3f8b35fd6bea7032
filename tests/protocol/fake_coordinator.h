// A coordinator that tests script: it answers hellos itself and gives everything else to a handler
// on its own thread. Over any ServerEndpoint.
#pragma once

#include "protocol/codec.h"
#include "protocol/transport.h"

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace tandem::protocol {

class FakeCoordinator {
 public:
  using Reply = std::function<void(const ServerMessage&)>;
  using Handler = std::function<void(const ClientMessage& message, const Reply& reply)>;

  FakeCoordinator(std::unique_ptr<ServerEndpoint> endpoint, Handler handler,
                  ServerHello hello = {{}, {}, "fake", 1, 0})
      : endpoint_(std::move(endpoint)), handler_(std::move(handler)), hello_(std::move(hello)) {
    thread_ = std::thread([this] { run(); });
  }
  ~FakeCoordinator() {
    stopping_ = true;
    endpoint_->wake();
    thread_.join();
  }
  FakeCoordinator(const FakeCoordinator&) = delete;
  FakeCoordinator& operator=(const FakeCoordinator&) = delete;

  /// What came, hellos included, in order.
  std::vector<ClientMessage> seen() {
    std::lock_guard lock(mutex_);
    return seen_;
  }
  template <class Message>
  std::vector<Message> seen_of() {
    std::vector<Message> all;
    for (const auto& message : seen())
      if (const auto* m = std::get_if<Message>(&message)) all.push_back(*m);
    return all;
  }

 private:
  void run() {
    while (!stopping_) {
      const auto envelope = endpoint_->receive(50);
      if (!envelope.has_value()) continue;
      const auto message = decode_client(envelope->frame);
      if (!message.ok()) continue;
      {
        std::lock_guard lock(mutex_);
        seen_.push_back(*message);
      }
      const Reply reply = [&](const ServerMessage& m) {
        static_cast<void>(endpoint_->send(envelope->peer, encode(m)));
      };
      if (const auto* hello = std::get_if<ClientHello>(&*message)) {
        answer_hello(*hello, reply);
      } else {
        handler_(*message, reply);
      }
    }
  }
  /// As a coordinator whose newest version is hello_.version and which knows that one only.
  void answer_hello(const ClientHello& hello, const Reply& reply) {
    ServerHello answer = hello_;
    if (answer.status.ok() && !(hello.version == hello_.version))
      answer.status = refused_error("understands its own version only");
    reply(answer);
  }

  std::unique_ptr<ServerEndpoint> endpoint_;
  Handler handler_;
  ServerHello hello_;
  std::mutex mutex_;
  std::vector<ClientMessage> seen_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace tandem::protocol
