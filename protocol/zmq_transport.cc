#include "protocol/zmq_transport.h"

#include "protocol/base/ids.h"
#include "protocol/base/str.h"
#include "protocol/descriptor_limit.h"
#include "protocol/endpoint_address.h"
#include "protocol/wakeup.h"

#include <zmq.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <utility>

namespace tandem::protocol {
namespace {

constexpr int kRoutingIdBytesMax = 255;
// Between a peer's routing id and its public key, in the name that callers know it by.
constexpr char kBeforeKey = ' ';
// A CURVE frame on the wire carries the command name, nonce, flags and MAC as well; the limit
// itself is enforced on what comes out.
constexpr std::int64_t kCurveOverheadBytes = 256;
// Refused messages read in one receive() before it returns to its caller.
constexpr int kRefusedPerReceiveMax = 64;
// The longest sleep of one receive() before it looks at its connection again.
constexpr TimeMs kLookMs = 500;
// libzmq never dials again after a refused key or a protocol error, so the client does it itself.
constexpr TimeMs kRedialMs = kHandshakeMs + 500;
constexpr int kMonitorEvents =
    ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH |
    ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL | ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL;

/// Owns one libzmq socket.
class Socket {
 public:
  Socket() = default;
  Socket(void* context, int type) : socket_(zmq_socket(context, type)) { set(ZMQ_LINGER, 0); }
  ~Socket() { reset(); }
  Socket(Socket&& other) noexcept : socket_(std::exchange(other.socket_, nullptr)) {}
  Socket& operator=(Socket&& other) noexcept {
    if (this != &other) {
      reset();
      socket_ = std::exchange(other.socket_, nullptr);
    }
    return *this;
  }

  [[nodiscard]] void* get() const { return socket_; }
  void set(int option, int value) { zmq_setsockopt(socket_, option, &value, sizeof value); }
  void set64(int option, std::int64_t value) {
    zmq_setsockopt(socket_, option, &value, sizeof value);
  }
  /// False: libzmq does not take the value.
  bool set_text(int option, const std::string& value) {
    return zmq_setsockopt(socket_, option, value.data(), value.size()) == 0;
  }

 private:
  void reset() {
    if (socket_ != nullptr) zmq_close(socket_);
  }
  void* socket_ = nullptr;
};

/// One received frame.
class Part {
 public:
  Part() { zmq_msg_init(&message_); }
  ~Part() { zmq_msg_close(&message_); }
  Part(const Part&) = delete;
  Part& operator=(const Part&) = delete;

  bool receive(const Socket& socket) {
    int rc = -1;
    do {
      rc = zmq_msg_recv(&message_, socket.get(), ZMQ_DONTWAIT);
    } while (rc < 0 && zmq_errno() == EINTR);
    return rc >= 0;
  }
  [[nodiscard]] bool more() { return zmq_msg_more(&message_) != 0; }
  [[nodiscard]] std::int64_t size() { return static_cast<std::int64_t>(zmq_msg_size(&message_)); }
  [[nodiscard]] Bytes bytes() {
    const auto* begin = static_cast<const std::byte*>(zmq_msg_data(&message_));
    return {begin, begin + zmq_msg_size(&message_)};
  }
  [[nodiscard]] std::string text() {
    return {static_cast<const char*>(zmq_msg_data(&message_)), zmq_msg_size(&message_)};
  }
  [[nodiscard]] std::string user_id() {
    const char* id = zmq_msg_gets(&message_, "User-Id");
    return id == nullptr ? "" : id;
  }

