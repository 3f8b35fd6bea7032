// The path, with real processes and a tiny model: train, publish, serve, cache, and every process
// killed on the way.
#include "protocol/base/random.h"
#include "tests/support/tiny_model.h"
#include "tests/system/platform.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <cstdlib>
#include <filesystem>

namespace tandem::test {
namespace {

/// Long enough to be killed in, short enough for CI.
const Json kSettings{{"lora_r", 4},         {"learning_rate", 5e-3},
                     {"max_steps", 300},    {"per_device_train_batch_size", 2},
                     {"max_length", 128},   {"save_steps", 25},
                     {"lora_dropout", 0.1}, {"adapter_dtype", "f32"}};

bool full() {
  return std::getenv("TANDEM_TEST_FULL") != nullptr;
}

class Path : public testing::Test {
 protected:
  Path()
      : platform_({"--dtype", "f32", "--threads", "1", "--kv-bytes-max", "8MiB", "--log-level",
                   "info"}) {}
  void SetUp() override {
    write_tiny_model(platform_.directory() + "/model", 7);
    write_tiny_dataset(platform_.directory() + "/train.jsonl", 64, 8);
    platform_.start_coordinator();
    platform_.start_worker();
    platform_.call("model.add", {{"name", "tiny"}, {"path", platform_.directory() + "/model"}});
    data_ = platform_.add_data(platform_.directory() + "/train.jsonl");
  }
  /// Digest of the adapter that an undisturbed job publishes.
  std::string undisturbed() {
    const std::string job = platform_.submit("tiny", data_, "undisturbed", kSettings);
    const Json end = platform_.wait_job(job);
    EXPECT_EQ(end.value("state", ""), "done") << end.dump(1);
    return platform_.call("adapter.show", {{"adapter", "undisturbed"}}).value("digest", "");
  }
  Platform platform_;
  std::string data_;
};

TEST_F(Path, AFreshAdapterAnswersOtherwiseThanItsBaseAndRepeatsComeFromTheCache) {
  const std::string digest = undisturbed();
  ASSERT_EQ(digest.size(), 64u);
  const auto base = platform_.generate("tiny", "say red 1", 24);
  const auto adapter = platform_.generate("undisturbed", "say red 1", 24);
  ASSERT_TRUE(base.ok()) << base.status().to_string();
  ASSERT_TRUE(adapter.ok()) << adapter.status().to_string();
  EXPECT_NE(base->tokens, adapter->tokens);
  EXPECT_EQ(adapter->adapter.hex(), digest);
  EXPECT_TRUE(base->adapter.empty());
  const auto first = platform_.generate("undisturbed", "say red 1", 24, false);
  const auto second = platform_.generate("undisturbed", "say red 1", 24, false);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_FALSE(first->cached);
  EXPECT_TRUE(second->cached);
  EXPECT_EQ(second->text, adapter->text);
  // The same name, another version: nothing of the old one is answered.
  Json other = kSettings;
  other["seed"] = 43;
  const Json end = platform_.wait_job(platform_.submit("tiny", data_, "undisturbed", other));
  ASSERT_EQ(end.value("state", ""), "done") << end.dump(1);
  const auto third = platform_.generate("undisturbed", "say red 1", 24, false);
  ASSERT_TRUE(third.ok());
  EXPECT_FALSE(third->cached);
  EXPECT_NE(third->adapter.hex(), digest);
  const auto pinned = platform_.generate("undisturbed@1", "say red 1", 24, false);
  ASSERT_TRUE(pinned.ok());
  EXPECT_TRUE(pinned->cached);
  EXPECT_EQ(pinned->text, adapter->text);
  const Json check = platform_.call("registry.check", {{"verify_blobs", true}});
  EXPECT_TRUE(check.value("ok", false)) << check.dump(1);
}

TEST_F(Path, AJobsLatestCheckpointAnswersWhileItTrains) {
  Json settings = kSettings;
  settings["max_steps"] = 2000;
  const std::string job = platform_.submit("tiny", data_, "long", settings);
  bool answered = false;
  ASSERT_TRUE(eventually(60'000, [&] {
    const auto latest = platform_.generate(job + "@latest", "say red 1", 8);
    answered = latest.ok() && !latest->adapter.empty();
    return answered;
  }));
  const Json shown = platform_.call("job.show", {{"job", job}});
  EXPECT_EQ(shown.value("state", ""), "running")
      << "the checkpoint must answer before the job's end";
  platform_.call("job.cancel", {{"job", job}});
  EXPECT_EQ(platform_.wait_job(job).value("state", ""), "cancelled");
}

TEST_F(Path, APausedJobGoesOnToTheSameBits) {
  const std::string expected = undisturbed();
  const std::string job = platform_.submit("tiny", data_, "paused", kSettings);
  ASSERT_TRUE(eventually(60'000, [&] {
    return platform_.call("job.show", {{"job", job}}).value("step", 0) >= 40;
  }));
  platform_.call("job.pause", {{"job", job}});
  ASSERT_EQ(platform_.wait_job(job).value("state", ""), "paused");
  platform_.call("job.resume", {{"job", job}});
  ASSERT_TRUE(eventually(60'000, [&] {
    return platform_.call("job.show", {{"job", job}}).value("state", "") == "done";
  }));
  EXPECT_EQ(platform_.call("adapter.show", {{"adapter", "paused"}}).value("digest", ""), expected);
}

