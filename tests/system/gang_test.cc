// Jobs of several ranks as a user submits them: every layout against one rank, the pool serving
// meanwhile, and every process of a gang killed or stopped on the way.
#include "protocol/base/random.h"
#include "storage/registry.h"
#include "tests/system/tiny_pool.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace tandem::test {
namespace {

namespace fs = std::filesystem;

/// Micro-batches for up to four data-parallel ranks.
const Json kSettings{{"lora_r", 4},       {"learning_rate", 5e-3},
                     {"max_steps", 60},   {"per_device_train_batch_size", 1},
                     {"max_length", 128}, {"gradient_accumulation_steps", 4},
                     {"save_steps", 10},  {"adapter_dtype", "f32"}};

bool full() {
  return std::getenv("TANDEM_TEST_FULL") != nullptr;
}

/// Some hours on: what nobody refers to is old enough to be collected.
class LaterClock final : public Clock {
 public:
  [[nodiscard]] TimeMs now_ms() const override { return now_.now_ms(); }
  [[nodiscard]] std::int64_t unix_ms() const override { return now_.unix_ms() + 3 * 3'600'000; }

 private:
  SystemClock now_;
};

/// What a process has mapped, as text.
std::string mappings(pid_t pid) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/maps");
  return {std::istreambuf_iterator<char>(in), {}};
}

class Gangs : public TinyPool {
 protected:
  static void SetUpTestSuite() { start_pool(4, 64, 4); }
  void TearDown() override { expect_no_gangs(); }

  static int leader(const std::string& job) {
    const std::string worker = show_job(job).value("worker", "");
    return worker.empty() ? -1 : worker.back() - '0';
  }
  /// The pid of a rank of the job's gang, once it is there.
  static pid_t rank_of(const std::string& job, int rank) {
    pid_t pid = 0;
    eventually(30'000, [&] {
      const int slot = leader(job);
      pid = slot < 0 ? 0 : platform_->gang_rank(rank, slot);
      return pid > 0 || show_job(job).value("state", "") == "done";
    });
    return pid;
  }
  /// The losses of the same job on one rank, and what it answers.
  struct Reference {
    std::map<std::int64_t, double> losses;
    std::vector<std::int32_t> tokens;
  };
  static const Reference& one_rank() {
    static const Reference reference = [] {
      const std::string job = submit("one", kSettings);
      finish(job);
      const auto answer = platform_->generate("one", "say red 1", 16);
      EXPECT_TRUE(answer.ok()) << answer.status().to_string();
      return Reference{platform_->losses(job),
                       answer.ok() ? answer->tokens : std::vector<std::int32_t>{}};
    }();
    return reference;
  }
  static void expect_losses_of_one_rank(const std::string& job) {
    const auto got = platform_->losses(job);
    ASSERT_EQ(got.size(), one_rank().losses.size());
    for (const auto& [step, loss] : one_rank().losses)
      EXPECT_NEAR(got.at(step), loss, 1e-5) << "step " << step;
  }
};

struct LayoutCase {
  std::string name;
  Json layout;
  int ranks = 2;
};
const std::vector<LayoutCase>& layouts() {
  static const std::vector<LayoutCase> all{
      {"dp2", {{"dp", 2}}, 2},
      {"tp2", {{"tp", 2}}, 2},
      {"pp2", {{"pp", 2}}, 2},
      {"pp2_virtual2", {{"pp", 2}, {"virtual_pipeline_size", 2}}, 2},
      {"dp2_zero3", {{"dp", 2}, {"zero", 3}}, 2},
      {"tp2_pp2", {{"tp", 2}, {"pp", 2}}, 4}};
  return all;
}

/// What that rank of the job's gang wrote after its last step; 0: nothing yet.
std::int64_t logged_peak(const std::string& folder, const std::string& job, int rank) {
  const std::string mine = str(" rank ", rank, "/"), words = " memory peak ";
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (!entry.path().filename().string().starts_with("gang-")) continue;
    std::ifstream in(entry.path());
    bool of_job = false;
    for (std::string line; std::getline(in, line);) {
      if (line.find(mine) == std::string::npos) continue;
      if (line.find(" epoch ") != std::string::npos) of_job = line.find(job) != std::string::npos;
      const std::size_t at = line.find(words);
      if (of_job && at != std::string::npos) return std::stoll(line.substr(at + words.size()));
    }
  }
  return 0;
}

