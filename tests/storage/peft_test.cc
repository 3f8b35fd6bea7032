#include "storage/peft.h"

#include "storage/file_io.h"
#include "storage/json_strict.h"
#include "storage/peft_manifest.h"
#include "tests/storage/scratch.h"

#include <gtest/gtest.h>

#include <cstring>

namespace tandem::storage {
namespace {

std::string golden(const std::string& name) {
  return std::string(TANDEM_SOURCE_DIR) + "/tests/golden/storage_peft/" + name;
}
bool same_bytes(const TensorInfo& a, const TensorInfo& b) {
  return a.dtype == b.dtype && a.shape == b.shape && a.bytes.size() == b.bytes.size() &&
         std::memcmp(a.bytes.data(), b.bytes.data(), a.bytes.size()) == 0;
}
void expect_same(std::span<const AdapterTensors> a, std::span<const AdapterTensors> b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].site, b[i].site);
    EXPECT_TRUE(same_bytes(a[i].a, b[i].a) && same_bytes(a[i].b, b[i].b)) << a[i].site;
    EXPECT_EQ(a[i].scale, b[i].scale);
  }
}

class PeftGolden : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Folders, PeftGolden, testing::Values("plain", "patterns"),
                         [](const auto& i) { return std::string(i.param); });

TEST_P(PeftGolden, GivesEverySiteTheScaleThatPeftComputes) {
  const auto adapter = read_peft(golden(GetParam()));
  ASSERT_TRUE(adapter.ok()) << adapter.status().to_string();
  const Json scales =
      parse_json_strict(read_bytes(golden(GetParam()) + "/scales.json"), "scales").value();
  ASSERT_EQ(adapter->sites.size(), scales.size());
  for (const AdapterTensors& site : adapter->sites) {
    EXPECT_EQ(site.scale, scales.at(site.site).get<double>()) << site.site;
    EXPECT_EQ(site.a.shape[0], site.b.shape[1]);
  }
}

TEST_P(PeftGolden, RoundTripsEveryBit) {
  const auto adapter = read_peft(golden(GetParam())).value();
  Scratch scratch;
  ASSERT_TRUE(write_peft(scratch / "out", adapter.config, adapter.sites).ok());
  const auto again = read_peft(scratch / "out");
  ASSERT_TRUE(again.ok()) << again.status().to_string();
  expect_same(adapter.sites, again->sites);
  EXPECT_EQ(again->config.r, adapter.config.r);
  EXPECT_EQ(again->config.all_linear, adapter.config.all_linear);
  // The tensors' file is PEFT's own, byte for byte.
  EXPECT_EQ(read_bytes(scratch / "out/adapter_model.safetensors"),
            read_bytes(golden(GetParam()) + "/adapter_model.safetensors"));
}

TEST_P(PeftGolden, SurvivesTheRegistrysManifest) {
  const auto adapter = read_peft(golden(GetParam())).value();
  const Digest base = sha256("base");
  const auto import = import_adapter(adapter, base).value();
  std::map<Digest, std::vector<std::byte>> blobs;
  for (const BlobChunk& chunk : import.chunks)
    blobs[chunk.digest] = {chunk.bytes.begin(), chunk.bytes.end()};
  auto fetch = [&](const Digest& digest) -> Result<std::vector<std::byte>> {
    return blobs.at(digest);
  };
  const auto out = export_adapter(import.manifest, fetch);
  ASSERT_TRUE(out.ok()) << out.status().to_string();
  EXPECT_EQ(out->base_model, base);
  expect_same(adapter.sites, out->sites);
  Scratch scratch;
  EXPECT_TRUE(write_peft(scratch / "out", out->config, out->sites).ok());

  blobs.begin()->second[0] ^= std::byte{1};
  EXPECT_EQ(export_adapter(import.manifest, fetch).status().code(), StatusCode::kCorrupt);
}