 private:
  zmq_msg_t message_;
};

/// 0, or libzmq's errno. EINTR is repeated.
int send_part(const Socket& socket, const void* data, std::size_t size, bool more) {
  int rc = -1;
  do {
    rc = zmq_send(socket.get(), data, size, ZMQ_DONTWAIT | (more ? ZMQ_SNDMORE : 0));
  } while (rc < 0 && zmq_errno() == EINTR);
  return rc < 0 ? zmq_errno() : 0;
}

int send_payload(const Socket& socket, ByteParts parts, std::size_t size) {
  zmq_msg_t message;
  if (zmq_msg_init_size(&message, size) != 0) return zmq_errno();
  auto* to = static_cast<std::byte*>(zmq_msg_data(&message));
  for (const auto& part : parts) to = std::copy(part.begin(), part.end(), to);
  int rc = -1;
  do {
    rc = zmq_msg_send(&message, socket.get(), ZMQ_DONTWAIT);
  } while (rc < 0 && zmq_errno() == EINTR);
  const int error = rc < 0 ? zmq_errno() : 0;
  zmq_msg_close(&message);  // nothing, once it is sent
  return error;
}

std::size_t size_of(ByteParts parts) {
  std::size_t size = 0;
  for (const auto& part : parts) size += part.size();
  return size;
}

/// The settings that both sides share (zmq_transport.h says why).
void set_common(Socket& socket, const SocketLimits& limits) {
  const auto ms = [](int value) { return static_cast<int>(scaled_ms(value)); };
  socket.set(ZMQ_SNDHWM, limits.queue_messages);
  socket.set(ZMQ_RCVHWM, limits.queue_messages);
  socket.set(ZMQ_HANDSHAKE_IVL, ms(kHandshakeMs));
  // The kernel watches connections, not ZMTP heartbeats: their timer writes to an engine that has
  // met its end while its input was stopped, and libzmq aborts the process then (4.3.4 and later).
  constexpr int kProbes = kTransportTimeoutMs / kTransportProbeMs - 1;
  socket.set(ZMQ_TCP_KEEPALIVE, 1);
  socket.set(ZMQ_TCP_KEEPALIVE_IDLE, std::max(1, ms(kTransportProbeMs) / 1000));
  socket.set(ZMQ_TCP_KEEPALIVE_INTVL, std::max(1, ms(kTransportProbeMs) / 1000));
  socket.set(ZMQ_TCP_KEEPALIVE_CNT, kProbes);
  socket.set(ZMQ_TCP_MAXRT, ms(kTransportTimeoutMs));
  socket.set64(ZMQ_MAXMSGSIZE,
               std::max(limits.frame_bytes_max, limits.payload_bytes_max) + kCurveOverheadBytes);
}

Status check_sizes(const SocketLimits& limits, const Bytes& frame, std::size_t payload_bytes) {
  const auto check = [](const char* what, std::size_t size, std::int64_t bytes_max) {
    return static_cast<std::int64_t>(size) <= bytes_max
               ? Status()
               : invalid_error(str("a ", what, " of ", size, " bytes exceeds the limit of ",
                                   bytes_max, " of this socket"));
  };
  TANDEM_RETURN_IF_ERROR(check("frame", frame.size(), limits.frame_bytes_max));
  return check("payload", payload_bytes, limits.payload_bytes_max);
}

enum class Reading { kNothing, kMessage, kRefused };

/// Reads one whole message; frames beyond the second are read and dropped.
Reading read_frames(const Socket& socket, const SocketLimits& limits, bool routed,
                    Envelope& envelope, std::string& user, EndpointCounters& counters) {
  int frames = 0;
  bool too_large = false, more = true;
  for (bool first = true; more; first = false) {
    Part part;
    if (!part.receive(socket)) return Reading::kNothing;  // only before a message's first part
    more = part.more();
    if (first && routed) {
      envelope.peer = part.text();
      continue;
    }
    ++frames;
    if (frames == 1) user = part.user_id();
    const std::int64_t bytes_max = frames == 1 ? limits.frame_bytes_max : limits.payload_bytes_max;
    too_large = too_large || part.size() > bytes_max;
    if (frames > kFramesMax || too_large) continue;
    (frames == 1 ? envelope.frame : envelope.payload) = part.bytes();
  }
  const int frames_max = limits.payload_bytes_max > 0 ? kFramesMax : 1;
  if (frames == 0 || frames > frames_max) {
    ++counters.refused_frames;
    return Reading::kRefused;
  }
  if (too_large) {
    ++counters.refused_size;
    return Reading::kRefused;
  }
  return Reading::kMessage;
}

/// What a poller asks of an endpoint.
class Pollable {
 public:
  virtual ~Pollable() = default;
  virtual void add_items(std::vector<zmq_pollitem_t>& items) = 0;
  virtual void drain_wakeup() = 0;
};

void poll(std::vector<zmq_pollitem_t>& items, TimeMs timeout_ms) {
  zmq_poll(items.data(), static_cast<int>(items.size()), static_cast<long>(timeout_ms));
}

/// receive() of both sides: `read` until a message, the deadline, or a reason to return early.
template <class Read, class Interrupted>
std::optional<Envelope> receive_until(Pollable& endpoint, TimeMs timeout_ms, Read read,
                                      Interrupted interrupted) {
  const std::int64_t deadline_ns = steady_ns() + timeout_ms * 1'000'000;
  int refused = 0;
  while (true) {
    Envelope envelope;
    const Reading reading = read(envelope);
    if (reading == Reading::kMessage) return envelope;
    if (reading == Reading::kRefused && ++refused < kRefusedPerReceiveMax) continue;
    if (reading == Reading::kRefused || interrupted()) return std::nullopt;
    // Rounded up, so that the last wait is not a busy loop.
    const TimeMs left = (deadline_ns - steady_ns() + 999'999) / 1'000'000;
    if (left <= 0) return std::nullopt;
    std::vector<zmq_pollitem_t> items;
    endpoint.add_items(items);
    poll(items, std::min(left, kLookMs));
  }
}

class ZmqServer final : public ServerEndpoint, public Pollable {
 public:
  ZmqServer(Socket socket, SocketLimits limits, std::optional<AllowedKeys> keys,
            std::string address)
      : socket_(std::move(socket)),
        limits_(limits),
        keys_(std::move(keys)),
        address_(std::move(address)) {}

  Status send(const std::string& peer, const Bytes& frame, const Bytes& payload) override {
    TANDEM_RETURN_IF_ERROR(check_sizes(limits_, frame, payload.size()));
    std::string id = peer;
    if (keys_.has_value()) {
      id.resize(std::min(peer.size(), peer.rfind(kBeforeKey)));
      // What it asked for before its key was revoked, an answer or events, ends with the key.
      if (id.size() == peer.size() || !key_of(id, peer.substr(id.size() + 1)).ok()) {
        ++counters_.unavailable;
        return unavailable_error(str("peer ", peer, ": its key was revoked"));
      }
    }
    // A ROUTER decides about the whole message at its first part.
    if (const int error = send_part(socket_, id.data(), id.size(), true); error != 0) {
      if (error == EAGAIN) {
        ++counters_.busy;
        return busy_error(
            str("peer ", peer, ": its queue of ", limits_.queue_messages, " messages is full"));
      }
      ++counters_.unavailable;
      return unavailable_error(str("peer ", peer, " is not connected"));
    }
    int error = send_part(socket_, frame.data(), frame.size(), !payload.empty());
    if (error == 0 && !payload.empty())
      error = send_part(socket_, payload.data(), payload.size(), false);
    if (error != 0)
      return unavailable_error(str("peer ", peer, ": lost while sending: ", zmq_strerror(error)));
    ++counters_.sent;
    return {};
  }

  std::optional<Envelope> receive(TimeMs timeout_ms) override {
    return receive_until(
        *this, timeout_ms, [this](Envelope& envelope) { return read(envelope); },
        [this] { return wakeup_.drain(); });
  }

  void wake() override { wakeup_.signal(); }
  [[nodiscard]] std::string address() const override { return address_; }
  [[nodiscard]] EndpointCounters counters() const override { return counters_; }

  void add_items(std::vector<zmq_pollitem_t>& items) override {
    items.push_back({socket_.get(), 0, ZMQ_POLLIN, 0});
    items.push_back({nullptr, wakeup_.fd(), ZMQ_POLLIN, 0});
  }
  void drain_wakeup() override { wakeup_.drain(); }

 private:
  Reading read(Envelope& envelope) {
    std::string user;
    const Reading reading = read_frames(socket_, limits_, true, envelope, user, counters_);
    if (reading != Reading::kMessage) return reading;
    if (keys_.has_value()) {
      const auto key = key_of(envelope.peer, user);
      if (!key.ok()) {
        ++counters_.refused_identity;
        return Reading::kRefused;
      }
      envelope.peer += kBeforeKey + user;
      envelope.user_id = key->name;
      envelope.admin = key->role == KeyRole::kAdmin;
    }
    ++counters_.received;
    return Reading::kMessage;
  }

  /// The key of this public half, when it may use this routing id. Asked again for every message:
  /// it may have been revoked since the handshake, and another one made under its name.
  [[nodiscard]] Result<KeyFile> key_of(const std::string& id, const std::string& public_key) const {
    TANDEM_ASSIGN_OR_RETURN(KeyFile key, keys_->check(public_key));
    if (id != key.name && id.rfind(key.name + "/", 0) != 0)
      return refused_error(str("routing id ", id, " is not of key ", key.name));
    return key;
  }

  Socket socket_;
  const SocketLimits limits_;
  const std::optional<AllowedKeys> keys_;
  const std::string address_;
  Wakeup wakeup_;
  EndpointCounters counters_;
};

class ZmqClient final : public ClientEndpoint, public Pollable {
 public:
  ZmqClient(Socket socket, Socket monitor, SocketLimits limits, std::string address)
      : socket_(std::move(socket)),
        monitor_(std::move(monitor)),
        limits_(limits),
        address_(std::move(address)) {}
  ~ZmqClient() override { zmq_socket_monitor(socket_.get(), nullptr, 0); }
  ZmqClient(const ZmqClient&) = delete;
  ZmqClient& operator=(const ZmqClient&) = delete;

  Status send(const Bytes& frame, const Bytes& payload) override {
    const std::span<const std::byte> whole = payload;
    return send_parts(frame, std::span(&whole, 1));
  }

  Status send_parts(const Bytes& frame, ByteParts payload) override {
    const std::size_t payload_bytes = size_of(payload);
    TANDEM_RETURN_IF_ERROR(check_sizes(limits_, frame, payload_bytes));
    read_monitor();
    int error = connected_ ? send_part(socket_, frame.data(), frame.size(), payload_bytes > 0)
                           : EHOSTUNREACH;
    if (error == EAGAIN) {
      read_monitor();
      if (!connected_) error = EHOSTUNREACH;
    }
    if (error == EAGAIN) {
      ++counters_.busy;
      return busy_error(
          str(address_, ": the queue of ", limits_.queue_messages, " messages is full"));
    }
    if (error == 0 && payload_bytes > 0) error = send_payload(socket_, payload, payload_bytes);
    if (error != 0) {
      ++counters_.unavailable;
      return unavailable_error(str("not connected to ", address_, why()));
    }
    ++counters_.sent;
    return {};
  }

  std::optional<Envelope> receive(TimeMs timeout_ms) override {
    return receive_until(
        *this, timeout_ms,
        [this](Envelope& envelope) {
          std::string user;
          const auto reading = read_frames(socket_, limits_, false, envelope, user, counters_);
          if (reading == Reading::kMessage) ++counters_.received;
          return reading;
        },
        [this] {
          const bool changed = read_monitor();
          return wakeup_.drain() || changed;
        });
  }

  void wake() override { wakeup_.signal(); }
  [[nodiscard]] std::uint64_t connections() const override { return connections_; }
  [[nodiscard]] bool connected() const override { return connected_; }
  [[nodiscard]] Status trouble() const override {
    if (connected_) return {};
    if (key_refused_) return refused_error(str(address_, ": the server refused this key"));
    return unavailable_error(str("not connected to ", address_, why()));
  }
  [[nodiscard]] EndpointCounters counters() const override { return counters_; }

  void add_items(std::vector<zmq_pollitem_t>& items) override {
    items.push_back({socket_.get(), 0, ZMQ_POLLIN, 0});
    items.push_back({monitor_.get(), 0, ZMQ_POLLIN, 0});
    items.push_back({nullptr, wakeup_.fd(), ZMQ_POLLIN, 0});
  }
  void drain_wakeup() override { wakeup_.drain(); }

 private:
  [[nodiscard]] const char* why() const {
    if (key_refused_) return " (the server refused this key)";
    return handshake_failed_
               ? " (the handshake failed: is it a Tandem endpoint, and are the keys right?)"
               : "";
  }
  /// Takes what happened to the connection; true when it came or went.
  bool read_monitor() {
    const auto before = std::pair(connections_, connected_);
    const std::int64_t now_ns = steady_ns();
    while (true) {
      Part event, peer;  // the event's number and value, then the address
      if (!event.receive(monitor_)) break;
      if (event.more()) peer.receive(monitor_);
      std::uint16_t number = 0;
      const Bytes bytes = event.bytes();
      if (bytes.size() < sizeof number) continue;
      std::memcpy(&number, bytes.data(), sizeof number);
      connected_ = number == ZMQ_EVENT_HANDSHAKE_SUCCEEDED;
      changed_ns_ = now_ns;
      if (connected_) ++connections_;
      // A refusal ends in a disconnect too, which says nothing more.
      if (number == ZMQ_EVENT_DISCONNECTED) continue;
      key_refused_ = number == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH;
      handshake_failed_ = !connected_;
    }
    const bool gave_up = handshake_failed_ || before.first > 0;
    if (!connected_ && gave_up && now_ns - changed_ns_ > scaled_ms(kRedialMs) * 1'000'000) {
      changed_ns_ = now_ns;
      zmq_disconnect(socket_.get(), address_.c_str());  // fails when libzmq has forgotten it
      zmq_connect(socket_.get(), address_.c_str());
    }
    return before != std::pair(connections_, connected_);
  }

  Socket socket_, monitor_;
  const SocketLimits limits_;
  const std::string address_;
  Wakeup wakeup_;
  EndpointCounters counters_;
  std::uint64_t connections_ = 0;
  std::int64_t changed_ns_ = 0;  // the last event of the connection, or dialling again
  bool connected_ = false, key_refused_ = false, handshake_failed_ = false;
};

class ZmqPoller final : public Poller {
 public:
  void add(ServerEndpoint& endpoint) override { add(as_pollable(endpoint)); }
  void add(ClientEndpoint& endpoint) override { add(as_pollable(endpoint)); }
  void remove(ServerEndpoint& endpoint) override { remove(as_pollable(endpoint)); }
  void remove(ClientEndpoint& endpoint) override { remove(as_pollable(endpoint)); }

  void wait(TimeMs timeout_ms) override {
    std::vector<zmq_pollitem_t> items{{nullptr, wakeup_.fd(), ZMQ_POLLIN, 0}};
    for (Pollable* endpoint : endpoints_) endpoint->add_items(items);
    poll(items, std::max<TimeMs>(timeout_ms, 0));
    wakeup_.drain();
    for (Pollable* endpoint : endpoints_) endpoint->drain_wakeup();
  }
  void wake() override { wakeup_.signal(); }

 private:
  template <class Endpoint>
  static Pollable& as_pollable(Endpoint& endpoint) {
    auto* pollable = dynamic_cast<Pollable*>(&endpoint);
    TANDEM_CHECK(pollable != nullptr, "this poller serves endpoints of its ZmqContext only");
    return *pollable;
  }
  void add(Pollable& endpoint) { endpoints_.push_back(&endpoint); }
  void remove(Pollable& endpoint) { std::erase(endpoints_, &endpoint); }

  Wakeup wakeup_;
  std::vector<Pollable*> endpoints_;
};

Status socket_error(const std::string& endpoint, int error) {
  const std::string what = str("endpoint ", endpoint, ": ", zmq_strerror(error));
  switch (error) {
    case EADDRINUSE:
      return conflict_error(str(what,
                                ": another process listens there; stop it, or use another "
                                "address"));
    case EINVAL:
    case ENODEV:
    case EADDRNOTAVAIL:
    case ENOENT:
      return invalid_error(str(what, ": no such address on this host"));
    default:
      return internal_error(what);
  }
}

Status check_keys(const EndpointAddress& address, const std::string& endpoint, bool has_keys) {
  if (address.kind == EndpointAddress::Kind::kTcp && !has_keys)
    return refused_error(str("endpoint ", endpoint,
                             ": a TCP endpoint needs CURVE keys, loopback "
                             "too (tandem key create NAME), or use ipc:///DIR/NAME"));
  return {};
}

}  // namespace

std::string make_routing_id(const std::string& name, const std::string& purpose) {
  return random_id(str(name, "/", purpose, "-"), 16);
}

struct ZmqContext::State {
  void* context = nullptr;
  std::mutex mutex;  // guards zap
  std::unique_ptr<ZapHandler> zap;
  std::atomic<std::uint64_t> next_name{1};

