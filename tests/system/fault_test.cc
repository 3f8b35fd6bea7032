// Devices that fail, with real processes: an engine whose op throws or whose memory is out ends and
// is replaced, its job is tried again and given up in the end, and nobody else notices. The faults
// are injected (kernels/fault_injection.h).
#include "tests/system/tiny_pool.h"

#include <sched.h>
#include <sys/mount.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <vector>

namespace tandem::test {
namespace {

namespace fs = std::filesystem;

const Json kSettings{{"lora_r", 4},      {"learning_rate", 5e-3},
                     {"max_steps", 120}, {"per_device_train_batch_size", 2},
                     {"max_length", 64}, {"save_steps", 10},
                     {"seed", 5},        {"adapter_dtype", "f32"}};

class Fault : public TinyPool {
 protected:
  static void SetUpTestSuite() {
    faults_ = (fs::temp_directory_path() / str("tandem-faults-", ::getpid(), "-")).string();
    ::setenv("TANDEM_TEST_FAULT_FILE", faults_.c_str(), 1);
    // What is mounted from here on only this program and its children see.
    private_mounts_ = on_gpus() && ::unshare(CLONE_NEWNS) == 0 &&
                      ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0;
    start_pool(2, 64);
  }
  void TearDown() override {
    for (int slot = 0; slot < 2; ++slot) fs::remove(faults_ + std::to_string(slot));
  }
  /// Of one slot, or of both (-1). The file appears whole.
  static void inject(const std::string& fault, int only = -1) {
    for (int slot = 0; slot < 2; ++slot) {
      if (only >= 0 && slot != only) continue;
      const std::string path = faults_ + std::to_string(slot);
      std::ofstream(path + ".new") << fault;
      fs::rename(path + ".new", path);
    }
  }
  static int slot_of(const std::string& job) {
    const std::string worker = show_job(job).value("worker", "");
    return worker.empty() ? -1 : worker.back() - '0';
  }
  static bool ready(int workers) {
    return eventually(60'000, [&] {
      int count = 0;
      const Json listed = platform_->call("worker.list", Json::object());
      for (const Json& worker : listed["workers"]) count += worker.value("state", "") == "ready";
      return count == workers;
    });
  }
  static void expect_registry_untouched() {
    const Json check = platform_->call("registry.check", {{"verify_blobs", true}});
    EXPECT_TRUE(check.value("ok", false)) << check.dump(1);
  }
  /// The node of a slot's GPU, which CUDA numbers as the bus does.
  static std::string gpu_node(int slot) {
    std::vector<fs::path> gpus;
    std::error_code error;
    for (const auto& gpu : fs::directory_iterator("/proc/driver/nvidia/gpus", error))
      gpus.push_back(gpu.path());
    std::sort(gpus.begin(), gpus.end());
    if (slot < std::ssize(gpus)) {
      std::ifstream information(gpus[static_cast<std::size_t>(slot)] / "information");
      for (std::string line; std::getline(information, line);)
        if (line.starts_with("Device Minor:"))
          return str("/dev/nvidia", std::stoi(line.substr(line.find(':') + 1)));
    }
    return str("/dev/nvidia", slot);
  }
  static int count_in_log(int slot, const std::string& text) {
    std::ifstream log(
        str(platform_->data_dir(), "/log/engine-", on_gpus() ? "cuda" : "cpu", slot, ".log"));
    int count = 0;
    for (std::string line; std::getline(log, line);) count += line.find(text) != std::string::npos;
    return count;
  }
  static inline std::string faults_;
  static inline bool private_mounts_ = false;
};

TEST_F(Fault, OneInTrainingCostsARetryAndNotABit) {
  finish(submit("undisturbed", kSettings));
  const std::string job = submit("faulted", kSettings);
  ASSERT_TRUE(reaches(job, 15));
  const int slot = slot_of(job);
  ASSERT_GE(slot, 0);
  const pid_t before = platform_->engine(slot);
  inject("linear_backward once", slot);
  ASSERT_TRUE(eventually(30'000, [&] {
    const pid_t now = platform_->engine(slot);
    return now > 0 && now != before;
  })) << "the engine that met the fault goes on";
  finish(job);
  EXPECT_EQ(digest("faulted"), digest("undisturbed"));
  expect_registry_untouched();
}

TEST_F(Fault, AJobThatFaultsEveryTimeFailsAndRequestsAreAnsweredAllAlong) {
  inject("linear_backward");
  const std::string job = submit("hopeless", kSettings);
  int answered = 0;
  Json end;
  ASSERT_TRUE(eventually(120'000, [&] {
    const auto answer = platform_->generate("tiny", "say red 1", 4);
    EXPECT_TRUE(answer.ok()) << answer.status().to_string();
    ++answered;
    end = show_job(job);
    return end.value("state", "") == "failed";
  })) << end.dump(1);
  EXPECT_GT(answered, 1);
  EXPECT_NE(end.value("error", "").find("device failure on "), std::string::npos) << end.dump(1);
  EXPECT_NE(end.value("error", "").find("linear_backward"), std::string::npos) << end.dump(1);
  EXPECT_FALSE(platform_->try_call("adapter.show", {{"adapter", "hopeless"}}).ok());
  TearDown();
  ASSERT_TRUE(ready(2));
  finish(submit("afterwards", kSettings));
  expect_registry_untouched();
}

