// Moves whole frames between peers and says honestly what became of them. Two implementations:
// ZeroMQ (zmq_transport.h) and in-process (inproc_transport.h, for tests). One thread owns an
// endpoint; wake() may be called from any thread. Delivery is at most once per connection and in
// order; a connection that breaks loses what was in flight, so messages that matter carry an id and
// are repeated until acknowledged.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/base/result.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace tandem::protocol {

using Bytes = std::vector<std::byte>;
using ByteParts = std::span<const std::span<const std::byte>>;  ///< one after another

/// A received message: the peer it came from (server side; "" on the client side), a control frame,
/// and for bulk at most one payload frame. More frames than that are refused and counted.
struct Envelope {
  std::string peer;     ///< routing id, and the peer's CURVE key where there is one
  std::string user_id;  ///< name of the peer's key; "" without CURVE
  Bytes frame;
  Bytes payload;
  bool admin = true;  ///< its key's role is admin, or there are no keys
};

/// What an endpoint moved and refused since it was made.
struct EndpointCounters {
  std::uint64_t received = 0, sent = 0;
  std::uint64_t refused_frames = 0;    ///< more frames than allowed, or none
  std::uint64_t refused_size = 0;      ///< a frame over its limit
  std::uint64_t refused_identity = 0;  ///< a routing id that does not belong to the peer's key
  std::uint64_t busy = 0;              ///< send() answered kBusy
  std::uint64_t unavailable = 0;       ///< send() answered kUnavailable
};

/// The listening side: many peers.
class ServerEndpoint {
 public:
  virtual ~ServerEndpoint() = default;
  /// `peer`: of an Envelope. Never blocks. kUnavailable: no such peer; kBusy: its queue is full;
  /// kInvalid: a frame over its limit (nothing was sent in any of these cases).
  virtual Status send(const std::string& peer, const Bytes& frame, const Bytes& payload = {}) = 0;
  /// The next message, or nothing when `timeout_ms` passed or wake() was called.
  virtual std::optional<Envelope> receive(TimeMs timeout_ms) = 0;
  virtual void wake() = 0;
  /// Where peers connect: the bound address with the real port.
  [[nodiscard]] virtual std::string address() const = 0;
  [[nodiscard]] virtual EndpointCounters counters() const = 0;
};

/// The connecting side: one server. Reconnects by itself; messages in flight at a break are lost,
/// none of an old connection is sent on a new one.
class ClientEndpoint {
 public:
  virtual ~ClientEndpoint() = default;
  /// Never blocks. kUnavailable: not connected now; kBusy: the queue is full; kInvalid: a frame
  /// over its limit.
  virtual Status send(const Bytes& frame, const Bytes& payload = {}) = 0;
  /// The same with a payload that lies in several places: copied once.
  virtual Status send_parts(const Bytes& frame, ByteParts payload) = 0;
  /// The next message, or nothing when `timeout_ms` passed, wake() was called or the connection
  /// came or went.
  virtual std::optional<Envelope> receive(TimeMs timeout_ms) = 0;
  virtual void wake() = 0;
  /// Connections made so far, this one included. When it grows, a new hello is due. Brought up to
  /// date by send() and receive().
  [[nodiscard]] virtual std::uint64_t connections() const = 0;
  [[nodiscard]] virtual bool connected() const = 0;
  /// Why there is no connection, as far as it is known: kRefused when the server turned this key
  /// away, kUnavailable otherwise; ok while connected.
  [[nodiscard]] virtual Status trouble() const {
    return connected() ? Status() : unavailable_error("not connected");
  }
  [[nodiscard]] virtual EndpointCounters counters() const = 0;
};

/// Waits on several endpoints of one transport, so that one I/O thread serves them all:
///   poller->wait(timeout); for each endpoint: while (auto m = endpoint.receive(0)) handle(*m);
/// Endpoints outlive the poller or are removed from it. Owned by one thread; wake() from any.
class Poller {
 public:
  virtual ~Poller() = default;
  virtual void add(ServerEndpoint& endpoint) = 0;
  virtual void add(ClientEndpoint& endpoint) = 0;
  virtual void remove(ServerEndpoint& endpoint) = 0;
  virtual void remove(ClientEndpoint& endpoint) = 0;
  /// Returns when an endpoint has a message (or its connection changed), after wake() of this
  /// poller or of an endpoint in it, or when `timeout_ms` passed.
  virtual void wait(TimeMs timeout_ms) = 0;
  virtual void wake() = 0;
};

}  // namespace tandem::protocol