class GangLayouts : public Gangs, public testing::WithParamInterface<LayoutCase> {};
INSTANTIATE_TEST_SUITE_P(Each, GangLayouts, testing::ValuesIn(layouts()),
                         [](const auto& each) { return each.param.name; });

TEST_P(GangLayouts, TrainsAsOneRankDoesAndIsServedByTheEngines) {
  TANDEM_NEEDS_WORKERS(GetParam().ranks);
  (void)one_rank();
  std::vector<pid_t> engines;
  for (int slot = 0; slot < workers(); ++slot) engines.push_back(platform_->engine(slot));
  const std::string name = GetParam().name;
  const std::string job = submit(name, with(kSettings, GetParam().layout));
  ASSERT_TRUE(reaches(job, 1));
  EXPECT_EQ(show_job(job)["workers"].size(), static_cast<std::size_t>(GetParam().ranks));
  const std::string mapped = mappings(rank_of(job, 0));
  if (!mapped.empty()) {  // it may have ended by now
    EXPECT_NE(mapped.find("/gang/vader_segment"), std::string::npos) << mapped;
    EXPECT_TRUE(on_gpus() || mapped.find("/dev/shm/") == std::string::npos)
        << "all of it lies in its folder, but for NCCL's";
  }
  const auto meanwhile = platform_->generate("tiny", "say red 1", 4);
  EXPECT_TRUE(meanwhile.ok()) << "the pool goes on serving: " << meanwhile.status().to_string();
  const Json end = finish(job);
  EXPECT_EQ(end.value("epoch", 0), 1) << end.dump(1);
  expect_losses_of_one_rank(job);
  const auto answer = platform_->generate(name, "say red 1", 16);
  ASSERT_TRUE(answer.ok()) << answer.status().to_string();
  EXPECT_EQ(answer->tokens, one_rank().tokens);
  EXPECT_EQ(answer->adapter.hex(), digest(name));
  for (int slot = 0; slot < workers(); ++slot)
    EXPECT_EQ(platform_->engine(slot), engines[static_cast<std::size_t>(slot)]);
  const Json planned = end["estimate"]["ranks"];
  ASSERT_EQ(planned.size(), static_cast<std::size_t>(GetParam().ranks)) << end.dump(1);
  for (int rank = 0; rank < GetParam().ranks; ++rank) {
    std::int64_t peak = 0;
    EXPECT_TRUE(eventually(10'000, [&] {
      return (peak = logged_peak(platform_->data_dir() + "/log", job, rank)) > 0;
    })) << rank;
    EXPECT_LE(peak, planned[static_cast<std::size_t>(rank)].value("peak_total", 0)) << rank;
  }
}

