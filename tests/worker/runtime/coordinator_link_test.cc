// A worker process's conversation with the coordinator. Runs with TANDEM_TIME_SCALE too: what the
// coordinator says is scaled already.
#include "worker/runtime/coordinator_link.h"

#include "protocol/codec.h"
#include "protocol/inproc_transport.h"

#include <gtest/gtest.h>

#include <utility>

namespace tandem::worker::runtime {
namespace {

struct CoordinatorLinkTest : testing::Test {
  /// What the worker has sent since the last look.
  template <class Message>
  int received() {
    int count = 0;
    while (const auto envelope = server->receive(0)) {
      const auto message = protocol::decode_worker(envelope->frame);
      EXPECT_TRUE(message.ok()) << message.status().message();
      count += message.ok() && std::holds_alternative<Message>(*message) ? 1 : 0;
    }
    return count;
  }
  void send(const protocol::ControlMessage& message) {
    ASSERT_TRUE(server->send("worker", protocol::encode(message)).ok());
    (void)link.poll(0);
  }

  ManualClock clock;
  protocol::InprocNetwork network{clock};
  std::unique_ptr<protocol::ServerEndpoint> server = network.listen("workers").value();
  CoordinatorLink link{network.connect("workers", "worker"),
                       clock,
                       {[] { return protocol::WorkerHello{}; },
                        [](std::uint64_t seq) {
                          protocol::Heartbeat beat;
                          beat.seq = seq;
                          return beat;
                        }}};
};

TEST_F(CoordinatorLinkTest, KeepsTheTimesThatTheCoordinatorSays) {
  constexpr TimeMs kHeartbeatMs = 100, kLeaseMs = 500;
  (void)link.poll(0);
  EXPECT_EQ(received<protocol::WorkerHello>(), 1);
  send(protocol::WorkerHelloReply{{}, 1, kHeartbeatMs, kLeaseMs, {}, {}});
  ASSERT_TRUE(link.connected());
  (void)link.poll(0);
  EXPECT_EQ(received<protocol::Heartbeat>(), 1);
  for (int beat = 0; beat < 10; ++beat) {
    send(protocol::HeartbeatReply{});
    clock.advance(kHeartbeatMs);
    (void)link.poll(0);
    EXPECT_EQ(received<protocol::Heartbeat>(), 1) << "beat " << beat;
  }
  clock.advance(kLeaseMs + 1);
  (void)link.poll(0);
  EXPECT_FALSE(link.connected()) << "nothing was heard for longer than the lease";
  EXPECT_EQ(received<protocol::WorkerHello>(), 1);
}

}  // namespace
}  // namespace tandem::worker::runtime