TEST(Peft, RefusesWhatChangesTheMathematicsByName) {
  const char* fields[] = {R"("use_dora":true)",
                          R"("modules_to_save":["lm_head"])",
                          R"("bias":"all")",
                          R"("fan_in_fan_out":true)",
                          R"("lora_bias":true)",
                          R"("layer_replication":[[0,1]])",
                          R"("trainable_token_indices":[1])",
                          R"("target_parameters":["x"])",
                          R"("use_qalora":true)",
                          R"("megatron_config":{"a":1})",
                          R"("init_lora_weights":"pissa")",
                          R"("task_type":"SEQ_CLS")",
                          R"("some_new_field":3)",
                          R"("r":513)",
                          R"("alora_invocation_tokens":[1])",
                          R"("rank_pattern":{"q_.*":4})",
                          R"("alpha_pattern":{"q_proj":1,"self_attn.q_proj":2})"};
  for (const std::string field : fields) {
    const auto config =
        parse_peft_config(R"({"peft_type":"LORA",)" + field + "}", "adapter_config.json");
    ASSERT_EQ(config.status().code(), StatusCode::kRefused) << field;
    const std::string name = field.substr(1, field.find('"', 1) - 1);
    EXPECT_NE(config.status().message().find(name), std::string::npos) << config.status().message();
  }
  EXPECT_EQ(parse_peft_config(R"({"peft_type":"IA3"})", "c").status().code(), StatusCode::kRefused);
  EXPECT_EQ(parse_peft_config(R"({"r":8})", "c").status().code(), StatusCode::kRefused);
}

TEST(Peft, RefusesValuesOutOfRange) {
  for (const std::string field :
       {R"("r":0)", R"("r":-1)", R"("r":1.5)", R"("r":"8")", R"("lora_alpha":0)",
        R"("lora_alpha":"x")", R"("lora_dropout":1)", R"("use_rslora":1)", R"("target_modules":3)",
        R"("target_modules":[3])", R"("rank_pattern":[])", R"("rank_pattern":{"q_proj":0})",
        R"("rank_pattern":{"q_proj":1.5})"})
    EXPECT_EQ(parse_peft_config(R"({"peft_type":"LORA",)" + field + "}", "c").status().code(),
              StatusCode::kInvalid)
        << field;
  EXPECT_EQ(parse_peft_config("[]", "c").status().code(), StatusCode::kInvalid);
  EXPECT_EQ(parse_peft_config("{", "c").status().code(), StatusCode::kCorrupt);
}

TEST(Peft, AcceptsWhatOnlySteersTraining) {
  const auto config = parse_peft_config(
      R"({"peft_type":"LORA","r":16,"lora_alpha":32,"lora_dropout":0.1,"use_dora":false,)"
      R"("modules_to_save":null,"loftq_config":{},"layers_to_transform":[0,1],)"
      R"("init_lora_weights":"gaussian","some_new_field":null,"target_modules":"all-linear"})",
      "c");
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_TRUE(config->all_linear);
  EXPECT_EQ(config->scale("model.layers.0.mlp.up_proj", 16), 2.0);
}

class PeftFolder : public testing::Test {
 protected:
  void SetUp() override {
    config(R"({"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q_proj"]})");
  }
  void config(const std::string& text) { write_bytes(scratch_ / "adapter_config.json", text); }
  void tensors(const std::vector<std::pair<std::string, std::vector<std::int64_t>>>& list) {
    std::vector<TensorInfo> infos;
    for (const auto& [name, shape] : list) {
      std::int64_t n = 4;
      for (auto d : shape) n *= d;
      infos.push_back(
          {name, DType::kF32, shape, std::span(zeros_).first(static_cast<std::size_t>(n))});
    }
    ASSERT_TRUE(write_safetensors(scratch_ / "adapter_model.safetensors", infos, {}).ok());
  }
  std::string message() {
    const auto adapter = read_peft(scratch_.path());
    return adapter.ok() ? "ok" : adapter.status().message();
  }
  const std::string q_ = "base_model.model.model.layers.0.self_attn.q_proj.";
  const std::vector<std::byte> zeros_ = std::vector<std::byte>(1024);
  Scratch scratch_;
};

