// Jobs that give their workers to others, and elastic ones that take what is free.
#include "coordinator/preemption.h"
#include "tests/coordinator/core_harness.h"

#include <gtest/gtest.h>

namespace tandem::coordinator {
namespace {

using protocol::JobEnded;
using protocol::StartJob;
using protocol::StopJob;
using protocol::StopMode;

nlohmann::json job_of(int priority, const nlohmann::json& train) {
  return {{"priority", priority}, {"train", train}};
}
const nlohmann::json kTwo{{"tp", 2}};
const nlohmann::json kElastic{{"dp", 4}, {"dp_min", 1}, {"gradient_accumulation_steps", 4}};

/// Four workers of one host; gangs say hello as soon as they are told to start.
struct Resizing : testing::Test {
  Resizing() {
    base = h.add_model("base");
    h.add_data("rows");
    for (int slot = 0; slot < kSlots; ++slot) {
      h.agent(slot);
      h.engine(slot);
    }
  }
  /// Everybody answers what they were told, and lives on for a while.
  void settle(TimeMs ms = 600) {
    for (TimeMs t = 0; t < ms; t += 200) {
      for (int slot = 0; slot < kSlots; ++slot) {
        for (const auto& start : h.to_agent<StartJob>(slot)) gangs[slot] = start;
        for (const auto& start : h.to_engine<StartJob>(slot)) singles[slot] = start;
        for (const auto& stop : h.to_gang<StopJob>(slot)) stopped(slot, stop);
      }
      for (int slot = 0; slot < kSlots; ++slot) {
        std::vector<protocol::RunningJob> mine;
        if (gangs.contains(slot)) mine = {{gangs[slot].job, gangs[slot].epoch, 1}};
        h.agent(slot, mine);
        if (gangs.contains(slot)) h.gang(slot, gangs[slot].gang, mine);
        std::vector<protocol::RunningJob> single;
        if (singles.contains(slot)) single = {{singles[slot].job, singles[slot].epoch, 1}};
        h.beat(slot, single);
      }
      h.advance(200);
    }
  }
  void stopped(int slot, const StopJob& stop) {
    if (!gangs.contains(slot) || gangs[slot].job != stop.job) return;
    EXPECT_EQ(stop.mode, StopMode::kPause) << "a checkpoint first";
    ++stops[stop.job];
    checkpoint(slot, 10);
    end(slot, cancelled_error("paused"));
  }
  void checkpoint(int slot, std::int64_t step) {
    const auto& start = gangs.at(slot);
    h.from_gang(slot, protocol::CheckpointReady{
                          start.job, start.epoch, step,
                          h.manifest(ManifestKind::kCheckpoint, base, str(start.job, step))});
  }
  void end(int slot, const Status& status) {
    const StartJob start = gangs.at(slot);
    gangs.erase(slot);
    h.from_gang(slot, JobEnded{start.job, start.epoch, status, 10, "{}"});
    h.agent(slot);
  }
  int slot_of(const JobId& id) const {
    for (const auto& [slot, start] : gangs)
      if (start.job == id) return slot;
    return -1;
  }
  std::string reason(const JobId& id) {
    return nlohmann::json::parse(h.call("job.show", {{"job", id.value}}).result_json)["reason"]
        .get<std::string>();
  }
  static constexpr int kSlots = 4;
  CoreHarness h;
  Digest base;
  std::map<int, StartJob> gangs, singles;
  std::map<JobId, int> stops;
};

TEST_F(Resizing, AHigherPriorityTakesTheRanksOfTheLowestAndTheYoungest) {
  const JobId old_low = h.submit(job_of(0, kTwo));
  const JobId young_low = h.submit(job_of(0, kTwo));
  settle();
  ASSERT_EQ(h.job(young_low).state, JobState::kRunning);
  const JobId urgent = h.submit(job_of(5, kTwo));
  settle(1600);
  EXPECT_EQ(h.job(urgent).state, JobState::kRunning);
  EXPECT_EQ(h.job(old_low).state, JobState::kRunning) << "one victim is enough";
  EXPECT_EQ(h.job(young_low).state, JobState::kQueued);
  EXPECT_NE(reason(young_low).find("preempted by " + urgent.value), std::string::npos)
      << reason(young_low);
  EXPECT_EQ(h.job(young_low).attempts, 0) << "it is no failed attempt";
  end(slot_of(urgent), invalid_error("bad row"));
  settle(1600);
  EXPECT_EQ(h.job(young_low).state, JobState::kRunning);
  EXPECT_EQ(gangs.at(slot_of(young_low)).checkpoint_manifest,
            h.manifest(ManifestKind::kCheckpoint, base, str(young_low, 10)))
      << "it goes on where it was";
}

TEST_F(Resizing, EqualPrioritiesNeverPreempt) {
  const JobId first = h.submit(job_of(3, {{"tp", 2}, {"pp", 2}}));
  settle();
  const JobId second = h.submit(job_of(3, kTwo));
  settle(3000);
  EXPECT_EQ(h.job(first).state, JobState::kRunning);
  EXPECT_EQ(h.job(second).state, JobState::kQueued);
  EXPECT_TRUE(stops.empty());
}

TEST_F(Resizing, NobodyIsStoppedForAJobThatWouldNotFitAnyway) {
  const JobId first = h.submit(job_of(0, kTwo));
  settle();
  const JobId large = h.submit(job_of(5, {{"tp", 2}, {"pp", 4}}));
  settle(3000);
  EXPECT_EQ(h.job(first).state, JobState::kRunning);
  EXPECT_NE(h.job(large).state, JobState::kRunning);
  EXPECT_TRUE(stops.empty());
}

TEST_F(Resizing, TwoVictimsWhereOneIsNotEnough) {
  const JobId a = h.submit(job_of(0, kTwo)), b = h.submit(job_of(1, kTwo));
  settle();
  const JobId urgent = h.submit(job_of(5, {{"tp", 2}, {"pp", 2}}));
  settle(2000);
  EXPECT_EQ(h.job(urgent).state, JobState::kRunning);
  EXPECT_EQ(h.job(a).state, JobState::kQueued);
  EXPECT_EQ(h.job(b).state, JobState::kQueued);
}

TEST_F(Resizing, AVictimIsSparedForAWhile) {
  const JobId low = h.submit(job_of(0, {{"tp", 2}, {"pp", 2}}));
  settle();
  const JobId first = h.submit(job_of(5, {{"tp", 2}, {"pp", 2}}));
  settle(1600);
  ASSERT_EQ(h.job(first).state, JobState::kRunning);
  end(slot_of(first), invalid_error("bad row"));
  settle();
  ASSERT_EQ(h.job(low).state, JobState::kRunning);
  const JobId second = h.submit(job_of(6, kTwo));
  settle(3000);
  EXPECT_EQ(h.job(low).state, JobState::kRunning) << "not twice in a minute";
  EXPECT_EQ(stops[low], 1);
  const std::int64_t then = h.job(low).preempted_unix_ms;
  const auto victims = [&](std::int64_t now) {
    return choose_victims(h.job(second), h.core().tables(), h.core().workers(), {}, {now, 60'000});
  };
  EXPECT_TRUE(victims(then).empty());
  EXPECT_EQ(victims(then - 3'600'000), std::vector<JobId>{low}) << "the clock was set back";
  settle(61'000);
  EXPECT_EQ(h.job(second).state, JobState::kRunning);
  EXPECT_EQ(stops[low], 2);
}

TEST_F(Resizing, AnElasticJobStartsWithWhatIsFreeAndGrowsAtACheckpoint) {
  const JobId other = h.submit(job_of(0, kTwo));
  settle();
  const JobId elastic = h.submit(job_of(0, kElastic));
  settle();
  ASSERT_EQ(h.job(elastic).state, JobState::kRunning);
  EXPECT_EQ(h.job(elastic).members.size(), 2u);
  const auto told = nlohmann::json::parse(gangs.at(slot_of(elastic)).spec_json)["train"];
  EXPECT_EQ(told["dp"], 2);
  EXPECT_FALSE(told.contains("dp_min")) << "an older rank would refuse it";
  checkpoint(slot_of(elastic), 4);
  settle();
  EXPECT_EQ(h.job(elastic).members.size(), 2u) << "nothing is free";
  end(slot_of(other), invalid_error("bad row"));
  settle();
  EXPECT_EQ(h.job(elastic).members.size(), 2u) << "not between checkpoints";
  checkpoint(slot_of(elastic), 8);
  settle(2000);
  EXPECT_EQ(h.job(elastic).state, JobState::kRunning);
  EXPECT_EQ(h.job(elastic).members.size(), 4u);
  EXPECT_EQ(nlohmann::json::parse(gangs.at(slot_of(elastic)).spec_json)["train"]["dp"], 4);
  h.restart();
  EXPECT_EQ(h.job(elastic).sizes, (std::vector<std::int64_t>{4, 2, 1}));
}

TEST_F(Resizing, APreemptedElasticJobGoesOnWithFewerRanks) {
  const JobId elastic = h.submit(job_of(0, kElastic));
  settle();
  ASSERT_EQ(h.job(elastic).members.size(), 4u);
  const JobId urgent = h.submit(job_of(5, kTwo));
  settle(2000);
  EXPECT_EQ(h.job(urgent).state, JobState::kRunning);
  EXPECT_EQ(h.job(elastic).state, JobState::kRunning);
  EXPECT_EQ(h.job(elastic).members.size(), 2u);
  EXPECT_GE(gangs.at(slot_of(elastic)).epoch, 2u);
}

TEST_F(Resizing, AFullFineTuneOfOneRankIsAGangOfOne) {
  nlohmann::json full{{"name", "made"}, {"train", {{"method", "full"}}}};
  full["adapter"] = "";
  const JobId id = h.submit(full);
  settle();
  EXPECT_EQ(h.job(id).state, JobState::kRunning);
  EXPECT_EQ(h.job(id).members.size(), 1u);
  EXPECT_TRUE(singles.empty()) << "no engine trains it";
  const auto taken = [&](const nlohmann::json& spec) {
    return h.call("job.submit", {{"spec", spec}}).status;
  };
  const Status adapter = taken({{"model", "base"}, {"dataset", "rows"}, {"adapter", "made"}});
  EXPECT_EQ(adapter.code(), StatusCode::kConflict) << adapter.message();
  const Status twice = taken(
      {{"model", "base"}, {"dataset", "rows"}, {"name", "made"}, {"train", {{"method", "full"}}}});
  EXPECT_EQ(twice.code(), StatusCode::kConflict) << twice.message();
}

}  // namespace
}  // namespace tandem::coordinator
