#include "worker/runtime/slot.h"
#include "worker/runtime/process.h"

#include <gtest/gtest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>

namespace tandem::worker::runtime {
namespace {

std::string temporary(const std::string& name) {
  return testing::TempDir() + "tandem_slot_" + std::to_string(::getpid()) + "_" + name;
}

TEST(SlotOf, IsTheNumberAtTheEndOfAWorker) {
  EXPECT_EQ(slot_of(WorkerId("node7/cuda3")).value(), 3);
  EXPECT_EQ(slot_of(WorkerId("host/cpu12")).value(), 12);
  for (const char* wrong : {"", "host/cpu", "host/cuda99999999"})
    EXPECT_EQ(slot_of(WorkerId(wrong)).status().code(), StatusCode::kInvalid) << wrong;
}

TEST(StopSignals, AWaveOfSignalsIsOneWish) {
  StopSignals signals;
  EXPECT_EQ(signals.count(), 0);
  for (int i = 0; i < 3; ++i) signals.note();  // mpirun to the group, then every parent
  EXPECT_EQ(signals.count(), 1);
  signals.at_least_one();
  EXPECT_EQ(signals.count(), 1);
  ::usleep(1'100'000);
  signals.note();
  EXPECT_EQ(signals.count(), 2);
}

TEST(Slot, ClosesTheRunDirectoryToOthersWhoeverIsThereFirst) {
  const std::string run = temporary("fresh");
  ASSERT_TRUE(SlotPaths::create(run, "cpu", 0).ok());
  EXPECT_EQ(std::filesystem::status(run).permissions(), std::filesystem::perms::owner_all);
  std::filesystem::remove_all(run);
}

TEST(Slot, ARunningEngineIsKnownOnlyWhileItsLockIsHeld) {
  const auto paths = SlotPaths::create(temporary("run"), "cpu", 3);
  ASSERT_TRUE(paths.ok());
  ASSERT_TRUE(write_engine_info(*paths, {4711, 42, "GPU-1"}).ok());
  EXPECT_FALSE(running_engine(*paths).has_value()) << "the file alone is a leftover";
  const auto lock = FileLock::acquire(paths->engine_lock);
  const auto engine = running_engine(*paths);
  ASSERT_TRUE(engine.has_value());
  EXPECT_EQ(engine->pid, 4711);
  EXPECT_EQ(engine->incarnation, 42u);
  std::filesystem::remove_all(temporary("run"));
}

TEST(Slot, AnEngineIsNotTheOneBeforeItHoweverYoungItIs) {
  const auto paths = SlotPaths::create(temporary("run"), "cpu", 3);
  ASSERT_TRUE(paths.ok());
  ASSERT_TRUE(write_engine_info(*paths, {4711, 42, ""}).ok());
  const auto lock = FileLock::acquire(paths->engine_lock);
  EXPECT_TRUE(runs_as(*paths, 4711, 42));
  EXPECT_FALSE(runs_as(*paths, 4712, 42)) << "the next one has not written who it is";
  ASSERT_TRUE(write_engine_info(*paths, {4712, 43, ""}).ok());
  EXPECT_FALSE(runs_as(*paths, 4712, 42));
  EXPECT_TRUE(runs_as(*paths, 4712, 43));
  std::filesystem::remove_all(temporary("run"));
}

TEST(Slot, KeepsItsGpuOverEnginesUntilANewSupervisorFindsNoneRunning) {
  const auto paths = SlotPaths::create(temporary("run"), "cuda", 3);
  ASSERT_TRUE(paths.ok());
  EXPECT_EQ(gpu_of(*paths), "");
  ASSERT_TRUE(write_engine_info(*paths, {4711, 42, "GPU-1"}).ok());
  EXPECT_EQ(gpu_of(*paths), "GPU-1") << "of the engine that was here";
  {
    const auto lock = FileLock::acquire(paths->engine_lock);
    forget_engine(*paths);
    EXPECT_EQ(gpu_of(*paths), "GPU-1") << "an engine runs";
  }
  forget_engine(*paths);
  EXPECT_EQ(gpu_of(*paths), "");
  std::filesystem::remove_all(temporary("run"));
}

TEST(RestartBackoff, GrowsForTheShortLivedAndForgetsAfterALongLife) {
  RestartBackoff backoff;
  EXPECT_EQ(backoff.next_delay_ms(60'000), 0);
  std::int64_t last = 0;
  for (int i = 0; i < 20; ++i) {
    const std::int64_t delay = backoff.next_delay_ms(1);
    EXPECT_GE(delay, last);
    last = delay;
  }
  EXPECT_EQ(last, 5000);
  EXPECT_EQ(backoff.next_delay_ms(60'000), 0);
}

TEST(RestartBackoff, OfAChildThatEndsByItselfGrowsToAMinuteHoweverLongItLoaded) {
  RestartBackoff backoff;
  std::int64_t last = 0;
  for (int i = 0; i < 20; ++i) last = backoff.next_delay_ms(10'000, true);
  EXPECT_EQ(last, 60'000);
  EXPECT_EQ(backoff.next_delay_ms(120'000, true), 0);
}

TEST(Process, SaysHowAChildEnded) {
  auto child = start_process("/bin/sh", {"-c", "exit 7"}, true);
  ASSERT_TRUE(child.ok());
  int wait_status = 0;
  ASSERT_EQ(::waitpid(*child, &wait_status, 0), *child);
  EXPECT_EQ(describe_wait_status(wait_status), "exit code 7");
}

TEST(Process, ASignalBetweenForkAndExecIsTheChilds) {
  const auto before = std::signal(SIGTERM, [](int) {});
  for (int i = 0; i < 200; ++i) {
    auto child = start_process("/bin/sleep", {"60"}, true);
    ASSERT_TRUE(child.ok());
    ASSERT_EQ(::kill(*child, SIGTERM), 0);
    int wait_status = 0;
    ASSERT_EQ(::waitpid(*child, &wait_status, 0), *child);
    EXPECT_TRUE(WIFSIGNALED(wait_status)) << describe_wait_status(wait_status);
    if (HasFailure()) break;
  }
  std::signal(SIGTERM, before);
}

TEST(Process, StopsWaitForAChildThatWantsThemLater) {
  auto child = start_process("/bin/sh", {"-c", "kill -TERM $$; exit 7"}, true, true);
  ASSERT_TRUE(child.ok());
  int wait_status = 0;
  ASSERT_EQ(::waitpid(*child, &wait_status, 0), *child);
  EXPECT_EQ(describe_wait_status(wait_status), "exit code 7");
}

}  // namespace
}  // namespace tandem::worker::runtime
