// Chunks through the client library: stored once, verified, repeated until answered; and the client
// over real sockets with keys.
#include "protocol/client/bulk_transfer.h"

#include "protocol/base/str.h"
#include "protocol/client/client.h"
#include "protocol/codec.h"
#include "protocol/inproc_transport.h"
#include "protocol/zmq_transport.h"
#include "tests/protocol/fake_coordinator.h"
#include "tests/protocol/transport_fixture.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>

namespace tandem::protocol::client {
namespace {

/// A store that answers bulk requests; `lose` says which of them (counted from 1) go unanswered.
class FakeStore {
 public:
  explicit FakeStore(std::unique_ptr<ServerEndpoint> endpoint, std::function<bool(int)> lose = {})
      : endpoint_(std::move(endpoint)), lose_(std::move(lose)) {
    thread_ = std::thread([this] { run(); });
  }
  ~FakeStore() {
    stopping_ = true;
    endpoint_->wake();
    thread_.join();
  }
  FakeStore(const FakeStore&) = delete;
  FakeStore& operator=(const FakeStore&) = delete;

  std::map<Digest, Bytes> blobs;  // read it when nothing is under way
  std::atomic<int> puts{0}, asked{0};
  std::atomic<bool> corrupt{false};

 private:
  void run() {
    while (!stopping_) {
      auto envelope = endpoint_->receive(20);
      if (!envelope.has_value()) continue;
      const auto request = decode_bulk(envelope->frame);
      if (!request.ok() || (lose_ && lose_(++asked))) continue;
      BlobReply reply;
      Bytes payload;
      std::visit([&](const auto& r) { answer(r, *envelope, reply, payload); }, *request);
      static_cast<void>(endpoint_->send(envelope->peer, encode(reply), payload));
    }
  }
  void answer(const BlobHas& request, const Envelope&, BlobReply& reply, Bytes&) {
    reply.call = request.call;
    for (const Digest& digest : request.digests) reply.has.push_back(blobs.contains(digest));
  }
  void answer(const BlobPut& request, const Envelope& envelope, BlobReply& reply, Bytes&) {
    ++puts;
    reply.call = request.call;
    if (sha256(envelope.payload) != request.digest) {
      reply.status = corrupt_error("another digest");
    } else {
      blobs[request.digest] = envelope.payload;
    }
  }
  void answer(const BlobGet& request, const Envelope&, BlobReply& reply, Bytes& payload) {
    reply.call = request.call;
    if (!blobs.contains(request.digest)) {
      reply.status = not_found_error(str("no blob ", request.digest));
      return;
    }
    const Bytes& blob = blobs[request.digest];
    reply.total_bytes = static_cast<std::int64_t>(blob.size());
    const std::int64_t bytes = request.bytes > 0
                                   ? std::min(request.bytes, reply.total_bytes - request.offset)
                                   : reply.total_bytes;
    payload.assign(blob.begin() + request.offset, blob.begin() + request.offset + bytes);
    if (corrupt) payload[0] ^= std::byte{1};
  }

  std::unique_ptr<ServerEndpoint> endpoint_;
  std::function<bool(int)> lose_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

class BulkTransferTest : public ::testing::Test {
 protected:
  void serve(std::function<bool(int)> lose = {}) {
    const bool store_loses = lose != nullptr;
    store_ = std::make_unique<FakeStore>(network_.listen("b").value(), std::move(lose));
    BulkOptions options;
    options.endpoint_name = "ipc:///run/tandem/bulk";
    options.repeat_ms = store_loses ? 30 : 10'000;
    options.give_up_ms = 500;
    bulk_ = std::make_unique<BulkTransfer>(network_.connect("b", "me"), options);
  }
  /// A file of that size in which every chunk differs.
  std::string file_of(std::int64_t bytes) {
    const std::string path = dir_.path() + "/data";
    std::string content(static_cast<std::size_t>(bytes), '\0');
    for (std::size_t i = 0; i < content.size(); i += 997) content[i] = static_cast<char>(i / 997);
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }

