// A disk that is full when a job ends: what was trained waits for room, it is not trained again.
// Needs root (or another way to mount); says so and skips where that cannot be had.
#include "tests/support/tiny_model.h"
#include "tests/system/platform.h"

#include <gtest/gtest.h>

#include <sys/mount.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace tandem::test {
namespace {

namespace fs = std::filesystem;

class FullRegistry : public testing::Test {
 protected:
  void SetUp() override {
    fs::create_directories(blobs());
    if (::mount("tmpfs", blobs().c_str(), "tmpfs", 0, "size=48m,mode=0700") != 0)
      GTEST_SKIP() << "cannot mount a tmpfs (" << std::strerror(errno)
                   << "): the full disk is not tested here";
    mounted_ = true;
  }
  void TearDown() override {
    if (mounted_) ::umount2(blobs().c_str(), MNT_DETACH);
  }
  [[nodiscard]] std::string blobs() const { return platform_.data_dir() + "/blobs"; }
  /// Takes every byte that is left.
  void fill() const {
    std::ofstream ballast(blobs() + "/ballast", std::ios::binary | std::ios::app);
    for (std::size_t bytes = 1 << 20; bytes > 0; bytes /= 2) {
      const std::string block(bytes, 'x');
      while (ballast.write(block.data(), static_cast<std::streamsize>(bytes)).flush()) continue;
      ballast.clear();
    }
  }
  [[nodiscard]] bool logged(const std::string& job, const std::string& what) const {
    return platform_.cli({"job", "logs", job}).out.find(what) != std::string::npos;
  }
  Platform platform_{{"--dtype", "f32", "--threads", "1", "--kv-bytes-max", "8MiB",
                      "--registry-bytes-max", "16MiB", "--blobs-bytes-max", "1GiB"}};
  bool mounted_ = false;
};

TEST_F(FullRegistry, WhatWasTrainedIsPublishedWhenThereIsRoomAgain) {
  const std::string model = platform_.directory() + "/model",
                    data = platform_.directory() + "/train.jsonl";
  write_tiny_model(model, 7);
  write_tiny_dataset(data, 16, 8);
  platform_.start_coordinator();
  platform_.start_worker();
  ASSERT_EQ(platform_.cli({"model", "add", "tiny", model}).code, 0);
  const std::string digest = platform_.add_data(data);
  fill();
  const std::string job = platform_.submit("tiny", digest, "guide",
                                           {{"max_steps", 3}, {"max_length", 128}, {"lora_r", 64}});
  ASSERT_TRUE(eventually(60'000, [&] { return logged(job, "not stored yet"); }))
      << platform_.cli({"job", "logs", job}).out;
  EXPECT_TRUE(logged(job, "disk full"));
  fs::remove(blobs() + "/ballast");
  const Json ended = platform_.wait_job(job);
  EXPECT_EQ(ended.value("state", ""), "done") << ended.dump();
  EXPECT_EQ(ended.value("attempts", 0), 1) << "nothing was trained twice";
  EXPECT_EQ(platform_.cli({"registry", "check"}).code, 0);
}

/// What a worker keeps of models lies on a disk that has no room for another.
TEST(FullModelCache, AFullFineTuneSaysSoLeavesNothingHalfWrittenAndIsPublishedOnceThereIsRoom) {
  Platform platform({"--dtype", "f32", "--threads", "1", "--kv-bytes-max", "8MiB"});
  const std::string models = platform.data_dir() + "/cache/models";
  fs::create_directories(models);
  if (::mount("tmpfs", models.c_str(), "tmpfs", 0, "size=64k,mode=0700") != 0)
    GTEST_SKIP() << "cannot mount a tmpfs (" << std::strerror(errno)
                 << "): the full disk is not tested here";
  const std::string model = platform.directory() + "/model",
                    data = platform.directory() + "/train.jsonl";
  write_tiny_model(model, 7);
  write_tiny_dataset(data, 16, 8);
  platform.start_coordinator();
  platform.start_worker();
  EXPECT_EQ(platform.cli({"model", "add", "tiny", model}).code, 0);
  const auto output =
      platform.cli({"--json", "train", "--model", "tiny", "--data", data, "--method", "full",
                    "--name", "new", "--max-steps", "3", "--max-length", "128"});
  const std::string job = Json::parse(output.out).value("job", "");
  const Json failed = platform.wait_job(job);
  EXPECT_EQ(failed.value("state", ""), "failed") << failed.dump(1);
  EXPECT_NE(failed.value("error", "").find("No space left"), std::string::npos) << failed.dump(1);
  EXPECT_TRUE(eventually(10'000, [&] { return fs::is_empty(models); }));
  ::umount2(models.c_str(), MNT_DETACH);
  EXPECT_EQ(platform.cli({"job", "resume", job}).code, 0);
  const Json ended = platform.wait_job(job);
  EXPECT_EQ(ended.value("state", ""), "done") << ended.dump(1);
  EXPECT_EQ(ended.value("step", 0), 3);
  EXPECT_EQ(platform.cli({"generate", "--model", "new", "--prompt", "a", "--max-tokens", "2"}).code,
            0);
}

}  // namespace
}  // namespace tandem::test