TEST_F(Gangs, LayoutAutoTakesTheRanksThatItsCostModelFindsFastest) {
  (void)one_rank();
  // A machine whose products are slow and whose links are not: every worker helps.
  const std::string file = platform_->data_dir() + "/cost_model.json";
  std::ofstream(file) << Json{
      {"product_flops_bf16", 1e6},
      {"product_flops_f32", 1e6},
      {"weight_grad_share", 1.0},
      {"low_rank_share", 1.0},
      {"low_rank_seconds", 0.0},
      {"attention_flops", 1e6},
      {"logits_per_second", 1e6},
      {"row_bytes_per_second", 1e12},
      {"memory_bytes_per_second", 1e12},
      {"op_seconds", 0.0},
      {"all_reduce_hop_seconds", 0.0},
      {"all_reduce_bytes_per_second", 1e12},
      {"all_gather_hop_seconds", 0.0},
      {"all_gather_bytes_per_second", 1e12},
      {"reduce_scatter_hop_seconds", 0.0},
      {"reduce_scatter_bytes_per_second", 1e12},
      {"exchange_hop_seconds", 0.0},
      {"exchange_bytes_per_second", 1e12},
      {"sum_16_bit_slowdown", 1.0},
      {"background_gather_hop_seconds", 0.0},
      {"background_gather_bytes_per_second", 1e12},
      {"background_reduce_hop_seconds", 0.0},
      {"background_reduce_bytes_per_second", 1e12},
      {"background_slowdown",
       1.0}}.dump();
  const Json settings = with(kSettings, {{"layout", "auto"}});
  const Json estimate = platform_->call("estimate", {{"model", "tiny"}, {"train", settings}});
  ASSERT_TRUE(estimate.contains("layouts")) << estimate.dump(1);
  const Json& best = estimate["layouts"][0];
  EXPECT_EQ(best.value("dp", 0) * best.value("tp", 0) * best.value("pp", 0), workers())
      << estimate.dump(1);
  const std::string job = submit("auto", settings);
  ASSERT_TRUE(reaches(job, 1));
  EXPECT_EQ(show_job(job)["workers"].size(), static_cast<std::size_t>(workers()));
  finish(job);
  expect_losses_of_one_rank(job);
  // One that nothing can be read from is an error that names it, not a guess.
  std::ofstream(file) << "{}";
  const auto refused = platform_->try_call("estimate", {{"model", "tiny"}, {"train", settings}});
  EXPECT_NE(refused.status().message().find("cost_model.json: the number product_flops_bf16"),
            std::string::npos)
      << refused.status().to_string();
  fs::remove(file);
}