TEST_F(PeftFolder, RefusesValuesThatAreNotFiniteAndCountsThem) {
  for (const auto& [dtype, infinite, largest] :
       {std::tuple{DType::kBF16, 0x7f80, 0x7f7f}, {DType::kF16, 0xfc00, 0xfbff}}) {
    std::vector<std::uint16_t> b(10, static_cast<std::uint16_t>(largest));
    const auto written = [&] {
      const std::vector<TensorInfo> infos{
          {q_ + "lora_A.weight", dtype, {2, 3}, std::span(zeros_).first(12)},
          {q_ + "lora_B.weight", dtype, {5, 2}, std::as_bytes(std::span(b))}};
      EXPECT_TRUE(write_safetensors(scratch_ / "adapter_model.safetensors", infos, {}).ok());
      return message();
    };
    EXPECT_EQ(written(), "ok");
    b[3] = static_cast<std::uint16_t>(infinite);
    b[9] = static_cast<std::uint16_t>(infinite + 1);  // no number
    const std::string refused = written();
    EXPECT_NE(refused.find(q_ + "lora_B.weight holds 2 values"), std::string::npos) << refused;
    EXPECT_NE(refused.find("of 10"), std::string::npos) << refused;
  }
}

TEST_F(PeftFolder, NamesWhatIsWrongWithItsTensors) {
  EXPECT_NE(message().find("no file"), std::string::npos);
  tensors({{q_ + "lora_A.weight", {2, 3}}, {q_ + "lora_B.weight", {5, 2}}});
  EXPECT_EQ(message(), "ok");
  tensors({{q_ + "lora_A.weight", {2, 3}}});
  EXPECT_NE(message().find("one of lora_A and lora_B is missing"), std::string::npos);
  tensors({{q_ + "lora_A.weight", {2, 3}}, {q_ + "lora_B.weight", {5, 3}}});
  EXPECT_NE(message().find("do not share a rank"), std::string::npos);
  tensors({{q_ + "lora_A.weight", {3, 3}}, {q_ + "lora_B.weight", {5, 3}}});
  EXPECT_NE(message().find("lora_A has rank 3, the configuration says 2"), std::string::npos);
  tensors({{q_ + "lora_A.weight", {2, 3}},
           {q_ + "lora_B.weight", {5, 2}},
           {q_ + "lora_magnitude_vector", {5}}});
  EXPECT_NE(message().find("lora_magnitude_vector is not lora_A or lora_B"), std::string::npos);
  tensors({{"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", {2, 3}},
           {"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", {5, 2}}});
  EXPECT_NE(message().find("target_modules of the configuration does not name it"),
            std::string::npos);
  tensors({{q_ + "lora_A.weight", {2, 3, 1}}, {q_ + "lora_B.weight", {5, 2}}});
  EXPECT_NE(message().find("two dimensions"), std::string::npos);
  tensors({});
  EXPECT_NE(message().find("no tensors"), std::string::npos);
}

TEST_F(PeftFolder, AScaleBeyondF32IsRefused) {
  write_bytes(scratch_ / "adapter_config.json",
              R"({"peft_type":"LORA","r":2,"lora_alpha":1e308,"target_modules":["q_proj"]})");
  tensors({{q_ + "lora_A.weight", {2, 3}}, {q_ + "lora_B.weight", {5, 2}}});
  EXPECT_NE(message().find("no finite f32"), std::string::npos) << message();
}

TEST_F(PeftFolder, NeverReadsAPickle) {
  write_bytes(scratch_ / "adapter_model.bin", "x");
  EXPECT_NE(message().find("a pickle, which is never read"), std::string::npos);
}

