#include "worker/runtime/device_arbiter.h"

#include <gtest/gtest.h>

namespace tandem::worker::runtime {
namespace {

constexpr std::int64_t kMs = 1'000'000;

TEST(DeviceArbiter, ServesAlwaysWhenNothingTrains) {
  DeviceArbiter arbiter(0.25);
  for (int i = 0; i < 100; ++i) arbiter.add_serve_ns(10 * kMs);
  EXPECT_TRUE(arbiter.serve_next(false));
}

TEST(DeviceArbiter, KeepsTrainingsShareUnderEndlessRequests) {
  for (const double share : {0.1, 0.25, 0.5, 0.9}) {
    DeviceArbiter arbiter(share);
    double train = 0, serve = 0;
    for (int i = 0; i < 20000; ++i) {
      if (arbiter.serve_next(true)) {
        arbiter.add_serve_ns(15 * kMs);
        serve += 15;
      } else {
        arbiter.add_train_ns(40 * kMs);
        train += 40;
      }
    }
    // One slice of either kind is at most 40 ms of the two-second window: 2 % of share.
    EXPECT_NEAR(train / (train + serve), share, 0.02) << share;
  }
}

TEST(DeviceArbiter, ForgetsOldTimes) {
  DeviceArbiter arbiter(0.25);
  for (int i = 0; i < 100; ++i) arbiter.add_train_ns(1000 * kMs);  // trained alone for long
  int served = 0;
  while (arbiter.serve_next(true) && served < 1000) {
    arbiter.add_serve_ns(15 * kMs);
    ++served;
  }
  EXPECT_LT(served * 15, 10'000) << "credit for the past must not starve training";
}

}  // namespace
}  // namespace tandem::worker::runtime
