#include "worker/runtime/engine_io.h"

#include "protocol/base/log.h"

namespace tandem::worker::runtime {
namespace {
constexpr TimeMs kPollMs = 20;
constexpr TimeMs kRepeatMs = 1500;
}  // namespace

EngineIo::EngineIo(std::unique_ptr<protocol::ClientEndpoint> endpoint, const Clock& clock,
                   Callbacks callbacks)
    : clock_(clock),
      callbacks_(std::move(callbacks)),
      link_(std::move(endpoint), clock, {callbacks_.hello, callbacks_.heartbeat}),
      thread_([this] { loop(); }) {}

EngineIo::~EngineIo() {
  ending_ = true;
  link_.wake();
  thread_.join();
}

void EngineIo::send(protocol::WorkerMessage message) {
  if (!outbox_.try_push(std::move(message)))
    log_warn("the outbox is full (", kOutboxMax, "): a message was dropped");
  link_.wake();
}

void EngineIo::send_reliably(const JobId& job, const std::string& of,
                             protocol::WorkerMessage message) {
  {
    std::lock_guard lock(mutex_);
    if (reliable_.size() >= kReliableMax)
      for (auto it = reliable_.begin(); it != reliable_.end(); ++it)
        if (it->second.of.starts_with("progress:")) {
          reliable_.erase(it);
          break;
        }
    reliable_[next_reliable_++] = {job, of, std::move(message)};
  }
  link_.wake();
}

void EngineIo::acknowledge(const JobId& job, const std::string& of) {
  std::lock_guard lock(mutex_);
  std::erase_if(reliable_, [&](const auto& entry) {
    return entry.second.job == job && entry.second.of == of;
  });
}

void EngineIo::forget(const JobId& job) {
  std::lock_guard lock(mutex_);
  std::erase_if(reliable_, [&](const auto& entry) { return entry.second.job == job; });
}

void EngineIo::flush() {
  if (!link_.connected() || callbacks_.hung()) return;
  while (stuck_ || (stuck_ = outbox_.try_pop())) {
    const Status sent = link_.send(*stuck_);
    if (sent.code() == StatusCode::kBusy) return;  // keeps its place
    stuck_.reset();
  }
  const TimeMs now = clock_.now_ms();
  std::lock_guard lock(mutex_);
  for (auto& [order, entry] : reliable_) {
    if (entry.sent_ms >= 0 && now - entry.sent_ms < scaled_ms(kRepeatMs)) continue;
    if (!link_.send(entry.message).ok()) return;
    entry.sent_ms = now;
  }
}

void EngineIo::loop() {
  while (!ending_) {
    if (rehello_.exchange(false)) link_.rehello();
    flush();
    const bool was_connected = connected_;
    auto message = link_.poll(kPollMs);
    connected_ = link_.connected();
    if (connected_ && !was_connected) {
      std::lock_guard lock(mutex_);
      for (auto& [order, entry] : reliable_) entry.sent_ms = -1;  // what was in flight may be lost
    }
    if (!connected_) {
      while (outbox_.try_pop()) {
      }
      stuck_.reset();
    }
    if (message) callbacks_.on_message(std::move(*message));
  }
  flush();
}

}  // namespace tandem::worker::runtime
