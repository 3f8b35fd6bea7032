// What strangers and broken peers can do to the ZeroMQ sockets: nothing that others notice.
#include "protocol/base/str.h"
#include "protocol/client/client.h"
#include "protocol/descriptor_limit.h"
#include "protocol/zmq_transport.h"
#include "tests/protocol/transport_fixture.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zmq.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

namespace tandem::protocol {
namespace {

constexpr std::int64_t kMiB = 1 << 20;

/// A plain TCP connection that speaks no ZeroMQ unless told to.
class RawTcp {
 public:
  explicit RawTcp(const std::string& address) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port =
        htons(static_cast<std::uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
    TANDEM_CHECK(::connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0);
  }
  ~RawTcp() { ::close(fd_); }
  RawTcp(const RawTcp&) = delete;
  RawTcp& operator=(const RawTcp&) = delete;
  /// False when the other side closed.
  bool send(const void* data, std::size_t size) {
    const char* at = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t n = ::send(fd_, at, size, MSG_NOSIGNAL);
      if (n <= 0) return false;
      at += n;
      size -= static_cast<std::size_t>(n);
    }
    return true;
  }
  /// True when the other side closes within the time.
  bool closed_within(TimeMs timeout_ms) {
    const std::int64_t end = steady_ns() + timeout_ms * 1'000'000;
    std::array<char, 4096> sink{};
    while (steady_ns() < end) {
      pollfd item{fd_, POLLIN, 0};
      if (::poll(&item, 1, 50) > 0 && ::recv(fd_, sink.data(), sink.size(), 0) <= 0) return true;
    }
    return false;
  }

 private:
  int fd_;
};

std::int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

class CurveServer : public ::testing::Test {
 protected:
  void SetUp() override {
    add_key("alice", KeyRole::kClient, alice_);
    server_ = listen();
  }
  void add_key(const std::string& name, KeyRole role, const CurveKeyPair& keys) {
    const Status written =
        write_key_file(dir_.path() + "/" + name + ".key", {name, role, keys.public_key, "", ""});
    ASSERT_TRUE(written.ok()) << written.to_string();
  }
  std::unique_ptr<ServerEndpoint> listen(SocketLimits limits = SocketLimits::control(),
                                         std::vector<KeyRole> roles = {}) {
    ZmqServerOptions options;
    options.endpoint = "tcp://127.0.0.1:0";
    options.limits = limits;
    options.keys = server_keys_;
    options.allowed_keys_dir = dir_.path();
    options.allowed_roles = std::move(roles);
    auto server = context_->listen(options);
    TANDEM_CHECK(server.ok(), server.status().to_string());
    return std::move(server).value();
  }
  std::unique_ptr<ClientEndpoint> connect(const ServerEndpoint& server, const CurveKeyPair& keys,
                                          const std::string& routing_id,
                                          SocketLimits limits = SocketLimits::control()) {
    ZmqClientOptions options;
    options.endpoint = server.address();
    options.routing_id = routing_id;
    options.limits = limits;
    options.keys = keys;
    options.server_public_key = server_keys_.public_key;
    return context_->connect(options).value();
  }
  /// The claim that ends most tests: an honest client is served as if nothing had happened.
  void expect_alice_is_served() {
    auto alice = connect(*server_, alice_, make_routing_id("alice", "test"));
    ASSERT_TRUE(wait_connected(*alice));
    ASSERT_TRUE(alice->send(bytes_of("honest")).ok());
    const auto got = receive_one(*server_);
    ASSERT_TRUE(got.has_value());
    EXPECT_EQ(text_of(got->frame), "honest");
    EXPECT_EQ(got->user_id, "alice");
    ASSERT_TRUE(server_->send(got->peer, bytes_of("served")).ok());
    EXPECT_TRUE(receive_one(*alice).has_value());
  }

