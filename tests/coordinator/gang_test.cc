// Jobs of several ranks: all their workers at once, one process that speaks for them, and its end.
#include "tests/coordinator/core_harness.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace tandem::coordinator {
namespace {

using protocol::JobAck;
using protocol::JobEnded;
using protocol::StartJob;
using protocol::StopJob;
using protocol::StopMode;

const nlohmann::json kTwoRanks{{"train", {{"tp", 2}}}};
const nlohmann::json kFourRanks{{"train", {{"tp", 2}, {"pp", 2}}}};

struct Gangs : testing::Test {
  Gangs() {
    base = h.add_model("base");
    h.add_data("rows");
    for (int slot = 0; slot < 3; ++slot) {
      h.agent(slot);
      h.engine(slot);
    }
  }
  /// What the leader's agent was told last.
  StartJob told(int slot) {
    const auto all = h.to_agent<StartJob>(slot);
    EXPECT_FALSE(all.empty());
    return all.empty() ? StartJob{} : all.back();
  }
  /// A job of two ranks that runs, led by worker 0.
  JobId running() {
    const JobId id = h.submit(kTwoRanks);
    start = told(0);
    h.agent(0, {{id, start.epoch, 0}});
    h.gang(0, start.gang, {{id, start.epoch, 0}});
    return id;
  }
  /// Everybody is well for so long.
  void live(TimeMs ms, const JobId& id, bool gang = true) {
    for (TimeMs t = 0; t < ms; t += 1000) {
      h.advance(1000);
      for (int slot = 0; slot < 3; ++slot) {
        h.agent(slot, slot == 0 && gang ? std::vector<protocol::RunningJob>{{id, start.epoch, 1}}
                                        : std::vector<protocol::RunningJob>{});
        h.beat(slot);
      }
      if (gang) h.gang(0, start.gang, {{id, start.epoch, 1}});
    }
  }
  std::string reason(const JobId& id) {
    const auto shown = h.call("job.show", {{"job", id.value}});
    return nlohmann::json::parse(shown.result_json)["reason"].get<std::string>();
  }
  CoreHarness h;
  Digest base;
  StartJob start;
};

TEST_F(Gangs, TakesAllItsWorkersAtOnceAndTellsTheLeadersAgentAfterTheCommit) {
  const JobId id = running();
  EXPECT_NE(start.gang, 0u);
  EXPECT_EQ(start.members, (std::vector<WorkerId>{CoreHarness::worker(0), CoreHarness::worker(1)}));
  EXPECT_EQ(h.job(id).engine, start.gang) << "committed before it is used";
  EXPECT_EQ(h.job(id).members, start.members);
  EXPECT_EQ(h.job(id).state, JobState::kRunning);
  for (int slot = 0; slot < 3; ++slot) EXPECT_TRUE(h.to_engine<StartJob>(slot).empty());
  h.restart();
  EXPECT_EQ(h.job(id).members, start.members) << "and kept";
}

TEST_F(Gangs, WaitsForAllOfItsWorkersAndNobodyOvertakesIt) {
  const JobId first = running();  // takes 0 and 1
  const JobId second = h.submit(kTwoRanks);
  EXPECT_EQ(h.job(second).state, JobState::kQueued);
  EXPECT_NE(reason(second).find("needs 2 workers of host at once, 1 are free"), std::string::npos)
      << reason(second);
  EXPECT_NE(reason(second).find(first.value), std::string::npos) << reason(second);
  const JobId single = h.submit();
  EXPECT_EQ(h.job(single).state, JobState::kQueued) << "worker 2 is kept for the gang";
  EXPECT_NE(reason(single).find("kept for a job of several ranks"), std::string::npos)
      << reason(single);
  h.from_gang(0, JobEnded{first, start.epoch, invalid_error("bad row"), 0, "{}"});
  h.agent(0);
  h.advance(100);
  EXPECT_EQ(h.job(second).state, JobState::kStarting);
  EXPECT_EQ(h.job(single).state, JobState::kStarting);
}

struct FarGangs : Gangs {
  FarGangs() {
    for (int slot : {10, 11}) {
      h.agent(slot);
      h.engine(slot);
    }
  }
  /// What the gang's mpirun asks of the other host.
  protocol::LaunchDaemon launch() const {
    return {CoreHarness::worker(10), start, {"-mca", "ess"}};
  }
  static WorkerId w(int slot) { return CoreHarness::worker(slot); }
};

TEST_F(FarGangs, LieOnOneHostWhereItHasAsManySlotsAndElseOverSeveral) {
  const JobId near = h.submit(kTwoRanks);
  EXPECT_EQ(told(0).members, (std::vector<WorkerId>{w(0), w(1)}));
  EXPECT_EQ(h.job(near).state, JobState::kStarting);
  const JobId far = h.submit(kFourRanks);
  EXPECT_EQ(h.job(far).state, JobState::kQueued);
  EXPECT_NE(reason(far).find("needs 4 workers of 2 hosts at once, 3 are free"), std::string::npos)
      << reason(far);
  h.from_agent(0, JobEnded{near, 1, invalid_error("bad row"), 0, "{}"});
  h.agent(0);
  h.advance(100);
  EXPECT_EQ(h.job(far).members, (std::vector<WorkerId>{w(0), w(1), w(2), w(10)}))
      << "those of a host are next to each other";
}

TEST_F(FarGangs, NeedAnAgentOnEachHostThatCanStartADaemon) {
  protocol::WorkerHello old;
  old.version.minor = 3;
  old.worker = w(10);
  old.host = "far";
  old.slot = 10;
  old.device = "cpu";
  old.incarnation = 2;
  h.from_agent(10, old);
  old.worker = w(11);
  old.slot = 11;
  h.from_agent(11, old);
  const JobId far = h.submit(kFourRanks);
  EXPECT_EQ(h.job(far).state, JobState::kQueued);
  EXPECT_NE(reason(far).find("no agent of far is connected that can start ranks for another host"),
            std::string::npos)
      << reason(far);
}

TEST_F(FarGangs, ADaemonIsStartedForTheLeaderOfAPlacedGangAloneAndOnItsHostsAlone) {
  const JobId far = h.submit(kFourRanks);
  start = told(0);
  ASSERT_EQ(start.members.size(), 4u);
  h.from_agent(0, launch());
  auto asked = h.to_agent<protocol::LaunchDaemon>(10);
  ASSERT_EQ(asked.size(), 1u);
  EXPECT_EQ(asked[0], launch()) << "as it was said";
  h.from_agent(10, protocol::DaemonLaunched{far, start.epoch, w(10), {}});
  auto told_back = h.to_agent<protocol::DaemonLaunched>(0);
  ASSERT_EQ(told_back.size(), 1u);
  EXPECT_TRUE(told_back[0].status.ok());

  const auto refused = [&](int sender, const protocol::LaunchDaemon& message) {
    h.from_agent(sender, message);
    for (int slot : {0, 1, 2, 10, 11})
      EXPECT_TRUE(h.to_agent<protocol::LaunchDaemon>(slot).empty()) << slot;
    const auto answers = h.to_agent<protocol::DaemonLaunched>(sender);
    return answers.size() == 1 && answers[0].status.code() == StatusCode::kConflict;
  };
  EXPECT_TRUE(refused(1, launch())) << "a member that does not lead it";
  auto other = launch();
  other.start.epoch += 1;
  EXPECT_TRUE(refused(0, other)) << "another epoch";
  other = launch();
  other.start.job = JobId("job-none");
  EXPECT_TRUE(refused(0, other));
  other = launch();
  other.start.members.pop_back();
  EXPECT_TRUE(refused(0, other)) << "other members";
  other = launch();
  other.worker = w(11);
  EXPECT_TRUE(refused(0, other)) << "no member";
  other = launch();
  other.worker = w(1);
  EXPECT_TRUE(refused(0, other)) << "the leader's own host";
}

TEST_F(FarGangs, ADaemonOfAHostWhoseAgentIsGoneIsRefusedAtOnce) {
  (void)h.submit(kFourRanks);
  start = told(0);
  h.from_agent(10, protocol::WorkerBye{w(10), protocol::WorkerRole::kAgent, 1});
  h.from_agent(0, launch());
  const auto answers = h.to_agent<protocol::DaemonLaunched>(0);
  ASSERT_EQ(answers.size(), 1u);
  EXPECT_EQ(answers[0].status.code(), StatusCode::kUnavailable);
}

TEST_F(FarGangs, AreOfHostsWithOneVersionOfThePrograms) {
  for (const int slot : {0, 1, 2, 10, 11}) {
    h.programs[slot] = slot < 10 ? "0.1.0" : "0.2.0";
    h.agent(slot);
  }
  const JobId far = h.submit(kFourRanks);
  EXPECT_EQ(h.job(far).state, JobState::kQueued);
  EXPECT_NE(reason(far).find("needs 4 workers of 2 hosts at once, 3 are free; hosts of a gang have "
                             "one version of Tandem: host has 0.1.0 (protocol 1.9), far has 0.2.0 "
                             "(protocol 1.9)"),
            std::string::npos)
      << reason(far);
  for (const int slot : {20, 21}) {
    h.programs[slot] = "0.2.0";
    h.agent(slot);
    h.engine(slot);
  }
  h.advance(100);
  EXPECT_EQ(h.job(far).members, (std::vector<WorkerId>{w(10), w(11), w(20), w(21)}))
      << "not of the host with most slots";
}

TEST_F(FarGangs, WaitForAHostThatIsSilentAndNameIt) {
  const JobId far = h.submit(kFourRanks);
  start = told(0);
  for (TimeMs t = 0; t < 8000; t += 1000) {
    h.advance(1000);
    for (const int slot : {0, 1, 2}) {
      h.agent(slot);
      h.beat(slot);
    }
  }
  h.from_agent(0, JobEnded{far, start.epoch, unavailable_error("a rank is gone"), 0, "{}"});
  EXPECT_EQ(h.job(far).state, JobState::kQueued);
  EXPECT_NE(reason(far).find("needs 4 workers of 2 hosts at once, 3 are free; far/cpu10 is not "
                             "connected; far/cpu11 is not connected"),
            std::string::npos)
      << reason(far);
}

TEST_F(FarGangs, DoNotWaitForAHostThatIsAwayWhereOthersHaveAsManySlots) {
  const nlohmann::json three{{"train", {{"dp", 3}, {"gradient_accumulation_steps", 3}}}};
  for (const int slot : {20, 21}) {
    h.agent(slot);
    h.engine(slot);
  }
  const JobId first = h.submit(three);
  EXPECT_EQ(h.job(first).members, (std::vector<WorkerId>{w(0), w(1), w(2)})) << "of one host";
  start = told(0);
  for (TimeMs t = 0; t < 8000; t += 1000) {  // which then is silent
    h.advance(1000);
    for (const int slot : {10, 11, 20, 21}) {
      h.agent(slot);
      h.beat(slot);
    }
  }
  EXPECT_EQ(h.job(first).epoch, start.epoch + 1);
  EXPECT_EQ(h.job(first).members, (std::vector<WorkerId>{w(10), w(11), w(20)}));
}

/// Engines hold "another", of 1,000 MiB of a worker's 1,024; a rank takes 100 and the engine that
/// serves the job's own base 200.
struct GangsBesideALargeBase : Gangs {
  static constexpr std::int64_t kMiB = 1 << 20;
  GangsBesideALargeBase() {
    another = h.add_model("another");
    h.dry_run["peak_bytes"] = 300 * kMiB;
    h.dry_run["by_kind"]["serving_engine"] = 200 * kMiB;
    for (int slot = 0; slot < 3; ++slot) {
      h.base_bytes[slot] = 1000 * kMiB;
      h.agent(slot);
      h.engine(slot);
    }
  }
  /// The engines that were told to load the base, which then hold it.
  std::vector<int> loads(const Digest& model) {
    std::vector<int> slots;
    for (int slot = 0; slot < 3; ++slot)
      for (const auto& load : h.to_engine<protocol::LoadModel>(slot))
        if (load.model.digest == model) slots.push_back(slot);
    for (const int slot : slots)
      h.from_engine(slot, protocol::ModelLoaded{model, {}, 1, 200 * kMiB});
    return slots;
  }
  Digest another;
};

TEST_F(GangsBesideALargeBase, WaitUntilTheirOwnBaseIsLoadedInItsPlace) {
  const JobId id = h.submit(kTwoRanks);
  EXPECT_EQ(h.job(id).state, JobState::kQueued) << "1,100 MiB are not there";
  EXPECT_NE(reason(id).find("host/cpu2 has 1.00 GiB, a rank and the base that its engine holds "
                            "need 1.07 GiB"),
            std::string::npos)
      << reason(id);
  h.advance(100);
  std::vector<WorkerId> loaded;
  for (int turn = 0; turn < 2; ++turn) {
    const auto slots = loads(base);
    ASSERT_EQ(slots.size(), 1u) << reason(id);
    loaded.push_back(CoreHarness::worker(slots[0]));
    h.advance(100);
  }
  EXPECT_EQ(h.job(id).state, JobState::kStarting) << reason(id);
  EXPECT_TRUE(std::ranges::is_permutation(h.job(id).members, loaded));
  EXPECT_TRUE(loads(base).empty()) << "the third engine keeps what it holds";
}

TEST_F(GangsBesideALargeBase, WaitForABaseThatIsBeingLoadedAndAnEngineIsToldOfAGangWithItsBase) {
  for (int slot = 0; slot < 3; ++slot) h.base_bytes[slot] = 200 * kMiB;
  protocol::WorkerHello empty;
  empty.role = protocol::WorkerRole::kEngine;
  empty.worker = CoreHarness::worker(2);
  empty.host = "host";
  empty.slot = 2;
  empty.device = "cpu";
  empty.memory_bytes = 1 << 30;
  empty.incarnation = 7;
  h.engine(0);
  h.engine(1);
  h.from_engine(2, empty);
  h.advance(100);
  const auto told_to_load = h.to_engine<protocol::LoadModel>(2);
  ASSERT_EQ(told_to_load.size(), 1u);
  EXPECT_EQ(told_to_load[0].gang_bytes, 0);
  const JobId id = h.submit({{"train", {{"dp", 3}, {"gradient_accumulation_steps", 3}}}});
  EXPECT_EQ(h.job(id).state, JobState::kQueued);
  EXPECT_NE(reason(id).find("host/cpu2 loads a base"), std::string::npos) << reason(id);
  h.from_engine(2, protocol::ModelLoaded{told_to_load[0].model.digest, {}, 1, 200 * kMiB});
  h.advance(100);
  EXPECT_EQ(h.job(id).state, JobState::kStarting) << reason(id);
  empty.incarnation = 8;  // the engine is another, and holds nothing yet
  h.from_engine(2, empty);
  h.advance(100);
  const auto again = h.to_engine<protocol::LoadModel>(2);
  ASSERT_EQ(again.size(), 1u);
  EXPECT_EQ(again[0].gang_bytes, 100 * kMiB);
}

struct MixedGangs : Gangs {
  int asked_ = 0;
  /// Three workers of two kinds.
  void mix(int first_gpu, const std::string& one, const std::string& two) {
    h.first_gpu = first_gpu;
    for (int slot = 0; slot < 3; ++slot) {
      h.device_names[slot] = slot == 0 ? one : two;
      h.agent(slot);
      h.engine(slot);
    }
  }
  /// The refusal of a job at its submission.
  Status refused(const nlohmann::json& train) {
    h.from_client(
        "c", protocol::Call{
                 "s", str("s", ++asked_), "job.submit",
                 nlohmann::json{
                     {"spec",
                      {{"model", "base"}, {"dataset", "rows"}, {"adapter", "a"}, {"train", train}}}}
                     .dump()});
    for (int slot = 0; slot < 3; ++slot)
      for (const auto& asked : h.to_engine<protocol::EstimateRequest>(slot))
        h.from_engine(slot,
                      protocol::EstimateReply{
                          asked.call_id,
                          {},
                          nlohmann::json{{"peak_bytes", 10}, {"device", h.device(slot)}}.dump()});
    const auto replies = h.to_client<protocol::CallReply>("c");
    return replies.size() == 1 ? replies[0].status : internal_error("no reply");
  }
};
const nlohmann::json kThreeRanks{{"dp", 3}, {"gradient_accumulation_steps", 6}};

TEST_F(MixedGangs, AreOfOneKindOfProcessorAndSayWhichThereAre) {
  mix(1 << 20, "Xeon", "EPYC");
  const JobId two = h.submit(kTwoRanks);
  EXPECT_EQ(h.job(two).members,
            (std::vector<WorkerId>{CoreHarness::worker(1), CoreHarness::worker(2)}));
  const JobId three = h.submit({{"train", kThreeRanks}});
  EXPECT_EQ(h.job(three).state, JobState::kQueued);
  EXPECT_NE(reason(three).find("needs 3 CPU workers; there are 2 CPU workers of kind EPYC, 2 of "
                               "them on host; all ranks of a gang are of one kind, and there are "
                               "2 x EPYC, 1 x Xeon"),
            std::string::npos)
      << reason(three);
  const JobId waits = h.submit(kTwoRanks);
  EXPECT_NE(reason(waits).find("needs 2 workers of host at once, 0 are free"), std::string::npos)
      << reason(waits);
  EXPECT_NE(reason(waits).find("2 x EPYC, 1 x Xeon"), std::string::npos) << reason(waits);
}

TEST_F(MixedGangs, OfGpusToo) {
  mix(0, "NVIDIA A100", "NVIDIA H100");
  const JobId two = h.submit(kTwoRanks);
  EXPECT_EQ(h.job(two).members,
            (std::vector<WorkerId>{CoreHarness::worker(1), CoreHarness::worker(2)}));
  live(11'000, JobId("none"), false);  // the coordinator knows its pool by now
  const Status three = refused(kThreeRanks);
  EXPECT_EQ(three.code(), StatusCode::kRefused);
  EXPECT_NE(three.message().find("the job has 3 ranks, one worker each, and there are 2 GPU "
                                 "workers of kind NVIDIA H100, 2 of them on host; all ranks of a "
                                 "gang are of one kind, and there are 1 x NVIDIA A100, 2 x NVIDIA "
                                 "H100"),
            std::string::npos)
      << three.message();
  EXPECT_NE(three.message().find("the nearest layout with as many workers: dp 2, tp 1, pp 1"),
            std::string::npos)
      << three.message();
}

TEST_F(MixedGangs, MoreRanksThanThereAreSlotsAreRefusedAtSubmission) {
  live(11'000, JobId("none"), false);  // the coordinator knows its pool by now
  const Status four = refused(kFourRanks["train"]);
  EXPECT_EQ(four.code(), StatusCode::kRefused);
  for (const char* words : {"4 ranks", "3 CPU workers", "nearest layout", "dp 1, tp 2, pp 1"})
    EXPECT_NE(four.message().find(words), std::string::npos) << four.message();
  const Status sharded =
      refused({{"dp", 2}, {"zero", 3}, {"tp", 2}, {"gradient_accumulation_steps", 2}});
  EXPECT_NE(sharded.message().find("dp 1, tp 2, pp 1, zero 0"), std::string::npos)
      << sharded.message();
}

TEST_F(Gangs, LayoutAutoIsToldThePoolAndTakesWhatTheDryRunChose) {
  const nlohmann::json train{{"layout", "auto"}, {"gradient_accumulation_steps", 4}};
  h.from_client(
      "c", protocol::Call{
               "s", "k", "job.submit",
               nlohmann::json{
                   {"spec",
                    {{"model", "base"}, {"dataset", "rows"}, {"adapter", "a"}, {"train", train}}}}
                   .dump()});
  bool asked = false;
  for (int slot = 0; slot < 3; ++slot)
    for (const auto& request : h.to_engine<protocol::EstimateRequest>(slot)) {
      asked = true;
      const auto settings = protocol::TrainSettings::parse(request.spec_json);
      EXPECT_EQ(settings->layout, "auto");
      EXPECT_EQ(settings->ranks_max, 3) << "three workers on the host";
      h.from_engine(slot, protocol::EstimateReply{request.call_id, {}, R"({"peak_bytes": 10,
          "fits": true, "layout": {"dp": 2, "tp": 1, "pp": 1, "zero": 1},
          "layout_name": "dp2 x tp1 x pp1, zero 1"})"});
    }
  ASSERT_TRUE(asked);
  const auto replies = h.to_client<protocol::CallReply>("c");
  ASSERT_EQ(replies.size(), 1u);
  ASSERT_TRUE(replies[0].status.ok()) << replies[0].status.message();
  const JobId id(nlohmann::json::parse(replies[0].result_json)["job"].get<std::string>());
  h.advance(100);
  const Job job = h.job(id);
  EXPECT_EQ(job.ranks, 2);
  EXPECT_EQ(job.members.size(), 2u);
  const auto spec = protocol::JobSpec::parse(told(0).spec_json);
  EXPECT_EQ(spec->train.layout, "manual") << "a job that goes on keeps what was chosen";
  EXPECT_EQ(spec->train.dp, 2);
  EXPECT_EQ(spec->train.zero, 1);
}

TEST_F(Gangs, RunsOnTheGpusOfAHostThatHasEnoughAndElseOnItsProcessors) {
  h.first_gpu = 3;
  for (const int slot : {3, 4}) {
    h.agent(slot);
    h.engine(slot);
  }
  const JobId two = h.submit(kTwoRanks);
  const std::vector<WorkerId> gpus{CoreHarness::worker(3), CoreHarness::worker(4)};
  EXPECT_EQ(h.job(two).members, gpus);
  const JobId waits = h.submit(kTwoRanks);
  EXPECT_EQ(h.job(waits).state, JobState::kQueued) << "its bytes are those of a GPU";
  EXPECT_NE(reason(waits).find("needs 2 workers of host at once, 0 are free"), std::string::npos)
      << reason(waits);
  const JobId three = h.submit({{"train", {{"pp", 3}, {"gradient_accumulation_steps", 3}}}});
  EXPECT_EQ(h.job(three).members.size(), 3u) << reason(three);
  for (const WorkerId& member : h.job(three).members)
    EXPECT_EQ(std::ranges::count(gpus, member), 0) << member << ": two kinds in one gang";
}

TEST(GpuGangs, LieOnOneHostWhereItHasAsManyGpusAndElseOverSeveral) {
  CoreHarness h;
  h.first_gpu = 0;
  h.add_model("base");
  h.add_data("rows");
  for (const int slot : {0, 1, 10}) {
    h.agent(slot);
    h.engine(slot);
  }
  const auto shown = [&](const JobId& id) {
    const auto reply = h.call("job.show", {{"job", id.value}});
    return nlohmann::json::parse(reply.result_json)["reason"].get<std::string>();
  };
  const auto w = [](int slot) { return CoreHarness::worker(slot); };
  const JobId two = h.submit(kTwoRanks);
  EXPECT_EQ(h.job(two).members, (std::vector<WorkerId>{w(0), w(1)}));
  const auto ranks = [](int dp) {
    return nlohmann::json{{"train", {{"dp", dp}, {"gradient_accumulation_steps", dp}}}};
  };
  const JobId three = h.submit(ranks(3));
  EXPECT_EQ(h.job(three).state, JobState::kQueued);
  EXPECT_NE(shown(three).find("needs 3 workers of 2 hosts at once, 1 are free"), std::string::npos)
      << shown(three);
  h.from_agent(0, JobEnded{two, 1, invalid_error("bad row"), 0, "{}"});
  h.agent(0);
  h.advance(100);
  EXPECT_EQ(h.job(three).members, (std::vector<WorkerId>{w(0), w(1), w(10)}));
  const JobId four = h.submit(ranks(4));
  EXPECT_NE(shown(four).find("there are 3 GPU workers, 2 of them on host"), std::string::npos)
      << shown(four);
}

TEST_F(Gangs, RightAfterAStartOfTheCoordinatorAJobWaitsForWorkersToComeBack) {
  const JobId id = h.submit(kFourRanks);
  EXPECT_EQ(h.job(id).state, JobState::kQueued);
  EXPECT_NE(reason(id).find("there are 3 CPU workers, 3 of them on host"), std::string::npos)
      << reason(id);
}

TEST_F(Gangs, AnAgentThatKnowsNoGangsIsNotGivenOne) {
  protocol::WorkerHello old;
  old.version = {1, 1};
  old.role = protocol::WorkerRole::kAgent;
  old.host = "host";
  old.device = "cpu";
  old.incarnation = 1;
  for (int slot = 0; slot < 3; ++slot) {
    old.worker = CoreHarness::worker(slot);
    h.from_agent(slot, old);
  }
  const JobId id = h.submit(kTwoRanks);
  EXPECT_EQ(h.job(id).state, JobState::kQueued);
  EXPECT_NE(reason(id).find("knows no gangs"), std::string::npos) << reason(id);
}

TEST_F(Gangs, AGangThatDiesIsStartedAgainFromItsCheckpointUnderANewEpochAndIncarnation) {
  const JobId id = running();
  const std::string text = h.manifest(ManifestKind::kCheckpoint, base, "state");
  h.from_gang(0, protocol::CheckpointReady{id, start.epoch, 4, text});
  h.from_agent(0, JobEnded{id, start.epoch, unavailable_error("ended by signal 9"), 0, "{}"});
  const auto acks = h.to_agent<JobAck>(0);
  ASSERT_FALSE(acks.empty());
  EXPECT_TRUE(acks.back().status.ok());
  h.agent(0);
  h.advance(1000);
  const StartJob again = told(0);
  EXPECT_EQ(again.epoch, start.epoch + 1);
  EXPECT_NE(again.gang, start.gang);
  EXPECT_EQ(again.checkpoint_manifest, text);
  EXPECT_NE(reason(id).find("prepares it; attempt 2 after: ended by signal 9"), std::string::npos)
      << reason(id);
  h.gang(0, again.gang, {{id, again.epoch, 4}});
  EXPECT_EQ(h.job(id).state, JobState::kRunning) << "it was the old one that was lost";
  EXPECT_EQ(h.job(id).epoch, again.epoch);
  // What the old one still says is refused.
  h.to_gang<JobAck>(0);
  h.from_gang(0, protocol::Publish{id, start.epoch, 9,
                                   h.manifest(ManifestKind::kAdapter, base, "old"), "{}"});
  const auto refused = h.to_gang<JobAck>(0);
  ASSERT_EQ(refused.size(), 1u);
  EXPECT_EQ(refused[0].status.code(), StatusCode::kConflict);
  EXPECT_TRUE(h.tables().adapters.empty());
}

TEST_F(Gangs, EnginesOnItsSlotsComeAndGoWithoutIt) {
  const JobId id = running();
  h.engine(0);  // another process
  h.engine(1);
  EXPECT_EQ(h.job(id).state, JobState::kRunning);
  live(8000, id);
  EXPECT_EQ(h.job(id).state, JobState::kRunning);
  EXPECT_EQ(h.job(id).epoch, start.epoch);
}

TEST_F(Gangs, ASilentGangLosesItsLeaseAndItsAgentIsToldToEndIt) {
  const JobId id = running();
  live(1000, id);
  for (int i = 0; i < 7; ++i) {  // agents and engines go on, the first rank hangs
    h.advance(1000);
    for (int slot = 0; slot < 3; ++slot) h.beat(slot);
    h.agent(1);
    h.agent(2);
    h.agent(0, {{id, start.epoch, 1}});
  }
  const StartJob again = told(0);
  EXPECT_EQ(again.epoch, start.epoch + 1) << "where it was: the old one must end there first";
  EXPECT_NE(again.gang, start.gang);
  protocol::Heartbeat beat;
  beat.worker = CoreHarness::worker(0);
  beat.role = protocol::WorkerRole::kAgent;
  beat.incarnation = 1;
  beat.jobs = {{id, start.epoch, 1}};
  h.from_agent(0, beat);
  const auto stops = h.to_agent<StopJob>(0);
  ASSERT_FALSE(stops.empty());
  EXPECT_EQ(stops.back().epoch, start.epoch);
  EXPECT_EQ(stops.back().mode, StopMode::kCancel);
}

TEST_F(Gangs, OneThatOnlyLostItsLeaseGoesOnUnlessAWorkerOfItsHasAnotherJob) {
  for (const bool taken : {false, true}) {
    const JobId id = running();
    h.call("worker.drain", {{"worker", CoreHarness::worker(2).value}});
    const JobId other = taken ? h.submit({{"priority", 5}}) : JobId();  // more urgent: overtakes
    const auto beat_all = [&] {
      for (int slot = 0; slot < 3; ++slot) h.beat(slot);
      h.agent(0, {{id, start.epoch, 1}});
    };
    const auto still_there = [&] {  // running, or asked to give its workers to the other
      return h.job(id).state == JobState::kRunning || h.job(id).state == JobState::kPausing;
    };
    for (int i = 0; i < 6 && still_there(); ++i) {
      h.advance(1050);
      beat_all();
    }
    if (!taken) {
      ASSERT_EQ(h.job(id).state, JobState::kStarting) << "started anew where it was";
    } else {
      ASSERT_EQ(h.job(other).state, JobState::kStarting);
      ASSERT_EQ(h.job(id).state, JobState::kQueued);
      h.to_gang<JobAck>(0);
      h.gang(0, start.gang, {{id, start.epoch, 5}});
      h.from_gang(0, protocol::JobProgress{id, start.epoch, 1, "step", 5, 10, "", "{}"});
      EXPECT_EQ(h.job(id).state, JobState::kQueued);
      const auto acks = h.to_gang<JobAck>(0);
      ASSERT_FALSE(acks.empty());
      EXPECT_EQ(acks.back().status.code(), StatusCode::kConflict);
    }
    h.call("job.cancel", {{"job", id.value}});
    h.from_agent(0, JobEnded{id, h.job(id).epoch, cancelled_error("killed"), 0, "{}"});
    h.call("worker.resume", {{"worker", CoreHarness::worker(2).value}});
    h.agent(0);
  }
}

TEST_F(Gangs, ARestartedCoordinatorAdoptsIt) {
  const JobId id = running();
  h.restart();
  h.agent(0, {{id, start.epoch, 1}});
  h.gang(0, start.gang, {{id, start.epoch, 7}});
  EXPECT_EQ(h.job(id).state, JobState::kRunning);
  EXPECT_EQ(h.job(id).epoch, start.epoch);
  const auto replies = h.to_gang<protocol::WorkerHelloReply>(0);
  ASSERT_FALSE(replies.empty());
  EXPECT_TRUE(replies.back().stop_jobs.empty());
  live(15'000, id);
  EXPECT_EQ(h.job(id).state, JobState::kRunning);
}

TEST_F(Gangs, PausingAndDrainingReachItsFirstRank) {
  const JobId id = running();
  h.call("job.pause", {{"job", id.value}});
  auto stops = h.to_gang<StopJob>(0);
  ASSERT_FALSE(stops.empty());
  EXPECT_EQ(stops.back().mode, StopMode::kPause);
  h.from_gang(0, JobEnded{id, start.epoch, cancelled_error("paused"), 3, "{}"});
  EXPECT_EQ(h.job(id).state, JobState::kPaused);
  h.agent(0);
  h.call("job.resume", {{"job", id.value}});
  start = told(0);
  h.agent(0, {{id, start.epoch, 0}});
  h.gang(0, start.gang, {{id, start.epoch, 0}});
  h.call("worker.drain", {{"worker", CoreHarness::worker(1).value}});  // a member, not the leader
  stops = h.to_gang<StopJob>(0);
  ASSERT_FALSE(stops.empty());
  h.from_gang(0, JobEnded{id, start.epoch, cancelled_error("paused"), 5, "{}"});
  h.agent(0);
  h.advance(1000);
  EXPECT_EQ(h.job(id).members,
            (std::vector<WorkerId>{CoreHarness::worker(0), CoreHarness::worker(2)}));
}

TEST_F(Gangs, ALayoutThatCannotWorkIsRefusedWhereAPausedJobIsResumedAndTheJobStaysPaused) {
  h.advance(11'000);  // by now who was there before the coordinator is known
  for (int slot = 0; slot < 3; ++slot) h.agent(slot), h.engine(slot);
  const JobId id = running();
  h.call("job.pause", {{"job", id.value}});
  h.from_gang(0, JobEnded{id, start.epoch, cancelled_error("paused"), 3, "{}"});
  h.agent(0);
  ASSERT_EQ(h.job(id).state, JobState::kPaused);
  const Job before = h.job(id);
  const auto resume = [&](const nlohmann::json& layout, const Status& status) {
    h.from_client("c",
                  protocol::Call{"r", layout.dump(), "job.resume",
                                 nlohmann::json{{"job", id.value}, {"layout", layout}}.dump()});
    EXPECT_TRUE(h.to_client<protocol::CallReply>("c").empty()) << "answered before the dry run";
    for (int slot = 0; slot < 3; ++slot)
      for (const auto& asked : h.to_engine<protocol::EstimateRequest>(slot))
        h.from_engine(slot, protocol::EstimateReply{asked.call_id, status,
                                                    R"({"peak_bytes":10,"device":"cpu"})"});
    return h.to_client<protocol::CallReply>("c").at(0).status;
  };
  const Status uneven = resume({{"tp", 3}}, refused_error("3 does not divide 4 heads"));
  EXPECT_EQ(uneven.code(), StatusCode::kRefused);
  EXPECT_NE(uneven.message().find("does not divide"), std::string::npos) << uneven.message();
  const Status large = resume({{"tp", 4}}, {});
  EXPECT_EQ(large.code(), StatusCode::kRefused);
  EXPECT_NE(large.message().find("nearest layout"), std::string::npos) << large.message();
  EXPECT_EQ(h.job(id).state, JobState::kPaused);
  EXPECT_EQ(h.job(id).spec_json, before.spec_json);
  EXPECT_EQ(h.job(id).estimate_json, before.estimate_json);
  EXPECT_TRUE(resume({{"tp", 1}, {"pp", 2}}, {}).ok());
  EXPECT_NE(h.job(id).state, JobState::kPaused);
}

TEST_F(Gangs, AnElasticJobGoesOnOverFewerRanksThanItsLeast) {
  const JobId id =
      h.submit({{"train", {{"dp", 2}, {"dp_min", 2}, {"gradient_accumulation_steps", 2}}}});
  start = told(0);
  h.agent(0, {{id, start.epoch, 0}});
  h.gang(0, start.gang, {{id, start.epoch, 0}});
  h.call("job.pause", {{"job", id.value}});
  h.from_gang(0, JobEnded{id, start.epoch, cancelled_error("paused"), 3, "{}"});
  ASSERT_EQ(h.job(id).state, JobState::kPaused);
  for (int slot = 0; slot < 3; ++slot) h.agent(slot), h.engine(slot);
  const auto resume = [&](const nlohmann::json& layout) {
    h.from_client("c",
                  protocol::Call{"r", layout.dump(), "job.resume",
                                 nlohmann::json{{"job", id.value}, {"layout", layout}}.dump()});
    for (int slot = 0; slot < 3; ++slot)
      for (const auto& asked : h.to_engine<protocol::EstimateRequest>(slot))
        h.from_engine(slot, protocol::EstimateReply{asked.call_id, {}, R"({"device":"cpu"})"});
    return h.to_client<protocol::CallReply>("c").at(0).status;
  };
  EXPECT_NE(resume({{"dp", 1}}).message().find("dp_min 2 must be 1 to dp (1)"), std::string::npos);
  const Status fewer = resume({{"dp", 1}, {"dp_min", 0}});
  EXPECT_TRUE(fewer.ok()) << fewer.to_string();
  EXPECT_EQ(h.job(id).ranks, 1);
}

TEST_F(Gangs, ACancelledOneThatNeverSaidHelloIsEndedByItsAgent) {
  const JobId id = h.submit(kTwoRanks);
  const StartJob told_first = told(0);
  h.call("job.cancel", {{"job", id.value}});
  const auto stops = h.to_agent<StopJob>(0);
  ASSERT_FALSE(stops.empty());
  EXPECT_EQ(stops.back().mode, StopMode::kCancel);
  h.from_agent(0, JobEnded{id, told_first.epoch, cancelled_error("killed"), 0, "{}"});
  EXPECT_EQ(h.job(id).state, JobState::kCancelled);
}

TEST_F(Gangs, OneWhoseAgentLeavesBeforeItStartedTakesOtherWorkers) {
  const JobId id = h.submit(kTwoRanks);
  (void)told(0);
  h.from_agent(0, protocol::WorkerBye{CoreHarness::worker(0), protocol::WorkerRole::kAgent, 1});
  h.advance(1000);
  EXPECT_EQ(h.job(id).epoch, 2u);
  EXPECT_EQ(h.job(id).worker, CoreHarness::worker(1)) << "whose agent is there";
}

TEST_F(Gangs, AStartThatIsLostIsRepeated) {
  const JobId id = h.submit(kTwoRanks);
  const StartJob first = told(0);
  h.advance(1100);
  const StartJob again = told(0);
  EXPECT_EQ(again, first);
  EXPECT_EQ(h.job(id).state, JobState::kStarting);
}

}  // namespace
}  // namespace tandem::coordinator
