// What tests of jobs and replicas over several workers share: one platform with a tiny model "tiny"
// and a data set, for all tests of a program, and what they ask of jobs. Its workers are CPU slots,
// or, with TANDEM_TEST_GPU set, the first two GPUs of this machine.
#pragma once

#include "kernels/cuda/cuda_backend.h"
#include "tests/support/tiny_model.h"
#include "tests/system/platform.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>

namespace tandem::test {

/// `settings` with `more` on top.
inline Json with(Json settings, const Json& more) {
  settings.update(more);
  return settings;
}

/// Ends a test that needs more workers than the pool has.
#define TANDEM_NEEDS_WORKERS(count) \
  if (workers() < (count))          \
  GTEST_SKIP() << "it takes " << (count) << " workers, and this pool has " << workers()

class TinyPool : public testing::Test {
 protected:
  static constexpr int kGpus = 2;
  static bool on_gpus() { return std::getenv("TANDEM_TEST_GPU") != nullptr; }
  static int workers() { return workers_; }
  /// How long a gang with a hanging rank may take to end: its patience, and as much again.
  static TimeMs hang_limit_ms() { return on_gpus() ? 30'000 : 10'000; }

  void SetUp() override {
    if (!missing_.empty()) GTEST_SKIP() << missing_;
  }

  /// Starts the platform and waits until all workers are ready: `cpus`, or as many GPUs as tests
  /// use. `rows` of data, `layers` blocks.
  static void start_pool(int cpus, int rows, std::int64_t layers = 2,
                         const std::string& gang_timeout_s = on_gpus() ? "15" : "5") {
    if (lacks_gpus()) return;
    begin_pool(rows, layers, "", gang_timeout_s);
    const int count = on_gpus() ? kGpus : cpus;
    for (int slot = 0; slot < count; ++slot) platform_->start_worker(slot);
    await_workers(count);
  }
  /// Whether GPUs are asked for and fewer than `count` are there; tests are then skipped.
  static bool lacks_gpus(int count = kGpus) {
    if (!on_gpus()) return false;
    if (const auto last = kernels::probe_cuda_device(count - 1); !last.ok())
      missing_ = str("it takes ", count, " GPUs: ", last.status().message());
    return !missing_.empty();
  }
  /// The same without workers; `address`: see Platform::listen_at.
  static void begin_pool(int rows, std::int64_t layers, const std::string& address = "",
                         const std::string& gang_timeout_s = on_gpus() ? "15" : "5") {
    platform_ = std::make_unique<Platform>(std::vector<std::string>{
        "--dtype", "f32", "--numerics", "invariant", "--threads", "1", "--kv-bytes-max", "4MiB",
        "--device", on_gpus() ? "cuda" : "cpu", "--gang-timeout-s", gang_timeout_s});
    if (!address.empty()) platform_->listen_at(address);
    write_tiny_model(platform_->directory() + "/model", 7, layers);
    write_tiny_dataset(platform_->directory() + "/train.jsonl", rows, 8);
    platform_->start_coordinator();
    platform_->call("model.add", {{"name", "tiny"}, {"path", platform_->directory() + "/model"}});
    data_ = platform_->add_data(platform_->directory() + "/train.jsonl");
  }
  static void await_workers(int count) {
    workers_ = count;
    ASSERT_TRUE(eventually(60'000, [&] {
      int ready = 0;
      const Json listed = platform_->call("worker.list", Json::object());
      for (const Json& worker : listed["workers"]) ready += worker.value("state", "") == "ready";
      return ready == workers_;
    }));
  }
  static void TearDownTestSuite() { platform_.reset(); }
  /// Whatever happened: nothing of any gang is left.
  static void expect_no_gangs() {
    for (int slot = 0; platform_ && slot < workers_; ++slot)
      EXPECT_TRUE(eventually(10'000, [&] {
        return !std::filesystem::exists(platform_->gang_directory(slot));
      })) << platform_->gang_directory(slot);
  }

  /// A job that publishes an adapter; its id.
  static std::string submit(const std::string& adapter, const Json& settings) {
    return platform_->submit("tiny", data_, adapter, settings);
  }
  /// How it ended, which must be well.
  static Json finish(const std::string& job) {
    const Json end = platform_->wait_job(job);
    EXPECT_EQ(end.value("state", ""), "done") << end.dump(1);
    return end;
  }
  static Json show_job(const std::string& job) {
    return platform_->call("job.show", {{"job", job}});
  }
  static bool reaches(const std::string& job, std::int64_t step) {
    return eventually(60'000, [&] { return show_job(job).value("step", std::int64_t{0}) >= step; });
  }
  static std::string digest(const std::string& adapter) {
    return platform_->call("adapter.show", {{"adapter", adapter}}).value("digest", "");
  }

  static inline std::unique_ptr<Platform> platform_;
  static inline std::string data_;

 private:
  static inline int workers_ = 0;
  static inline std::string missing_;
};

}  // namespace tandem::test