TEST_F(PeftFolder, TheWriterRefusesWhatItsConfigurationDoesNotSay) {
  tensors({{q_ + "lora_A.weight", {2, 3}}, {q_ + "lora_B.weight", {5, 2}}});
  auto adapter = read_peft(scratch_.path()).value();
  Scratch out;
  adapter.sites[0].scale = 3;
  EXPECT_EQ(write_peft(out / "x", adapter.config, adapter.sites).code(), StatusCode::kInvalid);
  adapter.sites[0].scale = 2;
  EXPECT_TRUE(write_peft(out / "x", adapter.config, adapter.sites).ok());
  adapter.config.r = 4;
  EXPECT_EQ(write_peft(out / "y", adapter.config, adapter.sites).code(), StatusCode::kInvalid);
  EXPECT_EQ(write_peft(out / "z", adapter.config, {}).code(), StatusCode::kInvalid);
}

TEST_F(PeftFolder, TheWriterNamesTheLayersThatHaveTensorsAndNoOthers) {
  Scratch out;
  const auto written = [&](const std::vector<std::string>& sites, std::int64_t base_layers) {
    std::vector<AdapterTensors> all;
    const std::vector<std::byte> values(8);
    PeftConfig config;
    config.r = 1;
    config.lora_alpha = 1;
    config.target_modules = {"q_proj", "v_proj"};
    for (const std::string& site : sites)
      all.push_back(
          {site, {"", DType::kF32, {1, 2}, values}, {"", DType::kF32, {2, 1}, values}, 1});
    EXPECT_TRUE(write_peft(out / "x", config, all, base_layers).ok());
    EXPECT_EQ(read_peft(out / "x").value().sites.size(), sites.size());
    return parse_json_strict(read_bytes(out / "x/adapter_config.json"), "written").value();
  };
  const std::string q0 = "model.layers.0.self_attn.q_proj", q2 = "model.layers.2.self_attn.q_proj",
                    v2 = "model.layers.2.self_attn.v_proj", v0 = "model.layers.0.self_attn.v_proj";
  Json json = written({q0, q2}, 4);
  EXPECT_EQ(json["target_modules"], Json({"q_proj"})) << "nothing was trained in v_proj";
  EXPECT_EQ(json["layers_to_transform"], Json({0, 2}));
  EXPECT_EQ(written({q0}, 0)["layers_to_transform"], Json({0})) << "there may be more layers";
  json = written({q0, v0}, 1);
  EXPECT_EQ(json["target_modules"], Json({"q_proj", "v_proj"}));
  EXPECT_TRUE(json["layers_to_transform"].is_null());
  json = written({q0, v2}, 4);
  EXPECT_EQ(json["target_modules"], Json({q0, v2}));
  EXPECT_TRUE(json["layers_to_transform"].is_null());
}

TEST(AdapterFit, NamesTheTensorThatTheBaseHasNoPlaceFor) {
  const auto tensor = [](const std::string& name, std::vector<std::int64_t> shape,
                         const std::string& dtype = "f32") {
    ManifestTensor made;
    made.name = name;
    made.dtype = dtype;
    made.shape = std::move(shape);
    return made;
  };
  const std::string site = "base_model.model.model.layers.0.self_attn.q_proj.lora_";
  Manifest adapter, hf, gguf;
  adapter.settings_json = R"({"lora_alpha":4,"r":2})";
  hf.tensors = {tensor("model.embed_tokens.weight", {9, 3}),
                tensor("model.layers.0.self_attn.q_proj.weight", {5, 3}, "bf16")};
  gguf.tensors = {tensor("blk.0.attn_q.weight", {5, 3}, "q4_1")};
  const auto message = [&](std::vector<ManifestTensor> tensors) {
    adapter.tensors = std::move(tensors);
    const Status status = check_adapter_fits(adapter, hf);
    EXPECT_EQ(check_adapter_fits(adapter, gguf).message(), status.message());
    return status.ok() ? "ok" : status.message();
  };
  const auto a = tensor(site + "A.weight", {2, 3}), b = tensor(site + "B.weight", {5, 2}, "f16");
  EXPECT_EQ(message({a, b}), "ok");
  EXPECT_NE(message({tensor(a.name, {2, 4}), b}).find("q_proj.lora_A.weight has shape [2,4]"),
            std::string::npos);
  EXPECT_NE(message({a, tensor(b.name, {4, 2})}).find("this model needs [5,r]"), std::string::npos);
  EXPECT_NE(message({a}).find("one of lora_A and lora_B is missing"), std::string::npos);
  EXPECT_NE(message({tensor(a.name, {2, 3}, "u8"), b}).find("dtype u8"), std::string::npos);
  EXPECT_NE(message({tensor(a.name, {513, 3}), tensor(b.name, {5, 513})})
                .find("q_proj has rank 513; adapters of rank 1 to 512 are served"),
            std::string::npos);
  for (const char* name : {"layers.1.self_attn.q_proj", "layers.0.self_attn.qkv", "embed_tokens"})
    EXPECT_NE(message({tensor(str("base_model.model.model.", name, ".lora_A.weight"), {2, 3})})
                  .find("matches no linear layer"),
              std::string::npos)
        << name;
  EXPECT_NE(message({}).find("no tensors"), std::string::npos);
}