  Result<AllowedKeys> allow(const ZmqServerOptions& options, const std::string& domain) {
    std::lock_guard lock(mutex);
    if (zap == nullptr) {
      TANDEM_ASSIGN_OR_RETURN(zap, ZapHandler::start(context));
    }
    AllowedKeys keys{std::make_shared<KeyRing>(options.allowed_keys_dir), options.allowed_roles};
    zap->add_domain(domain, keys);
    return keys;
  }
};

ZmqContext::ZmqContext(std::unique_ptr<State> state) : state_(std::move(state)) {}

Result<std::unique_ptr<ZmqContext>> ZmqContext::create() {
  auto state = std::make_unique<State>();
  state->context = zmq_ctx_new();
  if (state->context == nullptr)
    return internal_error(str("ZeroMQ: no context: out of file descriptors? (",
                              connections_turned_away(), " connections were turned away)"));
  zmq_ctx_set(state->context, ZMQ_IO_THREADS, 1);
  zmq_ctx_set(state->context, ZMQ_BLOCKY, 0);
  return std::unique_ptr<ZmqContext>(new ZmqContext(std::move(state)));
}

ZmqContext::~ZmqContext() {
  state_->zap.reset();
  zmq_ctx_term(state_->context);
}

Result<std::unique_ptr<ServerEndpoint>> ZmqContext::listen(const ZmqServerOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(const EndpointAddress address, parse_endpoint(options.endpoint));
  TANDEM_RETURN_IF_ERROR(check_keys(address, options.endpoint, options.keys.has_value()));
  if (address.kind == EndpointAddress::Kind::kIpc) {
    TANDEM_RETURN_IF_ERROR(check_ipc_directory(address.path, true));
    // libzmq would take the socket's name away from a living process without a word.
    if (unix_socket_alive(address.path)) return socket_error(options.endpoint, EADDRINUSE);
  }
  Socket socket(state_->context, ZMQ_ROUTER);
  if (socket.get() == nullptr) return socket_error(options.endpoint, zmq_errno());
  set_common(socket, options.limits);
  socket.set(ZMQ_ROUTER_MANDATORY, 1);
  socket.set(ZMQ_ROUTER_HANDOVER, 1);
  std::optional<AllowedKeys> keys;
  if (options.keys.has_value()) {
    const std::string domain = str("tandem-", state_->next_name++);
    TANDEM_ASSIGN_OR_RETURN(keys, state_->allow(options, domain));
    socket.set(ZMQ_CURVE_SERVER, 1);
    if (!socket.set_text(ZMQ_CURVE_SECRETKEY, options.keys->secret_key) ||
        !socket.set_text(ZMQ_ZAP_DOMAIN, domain))
      return invalid_error(
          str("endpoint ", options.endpoint, ": the server's secret key cannot be used"));
  }
  const std::string bind_to = address.kind == EndpointAddress::Kind::kTcp && address.port == 0
                                  ? str("tcp://", address.host, ":*")
                                  : options.endpoint;
  if (zmq_bind(socket.get(), bind_to.c_str()) != 0)
    return socket_error(options.endpoint, zmq_errno());
  std::array<char, 512> bound{};
  std::size_t bound_size = bound.size();
  if (zmq_getsockopt(socket.get(), ZMQ_LAST_ENDPOINT, bound.data(), &bound_size) != 0)
    return socket_error(options.endpoint, zmq_errno());
  return std::unique_ptr<ServerEndpoint>(
      new ZmqServer(std::move(socket), options.limits, std::move(keys), bound.data()));
}

Result<std::unique_ptr<ClientEndpoint>> ZmqContext::connect(const ZmqClientOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(const EndpointAddress address, parse_endpoint(options.endpoint));
  TANDEM_RETURN_IF_ERROR(check_keys(address, options.endpoint, options.keys.has_value()));
  if (address.kind == EndpointAddress::Kind::kIpc) {
    const Status directory = check_ipc_directory(address.path, false);
    if (!directory.ok() && directory.code() != StatusCode::kNotFound) return directory;
  }
  if (options.routing_id.empty() || options.routing_id.size() > kRoutingIdBytesMax)
    return invalid_error(str("routing id \"", options.routing_id, "\": must have 1..",
                             kRoutingIdBytesMax, " bytes"));
  Socket socket(state_->context, ZMQ_DEALER);
  if (socket.get() == nullptr) return socket_error(options.endpoint, zmq_errno());
  set_common(socket, options.limits);
  socket.set(ZMQ_IMMEDIATE, 1);
  socket.set(ZMQ_RECONNECT_IVL, kReconnectMs);
  socket.set(ZMQ_RECONNECT_IVL_MAX, kReconnectMaxMs);
  // The kernel's own attempts come up to a minute apart where nobody answers, and take two.
  socket.set(ZMQ_CONNECT_TIMEOUT, static_cast<int>(scaled_ms(kTransportTimeoutMs)));
  socket.set_text(ZMQ_ROUTING_ID, options.routing_id);
  if (options.keys.has_value() &&
      (!socket.set_text(ZMQ_CURVE_SERVERKEY, options.server_public_key) ||
       !socket.set_text(ZMQ_CURVE_PUBLICKEY, options.keys->public_key) ||
       !socket.set_text(ZMQ_CURVE_SECRETKEY, options.keys->secret_key)))
    return invalid_error(
        str("endpoint ", options.endpoint,
            ": a key cannot be used (40 characters of Z85 each: the server's public "
            "key, this client's public and secret keys)"));
  const std::string monitor_at = str("inproc://tandem-monitor-", state_->next_name++);
  if (zmq_socket_monitor(socket.get(), monitor_at.c_str(), kMonitorEvents) != 0)
    return socket_error(options.endpoint, zmq_errno());
  Socket monitor(state_->context, ZMQ_PAIR);
  // Never full: libzmq's I/O thread would wait for its reader. Events come at the pace of
  // reconnects.
  monitor.set(ZMQ_RCVHWM, 0);
  if (zmq_connect(monitor.get(), monitor_at.c_str()) != 0 ||
      zmq_connect(socket.get(), options.endpoint.c_str()) != 0)
    return socket_error(options.endpoint, zmq_errno());
  return std::unique_ptr<ClientEndpoint>(
      new ZmqClient(std::move(socket), std::move(monitor), options.limits, options.endpoint));
}

Result<std::unique_ptr<Poller>> ZmqContext::make_poller() {
  return std::unique_ptr<Poller>(new ZmqPoller());
}

ZapCounters ZmqContext::zap_counters() const {
  std::lock_guard lock(state_->mutex);
  return state_->zap == nullptr ? ZapCounters{} : state_->zap->counters();
}

}  // namespace tandem::protocol
