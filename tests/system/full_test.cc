// Full fine-tuning as a user submits it: on one rank or several a job ends in a model that every
// engine serves, that exports to the folder it came from, and that kills and pauses do not change.
#include "protocol/base/random.h"
#include "tests/system/tiny_pool.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <csignal>
#include <filesystem>

namespace tandem::test {
namespace {

namespace fs = std::filesystem;

const Json kSettings{{"method", "full"},  {"learning_rate", 1e-3},
                     {"max_steps", 40},   {"per_device_train_batch_size", 1},
                     {"max_length", 128}, {"gradient_accumulation_steps", 4},
                     {"save_steps", 10},  {"eval_split", 0.0}};

class Fulls : public TinyPool {
 protected:
  static void SetUpTestSuite() { start_pool(2, 64); }

  static std::string submit(const std::string& name, const Json& settings) {
    const Json spec{{"model", "tiny"}, {"dataset", data_}, {"name", name}, {"train", settings}};
    return platform_->call("job.submit", {{"spec", spec}}).value("job", "");
  }
  static Json model(const std::string& name) {
    return platform_->call("model.show", {{"model", name}});
  }
  /// The digest of the model of an undisturbed job on one rank, and its losses.
  struct Reference {
    std::string job, digest;
    std::map<std::int64_t, double> losses;
  };
  static const Reference& one_rank() {
    static const Reference reference = [] {
      const std::string job = submit("whole", kSettings);
      finish(job);
      return Reference{job, model("whole").value("digest", ""), platform_->losses(job)};
    }();
    return reference;
  }
};

TEST_F(Fulls, EndsInAModelThatKnowsItsOriginAndIsServedUnderItsName) {
  const auto& [job, digest, losses] = one_rank();
  ASSERT_EQ(losses.size(), 40u);
  EXPECT_LT(losses.at(40), 0.7 * losses.at(1)) << "it learned";
  const Json made = model("whole"), base = model("tiny");
  EXPECT_EQ(made.value("job", ""), job);
  EXPECT_EQ(made.value("base_model", ""), base.value("digest", "-"));
  EXPECT_EQ(made.value("path", "-"), "");
  EXPECT_NE(digest, base.value("digest", ""));
  const Json end = show_job(job);
  EXPECT_EQ(end.value("published", ""), digest);
  EXPECT_EQ(end["summary"].value("probe_max_abs_difference", -1.0), 0.0) << end.dump(1);
  const auto trained = platform_->generate("whole", "say red 1", 8);
  ASSERT_TRUE(trained.ok()) << trained.status().to_string();
  const auto before = platform_->generate("tiny", "say red 1", 8);
  ASSERT_TRUE(before.ok()) << before.status().to_string();
  EXPECT_NE(trained->tokens, before->tokens);
  const auto listed = platform_->cli({"model", "list"});
  EXPECT_NE(listed.out.find(job), std::string::npos) << listed.out;
  for (int slot = 0; slot < workers(); ++slot)
    EXPECT_FALSE(fs::exists(
        str(platform_->data_dir(), "/cache/models/.publish-", platform_->device(), slot)));
  const Json check = platform_->call("registry.check", Json::object());
  EXPECT_TRUE(check.value("ok", false)) << check.dump(1);
}

TEST_F(Fulls, ExportsToAFolderThatIsTheSameModelWhenItIsAdded) {
  const std::string folder = platform_->directory() + "/exported", digest = one_rank().digest;
  const auto exported = platform_->cli({"model", "export", "whole", folder});
  ASSERT_EQ(exported.code, 0) << exported.err;
  EXPECT_TRUE(fs::exists(folder + "/tokenizer_config.json")) << "the template goes along";
  const Json added = platform_->call("model.add", {{"name", "again"}, {"path", folder}});
  EXPECT_EQ(added.value("digest", ""), digest);
  platform_->call("model.rm", {{"model", "again"}});
  const auto twice = platform_->cli({"model", "export", "whole", folder});
  EXPECT_EQ(twice.code, 4) << "a folder with content is left alone";
}

TEST_F(Fulls, IsABaseLikeAnyOther) {
  (void)one_rank();
  const std::string data = platform_->directory() + "/train.jsonl";
  const auto run = [&](const std::vector<std::string>& line) {
    const auto output = platform_->cli(line);
    EXPECT_EQ(output.code, 0) << output.err;
    return output.out;
  };
  run({"train", "--model", "whole", "--data", data, "--adapter", "onwhole", "--max-steps", "2",
       "--max-length", "128", "--follow"});
  run({"adapter", "merge", "onwhole", platform_->directory() + "/merged"});
  EXPECT_TRUE(fs::exists(platform_->directory() + "/merged/model.safetensors"));
  fs::create_directories("whole");  // a registered name comes before a path
  run({"data", "check", data, "--model", "whole"});
  fs::remove("whole");
  for (const std::string name : {"whole", "onwhole"})
    EXPECT_GT(
        Json::parse(run({"--json", "eval", "--model", name, "--data", data})).value("loss", 0.0),
        0.0)
        << name;
}

TEST_F(Fulls, CheckpointsAreNotServedAndSayWhatIs) {
  const auto answer = platform_->generate(one_rank().job + "@latest", "say red 1", 4);
  ASSERT_FALSE(answer.ok());
  EXPECT_EQ(answer.status().code(), StatusCode::kRefused) << answer.status().to_string();
  EXPECT_NE(answer.status().message().find("whole"), std::string::npos);
}

TEST_F(Fulls, NamesAreRefusedBeforeAnythingRuns) {
  (void)one_rank();
  const std::string file = platform_->directory() + "/train.jsonl";
  const auto train = [&](std::vector<std::string> more) {
    std::vector<std::string> line{"train", "--model", "tiny", "--data", file};
    line.insert(line.end(), more.begin(), more.end());
    return platform_->cli(line);
  };
  const auto adapter = train({"--method", "full", "--adapter", "a"});
  EXPECT_EQ(adapter.code, 2) << adapter.err;
  EXPECT_NE(adapter.err.find("--name"), std::string::npos) << adapter.err;
  const auto name = train({"--name", "n"});
  EXPECT_EQ(name.code, 2) << name.err;
  EXPECT_NE(name.err.find("--adapter"), std::string::npos) << name.err;
  const auto taken = train({"--method", "full", "--name", "whole"});
  EXPECT_EQ(taken.code, 4) << taken.err;
  const auto lora = train({"--adapter", "whole"});
  EXPECT_EQ(lora.code, 4) << lora.err;
}

struct Layout {
  std::string name;
  Json layout;
};
class FullLayouts : public Fulls, public testing::WithParamInterface<Layout> {};
INSTANTIATE_TEST_SUITE_P(Each, FullLayouts,
                         testing::Values(Layout{"tp2", {{"tp", 2}}}, Layout{"pp2", {{"pp", 2}}},
                                         Layout{"dp2_zero3", {{"dp", 2}, {"zero", 3}}}),
                         [](const auto& each) { return each.param.name; });

TEST_P(FullLayouts, TrainsAsOneRankDoesAndIsServed) {
  const std::string job = submit(GetParam().name, with(kSettings, GetParam().layout));
  finish(job);
  const auto losses = platform_->losses(job);
  ASSERT_EQ(losses.size(), one_rank().losses.size());
  for (const auto& [step, loss] : one_rank().losses)
    EXPECT_NEAR(losses.at(step), loss, 1e-5) << "step " << step;
  const auto answer = platform_->generate(GetParam().name, "say red 1", 8);
  EXPECT_TRUE(answer.ok()) << answer.status().to_string();
}

/// Of the families that the pool's own model is not of: both methods, on one rank and cut.
class FullFamilies : public Fulls, public testing::WithParamInterface<std::string> {};
INSTANTIATE_TEST_SUITE_P(Each, FullFamilies, testing::Values("mistral", "qwen2", "qwen3"),
                         [](const auto& each) { return each.param; });

TEST_P(FullFamilies, AreTrainedServedAndExported) {
  const std::string base = GetParam(), folder = platform_->directory() + "/" + base;
  write_tiny_model(folder, 9, 2, base);
  const Json added = platform_->call("model.add", {{"name", base}, {"path", folder}});
  EXPECT_EQ(model(base).value("family", ""), base) << added.dump(1);
  const Json settings = with(kSettings, {{"max_steps", 12}, {"save_steps", 0}});
  const auto losses_of = [&](const Json& spec) {
    const std::string job = platform_->call("job.submit", {{"spec", spec}}).value("job", "");
    finish(job);
    return platform_->losses(job);
  };
  const auto full = [&](const std::string& name, const Json& layout) {
    return losses_of(
        {{"model", base}, {"dataset", data_}, {"name", name}, {"train", with(settings, layout)}});
  };
  const auto lora = [&](const std::string& name, Json layout) {
    layout["method"] = "lora";
    return losses_of({{"model", base},
                      {"dataset", data_},
                      {"adapter", name},
                      {"train", with(settings, layout)}});
  };
  const auto expect_same = [&](const std::map<std::int64_t, double>& got,
                               const std::map<std::int64_t, double>& want) {
    ASSERT_EQ(want.size(), 12u);
    for (const auto& [step, loss] : want) EXPECT_NEAR(got.at(step), loss, 1e-5) << "step " << step;
  };
  expect_same(full(base + "-full-tp", {{"tp", 2}}), full(base + "-full", Json::object()));
  expect_same(lora(base + "-lora-pp", {{"pp", 2}}), lora(base + "-lora", Json::object()));
  for (const std::string& name : {base, base + "-full", base + "-lora"}) {
    const auto answer = platform_->generate(name, "say red 1", 8);
    EXPECT_TRUE(answer.ok()) << name << ": " << answer.status().to_string();
  }
  const std::string out = platform_->directory() + "/" + base + "-exported";
  ASSERT_EQ(platform_->cli({"model", "export", base + "-full", out}).code, 0);
  EXPECT_EQ(
      platform_->call("model.add", {{"name", base + "-again"}, {"path", out}}).value("digest", "-"),
      model(base + "-full").value("digest", ""));
}

TEST_F(Fulls, EachRankKilledCostsARetryAndNotABit) {
  const Json layout{{"dp", 2}, {"zero", 3}, {"max_steps", 60}};
  finish(submit("calm", with(kSettings, layout)));
  Random random(11);
  for (int rank = 0; rank < 2; ++rank) {
    const std::string name = str("killed-", rank), job = submit(name, with(kSettings, layout));
    ASSERT_TRUE(reaches(job, 12));
    const std::string worker = show_job(job).value("worker", "0");
    const pid_t pid = platform_->gang_rank(rank, worker.back() - '0');
    ASSERT_GT(pid, 0) << show_job(job).dump(1);
    ::usleep(static_cast<useconds_t>(random.below(200'000)));
    ::kill(pid, SIGKILL);
    finish(job);
    EXPECT_EQ(model(name).value("digest", "a"), model("calm").value("digest", "b"));
  }
  const Json check = platform_->call("registry.check", Json::object());
  EXPECT_TRUE(check.value("ok", false)) << check.dump(1);
}

TEST_F(Fulls, RanksStoreTheirOwnPiecesOfACheckpoint) {
  const std::string job = submit("pieces", with(kSettings, {{"dp", 2}, {"zero", 3}}));
  finish(job);
  const Json checkpoints = show_job(job)["checkpoints"];
  ASSERT_FALSE(checkpoints.empty());
  const std::int64_t step = checkpoints.back().value("step", std::int64_t{0});
  const Json shown = platform_->call("adapter.manifest", {{"adapter", str(job, "@step-", step)}});
  const Json manifest = Json::parse(shown.value("manifest", "{}"));
  std::size_t cut = 0;
  std::int64_t bytes = 0;
  for (const Json& tensor : manifest["tensors"]) {
    cut += tensor.value("name", "").find('@') != std::string::npos;
    bytes += tensor.value("bytes", std::int64_t{0});
  }
  EXPECT_GT(cut, 0u) << "ZeRO cuts tensors between the ranks";
  EXPECT_FALSE(manifest["settings"]["shapes"].empty());
  // Weights and both moments in f32, each element once.
  const Json base = platform_->call("model.show", {{"model", "tiny"}});
  EXPECT_EQ(bytes, 12 * base.value("parameters", std::int64_t{0}));
}

TEST_F(Fulls, APausedJobGoesOnOverOtherRanksWithTheLossesOfOne) {
  const std::string job = submit("moved", with(kSettings, {{"tp", 2}, {"save_steps", 0}}));
  ASSERT_TRUE(reaches(job, 5));
  platform_->call("job.pause", {{"job", job}});
  ASSERT_EQ(platform_->wait_job(job).value("state", ""), "paused");
  platform_->call("job.resume", {{"job", job}, {"layout", {{"tp", 1}, {"dp", 2}, {"zero", 2}}}});
  finish(job);
  const auto losses = platform_->losses(job);
  for (const auto& [step, loss] : one_rank().losses)
    EXPECT_NEAR(losses.at(step), loss, 1e-5) << "step " << step;
}

}  // namespace
}  // namespace tandem::test
