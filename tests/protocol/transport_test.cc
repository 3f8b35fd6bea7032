// Claims that hold for both transports, and the in-process one's faults.
#include "protocol/inproc_transport.h"
#include "protocol/zmq_transport.h"
#include "tests/protocol/transport_fixture.h"

#include <gtest/gtest.h>

#include <thread>

namespace tandem::protocol {
namespace {

class EveryTransport : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { net_ = make_test_network(GetParam()); }
  std::unique_ptr<TestNetwork> net_;
};

TEST_P(EveryTransport, CarriesFramesBothWaysAndNamesThePeer) {
  auto server = net_->listen("a");
  auto client = net_->connect("a", "me/1");
  ASSERT_TRUE(wait_connected(*client));
  ASSERT_TRUE(client->send(bytes_of("hello")).ok());
  const auto got = receive_one(*server);
  ASSERT_TRUE(got.has_value());
  EXPECT_TRUE(got->peer.starts_with("me/1")) << got->peer;
  EXPECT_EQ(text_of(got->frame), "hello");
  EXPECT_TRUE(got->payload.empty());
  ASSERT_TRUE(server->send(got->peer, bytes_of("back")).ok());
  const auto back = receive_one(*client);
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(text_of(back->frame), "back");
}

TEST_P(EveryTransport, SaysThatAPeerIsNotThere) {
  auto server = net_->listen("a");
  EXPECT_EQ(server->send("nobody", bytes_of("x")).code(), StatusCode::kUnavailable);
  EXPECT_EQ(server->counters().unavailable, 1u);
}

TEST_P(EveryTransport, AClientWithoutAServerIsUnavailableAndConnectsLater) {
  auto client = net_->connect("a", "me/1");
  EXPECT_EQ(client->send(bytes_of("x")).code(), StatusCode::kUnavailable);
  EXPECT_FALSE(client->connected());
  auto server = net_->listen("a");
  ASSERT_TRUE(wait_connected(*client));
  EXPECT_EQ(client->connections(), 1u);
  ASSERT_TRUE(client->send(bytes_of("x")).ok());
  EXPECT_TRUE(receive_one(*server).has_value());
}

TEST_P(EveryTransport, ARestartedServerIsANewConnectionAndGetsNothingOld) {
  auto server = net_->listen("a");
  auto client = net_->connect("a", "me/1");
  ASSERT_TRUE(wait_connected(*client));
  server.reset();
  ASSERT_TRUE(wait_disconnected(*client));
  EXPECT_EQ(client->send(bytes_of("lost")).code(), StatusCode::kUnavailable);
  server = net_->listen("a");
  ASSERT_TRUE(wait_connected(*client));
  EXPECT_EQ(client->connections(), 2u);
  ASSERT_TRUE(client->send(bytes_of("new")).ok());
  const auto got = receive_one(*server);
  ASSERT_TRUE(got.has_value());
  EXPECT_EQ(text_of(got->frame), "new");
}

TEST_P(EveryTransport, ASlowPeerMakesTheSenderBusyAndLosesNothing) {
  auto server = net_->listen("a", 10);
  auto client = net_->connect("a", "me/1");
  ASSERT_TRUE(wait_connected(*client));
  ASSERT_TRUE(client->send(bytes_of("hello")).ok());
  const auto hello = receive_one(*server);
  ASSERT_TRUE(hello.has_value());
  // Large frames, so that the kernel's buffers do not hide the queue's end.
  const Bytes large(1 << 20, std::byte{7});
  int accepted = 0;
  Status status;
  while (accepted < 1000) {
    Bytes frame = large;
    frame[0] = static_cast<std::byte>(accepted);
    status = server->send(hello->peer, frame);
    if (!status.ok()) break;
    ++accepted;
  }
  ASSERT_EQ(status.code(), StatusCode::kBusy) << status.to_string();
  for (int i = 0; i < accepted; ++i) {
    const auto got = receive_one(*client);
    ASSERT_TRUE(got.has_value()) << "message " << i << " of " << accepted << " was lost";
    EXPECT_EQ(got->frame[0], static_cast<std::byte>(i));
  }
  EXPECT_GE(server->counters().busy, 1u);
}

TEST_P(EveryTransport, WakeEndsAReceiveFromAnotherThread) {
  auto server = net_->listen("a");
  std::thread other([&] { server->wake(); });
  EXPECT_FALSE(server->receive(scaled_ms(20'000)).has_value());
  other.join();
}

TEST_P(EveryTransport, OneThreadWaitsOnSeveralEndpoints) {
  auto first = net_->listen("a");
  auto second = net_->listen("b");
  auto poller = net_->poller();
  poller->add(*first);
  poller->add(*second);
  auto client = net_->connect("b", "me/1");
  ASSERT_TRUE(wait_connected(*client));
  ASSERT_TRUE(client->send(bytes_of("x")).ok());
  std::optional<Envelope> got;
  for (int i = 0; i < 100 && !got.has_value(); ++i) {
    poller->wait(scaled_ms(200));
    EXPECT_FALSE(first->receive(0).has_value());
    got = second->receive(0);
  }
  ASSERT_TRUE(got.has_value());
  std::thread other([&] { poller->wake(); });
  poller->wait(scaled_ms(20'000));
  other.join();
  first->wake();
  poller->wait(scaled_ms(20'000));
  poller->remove(*first);
}

TEST_P(EveryTransport, ATakenAddressIsAConflict) {
  auto server = net_->listen("a");
  EXPECT_EQ(net_->try_listen("a").code(), StatusCode::kConflict);
}

INSTANTIATE_TEST_SUITE_P(Transports, EveryTransport, ::testing::Values("inproc", "ipc", "tcp"),
                         [](const auto& kind) { return std::string(kind.param); });

// -- the in-process network's faults --------------------------------------------------------------

std::vector<int> run_with_faults(const InprocFaults& faults, int messages,
                                 InprocCounters* counters = nullptr) {
  ManualClock clock;
  InprocNetwork network(clock, faults);
  auto server = network.listen("a").value();
  auto client = network.connect("a", "me");
  std::vector<int> got;
  for (int i = 0; i < messages; ++i) {
    TANDEM_CHECK(client->send({static_cast<std::byte>(i)}).ok());
    clock.advance(1);
    while (auto envelope = server->receive(0)) got.push_back(static_cast<int>(envelope->frame[0]));
  }
  clock.advance(faults.delay_ms_max + 1);
  while (auto envelope = server->receive(0)) got.push_back(static_cast<int>(envelope->frame[0]));
  if (counters != nullptr) *counters = network.counters();
  return got;
}

TEST(InprocNetwork, LosesRepeatsReordersAndDelaysAsItsSeedSays) {
  const InprocFaults faults{
      .seed = 7, .drop = 0.2f, .repeat = 0.2f, .reorder = 0.3f, .delay = 0.5f, .delay_ms_max = 20};
  InprocCounters counters;
  const auto first = run_with_faults(faults, 200, &counters);
  EXPECT_EQ(first, run_with_faults(faults, 200)) << "the same seed gave another run";
  EXPECT_EQ(first.size(), counters.sent - counters.dropped + counters.repeated);
  EXPECT_GT(counters.dropped, 10u);
  EXPECT_GT(counters.repeated, 10u);
  EXPECT_GT(counters.reordered, 0u);
  EXPECT_GT(counters.delayed, 10u);
  EXPECT_FALSE(std::is_sorted(first.begin(), first.end()));
  InprocFaults other = faults;
  other.seed = 8;
  EXPECT_NE(first, run_with_faults(other, 200));
}

TEST(InprocNetwork, WithoutFaultsDeliversAllInOrder) {
  const auto got = run_with_faults({}, 100);
  ASSERT_EQ(got.size(), 100u);
  EXPECT_TRUE(std::is_sorted(got.begin(), got.end()));
}

TEST(InprocNetwork, ACutConnectionLosesWhatWasInFlightAndHealsAsANewOne) {
  ManualClock clock;
  InprocNetwork network(clock);
  auto server = network.listen("a").value();
  auto client = network.connect("a", "me");
  ASSERT_TRUE(client->send(bytes_of("in flight")).ok());
  network.cut("a", "me");
  EXPECT_FALSE(client->connected());
  EXPECT_EQ(client->send(bytes_of("x")).code(), StatusCode::kUnavailable);
  EXPECT_EQ(server->send("me", bytes_of("x")).code(), StatusCode::kUnavailable);
  EXPECT_FALSE(server->receive(0).has_value());
  network.heal("a", "me");
  EXPECT_EQ(client->connections(), 2u);
  ASSERT_TRUE(client->send(bytes_of("after")).ok());
  EXPECT_TRUE(server->receive(0).has_value());
}

}  // namespace
}  // namespace tandem::protocol
