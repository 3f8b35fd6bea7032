// A job whose ranks lie on two hosts, whose processes are killed (far_pool.h; silent_host_test is
// of hosts that fall silent).
#include "tests/system/far_pool.h"

#include <gtest/gtest.h>

#include <csignal>
#include <map>
#include <vector>

namespace tandem::test {
namespace {

const Json kSettings{{"lora_r", 4},       {"learning_rate", 5e-3},
                     {"max_steps", 60},   {"per_device_train_batch_size", 1},
                     {"max_length", 128}, {"gradient_accumulation_steps", 4},
                     {"save_steps", 10},  {"adapter_dtype", "f32"}};

using FarGangs = FarPool;

TEST_F(FarGangs, TrainAsOneRankDoes) {
  (void)one_rank(kSettings);
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
    expect_losses_of_one_rank(job, kSettings);
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

/// Two workers on each host.
class FarPairs : public FarPool {
 protected:
  static void SetUpTestSuite() { start_far_pool(2); }
};

TEST_F(FarPairs, TrainAsOneRankDoesWithTensorParallelRanksOnOneHost) {
  (void)one_rank(kSettings);
  const std::vector<Json> layouts{{{"dp", 2}, {"tp", 2}},
                                  {{"tp", 2}, {"pp", 2}},
                                  {{"dp", 2}, {"tp", 2}, {"zero", 3}},
                                  {{"dp", 4}, {"zero", 3}}};
  for (const Json& layout : layouts) {
    std::string adapter = "pairs";
    for (const auto& [kind, count] : layout.items()) adapter += str("-", kind, count.get<int>());
    const std::string job = submit(adapter, with(kSettings, layout));
    ASSERT_TRUE(reaches(job, 1)) << show_job(job).dump(1);
    const Json workers = show_job(job)["workers"];
    ASSERT_EQ(workers.size(), 4u);
    const auto host = [&](std::size_t rank) {
      return workers[rank].get<std::string>().substr(0, 4);
    };
    EXPECT_EQ(host(0), host(1)) << workers.dump();
    EXPECT_EQ(host(2), host(3)) << workers.dump();
    EXPECT_NE(host(0), host(2)) << workers.dump();
    const Json end = finish(job);
    EXPECT_EQ(end.value("epoch", 0), 1) << end.dump(1);
    expect_losses_of_one_rank(job, kSettings);
    EXPECT_TRUE(platform_->generate(adapter, "say red 1", 4).ok());
  }
}

}  // namespace
}  // namespace tandem::test