/// Each rank in turn, at random moments: the job ends with the bits of an undisturbed one.
TEST_P(GangLayouts, EachRankKilledCostsARetryAndNotABit) {
  TANDEM_NEEDS_WORKERS(GetParam().ranks);
  if (!full() && GetParam().name != "tp2" && GetParam().name != "dp2_zero3") return;
  const Json settings = with(kSettings, with(GetParam().layout, {{"max_steps", 120}}));
  finish(submit("calm-" + GetParam().name, settings));
  const std::string expected = digest("calm-" + GetParam().name);
  Random random(static_cast<std::uint64_t>(GetParam().name.size()) * 77 + 3);
  const int moments = full() ? 5 : 1;
  for (int rank = 0; rank < GetParam().ranks; ++rank)
    for (int moment = 0; moment < moments; ++moment) {
      const std::string adapter = str("killed-", GetParam().name, "-", rank, "-", moment);
      const std::string job = submit(adapter, settings);
      const pid_t pid = rank_of(job, rank);
      ASSERT_GT(pid, 0);
      ::usleep(static_cast<useconds_t>(random.below(600'000)));
      if (show_job(job).value("state", "") != "done") ::kill(pid, SIGKILL);
      const Json end = finish(job);
      EXPECT_EQ(digest(adapter), expected) << "rank " << rank << ": " << end.dump(1);
    }
}

/// The coordinator is held still, so that a checkpoint is begun and cannot be stored; one of the
/// two ranks that send their pieces dies then.
TEST_F(Gangs, ARankKilledWhileItsCheckpointIsUploadedCostsThatCheckpointAlone) {
  constexpr std::int64_t kSave = 20;
  const Json settings = with(kSettings, {{"tp", 2}, {"max_steps", 400}, {"save_steps", kSave}});
  const std::string calm = submit("upload-calm", settings);
  finish(calm);
  const std::string job = submit("upload-cut", settings);
  const auto step = [&] {
    const auto losses = platform_->losses(job);
    return losses.empty() ? 0 : losses.rbegin()->first;
  };
  // On a busy machine the gang is ahead of what it stores: there must be one to go on from.
  ASSERT_TRUE(eventually(60'000, [&] { return !show_job(job)["checkpoints"].empty(); }));
  const pid_t victim = rank_of(job, 1);
  ASSERT_GT(victim, 0);
  ::kill(platform_->coordinator(), SIGSTOP);
  const std::int64_t cut = (step() / kSave + 1) * kSave;
  EXPECT_TRUE(eventually(60'000, [&] { return step() > cut; })) << "the gang trains on";
  ::kill(victim, SIGKILL);
  EXPECT_TRUE(eventually(10'000, [&] { return ::kill(victim, 0) != 0; }));
  ::kill(platform_->coordinator(), SIGCONT);
  const Json end = finish(job);
  EXPECT_EQ(end.value("epoch", 0), 2) << end.dump(1);
  // Where the second run's losses begin; events of so many steps are not all kept.
  std::int64_t resumed = -1, before = 0;
  std::ifstream lines(str(platform_->data_dir(), "/runs/", job, "/metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const Json json = Json::parse(line, nullptr, false);
    if (!json.is_object() || !json.contains("train/loss")) continue;
    const auto at = json.value("step", std::int64_t{0});
    if (at <= before) resumed = at - 1;
    before = at;
  }
  EXPECT_GT(resumed, 0);
  EXPECT_LT(resumed, cut) << "what was being stored is no checkpoint";
  EXPECT_EQ(resumed % kSave, 0);
  EXPECT_EQ(platform_->losses(job), platform_->losses(calm));
  EXPECT_EQ(digest("upload-cut"), digest("upload-calm"));
  const Json checked = platform_->call("registry.check", {{"verify_blobs", true}});
  EXPECT_TRUE(checked.value("ok", false)) << checked.dump(1);
  // Hours later nothing of the unfinished one is left, and nothing else is missing.
  platform_->kill_coordinator();
  {
    const LaterClock later;
    storage::RegistryOptions options;
    options.directory = platform_->data_dir();
    const auto registry = storage::Registry::open(options, later);
    ASSERT_TRUE(registry.ok()) << registry.status().to_string();
    const auto collected = (*registry)->gc();
    ASSERT_TRUE(collected.ok()) << collected.status().to_string();
    EXPECT_GT(collected->blobs.removed, 0);
    EXPECT_EQ(collected->blobs.spared, 0);
    const auto stats = (*registry)->blobs().stats();
    ASSERT_TRUE(stats.ok());
    EXPECT_EQ(stats->chunks, collected->blobs.kept) << "what is left is referred to";
    const auto findings = (*registry)->check(true);
    ASSERT_TRUE(findings.ok());
    for (const auto& finding : *findings) ADD_FAILURE() << finding.where << ": " << finding.message;
  }
  platform_->start_coordinator();
}

TEST_F(Gangs, ARankThatHangsEndsItsGangWithinTheGangsPatience) {
  for (const int rank : {0, 1}) {
    const std::string job =
        submit(str("hung-", rank), with(kSettings, {{"tp", 2}, {"max_steps", 400}}));
    ASSERT_TRUE(reaches(job, 5));
    const pid_t pid = rank_of(job, rank);
    ASSERT_GT(pid, 0);
    ::kill(pid, SIGSTOP);
    EXPECT_TRUE(eventually(hang_limit_ms(),
                           [&] {
                             const Json shown = show_job(job);
                             return shown.value("epoch", 0) > 1 ||
                                    shown.value("state", "") == "queued";
                           }))
        << "rank " << rank;
    finish(job);
  }
}

TEST_F(Gangs, AnAgentsOrTheCoordinatorsDeathCostsItNoStep) {
  const Json settings = with(kSettings, {{"tp", 2}, {"max_steps", 200}});
  finish(submit("steady", settings));
  const std::string expected = digest("steady");
  const std::string job = submit("orphaned", settings);
  ASSERT_TRUE(reaches(job, 5));
  const int slot = leader(job);
  platform_->kill_process(platform_->agent(slot));
  ASSERT_TRUE(eventually(20'000, [&] { return platform_->agent(slot) > 0; }));
  platform_->kill_coordinator();
  platform_->start_coordinator();
  platform_->kill_process(platform_->supervisor(slot));
  platform_->start_worker(slot);
  platform_->kill_process(platform_->engine(slot));
  const Json end = finish(job);
  EXPECT_EQ(end.value("epoch", 0), 1) << end.dump(1);
  EXPECT_EQ(digest("orphaned"), expected);
}

TEST_F(Gangs, AKilledMpirunTakesItsRanksAlongAndTheJobGoesOn) {
  const Json settings = with(kSettings, {{"tp", 2}, {"max_steps", 200}});
  const std::string job = submit("headless", settings);
  ASSERT_TRUE(reaches(job, 15));
  const int slot = leader(job);
  std::vector<pid_t> ranks{platform_->gang_rank(0, slot), platform_->gang_rank(1, slot)};
  platform_->kill_process(platform_->gang_mpirun(slot));
  const Json end = finish(job);
  EXPECT_EQ(end.value("epoch", 0), 2) << end.dump(1);
  for (const pid_t pid : ranks) EXPECT_NE(::kill(pid, 0), 0) << pid << " outlived its mpirun";
}

TEST_F(Gangs, APausedGangGoesOnToTheSameBits) {
  const Json settings = with(kSettings, {{"pp", 2}, {"max_steps", 200}});
  finish(submit("unpaused", settings));
  const std::string job = submit("paused", settings);
  ASSERT_TRUE(reaches(job, 13));
  platform_->call("job.pause", {{"job", job}});
  ASSERT_EQ(platform_->wait_job(job).value("state", ""), "paused");
  ASSERT_LT(show_job(job).value("step", 0), 200) << "paused before its end";
  const auto latest = platform_->generate(job + "@latest", "say red 1", 4);
  EXPECT_TRUE(latest.ok()) << "an engine serves its checkpoint: " << latest.status().to_string();
  platform_->call("job.resume", {{"job", job}});
  finish(job);
  EXPECT_EQ(digest("paused"), digest("unpaused"));
}

TEST_F(Gangs, AWorkerThatDrainsOrEndsLosesNothingOfIt) {
  TANDEM_NEEDS_WORKERS(3);
  const Json settings = with(kSettings, {{"tp", 2}, {"max_steps", 600}});
  finish(submit("stayed", settings));
  const std::string job = submit("moved-on", settings);
  ASSERT_TRUE(reaches(job, 13));
  // A member, not the leader: its job is checkpointed and takes another worker.
  const std::string member = show_job(job)["workers"][1].get<std::string>();
  platform_->call("worker.drain", {{"worker", member}});
  ASSERT_TRUE(eventually(30'000, [&] {
    const Json shown = show_job(job);
    return shown.value("epoch", 0) == 2 && shown.value("state", "") == "running";
  })) << show_job(job).dump(1);
  EXPECT_GE(show_job(job).value("step", 0), 13) << "no step is done twice";
  const Json members = show_job(job)["workers"];  // lives as long as the loop
  for (const Json& worker : members) EXPECT_NE(worker.get<std::string>(), member);
  platform_->call("worker.resume", {{"worker", member}});
  // SIGTERM to the leader's worker: its agent lets the gang write a checkpoint.
  const int slot = leader(job);
  const pid_t supervisor = platform_->supervisor(slot);
  const std::int64_t before = show_job(job).value("step", std::int64_t{0});
  ::kill(supervisor, SIGTERM);
  ASSERT_TRUE(eventually(30'000, [&] { return platform_->supervisor(slot) == 0; }));
  ASSERT_TRUE(eventually(30'000, [&] {
    const Json shown = show_job(job);
    return shown.value("epoch", 0) >= 3 && shown.value("state", "") == "running";
  })) << show_job(job).dump(1);
  EXPECT_GE(show_job(job).value("step", std::int64_t{0}), before) << "no step is done twice";
  platform_->start_worker(slot);
  finish(job);
  EXPECT_EQ(digest("moved-on"), digest("stayed"));
}

/// As Slurm's scancel tells them: no step is lost, though nothing but the end would be stored.
TEST_F(Gangs, AStopThatReachesEveryProcessAtOnceLeavesACheckpoint) {
  const Json settings = with(kSettings, {{"tp", 2}, {"max_steps", 600}, {"save_steps", 0}});
  const std::string job = submit("told-at-once", settings);
  ASSERT_TRUE(reaches(job, 13));
  const int lead = leader(job);
  std::vector<pid_t> all{platform_->gang_mpirun(lead), platform_->gang_rank(0, lead),
                         platform_->gang_rank(1, lead)};
  for (int slot = 0; slot < workers(); ++slot)
    for (const pid_t pid :
         {platform_->supervisor(slot), platform_->agent(slot), platform_->engine(slot)})
      all.push_back(pid);
  for (const pid_t pid : all) {
    ASSERT_GT(pid, 0);
    ::kill(pid, SIGTERM);
  }
  for (int slot = 0; slot < workers(); ++slot)
    EXPECT_TRUE(eventually(30'000, [&] { return platform_->supervisor(slot) == 0; })) << slot;
  const Json stopped = show_job(job);
  EXPECT_EQ(stopped.value("state", ""), "queued") << stopped.dump(1);
  ASSERT_FALSE(stopped["checkpoints"].empty()) << stopped.dump(1);
  EXPECT_GE(stopped["checkpoints"].back().value("step", 0), 13);
  for (int slot = 0; slot < workers(); ++slot) platform_->start_worker(slot);
  await_workers(workers());
  finish(job);
  EXPECT_EQ(platform_->losses(job).size(), 600u);
}

/// Its manifest is longer than other texts of messages may be.
TEST_F(Gangs, ACheckpointOfManyPiecesIsStoredAndGoneOnFrom) {
  const std::string folder = platform_->directory() + "/deep";
  write_tiny_model(folder, 7, 100);
  platform_->call("model.add", {{"name", "deep"}, {"path", folder}});
  const std::string job = platform_->submit(
      "deep", data_, "deep-tuned",
      with(kSettings, {{"tp", 2}, {"max_steps", 400}, {"save_steps", 1}, {"lora_r", 1}}));
  ASSERT_TRUE(reaches(job, 2));
  platform_->call("job.pause", {{"job", job}});
  ASSERT_EQ(platform_->wait_job(job).value("state", ""), "paused");
  const Json shown = show_job(job);
  const std::int64_t paused = shown.value("step", std::int64_t{0});
  ASSERT_EQ(shown["checkpoints"].back()["step"], paused);
  EXPECT_GT(platform_->call("adapter.manifest", {{"adapter", job + "@latest"}}).dump().size(), 0u);
  platform_->call("job.resume", {{"job", job}});
  EXPECT_TRUE(reaches(job, paused + 2));
  EXPECT_EQ(show_job(job).value("attempts", 0), 1);
  platform_->call("job.cancel", {{"job", job}});
  EXPECT_EQ(platform_->wait_job(job).value("state", ""), "cancelled");
}

TEST_F(Gangs, APausedJobGoesOnOverOtherRanks) {
  const Json settings = with(kSettings, {{"tp", 2}, {"max_steps", 200}});
  const std::string whole = submit("whole", settings);
  finish(whole);
  const std::string job = submit("moved", settings);
  ASSERT_TRUE(reaches(job, 13));
  platform_->call("job.pause", {{"job", job}});
  ASSERT_EQ(platform_->wait_job(job).value("state", ""), "paused");
  const std::int64_t paused = show_job(job).value("step", std::int64_t{0});
  const auto refused = platform_->try_call("job.resume", {{"job", job}, {"layout", {{"dp", 3}}}});
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kRefused) << refused.status().to_string();
  platform_->call("job.resume", {{"job", job}, {"layout", {{"tp", 1}, {"dp", 2}, {"zero", 3}}}});
  finish(job);
  const auto want = platform_->losses(whole), got = platform_->losses(job);
  ASSERT_EQ(got.size(), 200u);
  for (std::int64_t step = paused + 1; step <= std::min<std::int64_t>(paused + 10, 200); ++step)
    EXPECT_NEAR(got.at(step), want.at(step), 1e-5) << "step " << step;
}

TEST_F(Gangs, ACancelledGangIsGoneAndItsWorkersAreFree) {
  const std::string job = submit("gone", with(kSettings, {{"dp", workers()}, {"max_steps", 5000}}));
  ASSERT_TRUE(reaches(job, 2));
  const std::string next = submit("next", with(kSettings, {{"tp", 2}, {"max_steps", 5}}));
  EXPECT_NE(show_job(next).value("reason", "").find("needs 2 workers"), std::string::npos)
      << show_job(next).dump(1);
  platform_->call("job.cancel", {{"job", job}});
  EXPECT_EQ(platform_->wait_job(job).value("state", ""), "cancelled");
  finish(next);
}

}  // namespace
}  // namespace tandem::test
