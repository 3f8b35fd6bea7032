// A host that falls silent (its power or its cable is gone: nobody is told) in the middle of a job
// or an answer, and one that is back before anybody's patience ends (far_pool.h).
#include "tests/system/far_pool.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>

namespace tandem::test {
namespace {

const Json kSettings{{"lora_r", 4},       {"learning_rate", 5e-3},
                     {"max_steps", 200},  {"per_device_train_batch_size", 1},
                     {"max_length", 128}, {"gradient_accumulation_steps", 4},
                     {"save_steps", 10},  {"adapter_dtype", "f32"}};
constexpr TimeMs kGangLimitMs = 10'000;  ///< until nothing of a gang with a silent rank is left
constexpr int kFlapMs = 2000, kSilentS = 8;

/// Requests of the base, one after another in a few threads, until they are checked.
class Asking {
 public:
  explicit Asking(Platform& platform) : platform_(platform) {
    (void)platform_.client();  // made once, before threads use it
    for (int i = 0; i < kThreads; ++i)
      threads_.emplace_back([this, i] {
        for (int n = 0; !over_; ++n) ask(str("asker ", i, " says ", n));
      });
  }
  ~Asking() { stop(); }
  Asking(const Asking&) = delete;
  Asking& operator=(const Asking&) = delete;
  void stop() {
    over_ = true;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  [[nodiscard]] int answered() const { return answered_; }
  [[nodiscard]] TimeMs longest_pause_ms() const { return longest_pause_ms_; }
  /// That all were answered, and as they are now.
  void expect_right() {
    stop();
    EXPECT_EQ(failures_, "");
    for (const auto& [prompt, tokens] : got_) {
      const auto now = platform_.generate("tiny", prompt, kTokens);
      ASSERT_TRUE(now.ok()) << now.status().to_string();
      ASSERT_EQ(tokens, now->tokens) << prompt;
    }
  }

 private:
  static constexpr int kThreads = 4, kTokens = 8;
  void ask(const std::string& prompt) {
    const auto answer = platform_.generate("tiny", prompt, kTokens);
    const std::int64_t end = steady_ns();
    {
      const std::lock_guard lock(mutex_);
      if (answer.ok())
        got_[prompt] = answer->tokens;
      else
        failures_ += prompt + ": " + answer.status().to_string() + "\n";
      longest_pause_ms_ = std::max<TimeMs>(longest_pause_ms_, (end - last_ns_) / 1'000'000);
      last_ns_ = end;
    }
    ++answered_;
    ::usleep(20'000);
  }

  Platform& platform_;
  std::vector<std::thread> threads_;
  std::atomic<bool> over_{false};
  std::atomic<int> answered_{0};
  std::mutex mutex_;
  std::int64_t last_ns_ = steady_ns();
  TimeMs longest_pause_ms_ = 0;
  std::map<std::string, std::vector<std::int32_t>> got_;
  std::string failures_;
};

class SilentHosts : public FarPool {
 protected:
  /// The digest of an undisturbed job of these settings.
  static std::string calm(const std::string& kind) {
    static std::map<std::string, std::string> known;
    if (!known.contains(kind)) {
      finish(submit("calm-" + kind, with(kSettings, {{kind, 2}})));
      known[kind] = digest("calm-" + kind);
    }
    return known[kind];
  }
  static std::string state(int host) {
    const Json listed = platform_->call("worker.list", Json::object());
    for (const Json& worker : listed["workers"])
      if (worker.value("host", "") == FarHosts::name(host)) return worker.value("state", "");
    return "";
  }
  static Json replica() {
    const Json list = platform_->call("replica.list", Json::object()).at("replicas");
    return list.empty() ? Json::object() : list.at(0);
  }
};

/// The host of the first rank, or the other one.
class SilentHostOfAGang : public SilentHosts, public testing::WithParamInterface<bool> {};
INSTANTIATE_TEST_SUITE_P(Of, SilentHostOfAGang, testing::Bool(), [](const auto& param) {
  return param.param ? "TheFirstRank" : "AnotherRank";
});

TEST_P(SilentHostOfAGang, EndsTheGangInTimeAndTheJobGoesOnToTheSameBitsWhenItIsBack) {
  const std::string expected = calm("dp"), name = GetParam() ? "led" : "joined";
  const std::string job = submit(name, with(kSettings, {{"dp", 2}}));
  ASSERT_TRUE(reaches(job, 15));
  const int silent = GetParam() ? leader(job) : 1 - leader(job), other = 1 - silent;
  const pid_t engines[] = {platform_->engine(0), platform_->engine(1)};
  Asking asking(*platform_);
  ASSERT_TRUE(eventually(10'000, [&] { return asking.answered() > 8; }));

  FarHosts::silence(silent);
  EXPECT_TRUE(eventually(kGangLimitMs, [] { return gang_processes() == ""; })) << gang_processes();
  EXPECT_TRUE(eventually(kGangLimitMs, [&] { return state(silent) == "lost"; }));
  EXPECT_EQ(state(other), "ready");
  EXPECT_TRUE(eventually(kGangLimitMs, [&] {
    const Json shown = show_job(job);
    const std::string reason = shown.value("reason", "");
    return shown.value("state", "") == "queued" &&
           reason.find("needs 2 workers of 2 hosts at once, 1 are free") != std::string::npos &&
           reason.find(FarHosts::name(silent) + "/cpu" + std::to_string(silent) +
                       " is not connected") != std::string::npos;
  })) << show_job(job).dump(1);
  const int answered = asking.answered();
  EXPECT_TRUE(eventually(10'000, [&] { return asking.answered() > answered + 20; }));
  ::sleep(kSilentS);  // longer than connections live

  FarHosts::speak(silent);
  await_workers(2);
  const Json end = finish(job);
  EXPECT_EQ(digest(name), expected);
  EXPECT_EQ(end.value("epoch", 0), 2) << end.dump(1);
  asking.expect_right();
  EXPECT_LT(asking.longest_pause_ms(), scaled_ms(2000)) << "the other engine answers all along";
  for (int host = 0; host < 2; ++host) EXPECT_EQ(platform_->engine(host), engines[host]);
}

TEST_F(SilentHosts, LessThanThePatienceCostsNothing) {
  const std::string expected = calm("tp");
  const std::string job = submit("flap", with(kSettings, {{"tp", 2}}));
  Asking asking(*platform_);
  for (const int host : {0, 1}) {
    const std::int64_t step = show_job(job).value("step", std::int64_t{0});
    ASSERT_TRUE(reaches(job, step + 15));
    FarHosts::silence(host);
    ::usleep(kFlapMs * 1000);
    FarHosts::speak(host);
  }
  const Json end = finish(job);
  EXPECT_EQ(end.value("epoch", 0), 1) << end.dump(1);
  EXPECT_EQ(digest("flap"), expected);
  asking.expect_right();
}

TEST_F(SilentHosts, AnElasticJobGoesOnWithoutTheHost) {
  const Json settings = with(kSettings, {{"max_steps", 60}});
  (void)one_rank(settings);
  const std::string job = submit("elastic", with(settings, {{"dp", 2}, {"dp_min", 1}}));
  ASSERT_TRUE(reaches(job, 12));
  FarHosts::silence(1 - leader(job));
  ASSERT_TRUE(eventually(30'000, [&] {
    const Json shown = show_job(job);
    return shown.value("epoch", 0) == 2 && shown.value("state", "") == "running";
  })) << show_job(job).dump(1);
  const Json end = finish(job);
  EXPECT_EQ(end.value("epoch", 0), 2) << end.dump(1);
  expect_losses_of_one_rank(job, settings);
}

TEST_F(SilentHosts, AReplicaGoesOnElsewhereWithoutALostOrRepeatedToken) {
  constexpr std::int64_t kLong = 300;
  const Json made = platform_->call("replica.add", {{"model", "tiny"}, {"tp", 2}});
  const std::string id = made.at("replicas").at(0).at("replica");
  std::map<std::string, std::vector<std::int32_t>> got;
  for (const int host : {1, 0}) {
    ASSERT_TRUE(eventually(60'000, [&] { return replica().value("state", "") == "serving"; }))
        << replica().dump(1);
    const int epoch = replica().value("epoch", 0);
    std::mutex mutex;
    std::vector<std::thread> threads;
    for (int i = 0; i < 6; ++i)
      threads.emplace_back([&, prompt = str("silent host ", host, " says ", i)] {
        const auto answer = platform_->generate("tiny", prompt, kLong);
        EXPECT_TRUE(answer.ok()) << answer.status().to_string();
        const std::lock_guard lock(mutex);
        if (answer.ok()) got[prompt] = answer->tokens;
      });
    EXPECT_TRUE(eventually(20'000, [&] { return replica().value("requests", 0) > 0; }));
    FarHosts::silence(host);
    for (std::thread& thread : threads) thread.join();
    EXPECT_TRUE(eventually(kGangLimitMs, [] { return gang_processes() == ""; }))
        << gang_processes();
    EXPECT_TRUE(eventually(kGangLimitMs, [&] { return state(host) == "lost"; }));
    FarHosts::speak(host);
    EXPECT_TRUE(eventually(60'000, [&] {
      const Json shown = replica();
      return shown.value("state", "") == "serving" && shown.value("epoch", 0) > epoch;
    })) << replica().dump(1);
  }
  platform_->call("replica.rm", {{"replica", id}});
  ASSERT_TRUE(eventually(30'000, [&] { return replica().empty(); })) << replica().dump(1);
  EXPECT_EQ(got.size(), 12u);
  for (const auto& [prompt, tokens] : got) {
    const auto now = platform_->generate("tiny", prompt, kLong);
    ASSERT_TRUE(now.ok()) << now.status().to_string();
    EXPECT_EQ(tokens, now->tokens) << prompt;
  }
}

TEST_F(SilentHosts, HostsThatDoNotReachEachOtherAreNamedAsWhyTheJobWaits) {
  if (std::getenv("TANDEM_TEST_FULL") == nullptr) GTEST_SKIP() << "takes a minute: --full";
  FarHosts::set_apart(true);
  const std::string job = submit("apart", with(kSettings, {{"dp", 2}, {"max_steps", 20}}));
  std::string reason;
  EXPECT_TRUE(eventually(150'000, [&] {
    reason = show_job(job).value("reason", "");
    return reason.find("must reach each other over TCP, any port: far0, far1") != std::string::npos;
  })) << reason;
  FarHosts::set_apart(false);
  finish(job);
}

}  // namespace
}  // namespace tandem::test
