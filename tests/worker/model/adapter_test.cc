#include "worker/model/adapter.h"

#include "tests/support/engine_fixture.h"
#include "tests/support/model_golden.h"
#include "worker/model/peft.h"

#include <gtest/gtest.h>

#include <filesystem>

namespace tandem::worker::model {
namespace {

HostAdapterTensor tensor(const ModelConfig& config, std::int64_t layer, Site site,
                         std::int64_t rank) {
  const SiteShape shape = site_shape(config, site);
  HostAdapterTensor t{layer, site, rank, 2.0f, {}, {}};
  for (std::int64_t e = 0; e < rank * shape.i; ++e)
    t.a.push_back(0.01f * static_cast<float>(e % 17) - 0.03f);
  for (std::int64_t e = 0; e < shape.n * rank; ++e)
    t.b.push_back(0.02f * static_cast<float>(e % 13) - 0.1f);
  return t;
}

TEST(Targets, AllLinearMeansEverySite) {
  const ModelConfig config = test::tiny_config();
  EXPECT_EQ(LoraConfig::resolve_targets(config, {"all-linear"}).value().size(), 7u);
  EXPECT_EQ(LoraConfig::resolve_targets(config, {"v_proj", "q_proj", "v_proj"}).value(),
            (std::vector<Site>{Site::kQ, Site::kV}));
}

TEST(Targets, UnknownNamesListWhatExists) {
  const Status status =
      LoraConfig::resolve_targets(test::tiny_config(), {"query_key_value"}).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalid);
  EXPECT_NE(status.message().find("query_key_value"), std::string::npos);
  EXPECT_NE(status.message().find("gate_proj"), std::string::npos);
}

TEST(LoraConfig, ScaleIsAlphaOverRankOrItsRoot) {
  LoraConfig lora;
  lora.r = 16;
  lora.lora_alpha = 32.0;
  EXPECT_EQ(lora.scale(), 2.0f);
  lora.use_rslora = true;
  EXPECT_EQ(lora.scale(), 8.0f);
}

TEST(PeftAdapters, LayersThatLostTheirTensorsAreNamed) {
  storage::PeftAdapter adapter;
  for (const char* site : {"model.layers.0.self_attn.q_proj", "model.layers.3.self_attn.q_proj",
                           "model.layers.3.mlp.up_proj"}) {
    adapter.sites.emplace_back();
    adapter.sites.back().site = site;
  }
  adapter.config.target_modules = {"q_proj", "up_proj", "c_attn"};
  EXPECT_EQ(sites_without_tensors(adapter),
            (std::vector<std::string>{"model.layers.0.mlp.up_proj"}));
  adapter.config.target_modules.clear();  // all-linear, or a pattern
  EXPECT_TRUE(sites_without_tensors(adapter).empty());
}

TEST(BuildAdapter, WhatDoesNotFitTheModelIsRefusedByName) {
  const ModelConfig config = test::tiny_config();
  const auto refusal = [&](std::vector<HostAdapterTensor> tensors) {
    return check_adapter(config, tensors).message();
  };
  const HostAdapterTensor good = tensor(config, 1, Site::kDown, 3);
  EXPECT_EQ(refusal({good}), "");
  EXPECT_NE(refusal({}).find("no tensors"), std::string::npos);
  EXPECT_NE(refusal({good, good}).find("twice"), std::string::npos);
  HostAdapterTensor bad = good;
  bad.layer = 2;
  EXPECT_NE(refusal({bad}).find("layers 0..1"), std::string::npos);
  bad = good;
  bad.rank = 4;  // the values are those of rank 3
  EXPECT_NE(refusal({bad}).find("model.layers.1.mlp.down_proj"), std::string::npos);
  bad = good;
  bad.rank = 0;
  EXPECT_NE(refusal({bad}).find("rank"), std::string::npos);
}

TEST(BuildAdapter, ReturnsItsMemoryWithTheLastHolder) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kBF16);
  kernels::MemoryLedger& ledger = *engine->backend.ledger;
  const std::int64_t before = ledger.live(kernels::MemoryKind::kAdapters);
  auto weights = build_adapter(*engine->backend.ops, engine->exec, *engine->backend.allocator,
                               ledger, engine->base->config(), DType::kBF16,
                               {tensor(engine->base->config(), 0, Site::kQ, 5)})
                     .value();
  EXPECT_EQ(weights->rank_max, 5);
  engine->adapters.set(engine->exec, 1, weights);
  weights.reset();
  EXPECT_GT(ledger.live(kernels::MemoryKind::kAdapters), before);  // the table still holds it
  engine->adapters.clear(engine->exec, 1);
  EXPECT_EQ(ledger.live(kernels::MemoryKind::kAdapters), before);
}

