#include "protocol/zap.h"

#include "protocol/base/log.h"
#include "protocol/base/str.h"
#include "protocol/wakeup.h"

#include <zmq.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <map>
#include <mutex>
#include <string_view>
#include <thread>

namespace tandem::protocol {
namespace {

constexpr const char* kZapEndpoint = "inproc://zeromq.zap.01";
constexpr std::size_t kCurveKeyBytes = 32, kZ85Size = 41;
constexpr std::size_t kZapFrames = 7;  // version, id, domain, address, identity, mechanism, key

/// The frames of one request; more than a request has are read and dropped.
std::vector<std::string> receive_frames(void* socket) {
  std::vector<std::string> frames;
  int more = 1;
  while (more != 0) {
    zmq_msg_t part;
    zmq_msg_init(&part);
    if (zmq_msg_recv(&part, socket, ZMQ_DONTWAIT) < 0) {
      zmq_msg_close(&part);
      return {};
    }
    if (frames.size() < kZapFrames)
      frames.emplace_back(static_cast<const char*>(zmq_msg_data(&part)), zmq_msg_size(&part));
    more = zmq_msg_more(&part);
    zmq_msg_close(&part);
  }
  return frames;
}

}  // namespace

Result<CurveKeyPair> generate_curve_keys() {
  std::array<char, kZ85Size> public_key{}, secret_key{};
  if (zmq_curve_keypair(public_key.data(), secret_key.data()) != 0)
    return internal_error(str("cannot make a CURVE key: ", zmq_strerror(zmq_errno()),
                              " (libzmq must be built with CURVE)"));
  return CurveKeyPair{public_key.data(), secret_key.data()};
}

Result<KeyFile> AllowedKeys::check(const std::string& public_key) const {
  TANDEM_ASSIGN_OR_RETURN(KeyFile key, ring->find(public_key));
  if (!roles.empty() && std::find(roles.begin(), roles.end(), key.role) == roles.end())
    return refused_error(
        str("key ", key.name, ": its role ", key_role_name(key.role), " may not use this socket"));
  return key;
}

struct ZapHandler::State {
  void* socket = nullptr;
  Wakeup wakeup;
  std::atomic<bool> stopping{false};
  std::atomic<std::uint64_t> accepted{0}, refused{0};
  std::mutex mutex;
  std::map<std::string, AllowedKeys> domains;
  std::thread thread;

  /// The public key in Z85 when it may connect, or "".
  std::string decide(const std::vector<std::string>& frames) {
    if (frames.size() != kZapFrames || frames[5] != "CURVE" || frames[6].size() != kCurveKeyBytes)
      return "";
    std::array<char, kZ85Size> z85{};
    zmq_z85_encode(z85.data(), reinterpret_cast<const std::uint8_t*>(frames[6].data()),
                   frames[6].size());
    AllowedKeys keys;
    {
      std::lock_guard lock(mutex);
      const auto it = domains.find(frames[2]);
      if (it == domains.end()) return "";
      keys = it->second;
    }
    const auto key = keys.check(z85.data());
    if (!key.ok()) {
      log_debug("connection from ", frames[3], " refused: ", key.status().message());
      return "";
    }
    return z85.data();
  }

  void answer() {
    const auto frames = receive_frames(socket);
    if (frames.empty()) return;
    const std::string user = decide(frames);
    ++(user.empty() ? refused : accepted);
    const std::string id = frames.size() > 1 ? frames[1] : "";
    const std::array<std::string_view, 6> reply{
        "1.0", id, user.empty() ? "400" : "200", user.empty() ? "key not allowed" : "OK", user, ""};
    for (std::size_t i = 0; i < reply.size(); ++i)
      zmq_send(socket, reply[i].data(), reply[i].size(),
               ZMQ_DONTWAIT | (i + 1 < reply.size() ? ZMQ_SNDMORE : 0));
  }

  void run() {
    while (!stopping) {
      std::array<zmq_pollitem_t, 2> items{
          {{socket, 0, ZMQ_POLLIN, 0}, {nullptr, wakeup.fd(), ZMQ_POLLIN, 0}}};
      if (zmq_poll(items.data(), static_cast<int>(items.size()), -1) < 0 && zmq_errno() != EINTR)
        return;
      if ((items[0].revents & ZMQ_POLLIN) != 0) answer();
    }
  }
};

ZapHandler::ZapHandler(std::unique_ptr<State> state) : state_(std::move(state)) {}

Result<std::unique_ptr<ZapHandler>> ZapHandler::start(void* zmq_context) {
  auto state = std::make_unique<State>();
  state->socket = zmq_socket(zmq_context, ZMQ_REP);
  if (state->socket == nullptr)
    return internal_error(str("key check: no socket: ", zmq_strerror(zmq_errno())));
  const int linger = 0;
  zmq_setsockopt(state->socket, ZMQ_LINGER, &linger, sizeof linger);
  if (zmq_bind(state->socket, kZapEndpoint) != 0) {
    zmq_close(state->socket);
    return conflict_error("key check: this ZeroMQ context has one already");
  }
  State* raw = state.get();
  state->thread = std::thread([raw] { raw->run(); });
  return std::unique_ptr<ZapHandler>(new ZapHandler(std::move(state)));
}

ZapHandler::~ZapHandler() {
  state_->stopping = true;
  state_->wakeup.signal();
  state_->thread.join();
  zmq_close(state_->socket);
}

void ZapHandler::add_domain(const std::string& domain, AllowedKeys keys) {
  std::lock_guard lock(state_->mutex);
  state_->domains[domain] = std::move(keys);
}

ZapCounters ZapHandler::counters() const {
  return {state_->accepted, state_->refused};
}

}  // namespace tandem::protocol
