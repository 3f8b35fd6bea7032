#include "tests/protocol/transport_fixture.h"

#include "protocol/base/str.h"
#include "protocol/inproc_transport.h"
#include "protocol/zmq_transport.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <thread>

namespace tandem::protocol {
namespace {

constexpr TimeMs kWaitMs = 20'000;

template <class Endpoint, class Done>
bool receive_while(Endpoint& endpoint, Done done) {
  const std::int64_t end = steady_ns() + scaled_ms(kWaitMs) * 1'000'000;
  while (steady_ns() < end) {
    if (done()) return true;
    endpoint.receive(20);
  }
  return done();
}

template <class Endpoint>
std::optional<Envelope> receive_within(Endpoint& endpoint) {
  const std::int64_t end = steady_ns() + scaled_ms(kWaitMs) * 1'000'000;
  while (steady_ns() < end)
    if (auto envelope = endpoint.receive(100)) return envelope;
  return std::nullopt;
}

/// A port that nobody has now.
int free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  TANDEM_CHECK(::bind(fd, generic, size) == 0 && ::getsockname(fd, generic, &size) == 0);
  ::close(fd);
  return ntohs(address.sin_port);
}

class InprocTestNetwork final : public TestNetwork {
 public:
  std::unique_ptr<ServerEndpoint> listen(const std::string& name, int queue) override {
    return network_.listen(name, static_cast<std::size_t>(queue)).value();
  }
  Status try_listen(const std::string& name) override { return network_.listen(name).status(); }
  std::unique_ptr<ClientEndpoint> connect(const std::string& name,
                                          const std::string& peer) override {
    return network_.connect(name, peer);
  }
  std::unique_ptr<Poller> poller() override { return network_.make_poller(); }

 private:
  SystemClock clock_;
  InprocNetwork network_{clock_};
};

class ZmqTestNetwork final : public TestNetwork {
 public:
  explicit ZmqTestNetwork(bool tcp) : tcp_(tcp) {
    TANDEM_CHECK(write_key_file(dir_.path() + "/me.key",
                                {"me", KeyRole::kClient, client_keys_.public_key, "", ""})
                     .ok());
  }
  std::unique_ptr<ServerEndpoint> listen(const std::string& name, int queue) override {
    // libzmq gives an address free on its own thread, some time after its socket was closed.
    auto server = context_->listen(server_options(name, queue));
    const std::int64_t end = steady_ns() + scaled_ms(kWaitMs) * 1'000'000;
    while (server.status().code() == StatusCode::kConflict && steady_ns() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      server = context_->listen(server_options(name, queue));
    }
    TANDEM_CHECK(server.ok(), server.status().to_string());
    addresses_[name] = (*server)->address();
    return std::move(server).value();
  }
  Status try_listen(const std::string& name) override {
    return context_->listen(server_options(name, 256)).status();
  }
  std::unique_ptr<ClientEndpoint> connect(const std::string& name,
                                          const std::string& peer) override {
    ZmqClientOptions options{.endpoint = address(name), .routing_id = peer};
    options.limits.queue_messages = 4;
    if (tcp_) {
      options.keys = client_keys_;
      options.server_public_key = server_keys_.public_key;
    }
    return context_->connect(options).value();
  }
  std::unique_ptr<Poller> poller() override { return context_->make_poller().value(); }

 private:
  std::string address(const std::string& name) {
    if (!addresses_.contains(name)) {
      if (tcp_) {
        addresses_[name] = str("tcp://127.0.0.1:", free_port());
      } else {
        addresses_[name] = "ipc://" + dir_.path() + "/" + name;
      }
    }
    return addresses_[name];
  }
  ZmqServerOptions server_options(const std::string& name, int queue) {
    ZmqServerOptions options;
    if (!tcp_) {
      options.endpoint = address(name);
    } else {
      options.endpoint = addresses_.contains(name) ? addresses_[name] : "tcp://127.0.0.1:0";
      options.keys = server_keys_;
      options.allowed_keys_dir = dir_.path();
    }
    options.limits.queue_messages = queue;
    return options;
  }

  const bool tcp_;
  TempDir dir_;
  CurveKeyPair server_keys_ = generate_curve_keys().value();
  CurveKeyPair client_keys_ = generate_curve_keys().value();
  std::map<std::string, std::string> addresses_;
  std::unique_ptr<ZmqContext> context_ = ZmqContext::create().value();
};

}  // namespace

Bytes bytes_of(const std::string& text) {
  const auto* begin = reinterpret_cast<const std::byte*>(text.data());
  return {begin, begin + text.size()};
}

std::string text_of(const Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

bool wait_connected(ClientEndpoint& client) {
  return receive_while(client, [&] { return client.connected(); });
}
bool wait_disconnected(ClientEndpoint& client) {
  return receive_while(client, [&] { return !client.connected(); });
}
std::optional<Envelope> receive_one(ServerEndpoint& server) {
  return receive_within(server);
}
std::optional<Envelope> receive_one(ClientEndpoint& client) {
  return receive_within(client);
}

TempDir::TempDir() {
  std::string pattern = (std::filesystem::temp_directory_path() / "tandem-XXXXXX").string();
  TANDEM_CHECK(::mkdtemp(pattern.data()) != nullptr, pattern);
  path_ = pattern;
}
TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::unique_ptr<TestNetwork> make_test_network(const std::string& kind) {
  if (kind == "inproc") return std::make_unique<InprocTestNetwork>();
  return std::make_unique<ZmqTestNetwork>(kind == "tcp");
}

}  // namespace tandem::protocol