TEST(SitePaths, ParseIsTheInverse) {
  for (std::int64_t layer : {0, 3, 79})
    for (int s = 0; s < kSiteCount; ++s) {
      const auto place = parse_site_path(site_path(layer, Site{s}));
      ASSERT_TRUE(place.has_value());
      EXPECT_EQ(place->first, layer);
      EXPECT_EQ(place->second, Site{s});
    }
  for (const char* bad :
       {"", "model.layers.", "model.layers.x.mlp.up_proj", "model.layers.-1.mlp.up_proj",
        "model.layers.1.mlp.q_proj", "model.layers.01.mlp.up_proj", "lm_head",
        "model.layers.1.mlp.up_proj.weight", "model.layers.99999999999999999999.mlp.up_proj"})
    EXPECT_FALSE(parse_site_path(bad).has_value()) << bad;
}

TEST(Peft, AnImportedAdapterIsExportedWithTheSameBits) {
  namespace fs = std::filesystem;
  const test::ModelGolden golden("llama_grouped");
  const auto theirs = storage::read_peft(golden.folder() + "/adapter");
  ASSERT_TRUE(theirs.ok()) << theirs.status().to_string();
  const auto tensors = from_peft(golden.config(), theirs.value().sites);
  ASSERT_TRUE(tensors.ok()) << tensors.status().to_string();
  EXPECT_EQ(tensors.value().size(), 14u);
  EXPECT_EQ(tensors.value()[0].scale, 2.5f);

  LoraConfig lora;
  lora.r = 4;
  lora.lora_alpha = 10.0;
  lora.target_modules = LoraConfig::resolve_targets(golden.config(), {"all-linear"}).value();
  const auto image = to_peft(golden.config(), lora, *tensors, DType::kF32, "base");
  const fs::path folder = fs::path(testing::TempDir()) / str("peft-", ::getpid());
  fs::remove_all(folder);
  const Status written = storage::write_peft(folder.string(), image->config, image->sites);
  ASSERT_TRUE(written.ok()) << written.to_string();
  const auto again = storage::read_peft(folder.string());
  ASSERT_TRUE(again.ok()) << again.status().to_string();
  ASSERT_EQ(again.value().sites.size(), theirs.value().sites.size());
  for (std::size_t s = 0; s < again.value().sites.size(); ++s) {
    const auto &a = again.value().sites[s], &b = theirs.value().sites[s];
    EXPECT_EQ(a.site, b.site);
    EXPECT_EQ(a.scale, b.scale);
    EXPECT_TRUE(std::equal(a.a.bytes.begin(), a.a.bytes.end(), b.a.bytes.begin(), b.a.bytes.end()));
    EXPECT_TRUE(std::equal(a.b.bytes.begin(), a.b.bytes.end(), b.b.bytes.begin(), b.b.bytes.end()));
  }
  fs::remove_all(folder);
}

TEST(Peft, AnAdapterOfAnotherModelIsRefusedWithBothShapes) {
  const test::ModelGolden golden("llama_grouped");
  const auto theirs = storage::read_peft(golden.folder() + "/adapter").value();
  ModelConfig other = golden.config();
  other.mlp_width = 64;
  const Status shapes = from_peft(other, theirs.sites).status();
  EXPECT_EQ(shapes.code(), StatusCode::kInvalid);
  EXPECT_NE(shapes.message().find("[4, 88]"), std::string::npos) << shapes.message();
  EXPECT_NE(shapes.message().find("[4, 64]"), std::string::npos) << shapes.message();
  other = golden.config();
  other.layers = 1;
  const Status layers = from_peft(other, theirs.sites).status();
  EXPECT_EQ(layers.code(), StatusCode::kInvalid);
  EXPECT_NE(layers.message().find("model.layers.1."), std::string::npos) << layers.message();
}

}  // namespace
}  // namespace tandem::worker::model
