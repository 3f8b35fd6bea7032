// tandem up and down: a platform grows to as many workers as it is asked for, and ends.
#include "protocol/base/str.h"
#include "tests/system/platform.h"

#include <gtest/gtest.h>

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>

namespace tandem::test {
namespace {

class Up : public testing::Test {
 protected:
  // What up leaves behind is nobody's child: here it would be this test's, and stay for down to
  // wait for until the test collects it.
  Up() { ::prctl(PR_SET_CHILD_SUBREAPER, 0); }
  ~Up() override { platform_.cli({"down"}); }
  void run(const std::vector<std::string>& arguments) {
    const auto output = platform_.cli(arguments);
    EXPECT_EQ(output.code, 0) << output.out << output.err;
  }
  std::size_t workers() {
    const auto output = platform_.cli({"--json", "status"});
    return output.code == 0 ? Json::parse(output.out).value("workers", Json::array()).size() : 0;
  }
  static bool awaits_sigterm(pid_t pid) {
    std::ifstream status(str("/proc/", pid, "/status"));
    for (std::string line; std::getline(status, line);)
      if (line.starts_with("ShdPnd:"))
        return (std::stoull(line.substr(7), nullptr, 16) >> (SIGTERM - 1) & 1) != 0;
    return false;
  }
  Platform platform_;
};

TEST_F(Up, AddsTheWorkersThatAreMissingAndDownEndsAllOfThem) {
  run({"up", "--workers", "1", "--device", "cpu"});
  EXPECT_EQ(workers(), 1u);
  // up waits for agents; their engines are on their way.
  ASSERT_TRUE(eventually(10'000, [&] { return platform_.engine(0) > 0; }));
  const pid_t first = platform_.engine(0);
  run({"up", "--workers", "1", "--device", "cpu"});
  EXPECT_EQ(workers(), 1u);
  EXPECT_EQ(platform_.engine(0), first);

  run({"up", "--workers", "2", "--device", "cpu"});
  EXPECT_EQ(workers(), 2u);
  EXPECT_EQ(platform_.engine(0), first) << "what was there goes on";
  EXPECT_TRUE(eventually(10'000, [&] { return platform_.engine(1) > 0; }));
  run({"up", "--workers", "1", "--device", "cpu"});
  EXPECT_EQ(workers(), 2u) << "up takes none away";

  run({"down"});
  for (const int slot : {0, 1})
    EXPECT_EQ(platform_.supervisor(slot) + platform_.agent(slot) + platform_.engine(slot), 0)
        << "slot " << slot;
  EXPECT_EQ(platform_.cli({"status"}).code, 5);
  run({"down"});
}

TEST_F(Up, DownEndsAWorkerWhoseSupervisorWasKilled) {
  run({"up", "--workers", "1", "--device", "cpu"});
  ASSERT_GT(platform_.supervisor(0), 0);
  ::kill(platform_.supervisor(0), SIGKILL);
  ASSERT_TRUE(eventually(10'000, [&] { return platform_.supervisor(0) == 0; }));
  ASSERT_GT(platform_.agent(0), 0);
  run({"down"});
  EXPECT_EQ(platform_.agent(0) + platform_.engine(0), 0);
}

TEST_F(Up, DownEndsAWorkerThatComesToItsSlotMeanwhile) {
  run({"up", "--workers", "1", "--device", "cpu"});
  const pid_t agent = platform_.agent(0);
  ASSERT_GT(agent, 0);
  ::kill(agent, SIGSTOP);  // its supervisor waits for it, and down for both
  const std::string out = platform_.directory() + "/down";
  const pid_t down = platform_.start_cli({"down"}, out, out + ".err");
  ASSERT_TRUE(eventually(10'000, [&] { return awaits_sigterm(agent); }));
  const std::string program =
      std::filesystem::read_symlink(str("/proc/", platform_.supervisor(0), "/exe"));
  const pid_t late = ::fork();
  if (late == 0) {
    ::execl(program.c_str(), program.c_str(), "--slot", "1", "--device", "cpu", "--data-dir",
            platform_.data_dir().c_str(), nullptr);
    ::_exit(127);
  }
  int status = -1;
  EXPECT_TRUE(eventually(20'000, [&] { return ::waitpid(late, &status, WNOHANG) == late; }))
      << "down told it";
  EXPECT_TRUE(WIFEXITED(status)) << status;
  ::kill(agent, SIGCONT);
  EXPECT_EQ(::waitpid(down, &status, 0), down);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(platform_.engine(1), 0);
}

TEST_F(Up, SaysWhyNoWorkerComes) {
  const auto output = platform_.cli({"up", "--workers", "1", "--device", "cpu", "--dtype", "f16"});
  EXPECT_EQ(output.code, 1);
  EXPECT_NE(output.err.find("dtype f16: a CPU computes in f32 and bf16"), std::string::npos)
      << output.err;
}

TEST_F(Up, StartsACoordinatorAgainRightAfterItWasKilled) {
  run({"up", "--workers", "1", "--device", "cpu"});
  const Json status = Json::parse(platform_.cli({"--json", "status"}).out);
  ::kill(status.value("pid", 0), SIGKILL);
  run({"up", "--workers", "1", "--device", "cpu"});
  EXPECT_EQ(platform_.cli({"status"}).code, 0);
}

/// Waits for a supervisor that was asked to stop; its exit code.
int ended(pid_t supervisor) {
  int status = 0;
  EXPECT_TRUE(eventually(20'000, [&] { return ::waitpid(supervisor, &status, WNOHANG) != 0; }));
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(Stop, OfAWorkerWhoseAgentWasKilledEndsItsEngine) {
  Platform platform;
  platform.start_coordinator();
  platform.start_worker();
  const pid_t supervisor = platform.supervisor();
  ASSERT_GT(supervisor, 0);
  ::kill(platform.agent(), SIGKILL);
  ::kill(supervisor, SIGTERM);
  EXPECT_EQ(ended(supervisor), 0);
  EXPECT_EQ(platform.engine(), 0) << "an engine that nobody looks after";
}

pid_t parent_of(pid_t process) {
  std::ifstream stat("/proc/" + std::to_string(process) + "/stat");
  std::string word;
  for (int i = 0; i < 4; ++i) stat >> word;  // pid (name) state parent
  return stat ? static_cast<pid_t>(std::stol(word)) : 0;
}

TEST(TakeOver, OfSeveralWorkersStartedInARowTheLastHasTheSlot) {
  Platform platform;
  platform.start_coordinator();
  platform.start_worker();
  const pid_t engine = platform.engine(), first = platform.agent();
  ::kill(first, SIGSTOP);  // all of them ask this one
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(eventually(10'000, [&] { return platform.supervisor() > 0; }));
    platform.kill_process(platform.supervisor());
    platform.start_worker();
    ::usleep(100'000);  // it starts its agent
  }
  ::usleep(1'000'000);
  ::kill(first, SIGCONT);
  EXPECT_TRUE(eventually(8'000, [&] {
    const pid_t agent = platform.agent();
    return agent > 0 && parent_of(agent) == platform.supervisor();
  }));
  EXPECT_EQ(platform.engine(), engine);
}

}  // namespace
}  // namespace tandem::test
