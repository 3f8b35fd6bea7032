// A job whose ranks lie on two hosts: each a network namespace with a name of its own and one
// worker, joined by a veth pair; the coordinator is reached through its socket's file. No ssh is
// there: the second host's ranks are started by its agent. Skipped where namespaces cannot be made.
#include "tests/system/tiny_pool.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <map>

namespace tandem::test {
namespace {

namespace fs = std::filesystem;

const Json kSettings{{"lora_r", 4},       {"learning_rate", 5e-3},
                     {"max_steps", 60},   {"per_device_train_batch_size", 1},
                     {"max_length", 128}, {"gradient_accumulation_steps", 4},
                     {"save_steps", 10},  {"adapter_dtype", "f32"}};

/// Two namespaces that see each other, for as long as it lives.
class TwoHosts {
 public:
  TwoHosts() {
    made_ = run(str("ip netns add ", space(0))) && run(str("ip netns add ", space(1))) &&
            run(str("ip link add ", link(0), " netns ", space(0), " type veth peer name ", link(1),
                    " netns ", space(1)));
    for (int i = 0; made_ && i < 2; ++i)
      made_ = run(str("ip -n ", space(i), " addr add 10.87.0.", i + 1, "/24 dev ", link(i))) &&
              run(str("ip -n ", space(i), " link set lo up")) &&
              run(str("ip -n ", space(i), " link set ", link(i), " up")) &&
              run(str("ip netns exec ", space(i), " unshare --uts true"));
  }
  ~TwoHosts() {
    for (int i = 0; i < 2; ++i) run(str("ip netns del ", space(i)));
  }
  TwoHosts(const TwoHosts&) = delete;
  TwoHosts& operator=(const TwoHosts&) = delete;
  [[nodiscard]] bool made() const { return made_; }
  /// What a program is started through on a host: its namespace, and its name.
  static std::vector<std::string> through(int host) {
    return {"ip",        "netns",   "exec",
            space(host), "unshare", "--uts",
            "sh",        "-c",      str("hostname far", host, " && exec \"$0\" \"$@\"")};
  }

