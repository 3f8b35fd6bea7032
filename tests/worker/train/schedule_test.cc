#include "worker/train/schedule.h"

#include <gtest/gtest.h>

namespace tandem::worker::train {
namespace {

using protocol::Schedule;

protocol::TrainSettings with(Schedule schedule, double warmup_ratio, std::int64_t steps = 0) {
  protocol::TrainSettings settings;
  settings.learning_rate = 1.0;
  settings.lr_scheduler_type = schedule;
  settings.warmup_ratio = warmup_ratio;
  settings.warmup_steps = steps;
  return settings;
}

// Expected values: transformers.get_scheduler(name, optimizer, num_warmup_steps=3,
// num_training_steps=10), lr of AdamW(lr=1.0) before each scheduler.step().
TEST(Schedule, CosineIsThatOfTransformers) {
  const double expected[] = {0.0,
                             0.3333333333333333,
                             0.6666666666666666,
                             1.0,
                             0.9504844339512095,
                             0.8117449009293668,
                             0.6112604669781572,
                             0.38873953302184283,
                             0.18825509907063326,
                             0.04951556604879048};
  for (std::int64_t k = 0; k < 10; ++k)
    EXPECT_NEAR(learning_rate(with(Schedule::kCosine, 0.0, 3), 10, k), expected[k], 1e-12) << k;
}

TEST(Schedule, LinearIsThatOfTransformers) {
  const double expected[] = {0.0,
                             0.3333333333333333,
                             0.6666666666666666,
                             1.0,
                             0.8571428571428571,
                             0.7142857142857143,
                             0.5714285714285714,
                             0.42857142857142855,
                             0.2857142857142857,
                             0.14285714285714285};
  for (std::int64_t k = 0; k < 10; ++k)
    EXPECT_NEAR(learning_rate(with(Schedule::kLinear, 0.0, 3), 10, k), expected[k], 1e-12) << k;
}

TEST(Schedule, ConstantStaysAfterItsWarmUp) {
  EXPECT_EQ(learning_rate(with(Schedule::kConstant, 0.0), 10, 0), 1.0);
  EXPECT_EQ(learning_rate(with(Schedule::kConstant, 0.0, 2), 10, 1), 0.5);
  EXPECT_EQ(learning_rate(with(Schedule::kConstant, 0.0, 2), 10, 9), 1.0);
}

TEST(Schedule, WarmUpRatioRoundsUpAndStepsOverrideIt) {
  EXPECT_EQ(warmup_steps(with(Schedule::kCosine, 0.03), 100), 3);
  EXPECT_EQ(warmup_steps(with(Schedule::kCosine, 0.03), 101), 4);
  EXPECT_EQ(warmup_steps(with(Schedule::kCosine, 0.03, 7), 101), 7);
  EXPECT_EQ(warmup_steps(with(Schedule::kCosine, 0.0), 101), 0);
}

}  // namespace
}  // namespace tandem::worker::train