  TempDir dir_;
  CurveKeyPair server_keys_ = generate_curve_keys().value();
  CurveKeyPair alice_ = generate_curve_keys().value();
  CurveKeyPair stranger_ = generate_curve_keys().value();
  std::unique_ptr<ZmqContext> context_ = ZmqContext::create().value();
  std::unique_ptr<ServerEndpoint> server_;
};

TEST_F(CurveServer, GarbageIsNeverDelivered) {
  std::uint64_t state = 9;
  for (int i = 0; i < 200; ++i) {
    RawTcp raw(server_->address());
    std::array<std::uint64_t, 64> garbage{};
    for (auto& word : garbage) word = state = mix64(state);
    raw.send(garbage.data(), sizeof garbage);
  }
  EXPECT_FALSE(server_->receive(scaled_ms(100)).has_value());
  EXPECT_EQ(server_->counters().received, 0u);
  expect_alice_is_served();
}

TEST_F(CurveServer, AnEndlessMultipartMessageWithoutAKeyTakesNoMemory) {
  // ZMTP 3.0: greeting with the NULL mechanism, an empty READY, then frames that all say MORE.
  std::string greeting("\xff\0\0\0\0\0\0\0\0\x7f\x03\0NULL", 16);
  greeting.resize(64, '\0');
  const std::string ready("\x04\x06\x05READY", 8);
  std::string more("\x03\0\0\0\0\0\x10\0\0", 9);  // a long frame of 1 MiB, MORE
  more.resize(more.size() + kMiB, 'x');
  const std::int64_t before = resident_bytes();
  RawTcp raw(server_->address());
  raw.send(greeting.data(), greeting.size());
  raw.send(ready.data(), ready.size());
  int sent = 0;
  while (sent < 256 && raw.send(more.data(), more.size())) ++sent;
  EXPECT_LT(resident_bytes() - before, 64 * kMiB) << "after " << sent << " MiB";
  EXPECT_LT(sent, 256) << "the connection was never closed";
  expect_alice_is_served();
}

TEST_F(CurveServer, SilentConnectionsAreClosedAndHinderNobody) {
  std::vector<std::unique_ptr<RawTcp>> silent;
  for (int i = 0; i < 100; ++i) silent.push_back(std::make_unique<RawTcp>(server_->address()));
  expect_alice_is_served();
  for (auto& raw : silent) ASSERT_TRUE(raw->closed_within(scaled_ms(10 * kHandshakeMs)));
}

TEST_F(CurveServer, AnUnknownKeyIsToldSoAndNeverDelivered) {
  auto stranger = connect(*server_, stranger_, "stranger/1");
  for (int i = 0; i < 200 && stranger->trouble().code() != StatusCode::kRefused; ++i)
    stranger->receive(scaled_ms(50));
  EXPECT_EQ(stranger->trouble().code(), StatusCode::kRefused);
  EXPECT_EQ(stranger->send(bytes_of("x")).code(), StatusCode::kUnavailable);
  EXPECT_GE(context_->zap_counters().refused, 1u);
  expect_alice_is_served();
}

TEST_F(CurveServer, AWrongServerKeyConnectsToNothing) {
  const CurveKeyPair right = server_keys_;
  server_keys_ = stranger_;
  auto alice = connect(*server_, alice_, "alice/1");
  server_keys_ = right;
  EXPECT_FALSE(alice->receive(scaled_ms(300)).has_value());
  EXPECT_FALSE(alice->connected());
  client::ClientOptions options;
  options.endpoint = server_->address();
  options.connect_ms = 300;
  const auto made = client::Client::connect(std::move(alice), nullptr, options);
  ASSERT_FALSE(made.ok());
  EXPECT_NE(made.status().message().find("are the keys right?"), std::string::npos)
      << made.status().message();
  expect_alice_is_served();
}

TEST_F(CurveServer, ARoutingIdThatIsNotTheKeysIsRefusedAndCounted) {
  const CurveKeyPair bob = generate_curve_keys().value();
  add_key("bob", KeyRole::kClient, bob);
  for (const char* stolen : {"alice", "alice/1", "bobby", ""}) {
    const std::string id = *stolen == '\0' ? "bo" : stolen;
    auto thief = connect(*server_, bob, id);
    ASSERT_TRUE(wait_connected(*thief));
    ASSERT_TRUE(thief->send(bytes_of("as somebody else")).ok());
    const auto before = server_->counters().refused_identity;
    for (int i = 0; i < 200 && server_->counters().refused_identity == before; ++i)
      EXPECT_FALSE(server_->receive(scaled_ms(50)).has_value());
    EXPECT_EQ(server_->counters().refused_identity, before + 1) << id;
  }
  expect_alice_is_served();
}

TEST_F(CurveServer, ANewConnectionOfTheSamePeerTakesItsRoutingIdOver) {
  auto first = connect(*server_, alice_, "alice/1");
  ASSERT_TRUE(wait_connected(*first));
  ASSERT_TRUE(first->send(bytes_of("first")).ok());
  ASSERT_TRUE(receive_one(*server_).has_value());
  {
    // As after a crash: the old connection still stands at the server.
    auto second = connect(*server_, alice_, "alice/1");
    ASSERT_TRUE(wait_connected(*second));
    ASSERT_TRUE(second->send(bytes_of("second")).ok());
    const auto got = receive_one(*server_);
    ASSERT_TRUE(got.has_value());
    EXPECT_EQ(text_of(got->frame), "second");
  }
  expect_alice_is_served();
}

TEST_F(CurveServer, KeysComeAndGoWhileItRuns) {
  const CurveKeyPair bob = generate_curve_keys().value();
  auto endpoint = connect(*server_, bob, "bob/1");
  EXPECT_FALSE(endpoint->receive(scaled_ms(100)).has_value());
  EXPECT_FALSE(endpoint->connected());
  add_key("bob", KeyRole::kClient, bob);
  ASSERT_TRUE(wait_connected(*endpoint));
  ASSERT_TRUE(endpoint->send(bytes_of("in")).ok());
  const auto in = receive_one(*server_);
  ASSERT_TRUE(in.has_value());
  ASSERT_TRUE(server_->send(in->peer, bytes_of("events"), {}).ok());

  std::filesystem::remove(dir_.path() + "/bob.key");
  const std::int64_t end = steady_ns() + scaled_ms(20'000) * 1'000'000;
  while (server_->counters().refused_identity == 0 && steady_ns() < end) {
    static_cast<void>(endpoint->send(bytes_of("out")));
    server_->receive(20);
  }
  EXPECT_GE(server_->counters().refused_identity, 1u) << "the revoked key still works";
  EXPECT_EQ(server_->send(in->peer, bytes_of("events"), {}).code(), StatusCode::kUnavailable);
  add_key("bob", KeyRole::kClient, generate_curve_keys().value());
  std::this_thread::sleep_for(std::chrono::milliseconds(2 * kKeyLookMs));
  EXPECT_EQ(server_->send(in->peer, bytes_of("events"), {}).code(), StatusCode::kUnavailable)
      << "the old key came back with a new one of its name";
  while (server_->receive(0).has_value()) {
  }
  expect_alice_is_served();
}

TEST_F(CurveServer, ASocketForWorkersRefusesAClientsKey) {
  auto workers = listen(SocketLimits::control(), {KeyRole::kWorker});
  auto alice = connect(*workers, alice_, "alice/1");
  for (int i = 0; i < 200 && alice->trouble().code() != StatusCode::kRefused; ++i)
    alice->receive(scaled_ms(50));
  EXPECT_EQ(alice->trouble().code(), StatusCode::kRefused);
}

TEST_F(CurveServer, AnOversizedFrameCostsItsSenderTheConnection) {
  SocketLimits wide = SocketLimits::control();
  wide.frame_bytes_max = 64 * kMiB;
  auto alice = connect(*server_, alice_, "alice/wide", wide);
  ASSERT_TRUE(wait_connected(*alice));
  ASSERT_TRUE(alice->send(Bytes(8 * kMiB)).ok());
  EXPECT_FALSE(server_->receive(scaled_ms(200)).has_value());
  EXPECT_TRUE(wait_connected(*alice)) << "it may come back";
  expect_alice_is_served();
}

TEST_F(CurveServer, AFrameJustOverTheLimitIsRefusedAndCounted) {
  SocketLimits wide = SocketLimits::control();
  wide.frame_bytes_max = kFrameBytesMax + 1;
  auto alice = connect(*server_, alice_, "alice/wide", wide);
  ASSERT_TRUE(wait_connected(*alice));
  ASSERT_TRUE(alice->send(Bytes(static_cast<std::size_t>(kFrameBytesMax) + 1)).ok());
  ASSERT_TRUE(alice->send(Bytes(static_cast<std::size_t>(kFrameBytesMax))).ok());
  const auto got = receive_one(*server_);
  ASSERT_TRUE(got.has_value());
  EXPECT_EQ(static_cast<std::int64_t>(got->frame.size()), kFrameBytesMax);
  EXPECT_EQ(server_->counters().refused_size, 1u);
  EXPECT_EQ(server_->send("alice/wide", Bytes(static_cast<std::size_t>(kFrameBytesMax) + 1)).code(),
            StatusCode::kInvalid);
}

// -- ipc -----------------------------------------------------------------------------------------

class IpcServer : public ::testing::Test {
 protected:
  Result<std::unique_ptr<ServerEndpoint>> listen(const std::string& endpoint,
                                                 SocketLimits limits = SocketLimits::control()) {
    ZmqServerOptions options;
    options.endpoint = endpoint;
    options.limits = limits;
    return context_->listen(options);
  }
  TempDir dir_;
  std::unique_ptr<ZmqContext> context_ = ZmqContext::create().value();
};

TEST_F(IpcServer, MoreFramesThanItsKindHasAreRefusedAndCounted) {
  const std::string at = "ipc://" + dir_.path() + "/s";
  auto control = listen(at).value();
  auto bulk = listen(at + "b", SocketLimits::bulk()).value();
  void* raw_context = zmq_ctx_new();
  for (const auto& [server, allowed] :
       std::vector<std::pair<ServerEndpoint*, int>>{{control.get(), 1}, {bulk.get(), 2}}) {
    void* raw = zmq_socket(raw_context, ZMQ_DEALER);
    ASSERT_EQ(zmq_connect(raw, server->address().c_str()), 0);
    for (int frames = 1; frames <= 5; ++frames)
      for (int i = 1; i <= frames; ++i)
        ASSERT_GE(zmq_send(raw, "frame", 5, i < frames ? ZMQ_SNDMORE : 0), 0);
    for (int frames = 1; frames <= allowed; ++frames) {
      const auto got = receive_one(*server);
      ASSERT_TRUE(got.has_value());
      EXPECT_EQ(got->payload.empty(), frames == 1);
    }
    const auto refused = static_cast<std::uint64_t>(5 - allowed);
    for (int i = 0; i < 200 && server->counters().refused_frames < refused; ++i)
      EXPECT_FALSE(server->receive(scaled_ms(50)).has_value());
    EXPECT_EQ(server->counters().refused_frames, refused);
    const int linger = 0;
    zmq_setsockopt(raw, ZMQ_LINGER, &linger, sizeof linger);
    zmq_close(raw);
  }
  zmq_ctx_term(raw_context);
}

TEST_F(IpcServer, AConnectionThatEndsAfterAnotherTookItsNameOverHarmsNobody) {
  auto server = listen("ipc://" + dir_.path() + "/s").value();
  void* raw_context = zmq_ctx_new();
  const auto dial = [&] {
    void* raw = zmq_socket(raw_context, ZMQ_DEALER);
    const int linger = 0;
    zmq_setsockopt(raw, ZMQ_LINGER, &linger, sizeof linger);
    zmq_setsockopt(raw, ZMQ_ROUTING_ID, "same", 4);
    EXPECT_EQ(zmq_connect(raw, server->address().c_str()), 0);
    EXPECT_EQ(zmq_send(raw, "hello", 5, 0), 5);
    EXPECT_TRUE(receive_one(*server).has_value());
    return raw;
  };
  void* first = dial();
  void* second = dial();
  // The server reads nothing more of the first, and then it ends. A timer of libzmq's that writes
  // to such a connection aborts the process; those of ZMTP's heartbeats came every two seconds.
  EXPECT_EQ(zmq_send(first, "unheard", 7, 0), 7);
  EXPECT_FALSE(server->receive(100).has_value());
  zmq_close(first);
  EXPECT_FALSE(server->receive(2'500).has_value());
  EXPECT_EQ(zmq_send(second, "heard", 5, 0), 5);
  EXPECT_TRUE(receive_one(*server).has_value());
  zmq_close(second);
  zmq_ctx_term(raw_context);
}

TEST_F(IpcServer, WithoutDescriptorsLeftStrangersAreTurnedAwayAndFriendsServed) {
  const std::string path = dir_.path() + "/s";
  auto server = listen("ipc://" + path).value();
  const auto dial = [&](const std::string& id) {
    ZmqClientOptions options;
    options.endpoint = "ipc://" + path;
    options.routing_id = id;
    return context_->connect(options).value();
  };
  auto client = dial("a/1");
  ASSERT_TRUE(wait_connected(*client));
  std::array<int, 2> go{}, done{};
  ASSERT_EQ(::pipe(go.data()) + ::pipe(done.data()), 0);
  const pid_t crowd = ::fork();
  if (crowd == 0) {
    char byte = 0;
    (void)!::read(go[0], &byte, 1);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    for (int i = 0; i < 200; ++i)
      (void)!::connect(::socket(AF_UNIX, SOCK_STREAM, 0), reinterpret_cast<sockaddr*>(&address),
                       sizeof address);
    (void)!::write(done[1], &byte, 1);
    ::pause();
    ::_exit(0);
  }
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const int next = ::dup(go[0]);
  rlimit few = before;
  few.rlim_cur = static_cast<rlim_t>(next + kReservedDescriptors + 20);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
  char byte = 'x';
  EXPECT_EQ(::write(go[1], &byte, 1), 1);
  EXPECT_EQ(::read(done[0], &byte, 1), 1);
  for (int i = 0; i < 200 && connections_turned_away() == 0; ++i) server->receive(50);
  EXPECT_GT(connections_turned_away(), 0u);
  EXPECT_TRUE(client->send(bytes_of("still")).ok());
  EXPECT_TRUE(receive_one(*server).has_value());
  ::kill(crowd, SIGKILL);
  ::waitpid(crowd, nullptr, 0);
  auto late = dial("b/1");
  EXPECT_TRUE(wait_connected(*late)) << "there is room again";
  ::setrlimit(RLIMIT_NOFILE, &before);
  for (const int fd : {go[0], go[1], done[0], done[1], next}) ::close(fd);
}

TEST_F(IpcServer, ADirectoryThatOthersCanEnterIsRefused) {
  const std::string open_dir = dir_.path() + "/open";
  ASSERT_EQ(::mkdir(open_dir.c_str(), 0755), 0);
  ASSERT_EQ(::chmod(open_dir.c_str(), 0755), 0);
  const Status refused = listen("ipc://" + open_dir + "/s").status();
  EXPECT_EQ(refused.code(), StatusCode::kRefused);
  EXPECT_NE(refused.message().find("chmod 700"), std::string::npos) << refused.message();
  EXPECT_EQ(context_->connect({.endpoint = "ipc://" + open_dir + "/s", .routing_id = "me"})
                .status()
                .code(),
            StatusCode::kRefused);
}

TEST_F(IpcServer, AMissingDirectoryIsMadeForItsOwnerOnly) {
  ASSERT_TRUE(listen("ipc://" + dir_.path() + "/new/s").ok());
  struct stat info {};
  ASSERT_EQ(::stat((dir_.path() + "/new").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
}

TEST_F(IpcServer, AnAddressThatCannotBeUsedIsNamed) {
  for (const char* bad : {"", "ipc://relative/s", "ipc://", "udp://127.0.0.1:1", "tcp://127.0.0.1",
                          "tcp://127.0.0.1:70000", "tcp://127.0.0.1:x", "nonsense"}) {
    const Status refused = listen(bad).status();
    EXPECT_EQ(refused.code(), StatusCode::kInvalid) << bad << ": " << refused.to_string();
  }
  const Status longest = listen("ipc:///tmp/" + std::string(200, 'x') + "/s").status();
  EXPECT_EQ(longest.code(), StatusCode::kInvalid);
  EXPECT_NE(longest.message().find("107"), std::string::npos) << longest.message();
}

TEST_F(IpcServer, TcpWithoutKeysIsRefusedOnLoopbackToo) {
  const Status refused = listen("tcp://127.0.0.1:0").status();
  EXPECT_EQ(refused.code(), StatusCode::kRefused);
  EXPECT_NE(refused.message().find("CURVE"), std::string::npos);
  EXPECT_EQ(
      context_->connect({.endpoint = "tcp://127.0.0.1:1", .routing_id = "me"}).status().code(),
      StatusCode::kRefused);
}

TEST_F(IpcServer, BulkCarriesASixteenMebibytePayloadInAFrameOfItsOwn) {
  auto server = listen("ipc://" + dir_.path() + "/b", SocketLimits::bulk()).value();
  auto client = context_
                    ->connect({.endpoint = server->address(),
                               .routing_id = make_routing_id("me", "bulk"),
                               .limits = SocketLimits::bulk()})
                    .value();
  ASSERT_TRUE(wait_connected(*client));
  Bytes payload(16 << 20);
  for (std::size_t i = 0; i < payload.size(); i += 4096)
    payload[i] = static_cast<std::byte>(i >> 12);
  ASSERT_TRUE(client->send(bytes_of("head"), payload).ok());
  const auto got = receive_one(*server);
  ASSERT_TRUE(got.has_value());
  EXPECT_EQ(text_of(got->frame), "head");
  EXPECT_TRUE(got->payload == payload);
  EXPECT_EQ(client->send(bytes_of("head"), Bytes(static_cast<std::size_t>(kBulkFrameBytesMax) + 1))
                .code(),
            StatusCode::kInvalid);
}

// -- key files -----------------------------------------------------------------------------------

TEST(KeyFile, RoundTripsAndIsPrivate) {
  TempDir dir;
  const CurveKeyPair keys = generate_curve_keys().value();
  const KeyFile key{"node-1", KeyRole::kWorker, keys.public_key, keys.secret_key, keys.public_key};
  const std::string path = dir.path() + "/k";
  ASSERT_TRUE(write_key_file(path, key).ok());
  struct stat info {};
  ASSERT_EQ(::stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  const auto again = read_key_file(path);
  ASSERT_TRUE(again.ok()) << again.status().to_string();
  EXPECT_EQ(again->name, key.name);
  EXPECT_EQ(again->role, key.role);
  EXPECT_EQ(again->secret_key, key.secret_key);
  EXPECT_EQ(again->server_key, key.server_key);
  EXPECT_EQ(write_key_file(path, key).code(), StatusCode::kConflict);
  EXPECT_TRUE(write_key_file(path, key, true).ok());
}

TEST(KeyFile, OneThatOthersMayReadIsRefused) {
  TempDir dir;
  const CurveKeyPair keys = generate_curve_keys().value();
  const std::string path = dir.path() + "/a.key";
  ASSERT_TRUE(write_key_file(path, {"a", KeyRole::kClient, keys.public_key, "", ""}).ok());
  ASSERT_EQ(::chmod(path.c_str(), 0644), 0);
  const Status refused = read_key_file(path).status();
  EXPECT_EQ(refused.code(), StatusCode::kRefused);
  EXPECT_NE(refused.message().find("mode 644"), std::string::npos) << refused.message();
  KeyRing ring(dir.path());
  EXPECT_EQ(ring.find(keys.public_key).status().code(), StatusCode::kNotFound);
  EXPECT_TRUE(ring.list().empty());
}

TEST(KeyFile, KnownKeysHoldWhileThereAreNoDescriptors) {
  TempDir dir;
  const CurveKeyPair old = generate_curve_keys().value(), added = generate_curve_keys().value();
  const auto write = [&](const std::string& name, const CurveKeyPair& keys) {
    const KeyFile file{name, KeyRole::kClient, keys.public_key, "", ""};
    ASSERT_TRUE(write_key_file(str(dir.path(), "/", name, ".key"), file).ok());
  };
  write("a", old);
  KeyRing ring(dir.path());
  ASSERT_TRUE(ring.find(old.public_key).ok());
  write("b", added);
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  const rlimit none{3, limit.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(2 * kKeyLookMs));
  const bool held = ring.find(old.public_key).ok(), blind = !ring.find(added.public_key).ok();
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
  EXPECT_TRUE(held);
  EXPECT_TRUE(blind) << "there were descriptors: nothing is tested";
  std::this_thread::sleep_for(std::chrono::milliseconds(2 * kKeyLookMs));
  EXPECT_TRUE(ring.find(old.public_key).ok());
  EXPECT_TRUE(ring.find(added.public_key).ok());
}

TEST(KeyFile, ABadLineIsNamedByItsNumberAndNeverQuoted) {
  TempDir dir;
  const std::string path = dir.path() + "/a.key";
  std::ofstream(path) << "tandem-key 1\nname a\nsecret hunter2\n";
  ASSERT_EQ(::chmod(path.c_str(), 0600), 0);
  const Status refused = read_key_file(path).status();
  EXPECT_EQ(refused.code(), StatusCode::kInvalid);
  EXPECT_NE(refused.message().find("line 3"), std::string::npos) << refused.message();
  EXPECT_EQ(refused.message().find("hunter2"), std::string::npos) << refused.message();
}

}  // namespace
}  // namespace tandem::protocol
