// Replicas: asked for, dry run, placed, served by, lost, started again, removed.
#include "tests/coordinator/core_harness.h"

#include "protocol/version.h"

#include <gtest/gtest.h>

namespace tandem::coordinator {
namespace {

using protocol::GenerateChunk;
using protocol::Infer;
using protocol::JobAck;
using protocol::JobEnded;
using protocol::StartJob;
using protocol::StopJob;
using protocol::StopMode;

const char* const kFits = R"({"peak_bytes":10,"limit_bytes":1000,"fits":true})";

struct ReplicaTest : testing::Test {
  int adds_ = 0;
  ReplicaTest() {
    base = h.add_model("base");
    h.add_data("rows");
    for (int slot = 0; slot < 3; ++slot) {
      h.agent(slot);
      h.engine(slot);
    }
  }
  /// replica.add with the dry run's answer; the reply.
  protocol::CallReply add(const nlohmann::json& params, const std::string& dry_run = kFits,
                          const Status& refusal = {}, const std::string& key = "") {
    const std::string own = str("add", ++adds_);
    h.from_client("c",
                  protocol::Call{"add", key.empty() ? own : key, "replica.add", params.dump()});
    for (int slot = 0; slot < 3; ++slot)
      for (const auto& asked : h.to_engine<protocol::EstimateRequest>(slot)) {
        serve_json = asked.serve_json;
        h.from_engine(slot, protocol::EstimateReply{asked.call_id, refusal, dry_run});
      }
    protocol::CallReply last;
    last.status = internal_error("no reply yet");
    for (const auto& reply : h.to_client<protocol::CallReply>("c")) last = reply;
    return last;
  }
  JobId added(const nlohmann::json& params) {
    const auto reply = add(params);
    EXPECT_TRUE(reply.status.ok()) << reply.status.to_string();
    if (!reply.status.ok()) return {};
    const auto made = nlohmann::json::parse(reply.result_json)["replicas"];
    return JobId(made.at(0)["replica"].get<std::string>());
  }
  StartJob told(int slot) {
    const auto all = h.to_agent<StartJob>(slot);
    EXPECT_FALSE(all.empty());
    return all.empty() ? StartJob{} : all.back();
  }
  /// A replica of two ranks that serves, led by worker 0.
  JobId serving() {
    const JobId id = added({{"model", "base"}, {"tp", 2}});
    start = told(0);
    h.agent(0, {claim(id)});
    h.gang(0, start.gang, {claim(id)});
    EXPECT_EQ(replica(id).state, ReplicaState::kStarting) << "it still loads";
    h.gang(0, start.gang, {claim(id)}, base);
    EXPECT_EQ(replica(id).state, ReplicaState::kServing);
    return id;
  }
  [[nodiscard]] protocol::RunningJob claim(const JobId& id) const { return {id, start.epoch, 0}; }
  const Replica& replica(const JobId& id) { return h.tables().replicas.at(id); }
  nlohmann::json shown(const JobId& id) {
    const auto all = nlohmann::json::parse(
        h.call("replica.list", nlohmann::json::object()).result_json)["replicas"];
    for (const auto& one : all)
      if (one["replica"] == id.value) return one;
    return {};
  }
  /// Everybody is well for so long.
  void live(TimeMs ms, const JobId& id, bool gang = true) {
    for (TimeMs t = 0; t < ms; t += 1000) {
      h.advance(1000);
      for (int slot = 0; slot < 3; ++slot) {
        h.agent(slot, slot == 0 && gang ? std::vector<protocol::RunningJob>{claim(id)}
                                        : std::vector<protocol::RunningJob>{});
        h.beat(slot);
      }
      if (gang) beat(id);
    }
  }
  void beat(const JobId& id, int running = 1) {
    protocol::Heartbeat beat;
    beat.worker = CoreHarness::worker(0);
    beat.role = protocol::WorkerRole::kGang;
    beat.incarnation = start.gang;
    beat.seq = ++seq;
    beat.running = running;
    beat.jobs = {claim(id)};
    h.from_gang(0, beat);
  }
  /// Engines take no requests: all go to replicas.
  void only_replicas() {
    for (int slot = 0; slot < 3; ++slot) {
      h.generate(str("full-", slot, "-a"), "base", str("a ", slot));
      h.generate(str("full-", slot, "-b"), "base", str("b ", slot));
    }
  }
  void chunk(const Infer& infer, std::int64_t index, std::int64_t tokens, bool last) {
    protocol::InferChunk message;
    message.attempt = infer.attempt;
    message.chunk.id = infer.request.id;
    message.chunk.index = index;
    for (std::int64_t i = 0; i < tokens; ++i)
      message.chunk.tokens.push_back(static_cast<std::int32_t>(100 + index + i));
    if (last) message.chunk.finish = protocol::FinishReason::kStop;
    h.from_gang(0, message);
  }
  std::vector<std::int32_t> tokens_of(const std::string& id) {
    std::vector<std::int32_t> tokens;
    for (const auto& part : h.to_client<GenerateChunk>("c")) {
      if (part.id.value != id) continue;
      EXPECT_TRUE(part.status.ok()) << part.status.to_string();
      EXPECT_EQ(part.index, static_cast<std::int64_t>(tokens.size()));
      tokens.insert(tokens.end(), part.tokens.begin(), part.tokens.end());
    }
    return tokens;
  }
  CoreHarness h;
  Digest base;
  StartJob start;
  std::string serve_json;
  std::uint64_t seq = 0;
};

TEST_F(ReplicaTest, IsStartedOnAllItsWorkersAtOnceAfterTheCommit) {
  const JobId id = serving();
  EXPECT_EQ(serve_json, R"({"tp":2,"pp":1})");
  EXPECT_EQ(start.serve_json, R"({"tp":2,"pp":1})");
  EXPECT_EQ(start.model.digest, base);
  EXPECT_NE(start.gang, 0u);
  EXPECT_EQ(start.members, (std::vector<WorkerId>{CoreHarness::worker(0), CoreHarness::worker(1)}));
  EXPECT_EQ(replica(id).gang, start.gang) << "committed before it is used";
  const Replica before = replica(id);
  h.restart();
  EXPECT_EQ(replica(id).gang, before.gang);
  EXPECT_EQ(replica(id).epoch, before.epoch);
  EXPECT_EQ(replica(id).members, before.members);
  EXPECT_EQ(replica(id).state, ReplicaState::kServing) << "and kept";
  EXPECT_EQ(replica(id).peak_bytes, 10);
}

/// Engines beside its ranks leave them what the dry run says, and adapters of both share the rest.
TEST_F(ReplicaTest, ItsEnginesLeaveItsRanksTheirBytesAndHalfOfWhatAdaptersMayTake) {
  constexpr std::int64_t kMemory = 1 << 30, kPeak = 600, kEngine = 250;
  const auto reply = add({{"model", "base"}, {"tp", 2}},
                         R"({"peak_bytes":600,"by_kind":{"serving_engine":250},"fits":true})");
  ASSERT_TRUE(reply.status.ok()) << reply.status.to_string();
  const JobId id(nlohmann::json::parse(reply.result_json)["replicas"][0]["replica"]);
  start = told(0);
  EXPECT_EQ(start.adapter_bytes, (kMemory - kPeak) / 2);
  const auto left_to_gang = [&](int slot) {
    (void)h.to_engine<protocol::HeartbeatReply>(slot);
    h.beat(slot);
    const auto replies = h.to_engine<protocol::HeartbeatReply>(slot);
    return replies.size() == 1 ? replies[0].gang_bytes : -1;
  };
  const std::int64_t rank = kPeak - kEngine + start.adapter_bytes;
  EXPECT_EQ(left_to_gang(0), rank);
  EXPECT_EQ(left_to_gang(1), rank);
  EXPECT_EQ(left_to_gang(2), 0) << "it is no member";
  h.restart();
  (void)h.to_engine<protocol::WorkerHelloReply>(1);
  h.engine(1);
  EXPECT_EQ(h.to_engine<protocol::WorkerHelloReply>(1).at(0).gang_bytes, rank)
      << "an engine is told before it loads anything";
}

TEST_F(ReplicaTest, ItsAdaptersHaveHalfOfWhatTheBaseThatAnEngineHoldsLeaves) {
  constexpr std::int64_t kMemory = 1 << 30;
  h.base_bytes[1] = 400;
  h.engine(1);
  const auto reply = add({{"model", "base"}, {"tp", 2}},
                         R"({"peak_bytes":600,"by_kind":{"serving_engine":250},"fits":true})");
  ASSERT_TRUE(reply.status.ok()) << reply.status.to_string();
  EXPECT_EQ(told(0).adapter_bytes, (kMemory - (600 - 250 + 400)) / 2);
}

TEST_F(ReplicaTest, WaitsUntilItsBaseIsLoadedInPlaceOfOneThatIsTooLarge) {
  (void)h.add_model("another");  // engines hold it, the first by name
  for (int slot = 0; slot < 3; ++slot) {
    h.base_bytes[slot] = (1 << 30) - 300;
    h.agent(slot);
    h.engine(slot);
  }
  const auto reply = add({{"model", "base"}, {"tp", 2}},
                         R"({"peak_bytes":600,"by_kind":{"serving_engine":250},"fits":true})");
  ASSERT_TRUE(reply.status.ok()) << reply.status.to_string();
  const JobId id(nlohmann::json::parse(reply.result_json)["replicas"][0]["replica"]);
  EXPECT_EQ(replica(id).state, ReplicaState::kWaiting);
  h.advance(100);
  std::size_t loads = 0;
  for (int slot = 0; slot < 3; ++slot)  // one after another
    for (const auto& load : h.to_engine<protocol::LoadModel>(slot)) {
      ++loads;
      EXPECT_EQ(load.model.digest, base);
      h.from_engine(slot, protocol::ModelLoaded{base, {}, 1, 250});
    }
  EXPECT_EQ(loads, 2u);
  EXPECT_EQ(replica(id).state, ReplicaState::kStarting) << shown(id)["reason"];
}

TEST_F(ReplicaTest, IsRefusedAtSubmissionWithReasonLimitAndValue) {
  const auto code = [&](const nlohmann::json& params, const std::string& dry_run = kFits,
                        const Status& refusal = {}) {
    const auto reply = add(params, dry_run, refusal);
    return std::pair(reply.status.code(), reply.status.message());
  };
  const auto has = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  const auto [one, why_one] = code({{"model", "base"}});
  EXPECT_EQ(one, StatusCode::kRefused);
  has(why_one, "tp 1, pp 1");
  const auto [cut, why_cut] = code({{"model", "base"}, {"tp", 2}}, "",
                                   refused_error("tp 2 does not divide; the nearest layout"));
  EXPECT_EQ(cut, StatusCode::kRefused);
  has(why_cut, "nearest layout");
  const auto [large, why_large] =
      code({{"model", "base"}, {"tp", 2}}, R"({"peak_bytes":900,"limit_bytes":800,"fits":false})");
  EXPECT_EQ(large, StatusCode::kRefused);
  has(why_large, "900 bytes");
  has(why_large, "800 bytes");
  EXPECT_EQ(code({{"model", "nobody"}, {"tp", 2}}).first, StatusCode::kNotFound);
  EXPECT_EQ(code({{"model", "base"}, {"tp", 0}}).first, StatusCode::kInvalid);
  EXPECT_EQ(code({{"model", "base"}, {"tp", 2}, {"ranks", 2}}).first, StatusCode::kInvalid);
  EXPECT_EQ(code({{"model", "base"}, {"tp", 16}, {"pp", 16}}).first, StatusCode::kRefused);
  live(11'000, JobId("none"), false);  // the coordinator knows its pool by now
  const auto [many, why_many] = code({{"model", "base"}, {"pp", 4}});
  EXPECT_EQ(many, StatusCode::kRefused);
  has(why_many, "4 ranks");
  has(why_many, "3 CPU workers");
  has(why_many, "the nearest layout with as many workers: tp 1, pp 3");
  // What is wrong with the model comes first: a part of what cannot cut it may not cut it either.
  const auto [both, why_both] =
      code({{"model", "base"}, {"tp", 6}}, "", refused_error("tp 6 does not divide the model"));
  EXPECT_EQ(both, StatusCode::kRefused);
  has(why_both, "tp 6 does not divide the model");
  EXPECT_TRUE(h.tables().replicas.empty());
}

TEST_F(ReplicaTest, ARepeatedCallMakesItOnce) {
  const nlohmann::json params{{"model", "base"}, {"tp", 2}};
  h.from_client("c", protocol::Call{"first", "key", "replica.add", params.dump()});
  const auto reply = add(params, kFits, {}, "key");  // while the dry run is made
  EXPECT_TRUE(reply.status.ok()) << reply.status.to_string();
  const auto again = add(params, kFits, {}, "key");
  EXPECT_EQ(again.result_json, reply.result_json);
  EXPECT_EQ(h.tables().replicas.size(), 1u);
}

TEST_F(ReplicaTest, WaitsForAllItsWorkersAndKeepsThemFromJobs) {
  const JobId first = serving();  // takes 0 and 1
  const JobId second = added({{"model", "base"}, {"pp", 2}});
  EXPECT_EQ(replica(second).state, ReplicaState::kWaiting);
  const std::string reason = shown(second)["reason"].get<std::string>();
  EXPECT_NE(reason.find("needs 2 workers of host at once, 1 are free"), std::string::npos)
      << reason;
  EXPECT_NE(reason.find("serves " + first.value), std::string::npos) << reason;
  const JobId job = h.submit();
  EXPECT_EQ(h.job(job).state, JobState::kQueued) << "worker 2 is kept for the replica";
  EXPECT_TRUE(h.call("replica.rm", {{"replica", second.value}}).status.ok());
  EXPECT_FALSE(h.tables().replicas.contains(second)) << "nothing of it runs: it is gone at once";
  h.advance(100);
  EXPECT_EQ(h.job(job).state, JobState::kStarting);
  EXPECT_EQ(h.job(job).worker, CoreHarness::worker(2));
}

TEST_F(ReplicaTest, RequestsGoToTheLeastBusyOfEnginesAndReplicas) {
  serving();
  std::size_t replica = 0, engines = 0;
  for (int i = 0; i < 8; ++i) h.generate(str("r", i), "base", str("prompt ", i));
  replica += h.to_gang<Infer>(0).size();
  for (int slot = 0; slot < 3; ++slot) engines += h.to_engine<Infer>(slot).size();
  EXPECT_EQ(replica, 2u);
  EXPECT_EQ(engines, 6u);
}

TEST_F(ReplicaTest, AnAnswerGoesOnElsewhereWhenItsReplicaDiesWithoutALostOrRepeatedToken) {
  const JobId id = serving();
  only_replicas();
  for (int slot = 0; slot < 3; ++slot) (void)h.to_engine<Infer>(slot);
  const auto sent = h.to_gang<Infer>(0);
  ASSERT_EQ(sent.size(), 2u);
  const std::string name = sent[0].request.id.value;
  chunk(sent[0], 0, 3, false);
  // Its agent saw it die; slots become free on an engine.
  h.from_agent(0, JobEnded{id, start.epoch, unavailable_error("the gang is over"), 0, "{}"});
  EXPECT_EQ(replica(id).state, ReplicaState::kStarting) << "started again at once, the first time";
  EXPECT_EQ(replica(id).epoch, start.epoch + 1);
  chunk(sent[0], 3, 2, false);  // of the one that died
  for (const char* other : {"full-0-a", "full-0-b", "full-1-a", "full-1-b", "full-2-a", "full-2-b"})
    for (int slot = 0; slot < 3; ++slot) h.answer(slot, other, 0, 1, true);
  h.advance(200);
  bool moved = false;
  for (int slot = 0; slot < 3; ++slot)
    for (const auto& infer : h.to_engine<Infer>(slot)) {
      if (infer.request.id.value != name) continue;
      moved = true;
      EXPECT_EQ(infer.request.next_index, 3);
      h.answer(slot, name, 3, 4, true);
    }
  EXPECT_TRUE(moved);
  EXPECT_EQ(tokens_of(name), (std::vector<std::int32_t>{100, 101, 102, 103, 104, 105, 106}));
}

TEST_F(ReplicaTest, AnAnswerThatNoEngineHoldsWaitsUntilItsReplicaServesAgain) {
  const JobId id = serving();
  h.generate("long", "base", "q");
  const auto sent = h.to_gang<Infer>(0);
  ASSERT_EQ(sent.size(), 1u);
  chunk(sent[0], 0, 3, false);
  h.from_agent(0, JobEnded{id, start.epoch, unavailable_error("the gang is over"), 0, "{}"});
  start = told(0);
  int refused = 0;
  for (int round = 0; round < 4; ++round) {
    h.advance(200);
    for (int slot = 0; slot < 3; ++slot)
      for (const auto& infer : h.to_engine<Infer>(slot)) {
        protocol::InferChunk no;
        no.attempt = infer.attempt;
        no.chunk.id = infer.request.id;
        no.chunk.finish = protocol::FinishReason::kError;
        no.chunk.status = refused_error("10 tokens fit here");
        h.from_engine(slot, no);
        ++refused;
      }
  }
  EXPECT_EQ(refused, 3) << "every engine once";
  h.agent(0, {claim(id)});
  h.gang(0, start.gang, {claim(id)}, base);
  h.advance(200);
  const auto again = h.to_gang<Infer>(0);
  ASSERT_EQ(again.size(), 1u);
  EXPECT_EQ(again[0].request.next_index, 3);
  chunk(again[0], 3, 2, true);
  EXPECT_EQ(tokens_of("long"), (std::vector<std::int32_t>{100, 101, 102, 103, 104}));
}

TEST_F(ReplicaTest, MessagesOfAnOldEpochAreRefused) {
  const JobId id = serving();
  h.from_agent(0, JobEnded{id, start.epoch, unavailable_error("killed"), 0, "{}"});
  const StartJob next = told(0);
  EXPECT_EQ(next.epoch, start.epoch + 1);
  EXPECT_NE(next.gang, start.gang);
  (void)h.to_gang<JobAck>(0);
  h.from_gang(0, JobEnded{id, start.epoch, {}, 0, "{}"});
  const auto acks = h.to_gang<JobAck>(0);
  ASSERT_EQ(acks.size(), 1u);
  EXPECT_EQ(acks[0].status.code(), StatusCode::kConflict);
  EXPECT_EQ(replica(id).state, ReplicaState::kStarting);
  // A first rank of the old epoch that says hello again is told to end, and given nothing.
  h.gang(0, start.gang, {{id, start.epoch, 0}}, base);
  const auto replies = h.to_gang<protocol::WorkerHelloReply>(0);
  ASSERT_FALSE(replies.empty());
  EXPECT_EQ(replies.back().stop_jobs, std::vector<JobId>{id});
  only_replicas();
  h.generate("more", "base", "more");
  EXPECT_TRUE(h.to_gang<Infer>(0).empty());
}

TEST_F(ReplicaTest, IsStartedAgainAfterABackOffThatIsBounded) {
  const JobId id = added({{"model", "base"}, {"tp", 2}});
  TimeMs longest = 0;
  for (int i = 0; i < 14; ++i) {
    const StartJob told_now = told(0);
    start = told_now;
    h.from_agent(0, JobEnded{id, start.epoch, unavailable_error("killed"), 0, "{}"});
    TimeMs waited = 0;
    while (replica(id).state == ReplicaState::kWaiting && waited < 100'000) {
      live(1000, id, false);
      waited += 1000;
    }
    longest = std::max(longest, waited);
    if (i == 3) {
      EXPECT_GE(waited, 1000);
    }
  }
  EXPECT_GE(longest, 20'000);
  EXPECT_LE(longest, 31'000);
}

TEST_F(ReplicaTest, ACoordinatorsRestartAdoptsItAndLosesOneThatDoesNotComeBack) {
  const JobId id = serving();
  const Epoch epoch = start.epoch;
  h.restart();
  for (int slot = 0; slot < 3; ++slot) h.engine(slot);
  h.agent(0, {claim(id)});
  h.gang(0, start.gang, {claim(id)}, base);
  EXPECT_TRUE(h.to_gang<protocol::WorkerHelloReply>(0).back().stop_jobs.empty());
  live(15'000, id);
  EXPECT_EQ(replica(id).epoch, epoch);
  EXPECT_EQ(replica(id).state, ReplicaState::kServing);
  only_replicas();
  EXPECT_FALSE(h.to_gang<Infer>(0).empty());
  h.restart();
  for (int slot = 0; slot < 3; ++slot) h.engine(slot);
  live(12'000, id, false);
  EXPECT_EQ(replica(id).epoch, epoch + 1) << "its gang did not come back";
}

TEST_F(ReplicaTest, IsRemovedAfterWhatItAnswers) {
  const JobId id = serving();
  only_replicas();
  const auto sent = h.to_gang<Infer>(0);
  ASSERT_FALSE(sent.empty());
  const auto reply = h.call("replica.rm", {{"replica", id.value}});
  ASSERT_TRUE(reply.status.ok()) << reply.status.to_string();
  EXPECT_EQ(nlohmann::json::parse(reply.result_json)["state"], "stopping");
  const auto stops = h.to_gang<StopJob>(0);
  ASSERT_EQ(stops.size(), 1u);
  EXPECT_EQ(stops[0].mode, StopMode::kPause) << "drains";
  h.generate("late", "base", "late");
  EXPECT_TRUE(h.to_gang<Infer>(0).empty()) << "nothing new";
  chunk(sent[0], 0, 2, true);
  EXPECT_EQ(tokens_of(sent[0].request.id.value).size(), 2u);
  h.from_gang(0, JobEnded{id, start.epoch, cancelled_error("drained"), 0, "{}"});
  EXPECT_TRUE(h.tables().replicas.empty());
  EXPECT_EQ(h.to_gang<JobAck>(0).back().status.code(), StatusCode::kOk);
  EXPECT_EQ(h.call("replica.rm", {{"replica", id.value}}).status.code(), StatusCode::kNotFound);
  h.restart();
  EXPECT_TRUE(h.tables().replicas.empty());
}

TEST_F(ReplicaTest, IsRemovedAfterWhatItAnswersAlsoWhenTheCoordinatorDiesMeanwhile) {
  const JobId id = serving();
  EXPECT_TRUE(h.call("replica.rm", {{"replica", id.value}}).status.ok());
  (void)h.to_gang<StopJob>(0);
  h.restart();
  h.agent(0, {claim(id)});
  h.advance(2000);
  EXPECT_TRUE(h.to_agent<StopJob>(0).empty()) << "its agent would end it at once";
  h.gang(0, start.gang, {claim(id)}, base);
  h.advance(2000);
  EXPECT_FALSE(h.to_gang<StopJob>(0).empty());
  h.from_gang(0, JobEnded{id, start.epoch, cancelled_error("drained"), 0, "{}"});
  EXPECT_TRUE(h.tables().replicas.empty());
}

TEST_F(ReplicaTest, AWorkerThatDrainsLetsItGoAndHasItBackWhenResumed) {
  const JobId id = serving();
  EXPECT_TRUE(h.call("worker.drain", {{"worker", "host/cpu1"}}).status.ok());
  EXPECT_EQ(replica(id).state, ReplicaState::kStopping);
  EXPECT_FALSE(h.to_gang<StopJob>(0).empty());
  h.from_gang(0, JobEnded{id, start.epoch, cancelled_error("drained"), 0, "{}"});
  h.agent(0);
  h.advance(50);
  EXPECT_EQ(replica(id).state, ReplicaState::kStarting) << "on the two that are left";
  EXPECT_FALSE(replica(id).holds(CoreHarness::worker(1)));
  EXPECT_TRUE(h.call("worker.drain", {{"worker", "host/cpu2"}}).status.ok());
  h.from_agent(replica(id).worker == CoreHarness::worker(0) ? 0 : 2,
               JobEnded{id, replica(id).epoch, cancelled_error("none here"), 0, "{}"});
  EXPECT_EQ(replica(id).state, ReplicaState::kWaiting);
  EXPECT_TRUE(h.call("worker.resume", {{"worker", "host/cpu1"}}).status.ok());
  h.advance(50);
  EXPECT_EQ(replica(id).state, ReplicaState::kStarting);
}

TEST_F(ReplicaTest, AShutdownWaitsUntilItHasEndedAndDoesNotStartItAgain) {
  const JobId id = serving();
  h.from_client("c", protocol::Call{"bye", "k", "shutdown", "{}"});
  h.advance(100);
  EXPECT_EQ(replica(id).state, ReplicaState::kStopping);
  h.from_gang(0, JobEnded{id, start.epoch, cancelled_error("drained"), 0, "{}"});
  h.advance(100);
  EXPECT_EQ(replica(id).state, ReplicaState::kWaiting);
  bool ended = false;
  for (const Effect& effect : h.last()) ended = ended || std::holds_alternative<Shutdown>(effect);
  EXPECT_TRUE(ended);
}

TEST_F(ReplicaTest, ItsModelIsNotRemovedUnderIt) {
  const JobId id = serving();
  const auto reply = h.call("model.rm", {{"model", "base"}, {"force", true}});
  EXPECT_EQ(reply.status.code(), StatusCode::kRefused);
  EXPECT_NE(reply.status.message().find(id.value), std::string::npos) << reply.status.message();
}

TEST_F(ReplicaTest, AFailedCommitStartsNothing) {
  h.fail_commits(1);
  const auto reply = add({{"model", "base"}, {"tp", 2}});
  EXPECT_FALSE(reply.status.ok());
  EXPECT_TRUE(h.tables().replicas.empty());
  EXPECT_TRUE(h.to_agent<StartJob>(0).empty());
}

TEST_F(ReplicaTest, AnAgentThatKnowsNoReplicasIsGivenNone) {
  for (int slot = 0; slot < 3; ++slot) {
    protocol::WorkerHello old;
    old.version = {1, 2};
    old.role = protocol::WorkerRole::kAgent;
    old.worker = CoreHarness::worker(slot);
    old.host = "host";
    old.slot = slot;
    old.device = "cpu";
    old.incarnation = 2;
    h.from_agent(slot, old);
  }
  const JobId id = added({{"model", "base"}, {"tp", 2}});
  EXPECT_EQ(replica(id).state, ReplicaState::kWaiting);
  EXPECT_TRUE(h.to_agent<StartJob>(0).empty());
  const std::string reason = shown(id)["reason"].get<std::string>();
  EXPECT_NE(reason.find("speaks protocol 1.2"), std::string::npos) << reason;
}

TEST_F(ReplicaTest, WhatIsPublishedIsAnnouncedToItToo) {
  serving();
  const std::string text = h.manifest(ManifestKind::kAdapter, base, "adapter");
  const auto reply =
      h.call("adapter.import", {{"name", "tuned"}, {"model", "base"}, {"manifest", text}}, "k1");
  ASSERT_TRUE(reply.status.ok()) << reply.status.to_string();
  EXPECT_EQ(h.to_gang<protocol::Announce>(0).size(), 1u);
  EXPECT_EQ(h.to_engine<protocol::Announce>(0).size(), 1u);
}

TEST_F(ReplicaTest, IsToldWhatIsPublishedAlreadyWhenItBeginsToServe) {
  const std::string text = h.manifest(ManifestKind::kAdapter, base, "adapter");
  ASSERT_TRUE(
      h.call("adapter.import", {{"name", "tuned"}, {"model", "base"}, {"manifest", text}}, "k1")
          .status.ok());
  serving();
  const auto news = h.to_gang<protocol::Announce>(0);
  ASSERT_EQ(news.size(), 1u);
  EXPECT_EQ(news[0].adapter, sha256(text));
  EXPECT_EQ(news[0].adapter_manifest, text);
}

}  // namespace
}  // namespace tandem::coordinator