 private:
  static std::string space(int i) { return str("tandem-", ::getpid(), "-", i); }
  static std::string link(int i) { return str("tdm", ::getpid() % 100000, "x", i); }
  static bool run(const std::string& command) {
    return std::system((command + " 2>/dev/null").c_str()) == 0;
  }
  bool made_ = false;
};

class FarGangs : public TinyPool {
 protected:
  static void SetUpTestSuite() {
    if (on_gpus()) return;
    hosts_ = std::make_unique<TwoHosts>();
    if (!hosts_->made()) return;
    begin_pool(64, 4);
    for (int host = 0; host < 2; ++host) start_host(host);
    await_workers(2);
  }
  static void TearDownTestSuite() {
    TinyPool::TearDownTestSuite();
    hosts_.reset();
  }
  void SetUp() override {
    if (on_gpus()) GTEST_SKIP() << "a gang of GPUs stays within one host";
    if (!hosts_->made())
      GTEST_SKIP() << "network namespaces cannot be made here (root, ip netns, veth, unshare)";
  }
  /// Whatever happened: nothing of any gang is left on either host.
  void TearDown() override {
    for (int slot = 0; hosts_ && hosts_->made() && slot < 2; ++slot)
      EXPECT_TRUE(eventually(10'000, [&] { return !fs::exists(platform_->gang_directory(slot)); }))
          << platform_->gang_directory(slot);
  }
  static void start_host(int host) { platform_->start_worker(host, TwoHosts::through(host)); }
  /// The slot that leads the job, once it has one.
  static int leader(const std::string& job) {
    std::string worker;
    eventually(30'000, [&] { return !(worker = show_job(job).value("worker", "")).empty(); });
    return worker.empty() ? -1 : worker.back() - '0';
  }
  static const std::map<std::int64_t, double>& one_rank() {
    static const auto losses = [] {
      const std::string job = submit("one", kSettings);
      finish(job);
      return platform_->losses(job);
    }();
    return losses;
  }
  static void expect_losses_of_one_rank(const std::string& job) {
    const auto got = platform_->losses(job);
    ASSERT_EQ(got.size(), one_rank().size());
    for (const auto& [step, loss] : one_rank())
      EXPECT_NEAR(got.at(step), loss, 1e-5) << "step " << step;
  }
  static inline std::unique_ptr<TwoHosts> hosts_;
};

TEST_F(FarGangs, TrainAsOneRankDoes) {
  (void)one_rank();
  for (const char* kind : {"dp", "tp"}) {
    const std::string job = submit(str("far-", kind), with(kSettings, {{kind, 2}}));
    ASSERT_TRUE(reaches(job, 1)) << show_job(job).dump(1);
    const Json workers = show_job(job)["workers"];
    ASSERT_EQ(workers.size(), 2u);
    EXPECT_NE(workers[0].get<std::string>().substr(0, 4),
              workers[1].get<std::string>().substr(0, 4))
        << "one of each host: " << workers.dump();
    const Json end = finish(job);
    EXPECT_EQ(end.value("epoch", 0), 1) << end.dump(1);
    expect_losses_of_one_rank(job);
    EXPECT_TRUE(platform_->generate(str("far-", kind), "say red 1", 4).ok());
  }
}

TEST_F(FarGangs, ARankOfTheOtherHostKilledCostsARetryAndNotABit) {
  const Json settings = with(kSettings, {{"tp", 2}, {"max_steps", 120}});
  finish(submit("far-calm", settings));
  const std::string job = submit("far-killed", settings);
  ASSERT_TRUE(reaches(job, 15));
  const pid_t pid = platform_->gang_rank(1, 1 - leader(job));
  ASSERT_GT(pid, 0);
  ::kill(pid, SIGKILL);
  const Json end = finish(job);
  EXPECT_EQ(end.value("epoch", 0), 2) << end.dump(1);
  EXPECT_EQ(digest("far-killed"), digest("far-calm"));
}

TEST_F(FarGangs, AHostThatDiesEndsTheGangAndTheJobGoesOnWhenItIsBack) {
  const Json settings = with(kSettings, {{"dp", 2}, {"max_steps", 200}});
  finish(submit("far-steady", settings));
  const std::string job = submit("far-lost", settings);
  ASSERT_TRUE(reaches(job, 15));
  const int host = 1 - leader(job);
  for (const pid_t pid :
       {platform_->supervisor(host), platform_->agent(host), platform_->engine(host),
        platform_->gang_mpirun(host), platform_->gang_rank(1, host)}) {
    ASSERT_GT(pid, 0);
    ::kill(pid, SIGKILL);
  }
  // Until the host's lease has run out it may be tried again; then the job waits for two workers.
  EXPECT_TRUE(eventually(40'000, [&] {
    const Json shown = show_job(job);
    return shown.value("state", "") == "queued" &&
           shown.value("reason", "").find("2 workers of 2 hosts") != std::string::npos;
  })) << show_job(job).dump(1);
  start_host(host);
  const Json end = finish(job);
  EXPECT_GE(end.value("epoch", 0), 2) << end.dump(1);
  EXPECT_EQ(digest("far-lost"), digest("far-steady"));
}

TEST_F(FarGangs, TheOtherHostsAgentsDeathCostsItNoStep) {
  const Json settings = with(kSettings, {{"tp", 2}, {"max_steps", 200}});
  finish(submit("far-whole", settings));
  const std::string job = submit("far-orphaned", settings);
  ASSERT_TRUE(reaches(job, 5));
  const int host = 1 - leader(job);
  platform_->kill_process(platform_->agent(host));
  ASSERT_TRUE(eventually(20'000, [&] { return platform_->agent(host) > 0; }));
  const Json end = finish(job);
  EXPECT_EQ(end.value("epoch", 0), 1) << end.dump(1);
  EXPECT_EQ(digest("far-orphaned"), digest("far-whole"));
}

TEST_F(FarGangs, AReplicaOverBothHostsAnswersAsAnEngineDoes) {
  const auto ask = [](const std::string& prompt) {
    const auto answer = platform_->generate("tiny", prompt, 24);
    EXPECT_TRUE(answer.ok()) << answer.status().to_string();
    return answer.ok() ? answer->tokens : std::vector<std::int32_t>{};
  };
  const auto shown = [] {
    const Json list = platform_->call("replica.list", Json::object()).at("replicas");
    return list.empty() ? Json::object() : list.at(0);
  };
  for (const char* kind : {"tp", "pp"}) {
    const Json made = platform_->call("replica.add", {{"model", "tiny"}, {kind, 2}});
    ASSERT_TRUE(eventually(60'000, [&] { return shown().value("state", "") == "serving"; }))
        << shown().dump(1);
    std::map<std::string, std::vector<std::int32_t>> got;
    for (int i = 0; i < 6; ++i) {  // prompts that no engine has seen: the idle replica gets most
      const std::string prompt = str(kind, " from afar ", i);
      got[prompt] = ask(prompt);
    }
    EXPECT_TRUE(eventually(
        5'000, [&] { return shown()["stats"].value("decode_tokens", std::int64_t{0}) >= 24; }))
        << "it was the replica that answered: " << shown().dump(1);
    platform_->call("replica.rm", {{"replica", made.at("replicas").at(0).at("replica")}});
    ASSERT_TRUE(eventually(30'000, [&] { return shown().empty(); })) << shown().dump(1);
    for (const auto& [prompt, tokens] : got) {
      EXPECT_EQ(tokens.size(), 24u);
      EXPECT_EQ(tokens, ask(prompt)) << prompt;
    }
  }
}

}  // namespace
}  // namespace tandem::test
