// Jobs that give their ranks to a more urgent one, and elastic ones that go on with what is free:
// no step is lost, and the numbers are those of an undisturbed run.
#include "tests/system/tiny_pool.h"

#include <gtest/gtest.h>

namespace tandem::test {
namespace {

const Json kSettings{{"lora_r", 4},       {"learning_rate", 5e-3},
                     {"max_steps", 200},  {"per_device_train_batch_size", 1},
                     {"max_length", 128}, {"gradient_accumulation_steps", 4},
                     {"save_steps", 0},   {"adapter_dtype", "f32"}};

class Resizing : public TinyPool {
 protected:
  static void SetUpTestSuite() { start_pool(2, 256); }

  static std::string submit(const std::string& adapter, const Json& settings, int priority = 0) {
    const Json spec{{"model", "tiny"},
                    {"dataset", data_},
                    {"adapter", adapter},
                    {"priority", priority},
                    {"train", settings}};
    return platform_->call("job.submit", {{"spec", spec}}).value("job", "");
  }
};

TEST_F(Resizing, AMoreUrgentJobTakesTheRanksAndTheOtherGoesOnToTheSameBits) {
  const Json low = with(kSettings, {{"tp", 2}});
  finish(submit("calm", low));
  const std::string job = submit("yielding", low);
  ASSERT_TRUE(reaches(job, 12));
  const std::string urgent = submit("urgent", with(kSettings, {{"tp", 2}, {"max_steps", 60}}), 5);
  std::string reason;
  EXPECT_TRUE(eventually(30'000, [&] {
    const Json shown = show_job(job);
    if (shown.value("state", "") == "queued") reason = shown.value("reason", "");
    return !reason.empty();
  })) << show_job(job).dump(1);
  EXPECT_NE(reason.find("preempted by " + urgent), std::string::npos) << reason;
  const std::int64_t stopped_at = show_job(job).value("step", std::int64_t{0});
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
  EXPECT_EQ(show_job(job)["workers"].size(), 1u) << "one worker is free";
  platform_->call("job.cancel", {{"job", other}});
  ASSERT_TRUE(eventually(60'000, [&] {
    const Json shown = show_job(job);
    return shown["workers"].size() == 2 && shown.value("state", "") == "running";
  })) << show_job(job).dump(1);
  finish(job);
  const auto want = platform_->losses(whole), got = platform_->losses(job);
  ASSERT_EQ(got.size(), 80u);
  for (const auto& [step, loss] : want) EXPECT_NEAR(got.at(step), loss, 1e-5) << "step " << step;
}

}  // namespace
}  // namespace tandem::test