  SystemClock clock_;
  InprocNetwork network_{clock_};
  TempDir dir_;
  std::unique_ptr<FakeStore> store_;
  std::unique_ptr<BulkTransfer> bulk_;
};

TEST_F(BulkTransferTest, AModelsFileComesInPiecesAndMustHaveItsContentRoot) {
  serve();
  Bytes content(static_cast<std::size_t>(kChunkBytes + 5), std::byte{7});
  Hasher leaves;
  for (const Digest& leaf : {sha256(std::span(content).first(kChunkBytes)),
                             sha256(std::span(content).subspan(kChunkBytes))})
    leaves.update(std::as_bytes(std::span(leaf.bytes)));
  const Digest root = leaves.finish();
  store_->blobs[root] = content;
  const std::string path = dir_.path() + "/model";
  ASSERT_TRUE(bulk_->get_content(root, path).ok());
  std::ifstream in(path, std::ios::binary);
  const std::string copy((std::istreambuf_iterator<char>(in)), {});
  EXPECT_EQ(sha256(copy), sha256(content));
  store_->corrupt = true;
  const std::string bad = dir_.path() + "/bad";
  EXPECT_EQ(bulk_->get_content(root, bad).code(), StatusCode::kCorrupt);
  EXPECT_EQ(bulk_->get_content(sha256("absent"), bad).code(), StatusCode::kNotFound);
  EXPECT_FALSE(std::filesystem::exists(bad));
}

TEST_F(BulkTransferTest, AFileGoesInChunksUnderItsContentRootAndComesBack) {
  serve();
  const std::string path = file_of(2 * kChunkBytes + 12345);
  std::vector<std::int64_t> progress;
  const auto upload = bulk_->put_file(path, [&](std::int64_t done, std::int64_t total) {
    EXPECT_EQ(total, 2 * kChunkBytes + 12345);
    progress.push_back(done);
  });
  ASSERT_TRUE(upload.ok()) << upload.status().to_string();
  EXPECT_EQ(upload->chunks.size(), 3u);
  EXPECT_EQ(progress.back(), upload->bytes);
  std::ifstream file(path, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  EXPECT_EQ(upload->root, content_root(std::as_bytes(std::span(content))));
}

TEST_F(BulkTransferTest, WhatIsThereAlreadyIsNotSent) {
  serve();
  const std::string path = file_of(1000);
  const auto first = bulk_->put_file(path);
  const auto second = bulk_->put_file(path);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(first->root, second->root);
  EXPECT_EQ(store_->puts, 1);
}

TEST_F(BulkTransferTest, LostRequestsAreRepeated) {
  serve([](int n) { return n % 3 != 0; });
  const auto upload = bulk_->put_bytes(bytes_of("some bytes"));
  ASSERT_TRUE(upload.ok()) << upload.status().to_string();
  EXPECT_EQ(store_->blobs.count(sha256("some bytes")), 1u);
}

TEST_F(BulkTransferTest, ChunksAreVerifiedWhenTheyCome) {
  serve();
  ASSERT_TRUE(bulk_->put(bytes_of("abc"), "pin").ok());
  ASSERT_TRUE(bulk_->get(sha256("abc")).ok());
  store_->corrupt = true;
  EXPECT_EQ(bulk_->get(sha256("abc")).status().code(), StatusCode::kCorrupt);
  EXPECT_EQ(bulk_->get(sha256("other")).status().code(), StatusCode::kNotFound);
}

TEST_F(BulkTransferTest, SaysWhatItCannotSend) {
  serve();
  EXPECT_EQ(bulk_->put_file(dir_.path() + "/none").status().code(), StatusCode::kInvalid);
  EXPECT_EQ(bulk_->put_file(file_of(0)).status().message(), dir_.path() + "/data: is empty");
  EXPECT_EQ(bulk_->put({}, "pin").code(), StatusCode::kInvalid);
}

TEST_F(BulkTransferTest, ANumberOfDigestsOverTheLimitIsAskedInParts) {
  serve();
  ASSERT_TRUE(bulk_->put(bytes_of("abc"), "pin").ok());
  std::vector<Digest> digests(static_cast<std::size_t>(kBlobHasMax) + 10, sha256("none"));
  digests.back() = sha256("abc");
  const auto there = bulk_->has(digests);
  ASSERT_TRUE(there.ok()) << there.status().to_string();
  ASSERT_EQ(there->size(), digests.size());
  EXPECT_EQ(std::count(there->begin(), there->end(), true), 1);
  EXPECT_TRUE(there->back());
}

TEST_F(BulkTransferTest, AStoreThatStaysAwayIsNamed) {
  serve([](int) { return true; });
  const Status gone = bulk_->put(bytes_of("abc"), "pin");
  EXPECT_EQ(gone.code(), StatusCode::kUnavailable);
  EXPECT_NE(gone.message().find("ipc:///run/tandem/bulk"), std::string::npos) << gone.message();
}

/// The whole client over tcp with CURVE, from key files.
class ClientOverTcp : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(write_key_file(dir_.path() + "/allowed.key",
                               {"alice", KeyRole::kClient, alice_.public_key, "", ""})
                    .ok());
    own_file_ = own_.path() + "/alice.key";
    ASSERT_TRUE(write_key_file(own_file_, {"alice", KeyRole::kClient, alice_.public_key,
                                           alice_.secret_key, server_keys_.public_key})
                    .ok());
    clients_ = listen(SocketLimits::control());
    bulk_ = listen(SocketLimits::bulk());
  }
  std::unique_ptr<ServerEndpoint> listen(SocketLimits limits) {
    ZmqServerOptions options;
    options.endpoint = "tcp://127.0.0.1:0";
    options.limits = limits;
    options.keys = server_keys_;
    options.allowed_keys_dir = dir_.path();
    return context_->listen(options).value();
  }
  TempDir dir_, own_;
  CurveKeyPair server_keys_ = generate_curve_keys().value();
  CurveKeyPair alice_ = generate_curve_keys().value();
  std::string own_file_;
  std::unique_ptr<ZmqContext> context_ = ZmqContext::create().value();
  std::unique_ptr<ServerEndpoint> clients_, bulk_;
};

TEST_F(ClientOverTcp, FindsTheBulkSocketByItselfAndTransfers) {
  const std::string endpoint = clients_->address(), bulk_endpoint = bulk_->address();
  FakeCoordinator coordinator(std::move(clients_), [&](const ClientMessage& message,
                                                       const auto& reply) {
    if (const auto* call = std::get_if<Call>(&message))
      reply(CallReply{
          call->call_id, {}, str("{\"endpoints\":{\"bulk\":\"", bulk_endpoint, "\"}}"), false, 0});
  });
  FakeStore store(std::move(bulk_));
  ClientOptions options;
  options.endpoint = endpoint;
  options.key_file = own_file_;
  options.connect_ms = 20'000;
  auto client = Client::connect(options);
  ASSERT_TRUE(client.ok()) << client.status().to_string();
  auto bulk = (*client)->bulk();
  ASSERT_TRUE(bulk.ok()) << bulk.status().to_string();
  const auto upload = (*bulk)->put_bytes(bytes_of("over the wire"));
  ASSERT_TRUE(upload.ok()) << upload.status().to_string();
  EXPECT_TRUE((*bulk)->get(upload->chunks.at(0)).ok());
}

TEST_F(ClientOverTcp, ARefusedKeyIsSaidAtOnce) {
  std::filesystem::remove(dir_.path() + "/allowed.key");
  ClientOptions options;
  options.endpoint = clients_->address();
  options.key_file = own_file_;
  options.connect_ms = 20'000;
  const Status refused = Client::connect(options).status();
  EXPECT_EQ(refused.code(), StatusCode::kRefused);
  EXPECT_NE(refused.message().find("refused this key"), std::string::npos) << refused.message();
}

TEST_F(ClientOverTcp, ACoordinatorsCopyOfAKeyIsNotEnough) {
  ClientOptions options;
  options.endpoint = clients_->address();
  options.key_file = dir_.path() + "/allowed.key";
  const Status refused = Client::connect(options).status();
  EXPECT_EQ(refused.code(), StatusCode::kInvalid);
  EXPECT_NE(refused.message().find("secret"), std::string::npos) << refused.message();
}

}  // namespace
}  // namespace tandem::protocol::client