TEST_F(Fault, MemoryThatIsOutInSpiteOfThePlanFailsTheJobWithTheNumbers) {
  ASSERT_TRUE(ready(2));
  // As much as an idle engine has mapped, and too little for the job's masters beside it.
  std::int64_t most = 0;
  ASSERT_TRUE(eventually(20'000, [&] {  // both have sent a heartbeat since they started
    most = 0;
    int heard = 0;
    const Json listed = platform_->call("worker.list", Json::object());
    for (const Json& worker : listed["workers"]) {
      const Json stats = worker.value("stats", Json::object());
      const Json kinds = stats.value("memory_bytes", Json::object());
      heard += kinds.empty() ? 0 : 1;
      for (const auto& [kind, bytes] : kinds.items()) most += bytes.get<std::int64_t>();
    }
    return heard == 2;
  }));
  inject(str("memory ", most / 2 + (1 << 20)));
  const std::string job = submit("too-large", with(kSettings, {{"lora_r", 512}}));
  const Json end = platform_->wait_job(job);
  EXPECT_EQ(end.value("state", ""), "failed") << end.dump(1);
  EXPECT_NE(end.value("error", "").find("device memory is out"), std::string::npos) << end.dump(1);
  EXPECT_NE(end.value("error", "").find("B asked"), std::string::npos) << end.dump(1);
  expect_registry_untouched();
}

TEST_F(Fault, AnEngineThatCannotLoadIsTriedMoreAndMoreSeldomWhileTheOtherServes) {
  ASSERT_TRUE(ready(2));
  inject("pack_weight", 1);
  platform_->kill_process(platform_->engine(1));
  const auto starts = [&] { return count_in_log(1, "engine starts"); };
  const int before = starts();
  ASSERT_TRUE(eventually(60'000, [&] { return starts() >= before + 4; }));
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - begin < std::chrono::seconds(5)) {
    const auto answer = platform_->generate("tiny", "say red 1", 4);
    EXPECT_TRUE(answer.ok()) << answer.status().to_string();
  }
  // 20 ms, doubled by each: after five starts those of the next five take 10 s and more.
  EXPECT_LE(starts(), before + 4 + 7);
  TearDown();
  EXPECT_TRUE(ready(2)) << "it is tried again for ever, at most a minute apart";
}

/// As when a GPU falls off the bus: its process ends, and nobody can open it any more. The driver
/// numbers those that are left anew.
TEST_F(Fault, AGpuThatIsLostMovesItsJobAndItsSlotTakesNoOther) {
  if (!on_gpus()) GTEST_SKIP() << "it takes GPUs";
  if (!private_mounts_) GTEST_SKIP() << "it takes the right to mount";
  ASSERT_TRUE(ready(2));
  finish(submit("undisturbed-gpu", kSettings));
  const std::string job = submit("moved", kSettings);
  ASSERT_TRUE(reaches(job, 15));
  const int slot = slot_of(job);
  ASSERT_GE(slot, 0);
  const std::string node = gpu_node(slot);
  ASSERT_EQ(::mount("/dev/null", node.c_str(), nullptr, MS_BIND, nullptr), 0) << node;
  platform_->kill_process(platform_->engine(slot));
  int answered = 0, ran_on = -1;
  ASSERT_TRUE(eventually(120'000, [&] {
    const auto answer = platform_->generate("tiny", "say red 1", 4);
    EXPECT_TRUE(answer.ok()) << answer.status().to_string();
    ++answered;
    if (const int now = slot_of(job); now >= 0) ran_on = now;  // nowhere once it is done
    return show_job(job).value("state", "") == "done";
  })) << show_job(job).dump(1);
  EXPECT_GT(answered, 1);
  EXPECT_EQ(ran_on, 1 - slot);
  EXPECT_EQ(digest("moved"), digest("undisturbed-gpu"));
  EXPECT_TRUE(ready(1));
  EXPECT_GT(count_in_log(slot, "is not among the 1") + count_in_log(slot, "no usable GPU"), 0);
  expect_registry_untouched();
  ASSERT_EQ(::umount2(node.c_str(), MNT_DETACH), 0);
  EXPECT_TRUE(eventually(120'000, [&] { return ready(2); })) << "it is tried again for ever";
}

}  // namespace
}  // namespace tandem::test