TEST(AdapterFit, SettingsAreReadAsStrictlyAsAPeftFoldersAreAndTensorsAreAsTheySay) {
  const std::string name = "base_model.model.model.layers.0.self_attn.q_proj.lora_";
  const auto tensor = [](const std::string& of, std::vector<std::int64_t> shape) {
    ManifestTensor made;
    made.name = of;
    made.dtype = "f32";
    made.shape = std::move(shape);
    return made;
  };
  Manifest adapter, base;
  base.tensors = {tensor("model.layers.0.self_attn.q_proj.weight", {5, 3})};
  adapter.tensors = {tensor(name + "A.weight", {2, 3}), tensor(name + "B.weight", {5, 2})};
  const auto fit = [&](const std::string& settings) {
    adapter.settings_json = "{" + settings + "}";
    return check_adapter_fits(adapter, base);
  };
  EXPECT_TRUE(fit(R"("lora_alpha":4,"r":2,"base_model":"ab")").ok());
  EXPECT_TRUE(fit(R"("lora_alpha":4,"r":8,"rank_pattern":{"q_proj":2})").ok());
  for (const std::string wrong :
       {R"("lora_alpha":0,"r":2)", R"("lora_alpha":1e300,"r":2)", R"("lora_alpha":4,"r":0)",
        R"("lora_alpha":4,"r":3)", R"("lora_alpha":4,"r":2,"use_dora":true)",
        R"("lora_alpha":4,"r":2,"rank_pattern":{"q_proj":3})",
        R"("lora_alpha":4,"r":2,"alpha_pattern":{"q.*":3})",
        R"("lora_alpha":4,"r":2,"alpha_pattern":{"q_proj":0})",
        R"("lora_alpha":4,"r":2,"target_modules":["k_proj"])"})
    EXPECT_FALSE(fit(wrong).ok()) << wrong;
}

TEST(LoraConfig, RefusesRanksThatAreNotWhole) {
  const auto config = [](const std::string& r, const std::string& pattern) {
    return lora_config(R"({"lora_alpha":16,"r":)" + r + R"(,"rank_pattern":{"q_proj":)" + pattern +
                       "}}");
  };
  ASSERT_TRUE(config("8", "4").ok());
  EXPECT_EQ(config("8", "4")->rank_pattern.at("q_proj"), 4);
  for (const char* bad : {"1e300", "8.5", "18446744073709551615", "\"8\"", "null"}) {
    EXPECT_EQ(config(bad, "4").status().code(), StatusCode::kInvalid) << bad;
    EXPECT_EQ(config("8", bad).status().code(), StatusCode::kInvalid) << bad;
  }
}

}  // namespace
}  // namespace tandem::storage
