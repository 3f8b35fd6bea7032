// Replicas as a user has them: a base served over several workers beside the engines, answers as a
// single engine gives them, adapters that come while it serves, every rank killed or stopped while
// it streams, a coordinator that dies, removal.
#include "tests/system/tiny_pool.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <csignal>
#include <set>
#include <thread>

namespace tandem::test {
namespace {

constexpr std::int64_t kLong = 300;  ///< tokens of an answer that is to be caught on its way
const Json kSettings{{"lora_r", 4},       {"learning_rate", 5e-3},
                     {"max_steps", 8},    {"per_device_train_batch_size", 1},
                     {"max_length", 128}, {"adapter_dtype", "f32"}};

class Replicas : public TinyPool {
 protected:
  static void SetUpTestSuite() {
    start_pool(4, 32);
    if (platform_) train("tuned");
  }
  /// Whatever happened: nothing of any replica is left.
  void TearDown() override {
    if (!platform_) return;
    for (const Json& replica : list())
      platform_->call("replica.rm", {{"replica", replica["replica"]}});
    EXPECT_TRUE(eventually(30'000, [] { return list().empty(); })) << list().dump(1);
    expect_no_gangs();
  }

  static void train(const std::string& adapter, int seed = 1) {
    finish(submit(adapter, with(kSettings, {{"seed", seed}})));
  }
  static Json list() {
    return platform_->call("replica.list", Json::object()).value("replicas", Json::array());
  }
  static Json show(const std::string& id) {
    for (const Json& replica : list())
      if (replica.value("replica", "") == id) return replica;
    return Json::object();
  }
  static bool serves(const std::string& id, int epoch_min = 1) {
    return eventually(60'000, [&] {
      const Json shown = show(id);
      return shown.value("state", "") == "serving" && shown.value("epoch", 0) >= epoch_min;
    });
  }
  static std::vector<std::string> add(const Json& layout) {
    Json params{{"model", "tiny"}};
    params.update(layout);
    std::vector<std::string> ids;
    const Json made = platform_->call("replica.add", params);
    for (const Json& replica : made.value("replicas", Json::array()))
      ids.push_back(replica["replica"].get<std::string>());
    // What is published already is loaded by it, too: of engines and replicas that have an adapter
    // an idle replica is preferred.
    for (const std::string& id : ids)
      EXPECT_TRUE(serves(id) &&
                  eventually(20'000, [&] { return show(id).value("adapters", 0) > 0; }))
          << show(id).dump(1);
    return ids;
  }
  static void remove(const std::string& id) {
    platform_->call("replica.rm", {{"replica", id}});
    EXPECT_TRUE(eventually(30'000, [&] { return show(id).empty(); })) << show(id).dump(1);
  }
  static int leader(const std::string& id) {
    const std::string worker = show(id).value("worker", "");
    return worker.empty() ? -1 : worker.back() - '0';
  }
  static std::int64_t decoded(const std::string& id) {
    const Json shown = show(id);
    return shown["stats"].value("decode_tokens", std::int64_t{0});
  }
  static std::vector<std::int32_t> tokens(const std::string& model, const std::string& prompt,
                                          std::int64_t count = 24) {
    const auto answer = platform_->generate(model, prompt, count);
    EXPECT_TRUE(answer.ok()) << answer.status().to_string();
    return answer.ok() ? answer->tokens : std::vector<std::int32_t>{};
  }
  /// What the engines answer while no replica is there.
  static const std::vector<std::int32_t>& reference(const std::string& model,
                                                    const std::string& prompt,
                                                    std::int64_t count = 24) {
    static std::map<std::string, std::vector<std::int32_t>> known;
    const std::string key = model + "\n" + prompt + "\n" + std::to_string(count);
    if (!known.contains(key)) {
      EXPECT_TRUE(list().empty());
      known[key] = tokens(model, prompt, count);
    }
    return known[key];
  }
  /// The prompts of this test: other tests' were seen by engines, which are then preferred.
  static std::vector<std::string> prompts(const std::string& test, int count) {
    std::vector<std::string> all;
    for (int i = 0; i < count; ++i) all.push_back(test + " say red " + std::to_string(i));
    return all;
  }

  /// Long answers, on their way at once; each is checked against the engines' when it is there.
  class Streams {
   public:
    Streams(const std::string& model, const std::vector<std::string>& prompts)
        : model_(model), prompts_(prompts), got_(prompts.size()) {
      for (std::size_t i = 0; i < prompts.size(); ++i)
        threads_.emplace_back([this, i] { got_[i] = tokens(model_, prompts_[i], kLong); });
    }
    ~Streams() { join(); }
    void join() {
      for (std::thread& thread : threads_) thread.join();
      threads_.clear();
    }
    [[nodiscard]] const std::vector<std::vector<std::int32_t>>& got() const { return got_; }

   private:
    const std::string model_;
    const std::vector<std::string> prompts_;
    std::vector<std::vector<std::int32_t>> got_;
    std::vector<std::thread> threads_;
  };
};

struct LayoutCase {
  std::string name;
  Json layout;
};
class ReplicaLayouts : public Replicas, public testing::WithParamInterface<LayoutCase> {};
INSTANTIATE_TEST_SUITE_P(Each, ReplicaLayouts,
                         testing::Values(LayoutCase{"tp2", {{"tp", 2}}},
                                         LayoutCase{"pp2", {{"pp", 2}}}),
                         [](const auto& each) { return each.param.name; });

TEST_P(ReplicaLayouts, AnswersAsASingleEngineDoesWithAndWithoutAnAdapter) {
  const auto asked = prompts("alike " + GetParam().name, 3);
  const std::string id = add(GetParam().layout).at(0);
  std::map<std::string, std::vector<std::vector<std::int32_t>>> got;
  for (const std::string model : {"tiny", "tuned"})
    for (const std::string& prompt : asked) got[model].push_back(tokens(model, prompt));
  EXPECT_TRUE(eventually(5000, [&] { return decoded(id) >= 100; }))
      << "it was the replica that answered: " << show(id).dump(1);
  remove(id);
  for (const std::string model : {"tiny", "tuned"})
    for (std::size_t i = 0; i < asked.size(); ++i) {
      EXPECT_EQ(got[model][i].size(), 24u);
      EXPECT_EQ(got[model][i], reference(model, asked[i])) << model << ": " << asked[i];
    }
}

TEST_P(ReplicaLayouts, SeedsScoresCancellationAndTheCacheWorkAsWithAnEngine) {
  const std::string prompt = "sampled " + GetParam().name;
  const auto sample = [&](bool no_cache) {
    protocol::Generate request;
    request.model = "tuned";
    request.input.prompt = prompt;
    request.sampling.max_tokens = 24;
    request.sampling.temperature = 0.8f;
    request.sampling.seed = 5;
    request.sampling.logprobs = 2;
    request.sampling.ignore_eos = true;
    request.no_cache = no_cache;
    const auto answer = platform_->client().generate(std::move(request));
    EXPECT_TRUE(answer.ok()) << answer.status().to_string();
    return answer.ok() ? *answer : protocol::client::Generation{};
  };
  const std::string id = add(GetParam().layout).at(0);
  const auto got = sample(false);
  EXPECT_TRUE(eventually(5000, [&] { return decoded(id) >= 20; })) << show(id).dump(1);
  const auto cached = sample(false);
  EXPECT_TRUE(cached.cached);
  EXPECT_EQ(cached.tokens, got.tokens);
  // A client that has enough: its sequence ends on all ranks, and the next one is answered.
  protocol::Generate endless;
  endless.model = "tiny";
  endless.input.prompt = "endless " + prompt;
  endless.sampling.max_tokens = kLong;
  endless.sampling.ignore_eos = true;
  const auto cut = platform_->client().generate(endless, [](const auto&) { return false; });
  EXPECT_EQ(cut.status().code(), StatusCode::kCancelled) << cut.status().to_string();
  EXPECT_TRUE(eventually(10'000, [&] { return show(id).value("requests", 1) == 0; }))
      << show(id).dump(1);
  EXPECT_EQ(tokens("tiny", "after " + prompt).size(), 24u);
  EXPECT_EQ(show(id).value("epoch", 0), 1);
  remove(id);
  const auto want = sample(true);
  EXPECT_FALSE(want.cached);
  EXPECT_EQ(got.tokens, want.tokens);
  ASSERT_EQ(got.logprobs.size(), want.logprobs.size());
  for (std::size_t i = 0; i < want.logprobs.size(); ++i)
    EXPECT_NEAR(got.logprobs[i].logprob, want.logprobs[i].logprob, 1e-4);
}

/// Each rank in turn: what was streaming goes on elsewhere, and the replica comes back.
TEST_P(ReplicaLayouts, EachRankKilledWhileItStreamsCostsNoToken) {
  std::vector<std::vector<std::string>> asked;
  std::vector<std::vector<std::vector<std::int32_t>>> got;
  const std::string id = add(GetParam().layout).at(0);
  for (const int rank : {0, 1}) {
    ASSERT_TRUE(serves(id) &&
                eventually(20'000, [&] { return show(id).value("adapters", 0) > 0; }));
    const int epoch = show(id).value("epoch", 0);
    asked.push_back(prompts("killed " + GetParam().name + std::to_string(rank), 6));
    Streams streams("tuned", asked.back());
    ASSERT_TRUE(eventually(20'000, [&] { return show(id).value("requests", 0) > 0; }));
    const pid_t pid = platform_->gang_rank(rank, leader(id));
    ASSERT_GT(pid, 0);
    platform_->kill_process(pid);
    streams.join();
    got.push_back(streams.got());
    EXPECT_TRUE(serves(id, epoch + 1)) << show(id).dump(1);
  }
  remove(id);
  for (std::size_t rank = 0; rank < asked.size(); ++rank)
    for (std::size_t i = 0; i < asked[rank].size(); ++i) {
      EXPECT_EQ(got[rank][i].size(), static_cast<std::size_t>(kLong));
      EXPECT_EQ(got[rank][i], reference("tuned", asked[rank][i], kLong))
          << "rank " << rank << ": " << asked[rank][i];
    }
}

TEST_F(Replicas, ARankThatHangsEndsItsReplicaWithinItsPatienceAndNobodyElseNotices) {
  const std::string id = add({{"tp", 2}}).at(0);
  std::vector<pid_t> engines;
  for (int slot = 0; slot < workers(); ++slot) engines.push_back(platform_->engine(slot));
  for (const int rank : {0, 1}) {
    ASSERT_TRUE(serves(id));
    const int epoch = show(id).value("epoch", 0);
    const pid_t pid = platform_->gang_rank(rank, leader(id));
    ASSERT_GT(pid, 0);
    ::kill(pid, SIGSTOP);
    EXPECT_TRUE(eventually(hang_limit_ms(),
                           [&] {
                             const Json shown = show(id);
                             return shown.value("epoch", 0) > epoch ||
                                    shown.value("state", "") == "waiting";
                           }))
        << "rank " << rank << ": " << show(id).dump(1);
    EXPECT_TRUE(serves(id, epoch + 1)) << show(id).dump(1);
  }
  for (int slot = 0; slot < workers(); ++slot)
    EXPECT_EQ(platform_->engine(slot), engines[static_cast<std::size_t>(slot)]);
}

/// Its ranks wait for each other for longer than any test here.
class PatientPool : public Replicas {
 protected:
  static void SetUpTestSuite() {
    start_pool(2, 32, 2, "3600");
    if (platform_) train("tuned");
  }
};

TEST_F(PatientPool, WhatIsToEndDoesNotWaitForARankThatIsSilent) {
  const std::string id = add({{"tp", 2}}).at(0);
  ASSERT_TRUE(serves(id));
  const pid_t silent = platform_->gang_rank(1, leader(id));
  ASSERT_GT(silent, 0);
  ::kill(silent, SIGSTOP);
  remove(id);
  expect_no_gangs();
  const std::string job = submit("gone", {{"tp", 2}, {"max_length", 128}, {"max_steps", 5000}});
  ASSERT_TRUE(reaches(job, 2));
  const pid_t rank = platform_->gang_rank(1, show_job(job).value("worker", "").back() - '0');
  ASSERT_GT(rank, 0);
  ::kill(rank, SIGSTOP);
  platform_->call("job.cancel", {{"job", job}});
  EXPECT_EQ(platform_->wait_job(job).value("state", ""), "cancelled");
}

TEST_F(Replicas, TwoBehindOneNameShareTheRequests) {
  TANDEM_NEEDS_WORKERS(4);
  const auto asked = prompts("two", 12);
  const auto ids = add({{"pp", 2}, {"count", 2}});
  ASSERT_EQ(ids.size(), 2u);
  Streams streams("tiny", asked);
  streams.join();
  for (const std::string& id : ids)
    EXPECT_TRUE(eventually(5000, [&] { return decoded(id) >= kLong - 1; })) << show(id).dump(1);
  const Json workers = platform_->call("worker.list", Json::object());
  std::set<std::string> held;
  for (const Json& worker : workers["workers"]) held.insert(worker.value("replica", ""));
  EXPECT_EQ(held, (std::set<std::string>{ids[0], ids[1]}));
  for (const std::string& id : ids) remove(id);
  for (std::size_t i = 0; i < asked.size(); ++i)
    EXPECT_EQ(streams.got()[i], reference("tiny", asked[i], kLong)) << asked[i];
}

TEST_F(Replicas, WhatIsPublishedWhileItServesIsAnsweredByIt) {
  TANDEM_NEEDS_WORKERS(3);  // a replica's two train nothing
  // One that no replica has seen.
  train("other", 2);
  const std::string folder = platform_->directory() + "/exported";
  const auto exported = platform_->cli({"adapter", "export", "other", folder});
  ASSERT_EQ(exported.code, 0) << exported.err;
  platform_->call("adapter.rm", {{"adapter", "other"}});
  const std::string id = add({{"tp", 2}}).at(0);
  train("fresh", 3);
  const std::string digest =
      platform_->call("adapter.show", {{"adapter", "fresh"}}).value("digest", "");
  const auto first = platform_->generate("fresh", "publish say red", 24);
  ASSERT_TRUE(first.ok()) << first.status().to_string();
  EXPECT_EQ(first->adapter.hex(), digest);
  EXPECT_TRUE(eventually(10'000, [&] { return show(id).value("adapters", 0) == 2; }))
      << "it was loaded ahead of a request: " << show(id).dump(1);
  // Imported: announced, loaded by all ranks, and answered.
  const auto imported = platform_->cli({"adapter", "import", "late", folder, "--model", "tiny"});
  ASSERT_EQ(imported.code, 0) << imported.err;
  EXPECT_TRUE(eventually(10'000, [&] { return show(id).value("adapters", 0) == 3; }))
      << show(id).dump(1);
  const std::int64_t before = decoded(id);
  const auto asked = prompts("late", 3);
  std::vector<std::vector<std::int32_t>> got;
  for (const std::string& prompt : asked) got.push_back(tokens("late", prompt));
  EXPECT_TRUE(eventually(5000, [&] { return decoded(id) > before; })) << show(id).dump(1);
  remove(id);
  for (std::size_t i = 0; i < asked.size(); ++i)
    EXPECT_EQ(got[i], reference("late", asked[i])) << asked[i];
  EXPECT_EQ(first->tokens, reference("fresh", "publish say red"));
}

TEST_F(Replicas, ACoordinatorsAndAnAgentsDeathCostItNothing) {
  const std::string id = add({{"tp", 2}}).at(0);
  const int slot = leader(id);
  const pid_t rank = platform_->gang_rank(1, slot);
  platform_->kill_coordinator();
  platform_->start_coordinator();
  ASSERT_TRUE(serves(id));
  platform_->kill_process(platform_->agent(slot));
  ASSERT_TRUE(eventually(20'000, [&] { return platform_->agent(slot) > 0; }));
  ASSERT_TRUE(eventually(20'000, [&] {
    const Json status = platform_->call("status", Json::object());
    return status["replicas"].at(0).value("pid", 0) > 0;
  }));
  const std::string prompt = prompts("adopted", 1).at(0);
  const auto got = tokens("tiny", prompt);
  EXPECT_EQ(show(id).value("epoch", 0), 1);
  EXPECT_EQ(platform_->gang_rank(1, slot), rank) << "the same process";
  remove(id);
  EXPECT_EQ(got, reference("tiny", prompt));
}

TEST_F(Replicas, AWorkerThatDrainsLetsItMoveAndOneThatEndsDoesToo) {
  TANDEM_NEEDS_WORKERS(4);
  const std::string id = add({{"pp", 2}}).at(0);
  const std::string member = show(id)["workers"][1].get<std::string>();
  platform_->call("worker.drain", {{"worker", member}});
  ASSERT_TRUE(serves(id, 2)) << show(id).dump(1);
  const Json members = show(id)["workers"];  // lives as long as the loop
  for (const Json& worker : members) EXPECT_NE(worker.get<std::string>(), member);
  platform_->call("worker.resume", {{"worker", member}});
  // SIGTERM to the leader's worker: its agent lets the replica finish what it answers.
  const int slot = leader(id);
  const pid_t supervisor = platform_->supervisor(slot);
  ::kill(supervisor, SIGTERM);
  ASSERT_TRUE(eventually(30'000, [&] { return platform_->supervisor(slot) == 0; }));
  EXPECT_TRUE(serves(id, 3)) << show(id).dump(1);
  platform_->start_worker(slot);
}

TEST_F(Replicas, AreAddedListedAndRemovedOnTheCommandLine) {
  TANDEM_NEEDS_WORKERS(4);
  const auto added =
      platform_->cli({"replica", "add", "--model", "tiny", "--tp", "2", "--follow", "--json"});
  ASSERT_EQ(added.code, 0) << added.err;
  const std::string id =
      Json::parse(added.out.substr(0, added.out.find('\n')))["replicas"][0]["replica"];
  const auto listed = platform_->cli({"replica", "list"});
  EXPECT_EQ(listed.code, 0);
  for (const std::string& word : {id, std::string("tp2 x pp1"), std::string("serving")})
    EXPECT_NE(listed.out.find(word), std::string::npos) << listed.out;
  EXPECT_NE(platform_->cli({"worker", "list"}).out.find(id), std::string::npos);
  EXPECT_NE(platform_->cli({"status"}).out.find(id), std::string::npos);
  EXPECT_EQ(platform_->cli({"model", "rm", "tiny"}).code, 4) << "it is served";
  const auto cut = platform_->cli({"replica", "add", "--model", "tiny", "--tp", "4"});
  EXPECT_EQ(cut.code, 4);
  EXPECT_NE(cut.err.find("nearest layout that the model allows: tp 2, pp 2"), std::string::npos)
      << cut.err;
  const auto many = platform_->cli({"replica", "add", "--model", "tiny", "--tp", "8"});
  EXPECT_EQ(many.code, 4);
  EXPECT_EQ(platform_->cli({"replica", "add", "--model", "tiny"}).code, 4) << "one rank is none";
  EXPECT_EQ(platform_->cli({"replica", "add", "--model", "tiny", "--tp", "zwei"}).code, 2);
  EXPECT_EQ(platform_->cli({"replica", "add", "--model", "nobody", "--tp", "2"}).code, 3);
  EXPECT_EQ(platform_->cli({"replica", "rm", "replica-000000000000"}).code, 3);
  EXPECT_EQ(platform_->cli({"replica", "rm", id}).code, 0);
  EXPECT_TRUE(eventually(30'000, [&] { return show(id).empty(); }));
  EXPECT_NE(platform_->cli({"completion"}).out.find("replica:) words='add list rm"),
            std::string::npos);
}

}  // namespace
}  // namespace tandem::test
