// Jobs that give their ranks to a more urgent one, and elastic ones that go on with what is free:
// no step is lost, and the numbers are those of an undisturbed run.
#include "tests/support/tiny_model.h"
#include "tests/system/platform.h"

#include <gtest/gtest.h>

namespace tandem::test {
namespace {

const Json kSettings{{"lora_r", 4},       {"learning_rate", 5e-3},
                     {"max_steps", 200},  {"per_device_train_batch_size", 1},
                     {"max_length", 128}, {"gradient_accumulation_steps", 4},
                     {"save_steps", 0},   {"adapter_dtype", "f32"}};

Json with(Json settings, const Json& more) {
  settings.update(more);
  return settings;
}

class Resizing : public testing::Test {
 protected:
  static constexpr int kWorkers = 2;
  static void SetUpTestSuite() {
    platform_ = std::make_unique<Platform>(
        std::vector<std::string>{"--dtype", "f32", "--threads", "1", "--kv-bytes-max", "4MiB",
                                 "--device", "cpu", "--gang-timeout-s", "5"});
    write_tiny_model(platform_->directory() + "/model", 7);
    write_tiny_dataset(platform_->directory() + "/train.jsonl", 256, 8);
    platform_->start_coordinator();
    for (int slot = 0; slot < kWorkers; ++slot) platform_->start_worker(slot);
    platform_->call("model.add", {{"name", "tiny"}, {"path", platform_->directory() + "/model"}});
    data_ = platform_->add_data(platform_->directory() + "/train.jsonl");
    ASSERT_TRUE(eventually(60'000, [] {
      std::size_t ready = 0;
      const Json listed = platform_->call("worker.list", Json::object());
      for (const Json& worker : listed["workers"]) ready += worker.value("state", "") == "ready";
      return ready == kWorkers;
    }));
  }
  static void TearDownTestSuite() { platform_.reset(); }

  static std::string submit(const std::string& adapter, const Json& settings, int priority = 0) {
    const Json spec{{"model", "tiny"},
                    {"dataset", data_},
                    {"adapter", adapter},
                    {"priority", priority},
                    {"train", settings}};
    return platform_->call("job.submit", {{"spec", spec}}).value("job", "");
  }
  static Json finish(const std::string& job) {
    const Json end = platform_->wait_job(job);
    EXPECT_EQ(end.value("state", ""), "done") << end.dump(1);
    return end;
  }
  static Json show(const std::string& job) { return platform_->call("job.show", {{"job", job}}); }
  static bool reaches(const std::string& job, std::int64_t step) {
    return eventually(60'000, [&] { return show(job).value("step", std::int64_t{0}) >= step; });
  }
  static std::string digest(const std::string& adapter) {
    return platform_->call("adapter.show", {{"adapter", adapter}}).value("digest", "");
  }

  static std::unique_ptr<Platform> platform_;
  static std::string data_;
};
std::unique_ptr<Platform> Resizing::platform_;
std::string Resizing::data_;

TEST_F(Resizing, AMoreUrgentJobTakesTheRanksAndTheOtherGoesOnToTheSameBits) {
  const Json low = with(kSettings, {{"tp", 2}});
  finish(submit("calm", low));
  const std::string job = submit("yielding", low);
  ASSERT_TRUE(reaches(job, 12));
  const std::string urgent = submit("urgent", with(kSettings, {{"tp", 2}, {"max_steps", 60}}), 5);
  std::string reason;
  EXPECT_TRUE(eventually(30'000, [&] {
    const Json shown = show(job);
    if (shown.value("state", "") == "queued") reason = shown.value("reason", "");
    return !reason.empty();
  })) << show(job).dump(1);
  EXPECT_NE(reason.find("preempted by " + urgent), std::string::npos) << reason;
  const std::int64_t stopped_at = show(job).value("step", std::int64_t{0});
  EXPECT_GE(stopped_at, 12);
  EXPECT_LT(stopped_at, 200);
  finish(urgent);
  const Json end = finish(job);
  EXPECT_EQ(end.value("epoch", 0), 2) << end.dump(1);
  EXPECT_EQ(digest("yielding"), digest("calm"));
}

TEST_F(Resizing, AnElasticJobStartsSmallGrowsAtACheckpointAndKeepsItsLosses) {
  const Json settings =
      with(kSettings, {{"dp", 2}, {"gradient_accumulation_steps", 16}, {"max_steps", 80}});
  const Json elastic = with(settings, {{"dp_min", 1}, {"save_steps", 10}});
  const std::string whole = submit("whole", settings);
  finish(whole);
  const std::string other = submit("in-the-way", with(kSettings, {{"max_steps", 5000}}));
  ASSERT_TRUE(reaches(other, 1));
  const std::string job = submit("elastic", elastic);
  ASSERT_TRUE(reaches(job, 5));
  EXPECT_EQ(show(job)["workers"].size(), 1u) << "one worker is free";
  platform_->call("job.cancel", {{"job", other}});
  ASSERT_TRUE(eventually(60'000, [&] {
    const Json shown = show(job);
    return shown["workers"].size() == 2 && shown.value("state", "") == "running";
  })) << show(job).dump(1);
  finish(job);
  const auto want = platform_->losses(whole), got = platform_->losses(job);
  ASSERT_EQ(got.size(), 80u);
  for (const auto& [step, loss] : want) EXPECT_NEAR(got.at(step), loss, 1e-5) << "step " << step;
}

}  // namespace
}  // namespace tandem::test
