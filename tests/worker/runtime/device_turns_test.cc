#include "worker/runtime/device_turns.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace tandem::worker::runtime {
namespace {

constexpr std::int64_t kMs = 1'000'000;

/// A device on which a step of `rows` takes `step_ns`, and the time that it and training take.
struct FakeDevice final : StepServer {
  bool has_work() const override { return work; }
  std::int64_t start_step() override {
    EXPECT_FALSE(running);
    running = true;
    begun.push_back(now);
    return rows;
  }
  bool step_ready() const override { return now >= begun.back() + step_ns; }
  void finish_step() override {
    EXPECT_TRUE(running);
    now = std::max(now, begun.back() + step_ns);
    running = false;
    ended.push_back(now);
  }

  std::int64_t now = 1000 * kMs, rows = 8, step_ns = 7 * kMs;
  bool work = true, running = false;
  std::vector<std::int64_t> begun, ended;
};

/// Trains in blocks of `block_ns` for `total_ns`; returns the time that blocks took.
std::int64_t train(DeviceTurns& turns, FakeDevice& device, std::int64_t block_ns,
                   std::int64_t total_ns) {
  std::int64_t trained = 0;
  const std::int64_t end = device.now + total_ns;
  turns.train([&] {
    while (device.now < end) {
      turns.between();
      device.now += block_ns;
      trained += block_ns;
    }
  });
  return trained;
}

TEST(DeviceTurns, StepsFollowEachOtherUpToTrainingsShareWithoutAnInterval) {
  FakeDevice device;
  DeviceTurns turns(
      {.train_share_min = 0.25}, device, [] {}, [&] { return device.now; });
  const std::int64_t trained = train(turns, device, 3 * kMs, 20'000 * kMs);
  EXPECT_NEAR(static_cast<double>(trained) / static_cast<double>(20'000 * kMs), 0.25, 0.02);
}

TEST(DeviceTurns, StepsEndAnIntervalApartAndTrainingGetsTheRest) {
  FakeDevice device;
  DeviceTurns turns(
      {.train_share_min = 0.25, .step_interval_ns = 22 * kMs}, device, [] {},
      [&] { return device.now; });
  const std::int64_t trained = train(turns, device, 3 * kMs, 20'000 * kMs);
  EXPECT_GE(device.ended.size(), 20'000u / 25);
  // A step waits for the end of the block that runs when it is due.
  for (std::size_t i = 10; i < device.ended.size(); ++i) {
    EXPECT_GE(device.ended[i] - device.ended[i - 1], 22 * kMs);
    EXPECT_LE(device.ended[i] - device.ended[i - 1], (22 + 3) * kMs);
  }
  EXPECT_GE(static_cast<double>(trained), (1.0 - 7.0 / 22.0) * 0.99 * 20'000 * kMs);
}

TEST(DeviceTurns, ALongStepIsNotFollowedByAWaitForTheNext) {
  FakeDevice device;
  device.step_ns = 40 * kMs;  // longer than the interval: the share alone decides
  DeviceTurns turns(
      {.train_share_min = 0.25, .step_interval_ns = 22 * kMs}, device, [] {},
      [&] { return device.now; });
  const std::int64_t trained = train(turns, device, 3 * kMs, 20'000 * kMs);
  EXPECT_NEAR(static_cast<double>(trained) / static_cast<double>(20'000 * kMs), 0.25, 0.02);
}

TEST(DeviceTurns, TrainingGoesOnBesideAStepOfFewRowsOnly) {
  for (const std::int64_t rows : {64, 65}) {
    FakeDevice device;
    device.rows = rows;
    DeviceTurns turns(
        {.step_interval_ns = 22 * kMs, .beside_rows_max = 64}, device, [] {},
        [&] { return device.now; });
    turns.train([&] {
      turns.between();
      EXPECT_EQ(turns.step_under_way(), rows <= 64);
      if (rows > 64) return;
      turns.between();
      EXPECT_TRUE(device.running) << "it was not ready";
      device.now += device.step_ns;
      turns.between();
      EXPECT_FALSE(device.running);
      EXPECT_EQ(device.begun.size(), 1u) << "the next one is due later";
    });
  }
}

TEST(DeviceTurns, SaysWhenAStepIsDueSoon) {
  FakeDevice device;
  DeviceTurns turns(
      {.step_interval_ns = 22 * kMs, .soon_ns = 8 * kMs}, device, [] {},
      [&] { return device.now; });
  turns.serve();  // steps take 7 ms: the next one begins 15 ms after this one's end
  EXPECT_FALSE(turns.soon());
  device.now += 6 * kMs;
  EXPECT_FALSE(turns.soon());
  device.now += 1 * kMs;
  EXPECT_TRUE(turns.soon());
  device.work = false;
  EXPECT_FALSE(turns.soon());
}

TEST(DeviceTurns, MessagesComeInOnlyBetweenSteps) {
  FakeDevice device;
  int messages = 0;
  DeviceTurns turns(
      {.step_interval_ns = 22 * kMs, .beside_rows_max = 64}, device,
      [&] {
        EXPECT_FALSE(device.running);
        ++messages;
      },
      [&] { return device.now; });
  train(turns, device, 3 * kMs, 1000 * kMs);
  EXPECT_GT(messages, 100);
}

TEST(DeviceTurns, ServesAtOnceWhenNothingTrains) {
  FakeDevice device;
  DeviceTurns turns(
      {.step_interval_ns = 22 * kMs}, device, [] {}, [&] { return device.now; });
  for (int i = 0; i < 3; ++i) turns.serve();
  EXPECT_EQ(device.ended.back() - device.begun.front(), 3 * device.step_ns);
}

}  // namespace
}  // namespace tandem::worker::runtime
