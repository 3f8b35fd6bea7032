// What tests of gangs over two hosts share: a pool whose coordinator is at the head (far_hosts.h),
// reached over TCP with keys, and one worker on each host, or more. No ssh is there. Skipped where
// namespaces cannot be made.
#pragma once

#include "tests/system/far_hosts.h"
#include "tests/system/tiny_pool.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>

namespace tandem::test {

class FarPool : public TinyPool {
 protected:
  static void SetUpTestSuite() { start_far_pool(1); }
  /// `each` workers on each host: slots 0 to `each` - 1 are host 0's.
  static void start_far_pool(int each) {
    if (lacks_gpus(each * FarHosts::kHosts)) return;
    each_ = each;
    hosts_ = std::make_unique<FarHosts>();
    if (!hosts_->made() || !hosts_->enter()) return;
    begin_pool(64, 4, FarHosts::address(FarHosts::kHead));
    for (int host = 0; host < FarHosts::kHosts; ++host) start_host(host);
    await_workers(each * FarHosts::kHosts);
  }
  static void TearDownTestSuite() {
    TinyPool::TearDownTestSuite();
    hosts_.reset();
  }
  void SetUp() override {
    TinyPool::SetUp();
    if (!platform_ && !IsSkipped())
      GTEST_SKIP() << "network namespaces cannot be made here (root, ip netns, bridges, unshare)";
  }
  /// Whatever happened: nothing of any gang is left on either host, and both are in the pool.
  void TearDown() override {
    if (!platform_) return;
    for (int host = 0; host < FarHosts::kHosts; ++host) FarHosts::speak(host);
    FarHosts::set_apart(false);
    await_workers(each_ * FarHosts::kHosts);
    for (int slot = 0; slot < each_ * FarHosts::kHosts; ++slot)
      EXPECT_TRUE(eventually(10'000, [&] {
        return !std::filesystem::exists(platform_->gang_directory(slot));
      })) << platform_->gang_directory(slot);
    EXPECT_TRUE(eventually(1000, [] { return gang_processes() == ""; })) << gang_processes();
  }
  static void start_host(int host) {
    for (int slot = host * each_; slot < (host + 1) * each_; ++slot)
      platform_->start_worker(slot, FarHosts::through(host));
  }
  /// The slot that leads the job, once it has one.
  static int leader(const std::string& job) {
    std::string worker;
    eventually(30'000, [&] { return !(worker = show_job(job).value("worker", "")).empty(); });
    return worker.empty() ? -1 : worker.back() - '0';
  }
  /// Processes of any gang of this pool, on any host: "orted 17, tandem-rank 18".
  static std::string gang_processes() {
    namespace fs = std::filesystem;
    std::string found;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator("/proc", error)) {
      const std::string pid = entry.path().filename().string();
      if (pid.find_first_not_of("0123456789") != std::string::npos) continue;
      std::string name = read(entry.path() / "comm");
      name = name.substr(0, name.find('\n'));
      if ((name == "mpirun" || name == "orted" || name == "tandem-rank") &&
          read(entry.path() / "environ").find(platform_->directory()) != std::string::npos)
        found += (found.empty() ? "" : ", ") + name + " " + pid;
    }
    return found;
  }
  /// The losses of the program's one-rank job, which the first call runs.
  static const std::map<std::int64_t, double>& one_rank(const Json& settings) {
    static const auto losses = [&] {
      const std::string job = submit("one", settings);
      finish(job);
      return platform_->losses(job);
    }();
    return losses;
  }
  static void expect_losses_of_one_rank(const std::string& job, const Json& settings) {
    const auto got = platform_->losses(job);
    ASSERT_EQ(got.size(), one_rank(settings).size());
    for (const auto& [step, loss] : one_rank(settings))
      EXPECT_NEAR(got.at(step), loss, 1e-5) << "step " << step;
  }
  static inline std::unique_ptr<FarHosts> hosts_;

 private:
  static inline int each_ = 1;

  static std::string read(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
};

}  // namespace tandem::test