/// Kills one kind of process at random moments of jobs; the adapters must be the undisturbed one's
/// bits.
class KillStorm : public Path, public testing::WithParamInterface<const char*> {};

TEST_P(KillStorm, EndsWithTheUndisturbedJobsBits) {
  const std::string expected = undisturbed();
  const std::string victim = GetParam();
  const int jobs = full() ? 10 : 2, kills_per_job = 2;
  Random random(static_cast<std::uint64_t>(victim.size()) * 1000 + 5);
  for (int i = 0; i < jobs; ++i) {
    const std::string adapter = victim + std::to_string(i);
    const std::string job = platform_.submit("tiny", data_, adapter, kSettings);
    for (int k = 0; k < kills_per_job; ++k) {
      // The last one hits the job however slowly the machine has started it.
      const bool last = k + 1 == kills_per_job;
      if (last) {
        ASSERT_TRUE(eventually(60'000, [&] {
          return platform_.call("job.show", {{"job", job}}).value("step", 0) >= 1;
        }));
      }
      ::usleep(
          static_cast<useconds_t>(last ? random.below(50'000) : 20'000 + random.below(400'000)));
      pid_t pid = 0;
      ASSERT_TRUE(eventually(20'000, [&] {
        pid = victim == "engine"  ? platform_.engine()
              : victim == "agent" ? platform_.agent()
                                  : platform_.supervisor();
        return pid > 0;
      }));
      platform_.kill_process(pid);
      if (victim == "supervisor") platform_.start_worker();
    }
    const Json end = platform_.wait_job(job);
    ASSERT_EQ(end.value("state", ""), "done") << end.dump(1);
    EXPECT_EQ(platform_.call("adapter.show", {{"adapter", adapter}}).value("digest", ""), expected)
        << adapter;
    if (victim == "engine") {
      EXPECT_GT(end.value("epoch", 0), 1) << "no kill hit the job";
    } else {
      EXPECT_EQ(end.value("epoch", 0), 1)
          << "a bare " << victim << "'s death costs no step: " << end.dump(1);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Each, KillStorm, testing::Values("engine", "agent", "supervisor"),
                         [](const auto& victim) { return std::string(victim.param); });

TEST_F(Path, ACoordinatorKilledDuringPublishesLosesNothing) {
  const std::string expected = undisturbed();
  Json settings = kSettings;
  settings["max_steps"] = 30;
  settings["save_steps"] = 10;
  const int kills = full() ? 50 : 10;
  Random random(99);
  std::vector<std::pair<std::string, std::string>> acknowledged;
  for (int i = 0; i < kills; ++i) {
    const std::string adapter = "storm" + std::to_string(i);
    const Json spec{
        {"model", "tiny"}, {"dataset", data_}, {"adapter", adapter}, {"train", settings}};
    const auto submitted = platform_.try_call("job.submit", {{"spec", spec}}, adapter);
    ASSERT_TRUE(submitted.ok()) << submitted.status().to_string();
    acknowledged.emplace_back(submitted->value("job", ""), adapter);
    ::usleep(static_cast<useconds_t>(random.below(350'000)));
    platform_.kill_coordinator();
    platform_.start_coordinator();
    // The same submission again is the same job.
    const auto repeated = platform_.try_call("job.submit", {{"spec", spec}}, adapter);
    ASSERT_TRUE(repeated.ok()) << repeated.status().to_string();
    EXPECT_EQ(repeated->value("job", ""), acknowledged.back().first);
  }
  std::string digest;
  for (const auto& [job, adapter] : acknowledged) {
    const Json end = platform_.wait_job(job);
    ASSERT_EQ(end.value("state", ""), "done") << end.dump(1);
    const Json shown = platform_.call("adapter.show", {{"adapter", adapter}});
    if (digest.empty()) digest = shown.value("digest", "");
    EXPECT_EQ(shown.value("digest", ""), digest);
    EXPECT_EQ(shown.value("version", 0), 1) << "published once";
  }
  const Json check = platform_.call("registry.check", {{"verify_blobs", true}});
  EXPECT_TRUE(check.value("ok", false)) << check.dump(1);
}

TEST_F(Path, ARestartedCoordinatorCostsARunningJobNoStep) {
  const std::string expected = undisturbed();
  const std::string job = platform_.submit("tiny", data_, "restarted", kSettings);
  ASSERT_TRUE(eventually(60'000, [&] {
    return platform_.call("job.show", {{"job", job}}).value("step", 0) >= 10;
  }));
  platform_.kill_coordinator();
  ::usleep(200'000);
  platform_.start_coordinator();
  const Json end = platform_.wait_job(job);
  ASSERT_EQ(end.value("state", ""), "done") << end.dump(1);
  EXPECT_EQ(end.value("epoch", 0), 1) << end.dump(1);
  EXPECT_EQ(platform_.call("adapter.show", {{"adapter", "restarted"}}).value("digest", ""),
            expected);
}

TEST_F(Path, ARestartedWorkerRunsTheProgramInPlaceAndItsJobLosesNothing) {
  namespace fs = std::filesystem;
  const std::string expected = undisturbed();
  const std::string copy = platform_.directory() + "/tandem-worker";
  const auto runs = [](pid_t pid) { return fs::read_symlink(str("/proc/", pid, "/exe")).string(); };
  fs::copy_file(runs(platform_.agent(0)), copy);
  platform_.start_worker(1, {"sh", "-c", "shift; exec \"$0\" \"$@\"", copy});
  const Json workers = platform_.call("worker.list", Json::object())["workers"];
  ASSERT_EQ(workers.size(), 2u) << workers.dump(1);
  const auto name_of = [&](int slot) {
    for (const Json& worker : workers)
      if (worker.value("worker", "").back() == '0' + slot) return worker.value("worker", "");
    return std::string();
  };
  platform_.call("worker.drain", {{"worker", name_of(0)}});
  const std::string job = platform_.submit("tiny", data_, "moved", kSettings);
  ASSERT_TRUE(eventually(60'000, [&] {
    return platform_.call("job.show", {{"job", job}}).value("step", 0) >= 40;
  }));
  const pid_t agent = platform_.agent(1), engine = platform_.engine(1);
  fs::copy_file(copy, copy + ".new");
  fs::rename(copy + ".new", copy);
  ASSERT_EQ(runs(agent), copy + " (deleted)");
  platform_.call("worker.restart", {{"worker", name_of(1)}});
  ASSERT_TRUE(eventually(60'000, [&] {
    const pid_t now = platform_.engine(1);
    return now > 0 && now != engine;
  })) << "the engine goes on";
  EXPECT_EQ(platform_.agent(1), agent) << "another process";
  EXPECT_EQ(runs(agent), copy);
  EXPECT_EQ(runs(platform_.engine(1)), copy);
  const Json end = platform_.wait_job(job);
  ASSERT_EQ(end.value("state", ""), "done") << end.dump(1);
  EXPECT_EQ(platform_.call("adapter.show", {{"adapter", "moved"}}).value("digest", ""), expected);
}

}  // namespace
}  // namespace tandem::test
