// The loop with real threads over the in-process transport.
#include "coordinator/coordinator_loop.h"
#include "protocol/codec.h"
#include "protocol/inproc_transport.h"
#include "storage/memory_store.h"
#include "tests/storage/scratch.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include <filesystem>
#include <fstream>
#include <thread>

namespace tandem::coordinator {
namespace {

TEST(Background, OfAFileThatCannotBeLookedAtOnlyItsModelIsRefused) {
  namespace fs = std::filesystem;
  storage::Scratch scratch;
  std::ofstream(scratch / "config.json") << R"({"model_type": "llama"})";
  const std::string header = R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  const std::uint64_t size = header.size();
  std::ofstream(scratch / "model.safetensors", std::ios::binary)
      << std::string(reinterpret_cast<const char*>(&size), 8) << header << std::string(4, '\0');
  fs::create_symlink("tokenizer.json", scratch / "tokenizer.json");  // to itself
  SystemClock clock;
  const auto registry = storage::Registry::in_memory(clock);
  const WorkDone done = do_work({1, HashModel{"m", scratch / ".", false}}, *registry, {});
  EXPECT_EQ(done.status.code(), StatusCode::kInvalid) << done.status.to_string();
  EXPECT_NE(done.status.message().find("tokenizer.json"), std::string::npos)
      << done.status.message();
}

TEST(Background, AFileWhoseKeysAreNotUtf8IsRefused) {
  storage::Scratch scratch;
  const auto number = [](auto n) { return std::string(reinterpret_cast<char*>(&n), sizeof n); };
  const auto text = [&](const std::string& t) {
    return number(static_cast<std::uint64_t>(t.size())) + t;
  };
  const auto key = [&](const std::string& name, const std::string& value) {
    return text(name) + number(std::uint32_t{8}) + text(value);
  };
  std::string file = "GGUF" + number(std::uint32_t{3}) + number(std::uint64_t{0}) +
                     number(std::uint64_t{2}) + key("general.architecture", "llama") +
                     key("x.\xff", "");
  file.resize((file.size() + 31) / 32 * 32);
  storage::write_bytes(scratch / "m.gguf", file);
  SystemClock clock;
  const auto registry = storage::Registry::in_memory(clock);
  const WorkDone done = do_work({1, HashModel{"m", scratch / "m.gguf", false}}, *registry, {});
  EXPECT_EQ(done.status.code(), StatusCode::kCorrupt) << done.status.to_string();
}

struct LoopTest : testing::Test {
  LoopTest() {
    registry = storage::Registry::in_memory(clock);
    clients = network.listen("clients").value();
    workers = network.listen("workers").value();
    poller = network.make_poller();
    poller->add(*clients);
    poller->add(*workers);
  }
  ~LoopTest() override { end(); }
  void begin(const std::string& failpoint = "") {
    Options options;
    options.incarnation = 5;
    loop = CoordinatorLoop::create({*clients, *workers, *poller, *registry, files, clock}, options,
                                   {}, failpoint)
               .value();
    thread = std::thread([this] { loop->run(stop); });
    client = network.connect("clients", "c");
    say(protocol::ClientHello{{}, "test"});
    EXPECT_TRUE(hear<protocol::ServerHello>().status.ok());
  }
  void end() {
    stop = true;
    if (thread.joinable()) thread.join();
  }
  void say(const protocol::ClientMessage& message) const {
    while (!client->send(protocol::encode(message)).ok()) (void)client->receive(1);
  }
  template <class Message>
  Message hear() const {
    for (TimeMs i = 0; i < scaled_ms(1000); ++i)
      if (auto envelope = client->receive(20)) {
        auto message = protocol::decode_server(envelope->frame).value();
        if (auto* wanted = std::get_if<Message>(&message)) return *wanted;
      }
    ADD_FAILURE() << "nothing came";
    return {};
  }
  protocol::CallReply call(const std::string& method, const std::string& params) {
    say(protocol::Call{str("id", ++calls), str("key", calls), method, params});
    return hear<protocol::CallReply>();
  }
  SystemClock clock;
  protocol::InprocNetwork network{clock};
  std::unique_ptr<storage::Registry> registry;
  std::unique_ptr<protocol::ServerEndpoint> clients, workers;
  std::unique_ptr<protocol::Poller> poller;
  ServedFiles files;
  std::unique_ptr<CoordinatorLoop> loop;
  std::unique_ptr<protocol::ClientEndpoint> client;
  std::atomic<bool> stop{false};
  std::thread thread;
  int calls = 0;
};

TEST_F(LoopTest, AnswersCallsAndEndsWhenAsked) {
  begin();
  const auto status = call("status", "{}");
  ASSERT_TRUE(status.status.ok()) << status.status.message();
  EXPECT_EQ(nlohmann::json::parse(status.result_json)["models"], 0);
  EXPECT_TRUE(call("registry.check", "{}").status.ok());
  EXPECT_TRUE(call("shutdown", R"({"checkpoint":false})").status.ok());
  thread.join();
}

TEST_F(LoopTest, AFailedCommitIsAClearErrorAndTheProcessGoesOn) {
  begin("before_commit:fail:1");
  // A wish that is written at once: an agent to drain.
  auto agent = network.connect("workers", "a");
  protocol::WorkerHello hello;
  hello.worker = WorkerId("host/cpu0");
  hello.incarnation = 3;
  while (!agent->send(protocol::encode(protocol::WorkerMessage{hello})).ok())
    (void)agent->receive(1);
  for (TimeMs i = 0; i < scaled_ms(1000) && !agent->receive(20); ++i) continue;
  const auto failed = call("worker.drain", R"({"worker":"host/cpu0"})");
  EXPECT_EQ(failed.status.code(), StatusCode::kInternal);
  EXPECT_NE(failed.status.message().find("nothing was changed"), std::string::npos);
  EXPECT_TRUE(call("worker.drain", R"({"worker":"host/cpu0"})").status.ok());
  end();
  EXPECT_EQ(loop->counters().commit_failures, 1u);
}

TEST_F(LoopTest, MalformedFramesAreCountedAndHarmless) {
  begin();
  const protocol::Bytes garbage(100, std::byte{0x5a});
  for (int i = 0; i < 10; ++i) (void)client->send(garbage);
  EXPECT_TRUE(call("status", "{}").status.ok());
  end();
  EXPECT_EQ(loop->counters().malformed, 10u);
}

TEST_F(LoopTest, WhatAClientThatReadsNothingGetsInTheEndHasNoGaps) {
  begin();
  for (std::uint64_t nonce = 1; nonce <= 4 * kOutboxMessagesMax; ++nonce)
    while (!client->send(protocol::encode(protocol::ClientMessage(protocol::Ping{nonce}))).ok())
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::uint64_t read = 0;
  while (const auto envelope = client->receive(scaled_ms(500))) {
    const auto message = protocol::decode_server(envelope->frame).value();
    ASSERT_EQ(std::get<protocol::Pong>(message).nonce, ++read);
  }
  EXPECT_LT(read, 4 * kOutboxMessagesMax) << "some were dropped";
  say(protocol::ClientHello{{}, "test"});
  EXPECT_TRUE(hear<protocol::ServerHello>().status.ok()) << "it may come back";
  EXPECT_TRUE(call("status", "{}").status.ok());
}

TEST(Failpoint, FailsAtItsPassAndOnlyThere) {
  Failpoint point("before_commit:fail:2");
  EXPECT_FALSE(point.hit("after_send"));
  EXPECT_FALSE(point.hit("before_commit"));
  EXPECT_TRUE(point.hit("before_commit"));
  EXPECT_FALSE(point.hit("before_commit"));
  EXPECT_FALSE(Failpoint("").hit("before_commit"));
}

}  // namespace
}  // namespace tandem::coordinator
