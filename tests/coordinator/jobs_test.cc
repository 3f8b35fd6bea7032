#include "tests/coordinator/core_harness.h"

#include <gtest/gtest.h>

namespace tandem::coordinator {
namespace {

using protocol::JobAck;
using protocol::StartJob;
using protocol::StopJob;

struct JobsTest : testing::Test {
  JobsTest() {
    base = h.add_model("base");
    h.add_data("rows");
    h.engine(0);
  }
  /// A submitted job that runs on engine 0.
  JobId running() {
    const JobId id = h.submit();
    started = h.to_engine<StartJob>(0).at(0);
    h.beat(0, {{id, started.epoch, 0}});
    return id;
  }
  void progress(const JobId& id, Epoch epoch, std::uint64_t seq, std::int64_t step, int slot = 0) {
    h.from_engine(slot, protocol::JobProgress{id, epoch, seq, "step", step, 10, "", "{}"});
  }
  CoreHarness h;
  Digest base;
  StartJob started;
};

TEST_F(JobsTest, AJobThatDoesNotFitIsRefusedWithTheNumberAndTheLimit) {
  h.from_client("c", protocol::Call{"s", "k", "job.submit",
                                    R"({"spec":{"model":"base","dataset":"rows","adapter":"a"}})"});
  const auto asked = h.to_engine<protocol::EstimateRequest>(0).at(0);
  EXPECT_TRUE(h.to_client<protocol::CallReply>("c").empty()) << "answered before the dry run";
  h.from_engine(0,
                protocol::EstimateReply{
                    asked.call_id, {}, R"({"peak_bytes":5000,"limit_bytes":4000,"fits":false})"});
  const auto reply = h.to_client<protocol::CallReply>("c").at(0);
  EXPECT_EQ(reply.status.code(), StatusCode::kRefused);
  EXPECT_NE(reply.status.message().find("5000"), std::string::npos) << reply.status.message();
  EXPECT_NE(reply.status.message().find("4000"), std::string::npos) << reply.status.message();
  EXPECT_TRUE(h.to_engine<StartJob>(0).empty());
}

TEST_F(JobsTest, TheDryRunKnowsWhetherTheJobEvaluates) {
  const auto evaluates = [&](const std::string& more) {
    h.from_client("c", protocol::Call{"s", str("k", more), "job.submit",
                                      R"({"spec":{"model":"base","dataset":"rows","adapter":"a")" +
                                          more + "}}"});
    return h.to_engine<protocol::EstimateRequest>(0).at(0).evaluates;
  };
  EXPECT_FALSE(evaluates(""));
  EXPECT_TRUE(evaluates(R"(,"train":{"eval_split":0.2})"));
  EXPECT_TRUE(evaluates(R"(,"eval_dataset":"rows")"));
  const auto estimated = [&](const std::string& more) {
    h.from_client("c", protocol::Call{"e", "", "estimate", R"({"model":"base")" + more + "}"});
    return h.to_engine<protocol::EstimateRequest>(0).at(0).evaluates;
  };
  EXPECT_FALSE(estimated(""));
  EXPECT_TRUE(estimated(R"(,"train":{"eval_split":0.2})"));
  EXPECT_TRUE(estimated(R"(,"eval_data":true)"));
}

TEST_F(JobsTest, UnknownNamesAndSettingsAreRefusedWithTheNearest) {
  const auto submit = [&](nlohmann::json spec) {
    return h.call("job.submit", {{"spec", std::move(spec)}}, "k").status;
  };
  const Status model = submit({{"model", "bose"}, {"dataset", "rows"}, {"adapter", "a"}});
  EXPECT_EQ(model.code(), StatusCode::kNotFound);
  EXPECT_NE(model.message().find("did you mean base"), std::string::npos) << model.message();
  const Status data = submit({{"model", "base"}, {"dataset", "row"}, {"adapter", "a"}});
  EXPECT_EQ(data.code(), StatusCode::kNotFound);
  EXPECT_NE(data.message().find("did you mean rows"), std::string::npos) << data.message();
  EXPECT_EQ(submit({{"model", "base"}, {"dataset", "rows"}, {"adapter", "base"}}).code(),
            StatusCode::kConflict);
  EXPECT_EQ(submit({{"model", "base"}, {"dataset", "rows"}, {"adapter", "a@2"}}).code(),
            StatusCode::kInvalid);
  EXPECT_EQ(submit({{"model", "base"}, {"dataset", "rows"}, {"adapter", "a"}, {"lora", 3}}).code(),
            StatusCode::kInvalid);
  EXPECT_TRUE(h.tables().jobs.empty());
}

TEST_F(JobsTest, StartsByPriorityThenInOrderOfSubmission) {
  const JobId first = running();
  const JobId low = h.submit({{"priority", -1}});
  const JobId early = h.submit();
  const JobId late = h.submit();
  const JobId urgent = h.submit({{"priority", 5}});
  const auto position = [&](const JobId& id) {
    const auto shown = h.call("job.show", {{"job", id.value}});
    const auto json = nlohmann::json::parse(shown.result_json);
    EXPECT_NE(json["reason"].get<std::string>().find(first.value), std::string::npos)
        << "why it waits: " << json["reason"];
    return json["position"].get<int>();
  };
  EXPECT_EQ(position(urgent), 1);
  EXPECT_EQ(position(early), 2);
  EXPECT_EQ(position(late), 3);
  EXPECT_EQ(position(low), 4);
  h.from_engine(0, protocol::JobEnded{first, started.epoch, invalid_error("bad row"), 0, "{}"});
  EXPECT_EQ(h.job(first).state, JobState::kFailed);
  EXPECT_EQ(h.to_engine<StartJob>(0).at(0).job, urgent);
}

TEST_F(JobsTest, AnOldEpochIsRefusedAndChangesNothing) {
  const JobId id = running();
  h.engine(0);  // another process: the first one died
  const Epoch now = h.job(id).epoch;
  EXPECT_EQ(now, started.epoch + 1);
  h.to_engine<JobAck>(0);
  progress(id, started.epoch, 1, 5);
  h.from_engine(0, protocol::Publish{id, started.epoch, 5,
                                     h.manifest(ManifestKind::kAdapter, base, "old"), "{}"});
  for (const JobAck& ack : h.to_engine<JobAck>(0))
    EXPECT_EQ(ack.status.code(), StatusCode::kConflict) << ack.of;
  EXPECT_EQ(h.job(id).step, 0);
  EXPECT_TRUE(h.tables().adapters.empty());
}

TEST_F(JobsTest, AfterAnEnginesDeathTheJobGoesOnFromItsLastCheckpointUnderANewEpoch) {
  const JobId id = running();
  progress(id, started.epoch, 1, 4);
  const std::string text = h.manifest(ManifestKind::kCheckpoint, base, "state");
  h.from_engine(0, protocol::CheckpointReady{id, started.epoch, 4, text});
  h.engine(1);
  h.advance(6000);  // nothing from engine 0
  EXPECT_FALSE(h.core().workers().find(CoreHarness::worker(0))->engine.alive);
  h.engine(1, 0);  // engine 1 had gone silent too, and is back
  h.advance(1000);
  const auto again = h.to_engine<StartJob>(1);
  ASSERT_FALSE(again.empty());
  EXPECT_EQ(again.back().epoch, started.epoch + 1);
  EXPECT_EQ(again.back().checkpoint_manifest, text);
}

TEST_F(JobsTest, ACoordinatorRestartAdoptsWhatRunsAndCostsNoStep) {
  const JobId id = running();
  const Incarnation engine = h.job(id).engine;
  progress(id, started.epoch, 1, 3);
  h.advance(200);
  h.restart();
  h.engine(0, engine, {{id, started.epoch, 7}});
  const auto reply = h.to_engine<protocol::WorkerHelloReply>(0);
  EXPECT_TRUE(reply.back().stop_jobs.empty());
  h.advance(1000);
  EXPECT_EQ(h.job(id).state, JobState::kRunning);
  EXPECT_EQ(h.job(id).epoch, started.epoch);
  EXPECT_TRUE(h.to_engine<StartJob>(0).empty());
}

TEST_F(JobsTest, AnEngineIsToldToStopAJobThatIsNotItsOwn) {
  const JobId id = running();
  h.engine(1, 77, {{id, started.epoch, 2}, {JobId("job-unknown"), 1, 2}});
  EXPECT_EQ(h.to_engine<protocol::WorkerHelloReply>(1).back().stop_jobs.size(), 2u);
  EXPECT_EQ(h.job(id).worker, CoreHarness::worker(0));
}

TEST_F(JobsTest, ALeaseThatOnlyRanOutIsTakenUpAgainWithoutANewEpoch) {
  const JobId id = running();
  const Incarnation engine = h.job(id).engine;
  h.advance(6000);
  EXPECT_EQ(h.job(id).state, JobState::kQueued);
  h.engine(0, engine, {{id, started.epoch, 9}});
  EXPECT_EQ(h.job(id).state, JobState::kRunning);
  EXPECT_EQ(h.job(id).epoch, started.epoch);
}

TEST_F(JobsTest, GivesUpAfterTooManyAttemptsWithoutAStepAndSaysWhy) {
  const JobId id = running();
  for (int i = 0; i < Limits{}.attempts_max + 2 && !is_terminal(h.job(id).state); ++i) {
    h.engine(0);
    h.advance(40'000);
    h.engine(0);
  }
  EXPECT_EQ(h.job(id).state, JobState::kFailed);
  EXPECT_NE(h.job(id).error.find("without a new step"), std::string::npos) << h.job(id).error;
}

TEST_F(JobsTest, AttemptsThatMakeStepsAreNotCounted) {
  const JobId id = running();
  for (int i = 1; i < 3 * Limits{}.attempts_max; ++i) {
    progress(id, h.job(id).epoch, 1, i);
    h.engine(0);
    h.advance(1000);
    h.beat(0, {{id, h.job(id).epoch, 0}});
    ASSERT_EQ(h.job(id).state, JobState::kRunning) << "death " << i;
  }
}

TEST_F(JobsTest, PauseWaitsForTheCheckpointAndResumeStartsFromIt) {
  const JobId id = running();
  EXPECT_TRUE(h.call("job.pause", {{"job", id.value}}, "p").status.ok());
  const auto stop = h.to_engine<StopJob>(0).at(0);
  EXPECT_EQ(stop.mode, protocol::StopMode::kPause);
  EXPECT_EQ(h.job(id).state, JobState::kPausing);
  const std::string text = h.manifest(ManifestKind::kCheckpoint, base, "paused");
  h.from_engine(0, protocol::CheckpointReady{id, started.epoch, 6, text});
  h.from_engine(0, protocol::JobEnded{id, started.epoch, cancelled_error("paused"), 6, "{}"});
  EXPECT_EQ(h.job(id).state, JobState::kPaused);
  EXPECT_TRUE(h.to_engine<StartJob>(0).empty());
  EXPECT_TRUE(h.call("job.resume", {{"job", id.value}}, "r").status.ok());
  EXPECT_EQ(h.to_engine<StartJob>(0).at(0).checkpoint_manifest, text);
}

TEST_F(JobsTest, AJobThatRunsAgainNoLongerShowsWhyItStopped) {
  const JobId id = running();
  EXPECT_TRUE(h.call("job.pause", {{"job", id.value}}, "p").status.ok());
  EXPECT_TRUE(h.call("job.resume", {{"job", id.value}}, "r").status.ok());
  h.from_engine(0, protocol::JobEnded{id, started.epoch, cancelled_error("paused"), 6, "{}"});
  h.advance(1000);
  h.beat(0, {{id, h.job(id).epoch, 0}});
  ASSERT_EQ(h.job(id).state, JobState::kRunning);
  EXPECT_EQ(h.job(id).error, "");
}

TEST_F(JobsTest, CancelIsRepeatedUntilTheEngineHasStopped) {
  const JobId id = running();
  EXPECT_TRUE(h.call("job.cancel", {{"job", id.value}}, "x").status.ok());
  EXPECT_EQ(h.job(id).state, JobState::kCancelling);
  const Status early = h.call("job.rm", {{"job", id.value}}, "early").status;
  EXPECT_EQ(early.code(), StatusCode::kConflict);
  EXPECT_NE(early.message().find("repeat when it has ended"), std::string::npos) << early.message();
  h.advance(1500);
  h.beat(0, {{id, started.epoch, 2}});
  h.advance(1500);
  EXPECT_GE(h.to_engine<StopJob>(0).size(), 2u);
  h.from_engine(0, protocol::JobEnded{id, started.epoch, cancelled_error("stopped"), 2, "{}"});
  EXPECT_EQ(h.job(id).state, JobState::kCancelled);
  EXPECT_EQ(h.call("job.cancel", {{"job", id.value}}, "y").status.code(), StatusCode::kConflict);
}

TEST_F(JobsTest, ARepeatedSubmissionIsTheSameJobEvenAfterARestart) {
  const JobId id = h.submit({}, "once");
  h.restart();
  h.engine(0, h.job(id).engine, {{id, h.job(id).epoch, 0}});
  EXPECT_EQ(h.submit({}, "once"), id);
  EXPECT_EQ(h.tables().jobs.size(), 1u);
  const auto other = h.call("job.submit", {{"spec", {{"model", "base"}}}}, "once");
  EXPECT_EQ(other.status.code(), StatusCode::kConflict);
}

TEST_F(JobsTest, TwoJobsNeverTrainOnOneEngine) {
  running();
  const JobId second = h.submit();
  EXPECT_EQ(h.job(second).state, JobState::kQueued);
  EXPECT_TRUE(h.to_engine<StartJob>(0).empty());
  h.engine(1);
  EXPECT_EQ(h.to_engine<StartJob>(1).at(0).job, second);
}

TEST_F(JobsTest, ADrainedWorkersJobIsCheckpointedAndMoves) {
  const JobId id = running();
  EXPECT_TRUE(h.call("worker.drain", {{"worker", CoreHarness::worker(0).value}}, "d").status.ok());
  EXPECT_EQ(h.to_engine<StopJob>(0).at(0).mode, protocol::StopMode::kPause);
  h.from_engine(0, protocol::JobEnded{id, started.epoch, cancelled_error("paused"), 3, "{}"});
  EXPECT_EQ(h.job(id).state, JobState::kQueued);
  EXPECT_TRUE(h.to_engine<StartJob>(0).empty()) << "a draining worker gets nothing new";
  h.engine(1);
  EXPECT_EQ(h.to_engine<StartJob>(1).at(0).job, id);
}

TEST_F(JobsTest, ProgressIsAcknowledgedOnlyWithItsTransactionAndRepeatsAddNothing) {
  const JobId id = running();
  h.to_engine<JobAck>(0);
  progress(id, started.epoch, 1, 1);
  EXPECT_TRUE(h.to_engine<JobAck>(0).empty()) << "acknowledged before it was on disk";
  h.advance(200);
  EXPECT_EQ(h.to_engine<JobAck>(0).at(0).of, "progress:1");
  const std::uint64_t events = h.job(id).events;
  progress(id, started.epoch, 1, 1);
  h.advance(200);
  EXPECT_EQ(h.to_engine<JobAck>(0).at(0).of, "progress:1");
  EXPECT_EQ(h.job(id).events, events);
}

TEST_F(JobsTest, WatchSendsOldEventsThenNewOnesAndEndsWithTheJob) {
  const JobId id = running();
  progress(id, started.epoch, 1, 1);
  h.from_client("c",
                protocol::Call{"w", "", "job.watch", nlohmann::json{{"job", id.value}}.dump()});
  const std::size_t old = h.to_client<protocol::CallReply>("c").size();
  EXPECT_EQ(old, h.job(id).events);
  progress(id, started.epoch, 2, 2);
  EXPECT_EQ(h.to_client<protocol::CallReply>("c").size(), 1u);
  h.from_engine(0, protocol::JobEnded{id, started.epoch, invalid_error("row 3"), 2, "{}"});
  const auto end = h.to_client<protocol::CallReply>("c");
  ASSERT_FALSE(end.empty());
  EXPECT_FALSE(end.back().more);
  EXPECT_EQ(nlohmann::json::parse(end.back().result_json)["state"], "failed");
}

TEST_F(JobsTest, AnEndedJobWithoutACheckpointIsNotToBeWaitedFor) {
  running();  // takes the engine
  const JobId id = h.submit({{"adapter", "next"}});
  const auto latest = [&] {
    return h.call("adapter.manifest", {{"adapter", id.value + "@latest"}}).status.message();
  };
  EXPECT_NE(latest().find("has no checkpoint yet (step 0); set save_steps lower or wait"),
            std::string::npos)
      << latest();
  EXPECT_TRUE(h.call("job.cancel", {{"job", id.value}}).status.ok());
  EXPECT_NE(latest().find("is cancelled and has no checkpoint"), std::string::npos) << latest();
}

TEST_F(JobsTest, ARestoredJobIsPausedAndGoesOnFromItsNewestCheckpoint) {
  const auto restore = [&](const std::string& job, std::int64_t step, const std::string& state) {
    return h
        .call("job.restore",
              {{"job", job},
               {"spec", {{"model", "theirs"}, {"dataset", "x"}, {"adapter", "t"}}},
               {"model", base.hex()},
               {"dataset", "rows"},
               {"step", step},
               {"manifest", h.manifest(ManifestKind::kCheckpoint, base, state)}},
              str(job, step, state))
        .status;
  };
  const JobId id("job-0123456789ab");
  EXPECT_TRUE(restore(id.value, 4, "four").ok());
  EXPECT_TRUE(restore(id.value, 8, "eight").ok());
  EXPECT_TRUE(restore(id.value, 8, "eight").ok()) << "again: nothing new";
  EXPECT_EQ(restore(id.value, 8, "other").code(), StatusCode::kConflict);
  EXPECT_EQ(restore("no-job", 8, "eight").code(), StatusCode::kInvalid);
  EXPECT_EQ(h.job(id).state, JobState::kPaused);
  EXPECT_EQ(h.job(id).step, 8);
  h.restart();
  h.engine(0);
  EXPECT_EQ(h.tables().checkpoints.size(), 2u);
  h.from_client("c", protocol::Call{"r", "r", "job.resume", str(R"({"job":")", id, R"("})")});
  for (const auto& asked : h.to_engine<protocol::EstimateRequest>(0))
    h.from_engine(0, protocol::EstimateReply{asked.call_id, {}, R"({"peak_bytes":1,"fits":true})"});
  EXPECT_TRUE(h.to_client<protocol::CallReply>("c").at(0).status.ok());
  const auto starts = h.to_engine<StartJob>(0);
  ASSERT_FALSE(starts.empty());
  EXPECT_EQ(starts.back().job, id);
  EXPECT_EQ(starts.back().checkpoint_manifest,
            h.manifest(ManifestKind::kCheckpoint, base, "eight"));
  EXPECT_EQ(restore(id.value, 12, "twelve").code(), StatusCode::kConflict) << "it runs";
}

struct History : testing::Test {
  explicit History(Limits limits = few()) : h(limits) {
    base = h.add_model("base");
    h.add_data("rows");
    h.engine(0);
  }
  static Limits few() {
    Limits limits;
    limits.jobs_kept = 3;
    limits.history_bytes_max = 10'000;
    limits.gc_ms = 60'000;
    return limits;
  }
  /// One that ran two steps, stored a checkpoint and then failed.
  JobId ended() {
    const JobId id = h.submit();
    const auto start = h.to_engine<StartJob>(0).back();
    h.beat(0, {{id, start.epoch, 0}});
    for (std::uint64_t step : {1, 2})
      h.from_engine(0, protocol::JobProgress{id, start.epoch, step, "step",
                                             static_cast<std::int64_t>(step), 10, "", "{}"});
    h.from_engine(0,
                  protocol::CheckpointReady{id, start.epoch, 2,
                                            h.manifest(ManifestKind::kCheckpoint, base, id.value)});
    h.from_engine(0, protocol::JobEnded{id, start.epoch, invalid_error("bad row"), 2, "{}"});
    h.beat(0);
    h.advance(100);
    return id;
  }
  std::size_t events(const JobId& id) {
    return RegistryStore(h.registry()).events(id, 1000).value().size();
  }
  CoreHarness h;
  Digest base;
};

TEST_F(History, OfEndedJobsTheOldestLoseTheirEventsAndCheckpointsAndThenTheirRecord) {
  std::vector<JobId> jobs;
  for (int i = 0; i < 4; ++i) jobs.push_back(ended());
  const auto kept = [&](int i) { return h.tables().jobs.contains(jobs[std::size_t(i)]); };
  EXPECT_FALSE(kept(0));
  for (int i = 1; i < 4; ++i) EXPECT_TRUE(kept(i)) << i;
  EXPECT_EQ(events(jobs[0]), 0u);
  EXPECT_EQ(events(jobs[1]), 0u) << "three jobs' events are more than history_bytes_max";
  EXPECT_TRUE(h.tables().checkpoints_of(jobs[1]).empty());
  EXPECT_GT(events(jobs[3]), 3u);
  EXPECT_EQ(h.tables().checkpoints_of(jobs[3]).size(), 1u);
  h.restart();
  EXPECT_FALSE(kept(0)) << "on disk too";
  EXPECT_TRUE(h.registry().check(true).value().empty());
  h.engine(0);
  const auto resumed = h.call("job.resume", {{"job", jobs[1].value}}, "r");
  EXPECT_TRUE(resumed.status.ok()) << resumed.status.message();
  EXPECT_TRUE(h.to_engine<StartJob>(0).back().checkpoint_manifest.empty()) << "from its beginning";
}

TEST_F(History, AFailedJobWhoseDataOrBaseWasRemovedIsNotResumed) {
  const JobId id = ended();
  const auto resume = [&] { return h.call("job.resume", {{"job", id.value}}, "r").status; };
  ASSERT_TRUE(h.call("data.rm", {{"data", "rows"}}, "k1").status.ok());
  EXPECT_EQ(resume().code(), StatusCode::kNotFound);
  EXPECT_NE(resume().message().find("data set"), std::string::npos) << resume().message();
  ASSERT_TRUE(h.call("model.rm", {{"model", "base"}}, "k2").status.ok());
  EXPECT_NE(resume().message().find("base"), std::string::npos) << resume().message();
  EXPECT_EQ(h.job(id).state, JobState::kFailed);
}

TEST_F(History, AJobThatHasEndedCanBeRemovedAndItsChunksAreCollectedByThemselves) {
  const JobId id = ended(), live = h.submit();
  const Digest chunk = sha256(id.value);
  EXPECT_EQ(h.call("job.rm", {{"job", live.value}}, "k1").status.code(), StatusCode::kConflict);
  EXPECT_TRUE(h.call("job.rm", {{"job", id.value}}, "k2").status.ok());
  EXPECT_EQ(h.call("job.show", {{"job", id.value}}).status.code(), StatusCode::kNotFound);
  EXPECT_EQ(h.call("job.list", {{"after", id.value}}).status.code(), StatusCode::kConflict)
      << "not a page that begins anywhere";
  EXPECT_EQ(events(id), 0u);
  EXPECT_TRUE(h.tables().checkpoints.empty());
  EXPECT_TRUE(h.registry().blobs().has(chunk).value());
  h.advance(storage::kBlobSpareMs + 2 * few().gc_ms);
  EXPECT_FALSE(h.registry().blobs().has(chunk).value());
}

TEST_F(JobsTest, EvaluationsOfNothingAreRefused) {
  const auto submit = [&](const Json& train) {
    return h
        .call("job.submit",
              {{"spec",
                {{"model", "base"}, {"dataset", "rows"}, {"adapter", "a"}, {"train", train}}}},
              train.dump())
        .status;
  };
  const Status status = submit({{"eval_steps", 5}});
  EXPECT_EQ(status.code(), StatusCode::kInvalid);
  EXPECT_NE(status.message().find("eval_split"), std::string::npos) << status.message();
  EXPECT_NE(submit({{"eval_steps", 5}, {"eval_split", 0.25}}).code(), StatusCode::kInvalid);
}

TEST_F(JobsTest, ACheckpointOfAnotherBaseOrWithoutItsBytesIsNotRestored) {
  const auto restore = [&](const std::string& manifest) {
    return h
        .call("job.restore",
              {{"job", "job-0123456789ab"},
               {"spec", {{"model", "m"}, {"dataset", "x"}, {"adapter", "t"}}},
               {"model", "base"},
               {"dataset", "rows"},
               {"step", 4},
               {"manifest", manifest}},
              manifest)
        .status;
  };
  EXPECT_EQ(restore(h.manifest(ManifestKind::kCheckpoint, sha256("another"), "s")).code(),
            StatusCode::kInvalid);
  EXPECT_EQ(restore(h.manifest(ManifestKind::kAdapter, base, "s")).code(), StatusCode::kInvalid);
  EXPECT_EQ(restore(h.manifest(ManifestKind::kCheckpoint, base, "t", false)).code(),
            StatusCode::kNotFound);
  EXPECT_TRUE(h.tables().jobs.empty());
}

}  // namespace
}  // namespace tandem::coordinator
