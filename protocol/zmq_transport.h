// ROUTER and DEALER over ipc:// and tcp:// with the settings that make ZeroMQ honest (measured
// with 4.3.4): MANDATORY and DONTWAIT (a plain ROUTER drops silently), LINGER 0, IMMEDIATE (nothing
// is queued for a peer that is not there), a short handshake interval (silent connections go),
// MAXMSGSIZE, bounded queues, TCP's own probes (they see dead connections, never a hung
// application: leases are ours; ZMTP heartbeats would let a peer end this process).
//
// Who may connect: ipc:// lies in a directory of mode 0700, so the file system says it. Any tcp://
// endpoint, loopback too, needs CURVE keys, and the peer's key must be in the server's key
// directory (zap.h). A peer's routing id is NAME or NAME/anything, where NAME is its key's name;
// other messages are refused and counted. A new connection with a routing id in use takes it over
// (a restarted peer need not wait for its dead connection); make_routing_id() ends in random digits
// so that nobody takes over a stranger's by guessing.
#pragma once

#include "protocol/base/result.h"
#include "protocol/messages.h"
#include "protocol/transport.h"
#include "protocol/zap.h"

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tandem::protocol {

inline constexpr int kHandshakeMs = 2000;
inline constexpr int kTransportProbeMs = 2000, kTransportTimeoutMs = 6000;  ///< tcp
inline constexpr int kReconnectMs = 50, kReconnectMaxMs = 1000;
inline constexpr int kControlQueueMessages = 512;  ///< per connection and direction
inline constexpr int kBulkQueueMessages = 8;
inline constexpr int kFramesMax = 2;  ///< control frame and payload

/// Limits of one kind of socket. Control sockets carry no payload.
struct SocketLimits {
  std::int64_t frame_bytes_max = kFrameBytesMax;
  std::int64_t payload_bytes_max = 0;
  int queue_messages = kControlQueueMessages;

  static SocketLimits control() { return {}; }
  static SocketLimits workers() { return {kWorkerFrameBytesMax, 0, kControlQueueMessages}; }
  static SocketLimits bulk() { return {kFrameBytesMax, kBulkFrameBytesMax, kBulkQueueMessages}; }
};

struct ZmqServerOptions {
  std::string endpoint;  ///< "ipc:///DIR/NAME" or "tcp://HOST:PORT" (PORT 0: any)
  SocketLimits limits{};
  std::optional<CurveKeyPair> keys{};    ///< needed for tcp
  std::string allowed_keys_dir{};        ///< with keys: who may connect; read again when it changes
  std::vector<KeyRole> allowed_roles{};  ///< with keys; empty: all
};

struct ZmqClientOptions {
  std::string endpoint;
  std::string routing_id{};  ///< from make_routing_id()
  SocketLimits limits{};
  std::optional<CurveKeyPair> keys{};  ///< needed for tcp
  std::string server_public_key{};     ///< with keys
};

/// "NAME/PURPOSE-16 hex digits"; NAME is the key's name (or anything over ipc). At most 255 bytes.
std::string make_routing_id(const std::string& name, const std::string& purpose);

/// Owns the ZeroMQ context, its one I/O thread and, when a server has keys, the ZAP thread. Its
/// endpoints and pollers must be destroyed before it. Any thread may call it.
class ZmqContext {
 public:
  static Result<std::unique_ptr<ZmqContext>> create();
  ~ZmqContext();
  ZmqContext(const ZmqContext&) = delete;
  ZmqContext& operator=(const ZmqContext&) = delete;

  /// Binds. kInvalid: the address cannot be used (not ipc or tcp, path too long); kRefused: tcp
  /// without keys, a directory that others can enter; kConflict: somebody listens there already.
  /// The directory of an ipc endpoint is made (0700) when it is missing.
  Result<std::unique_ptr<ServerEndpoint>> listen(const ZmqServerOptions& options);
  /// Never waits for the server: connected() says when it is there.
  Result<std::unique_ptr<ClientEndpoint>> connect(const ZmqClientOptions& options);
  /// For endpoints of this context only.
  Result<std::unique_ptr<Poller>> make_poller();
  /// Connections that the key check let in and turned away; zero without keys.
  [[nodiscard]] ZapCounters zap_counters() const;

  struct State;

 private:
  explicit ZmqContext(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace tandem::protocol
