// The engine's I/O thread: its link to the coordinator, what must be repeated until it is
// acknowledged, and heartbeats that stop when the device thread hangs. Everything else of the
// engine lives on the device thread; the two meet in queues.
#pragma once

#include "protocol/base/bounded_queue.h"
#include "worker/runtime/coordinator_link.h"

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>

namespace tandem::worker::runtime {

class EngineIo {
 public:
  struct Callbacks {
    /// Called on the I/O thread; they read snapshots that the device thread leaves.
    std::function<std::optional<protocol::WorkerHello>()> hello;
    std::function<std::optional<protocol::Heartbeat>(std::uint64_t seq)> heartbeat;
    /// Called on the I/O thread for each message; posts it to the device thread.
    std::function<void(protocol::ControlMessage)> on_message;
    /// Whether the device thread hangs. Nothing is sent then: what is repeated for want of an
    /// acknowledgement, which that thread would take, must not pass for a sign of life.
    std::function<bool()> hung;
  };

  EngineIo(std::unique_ptr<protocol::ClientEndpoint> endpoint, const Clock& clock,
           Callbacks callbacks);
  ~EngineIo();
  EngineIo(const EngineIo&) = delete;
  EngineIo& operator=(const EngineIo&) = delete;

  /// Sends as soon as the link allows, in order; dropped when the coordinator is away (its requests
  /// are sent again by the clients). Any thread.
  void send(protocol::WorkerMessage message);
  /// Sends and repeats until acknowledge(job, of): job events, checkpoints, publishes, ends. At
  /// most kReliableMax wait; beyond that the oldest "progress:" goes. Any thread.
  void send_reliably(const JobId& job, const std::string& of, protocol::WorkerMessage message);
  void acknowledge(const JobId& job, const std::string& of);
  /// Forgets everything of a job (it was taken from us).
  void forget(const JobId& job);
  [[nodiscard]] bool connected() const { return connected_; }
  void rehello() { rehello_ = true; }

  static constexpr std::size_t kOutboxMax = 65536, kReliableMax = 4096;

 private:
  struct Reliable {
    JobId job;
    std::string of;
    protocol::WorkerMessage message;
    TimeMs sent_ms = -1;
  };
  void loop();
  void flush();

  const Clock& clock_;
  Callbacks callbacks_;
  CoordinatorLink link_;
  BoundedQueue<protocol::WorkerMessage> outbox_{kOutboxMax};
  std::optional<protocol::WorkerMessage> stuck_;  ///< taken from the outbox while the peer was busy
  mutable std::mutex mutex_;                      ///< guards reliable_
  std::map<std::uint64_t, Reliable> reliable_;    ///< by order of sending
  std::uint64_t next_reliable_ = 0;
  std::atomic<bool> ending_{false}, connected_{false}, rehello_{false};
  std::thread thread_;
};

}  // namespace tandem::worker::runtime
