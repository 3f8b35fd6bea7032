// What tests of jobs and replicas over several workers share: one platform of CPU workers with a
// tiny model "tiny" and a data set, for all tests of a program, and what they ask of jobs.
#pragma once

#include "tests/support/tiny_model.h"
#include "tests/system/platform.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>

namespace tandem::test {

/// `settings` with `more` on top.
inline Json with(Json settings, const Json& more) {
  settings.update(more);
  return settings;
}

class TinyPool : public testing::Test {
 protected:
  /// Starts the platform and waits until all `workers` are ready. `rows` of data, `layers` blocks.
  static void start_pool(int workers, int rows, std::int64_t layers = 2) {
    begin_pool(rows, layers);
    for (int slot = 0; slot < workers; ++slot) platform_->start_worker(slot);
    await_workers(workers);
  }
  /// The same without workers.
  static void begin_pool(int rows, std::int64_t layers) {
    platform_ = std::make_unique<Platform>(
        std::vector<std::string>{"--dtype", "f32", "--threads", "1", "--kv-bytes-max", "4MiB",
                                 "--device", "cpu", "--gang-timeout-s", "5"});
    write_tiny_model(platform_->directory() + "/model", 7, layers);
    write_tiny_dataset(platform_->directory() + "/train.jsonl", rows, 8);
    platform_->start_coordinator();
    platform_->call("model.add", {{"name", "tiny"}, {"path", platform_->directory() + "/model"}});
    data_ = platform_->add_data(platform_->directory() + "/train.jsonl");
  }
  static void await_workers(int workers) {
    ASSERT_TRUE(eventually(60'000, [&] {
      int ready = 0;
      const Json listed = platform_->call("worker.list", Json::object());
      for (const Json& worker : listed["workers"]) ready += worker.value("state", "") == "ready";
      return ready == workers;
    }));
  }
  static void TearDownTestSuite() { platform_.reset(); }

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
};

}  // namespace tandem::test
