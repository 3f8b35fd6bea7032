// Moves whole frames between peers and says honestly what became of them. Two implementations:
// ZeroMQ (zmq_transport.h) and in-process (inproc_transport.h, for tests). One thread owns an
// endpoint; wake() may be called from any thread.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/base/result.h"

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tandem::protocol {

using Bytes = std::vector<std::byte>;

/// A received message: the peer it came from (server side; "" on the client side), a control frame,
/// and for bulk at most one payload frame. More frames than that are refused and counted.
struct Envelope {
  std::string peer;     ///< routing id, bound to the peer's CURVE key where there is one
  std::string user_id;  ///< name of the peer's key; "" without CURVE
  Bytes frame;
  Bytes payload;
};

/// The listening side: many peers.
class ServerEndpoint {
 public:
  virtual ~ServerEndpoint() = default;
  /// Never blocks. kUnavailable: no such peer; kBusy: its queue is full (nothing was sent in either
  /// case).
  virtual Status send(const std::string& peer, const Bytes& frame, const Bytes& payload = {}) = 0;
  /// The next message, or nothing when `timeout_ms` passed or wake() was called.
  virtual std::optional<Envelope> receive(TimeMs timeout_ms) = 0;
  virtual void wake() = 0;
  /// Where peers connect: the bound address with the real port.
  [[nodiscard]] virtual std::string address() const = 0;
};

/// The connecting side: one server. Reconnects by itself; messages in flight at a break are lost.
class ClientEndpoint {
 public:
  virtual ~ClientEndpoint() = default;
  /// Never blocks. kUnavailable: not connected now; kBusy: the queue is full.
  virtual Status send(const Bytes& frame, const Bytes& payload = {}) = 0;
  virtual std::optional<Envelope> receive(TimeMs timeout_ms) = 0;
  virtual void wake() = 0;
};

}  // namespace tandem::protocol
