// Sharded replicas answer as one rank does, over threads.
#include "tests/worker/serve/replica_fixture.h"

#include <thread>

namespace tandem::worker::serve {
namespace {

struct Case {
  comm::Layout layout;
  bool tied;
};
class Replica : public ::testing::TestWithParam<Case> {};

TEST_P(Replica, AnswersAsOneRankDoes) {
  const Case& c = GetParam();
  const Outcomes want = run_alone(c.tied);
  // The script reaches what it is for.
  EXPECT_EQ(want.at("r7").finish, FinishReason::kCancelled);
  EXPECT_EQ(want.at("late").finish, FinishReason::kError);
  EXPECT_EQ(want.at("r0").ids.size(), 16u);
  EXPECT_GE(want.at("r4").ids.size(), 9u);
  EXPECT_FALSE(want.at("r5").prompt_logprobs.empty());

  auto gang = comm::make_thread_communicators(c.layout.ranks());
  std::vector<Outcomes> got(gang.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < gang.size(); ++r)
    threads.emplace_back([&, r] { got[r] = run_replica(*gang[r], c.layout, c.tied); });
  for (std::thread& thread : threads) thread.join();
  expect_same(got[0], want);
}

INSTANTIATE_TEST_SUITE_P(Layouts, Replica,
                         ::testing::Values(Case{{1, 2, 1, 0}, false}, Case{{1, 4, 1, 0}, true},
                                           Case{{1, 1, 2, 0}, true}, Case{{1, 1, 4, 0}, false},
                                           Case{{1, 2, 2, 0}, true}, Case{{1, 2, 2, 0}, false}),
                         [](const auto& test) {
                           const Case& c = test.param;
                           return str("tp", c.layout.tp, "_pp", c.layout.pp,
                                      c.tied ? "_tied" : "_untied");
                         });

/// An adapter that one rank has no memory for is on no rank, and the replica goes on.
TEST(ReplicaAdapters, AreLoadedOnAllRanksOrOnNone) {
  const comm::Layout layout{1, 2, 1, 0};
  auto gang = comm::make_thread_communicators(layout.ranks());
  const Digest name = sha256("adapter");
  const auto run = [&](comm::Communicator& comm) {
    ReplicaRank rank(comm, layout, true);
    const auto engine = rank.engine(false);
    if (comm.rank() == 1) {
      engine->follow();  // reserves
      rank.full = true;
      engine->follow();  // the first load
      rank.full = false;
      while (engine->follow()) {
      }
      EXPECT_EQ(engine->stats().resident_adapters, std::vector<Digest>{name});
      return;
    }
    engine->reserve_worst_case();
    const Status refused = engine->install_adapter(name, replica_adapter(1, true));
    EXPECT_EQ(refused.code(), StatusCode::kUnavailable) << refused.to_string();
    EXPECT_NE(refused.message().find("rank 1: no memory for an adapter"), std::string::npos)
        << refused.to_string();
    GenerateRequest waits = request("waits", {1, 2, 3}, 4);
    waits.adapter = name;
    EXPECT_TRUE(engine->submit(waits).ok());
    EXPECT_EQ(engine->missing_adapters(), std::vector<Digest>{name});
    EXPECT_TRUE(engine->install_adapter(name, replica_adapter(1, true)).ok());
    Outcomes outcomes;
    drain(*engine, outcomes);
    EXPECT_EQ(outcomes.at("waits").ids.size(), 4u);
    EXPECT_EQ(engine->stats().resident_adapters, std::vector<Digest>{name});
    engine->end();
  };
  std::thread other([&] { run(*gang[1]); });
  run(*gang[0]);
  other.join();
}

/// What adapters may take is the same on every rank, and counts what the fullest one holds: all let
/// the same ones go, though some lie on one stage alone.
TEST(ReplicaAdapters, BeyondTheirBytesTheIdleOnesGoOnAllRanks) {
  const comm::Layout layout{1, 1, 2, 0};
  auto gang = comm::make_thread_communicators(layout.ranks());
  const auto name = [](std::uint64_t i) { return sha256(str("adapter", i)); };
  const auto run = [&](comm::Communicator& comm) {
    ReplicaRank rank(comm, layout, true);
    const auto engine = rank.engine(false);
    engine->set_adapter_bytes_max(2 * kernels::kMapGranularity);
    const auto adapters = [&] {
      return rank.backend.ledger->live(kernels::MemoryKind::kAdapters) - rank.adapters_arena.used();
    };
    const std::vector<Digest> left{name(5), name(4)};
    if (comm.rank() != 0) {
      while (engine->follow()) EXPECT_LE(engine->stats().resident_adapters.size(), 2u);
      EXPECT_EQ(engine->stats().resident_adapters, left);
      return;
    }
    for (std::uint64_t i = 1; i <= 4; ++i) {
      EXPECT_TRUE(engine->install_adapter(name(i), replica_adapter(i, true)).ok());
      EXPECT_LE(adapters(), 3 * kernels::kMapGranularity) << "the table's page, and two of them";
    }
    // In use they stay, and what finds no room is told so, everywhere.
    for (const std::uint64_t i : {3, 4}) {
      GenerateRequest uses = request(str("r", i), {1, 2, 3}, 4);
      uses.adapter = name(i);
      EXPECT_TRUE(engine->submit(uses).ok());
    }
    const Status full = engine->install_adapter(name(5), replica_adapter(5, true));
    EXPECT_EQ(full.code(), StatusCode::kBusy) << full.to_string();
    EXPECT_NE(full.message().find("4.0 MiB are in use"), std::string::npos) << full.message();
    Outcomes outcomes;
    drain(*engine, outcomes);
    EXPECT_EQ(outcomes.at("r3").ids.size(), 4u);
    EXPECT_TRUE(engine->install_adapter(name(5), replica_adapter(5, true)).ok());
    EXPECT_EQ(engine->stats().resident_adapters, left);
    engine->end();
  };
  std::thread other([&] { run(*gang[1]); });
  run(*gang[0]);
  other.join();
}

TEST(EngineCall, ComesBackAsItWas) {
  EngineCall call{.kind = EngineCall::Kind::kSubmit, .now = 77, .number = -5};
  call.request = request("r", {1, 2, 3}, 9);
  call.request.sampling.stop = {"a", "\xc3\xa9"};
  call.request.sampling.seed = 3;
  call.request.sampling.prompt_logprobs_from = std::nullopt;
  call.request.adapter = sha256("x");
  call.request.priority = -2;
  call.status = busy_error("later");
  call.tensors = replica_adapter(1, true);
  std::vector<std::byte> bytes;
  encode(call, bytes);
  encode({.kind = EngineCall::Kind::kEnd}, bytes);
  std::span<const std::byte> rest(bytes);
  const EngineCall got = decode(rest);
  EXPECT_EQ(got.kind, EngineCall::Kind::kSubmit);
  EXPECT_EQ(got.now, 77);
  EXPECT_EQ(got.number, -5);
  EXPECT_EQ(got.request.id, call.request.id);
  EXPECT_EQ(got.request.prompt, call.request.prompt);
  EXPECT_EQ(got.request.adapter, call.request.adapter);
  EXPECT_EQ(got.request.priority, -2);
  EXPECT_EQ(got.request.sampling.stop, call.request.sampling.stop);
  EXPECT_EQ(got.request.sampling.seed, call.request.sampling.seed);
  EXPECT_EQ(got.request.sampling.max_tokens, call.request.sampling.max_tokens);
  EXPECT_EQ(got.request.sampling.prompt_logprobs_from, std::nullopt);
  EXPECT_EQ(got.request.sampling.ignore_eos, true);
  EXPECT_EQ(got.status, call.status);
  ASSERT_EQ(got.tensors.size(), call.tensors.size());
  EXPECT_EQ(got.tensors.back().b, call.tensors.back().b);
  EXPECT_EQ(got.tensors.back().site, call.tensors.back().site);
  EXPECT_EQ(decode(rest).kind, EngineCall::Kind::kEnd);
  EXPECT_TRUE(rest.empty());
}

}  // namespace
}  // namespace tandem::worker::serve
