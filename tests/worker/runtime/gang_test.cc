// What the ranks of a gang say to each other, over threads; and what an agent gives a gang to see.
#include "worker/runtime/gang_hosts.h"
#include "worker/runtime/gang_keeper.h"
#include "worker/runtime/gang_rank.h"

#include "kernels/cpu/cpu_backend.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

#include <sys/mount.h>
#include <unistd.h>

namespace tandem::worker::runtime {
namespace {

/// Runs `f(wire)` on every rank of a gang of `size` threads.
template <class F>
void on_all_ranks(int size, const F& f) {
  auto gang = comm::make_thread_communicators(size);
  std::vector<std::thread> threads;
  for (auto& comm : gang)
    threads.emplace_back([&f, &comm] {
      kernels::Backend backend = kernels::make_cpu_backend({1, 0});
      kernels::Arena arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                           "workspace", 1 << 20);
      kernels::Exec exec{arena};
      GangWire wire(*comm, exec);
      f(wire);
    });
  for (auto& thread : threads) thread.join();
}

TEST(GangWire, EveryRankHearsTheSameWordsInOrder) {
  on_all_ranks(3, [](GangWire& wire) {
    ByteWriter payload;
    payload.text("plan");
    if (wire.rank() == 0) {
      wire.tell(GangOp::kOpen, payload.bytes());
      wire.tell(GangOp::kSlice);
      wire.tell(GangOp::kEnd);
      return;
    }
    const auto open = wire.hear();
    EXPECT_EQ(open.op, GangOp::kOpen);
    EXPECT_EQ(ByteReader(open.payload).text(), "plan");
    EXPECT_EQ(wire.hear().op, GangOp::kSlice);
    EXPECT_EQ(wire.hear().op, GangOp::kEnd);
  });
}

TEST(GangWire, TheFirstRankGathersBytesOfAnyLength) {
  on_all_ranks(3, [](GangWire& wire) {
    const ByteVector mine(static_cast<std::size_t>(wire.rank()) * 1000,
                          std::byte(static_cast<unsigned char>(wire.rank())));
    const auto all = wire.gather(mine);
    if (wire.rank() != 0) {
      EXPECT_TRUE(all.empty());
      return;
    }
    ASSERT_EQ(all.size(), 3u);
    for (std::size_t r = 0; r < 3; ++r)
      EXPECT_EQ(all[r], ByteVector(r * 1000, std::byte(static_cast<unsigned char>(r))));
  });
}

TEST(GangWire, OneRanksErrorIsEverybodysAndNamesIt) {
  on_all_ranks(3, [](GangWire& wire) {
    EXPECT_TRUE(wire.agree({}).ok());
    const Status agreed = wire.agree(wire.rank() == 2 ? refused_error("too small") : Status());
    EXPECT_EQ(agreed.code(), StatusCode::kRefused);
    EXPECT_EQ(agreed.message(), "rank 2: too small");
    EXPECT_EQ(wire.agree(invalid_error("all alike")).message(), "all alike");
    EXPECT_EQ(wire.largest(wire.rank()), 2.0);
  });
}

TEST(GangPatience, GrowsWithTheLongestRecentSlice) {
  GangPatience patience(1000);
  patience.add_slice(0.01);
  EXPECT_EQ(patience.timeout_ms()->load(), 1000);
  patience.add_slice(3.0);
  EXPECT_EQ(patience.timeout_ms()->load(), 15'000);
  for (int i = 0; i < 200; ++i) patience.add_slice(0.01);
  EXPECT_EQ(patience.timeout_ms()->load(), 1000);
}

TEST(GangState, ComesBackAsItWas) {
  GangPlan plan;
  plan.model_path = "/models/m";
  plan.settings.tp = 2;
  auto train = std::make_shared<data::Dataset>();
  train->examples.push_back({{1, 2, 3}, {2, 3, data::kIgnore}, 7});
  plan.train = train;
  plan.base_model = sha256("base");
  plan.checkpoint = "a manifest";
  const GangPlan again = GangPlan::decode(plan.encode());
  EXPECT_EQ(again.model_path, plan.model_path);
  EXPECT_EQ(again.settings.to_json(), plan.settings.to_json());
  ASSERT_EQ(again.train->examples.size(), 1u);
  EXPECT_EQ(again.train->examples[0].labels, train->examples[0].labels);
  EXPECT_EQ(again.train->examples[0].line, 7);
  EXPECT_EQ(again.eval, nullptr);
  EXPECT_EQ(again.base_model, plan.base_model);
  EXPECT_EQ(again.checkpoint, plan.checkpoint);

  const train::TrainState state{"{}", {{"x.param", {2, 3}, {1, 2, 3, 4, 5, 6}, {1, 2, 0, 3}, 4}}};
  ByteWriter bytes;
  encode_state(state, bytes);
  ByteReader reader(bytes.bytes());
  const train::TrainState copy = decode_state(reader);
  ASSERT_EQ(copy.tensors.size(), 1u);
  EXPECT_EQ(copy.tensors[0].values, state.tensors[0].values);
  EXPECT_EQ(copy.tensors[0].slice.rows, 2);
  EXPECT_EQ(copy.tensors[0].first, 4);
}

TEST(GangPaths, KeepTheWordOfTheRankThatFailedFirst) {
  const auto slot =
      SlotPaths::create(testing::TempDir() + str("tandem_word_", ::getpid()), "cuda", 1);
  const GangPaths paths(slot.value());
  EXPECT_EQ(paths.word(), "");
  std::filesystem::create_directories(paths.directory);
  paths.leave_word("rank 1: out of GPU memory");
  paths.leave_word("rank 0: a member of the gang is gone");
  EXPECT_EQ(paths.word(), "rank 1: out of GPU memory");
  std::filesystem::remove_all(paths.directory);
  paths.leave_word("nobody is there to hear it");
  EXPECT_EQ(paths.word(), "");
}

/// A keeper of a gang over two hosts whose mpirun never ends by itself, and nobody's ranks.
struct StuckGang : testing::Test {
  StuckGang() {
    std::filesystem::create_directories(folder);
    for (const char* program : {"mpirun", "tandem-rank"}) {
      const std::string path = str(folder, "/", program);
      std::ofstream(path) << "#!/bin/sh\nexec sleep 1000\n";
      std::filesystem::permissions(path, std::filesystem::perms::owner_all);
    }
    ::setenv("PATH", str(folder, ":", path_before).c_str(), 1);
    clock.advance(1);
    protocol::StartJob start;
    start.job = JobId("job-1");
    start.epoch = 1;
    start.members = {WorkerId("near/cpu0"), WorkerId("far/cpu0")};
    EXPECT_TRUE(keeper.start(start).ok());
  }
  ~StuckGang() override {
    keeper.kill();
    (void)ended();
    ::setenv("PATH", path_before.c_str(), 1);
    std::filesystem::remove_all(folder);
  }
  /// How it ended, within a few seconds of real time; "" when it goes on.
  std::string ended() {
    for (TimeMs wait = 0; wait < scaled_ms(3000) && keeper.running(); wait += 10) {
      if (const auto how = keeper.poll()) return *how;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return "";
  }
  const std::string path_before = std::getenv("PATH");
  const std::string folder = testing::TempDir() + str("tandem_stuck_", ::getpid());
  const SlotPaths slot = SlotPaths::create(folder, "cpu", 0).value();
  ManualClock clock;
  GangKeeper keeper{{folder + "/tandem-rank", {}, folder + "/log"}, slot, clock};
};

TEST_F(StuckGang, IsEndedSoonAfterARanksWord) {
  GangPaths(slot).leave_word("rank 1: a member of the gang is gone");
  EXPECT_EQ(keeper.poll(), std::nullopt);  // mpirun has a moment to end by itself
  clock.advance(scaled_ms(GangKeeper::kWordMs) - 100);
  EXPECT_EQ(keeper.poll(), std::nullopt);
  clock.advance(1000);
  const std::string how = ended();
  EXPECT_NE(how.find("rank 1: a member of the gang is gone"), std::string::npos) << how;
  EXPECT_FALSE(std::filesystem::exists(GangPaths(slot).directory));
}

TEST_F(StuckGang, IsEndedSoonAfterAFarHostsDaemonHasFailed) {
  const auto told = [&](Epoch epoch, const Status& status) {
    keeper.answer({JobId("job-1"), epoch, WorkerId("far/cpu0"), status});
    clock.advance(1000);
    EXPECT_EQ(keeper.poll(), std::nullopt);
    clock.advance(scaled_ms(GangKeeper::kWordMs) + 1000);
    return ended();
  };
  EXPECT_EQ(told(1, {}), "") << "it was started";
  EXPECT_EQ(told(0, unavailable_error("an earlier one")), "");
  const std::string how = told(1, unavailable_error("far/cpu0: its daemon ended by exit code 213"));
  EXPECT_NE(how.find("far/cpu0: its daemon ended by exit code 213"), std::string::npos) << how;
}

TEST_F(StuckGang, IsEndedWhereNoRankComesAndNamesItsHosts) {
  {
    const auto rank = FileLock::acquire(GangPaths(slot).rank_lock(1));
    clock.advance(2 * scaled_ms(GangKeeper::kRanklessMs));
    EXPECT_EQ(keeper.poll(), std::nullopt) << "a rank is there";
  }
  clock.advance(scaled_ms(GangKeeper::kRanklessMs) - 100);
  EXPECT_EQ(keeper.poll(), std::nullopt);
  clock.advance(1000);
  const std::string how = ended();
  EXPECT_NE(how.find("no rank of it ran for 60 s"), std::string::npos) << how;
  EXPECT_NE(how.find("near, far"), std::string::npos) << how;
}

TEST(GangKeeper, SaysThatADiskIsFullOnWhichRanksCouldNotBegin) {
  const std::string folder = testing::TempDir() + str("tandem_full_gang_", ::getpid());
  std::filesystem::create_directories(folder);
  if (::mount("tmpfs", folder.c_str(), "tmpfs", 0, "size=2m,mode=0700") != 0)
    GTEST_SKIP() << "cannot mount a tmpfs: the full disk is not tested here";
  {
    const std::string program = folder + "/tandem-rank";
    std::ofstream(program) << "#!/bin/sh\n";
    std::filesystem::permissions(program, std::filesystem::perms::owner_all);
    const SlotPaths slot = SlotPaths::create(folder, "cpu", 0).value();
    ManualClock clock;
    GangKeeper keeper{{program, {}, folder + "/log"}, slot, clock};
    protocol::StartJob start;
    start.job = JobId("job-1");
    start.epoch = 1;
    start.members = {WorkerId(host_name() + "/cpu0"), WorkerId(host_name() + "/cpu1")};
    const Status status = keeper.start(start);
    EXPECT_EQ(status.code(), StatusCode::kUnavailable);
    EXPECT_NE(status.message().find("disk full: "), std::string::npos) << status.message();
    EXPECT_NE(status.message().find("16.0 MiB are needed"), std::string::npos) << status.message();
    EXPECT_FALSE(std::filesystem::exists(GangPaths(slot).directory));
  }
  ::umount2(folder.c_str(), MNT_DETACH);
  std::filesystem::remove_all(folder);
}

TEST(GangHosts, AreThoseOfItsMembersInTheOrderOfTheirRanks) {
  const auto hosts = hosts_of({WorkerId("a.x/cpu0"), WorkerId("a.x/cpu3"), WorkerId("b/cpu0")});
  ASSERT_EQ(hosts.size(), 2u);
  EXPECT_EQ(hosts[0], std::pair(std::string("a.x"), 2));
  EXPECT_EQ(hosts[1], std::pair(std::string("b"), 1));
}

TEST(DaemonArguments, AreThoseThatOpenMpiGivesUnquotedAndWithThisHostsFolder) {
  const auto taken = daemon_arguments(
      {"--daemonize", "-mca", "ess", "\"env\"", "-mca", "orte_hnp_uri",
       "\"14.0;tcp://10.0.0.1:4186\"", "--mca", "plm_rsh_agent", "\"/x/tandem-rank --launch /g\"",
       "-mca", "orte_tmpdir_base", "\"/theirs\""},
      "/ours");
  ASSERT_TRUE(taken.ok()) << taken.status().to_string();
  EXPECT_EQ(*taken,
            (std::vector<std::string>{"-mca", "ess", "env", "-mca", "orte_hnp_uri",
                                      "14.0;tcp://10.0.0.1:4186", "-mca", "orte_tmpdir_base",
                                      "/ours", "-mca", "plm_rsh_agent", "/bin/false"}));
}

TEST(DaemonArguments, TakeNothingThatNamesAProgramALibraryOrAnotherOption) {
  const std::vector<std::vector<std::string>> hostile{
      {"--bootproxy"},
      {"-mca", "ess"},
      {"-mca", "orte_launch_agent", "/bin/sh"},
      {"-mca", "mca_base_component_path", "/tmp"},
      {"-mca", "odls_base_env_list", "LD_PRELOAD=/tmp/x.so"},
      {"-mca", "orte_fork_agent", "/tmp/x"},
      {"-mca", "orte_hnp_uri", "a\nb"},
      {"-x", "LD_PRELOAD", "/tmp/x.so"},
      {"sh", "-c", "id"}};
  for (const auto& words : hostile) {
    const auto taken = daemon_arguments(words, "/ours");
    EXPECT_EQ(taken.status().code(), StatusCode::kInvalid) << words.front() << " " << words.back();
  }
}

TEST(LaunchProgram, LeavesItsRequestInTheFolderAndEndsAsItIsAnswered) {
  const std::string folder =
      str(std::filesystem::temp_directory_path().string(), "/tandem-launch-", ::getpid());
  std::filesystem::create_directories(folder);
  for (const Status& answer : {Status(), unavailable_error("its agent is not connected")}) {
    std::filesystem::remove_all(folder);
    std::filesystem::create_directories(folder);
    int code = -1;
    std::thread program([&] {
      code = ask_for_daemon(folder, {"node7", " orted", "-mca", "ess", "\"env\""});
    });
    std::vector<LaunchRequest> requests;
    for (TimeMs wait = 0; requests.empty() && wait < scaled_ms(5000); wait += 5) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      requests = open_requests(folder);
    }
    if (requests.empty()) ADD_FAILURE() << "no request in " << folder;
    for (const LaunchRequest& request : requests) {
      EXPECT_EQ(request.host, "node7");
      EXPECT_EQ(request.arguments, (std::vector<std::string>{"-mca", "ess", "\"env\""}));
      reply(request, answer);
    }
    program.join();
    EXPECT_EQ(code, answer.ok() ? 0 : 1);
    EXPECT_TRUE(open_requests(folder).empty()) << "answered ones are not open";
  }
  std::filesystem::remove_all(folder);
}

TEST(GangEnvironment, HoldsNothingOfAnOuterMpirunOrSlurm) {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_JOB_ID", "ORTE_X", "SECRET"})
    ::setenv(name, "1", 1);
  ::setenv("TANDEM_TIME_SCALE", "1", 1);
  ::setenv("NCCL_NVLS_ENABLE", "0", 1);
  bool scale = false, path = false, root = false, nccl = false;
  for (const std::string& variable : gang_environment("/run/gang")) {
    for (const char* name : {"OMPI_COMM", "PMIX_", "SLURM_", "ORTE_", "SECRET"})
      EXPECT_FALSE(variable.starts_with(name)) << variable;
    scale = scale || variable == "TANDEM_TIME_SCALE=1";
    nccl = nccl || variable == "NCCL_NVLS_ENABLE=0";
    path = path || variable.starts_with("PATH=");
    root = root || variable == "OMPI_ALLOW_RUN_AS_ROOT=1";
  }
  EXPECT_TRUE(scale && path && nccl);
  EXPECT_EQ(root, ::geteuid() == 0);
}

}  // namespace
}  // namespace tandem::worker::runtime
