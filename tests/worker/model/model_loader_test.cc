#include "worker/model/model_loader.h"

#include "kernels/cpu/cpu_backend.h"
#include "storage/file_io.h"
#include "tests/support/model_golden.h"
#include "tools/bench_device.h"
#include "tools/random_model.h"
#include "worker/model/merge.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <fstream>

namespace tandem::worker::model {
namespace {

namespace fs = std::filesystem;

/// A copy of a golden model's folder that a test may damage.
class ModelFolder : public testing::Test {
 protected:
  ModelFolder() : folder(fs::path(testing::TempDir()) / str("model-", ::getpid())) {
    fs::remove_all(folder);
    fs::create_directories(folder);
    const fs::path from = fs::path(TANDEM_SOURCE_DIR) / "tests/golden/model/llama_grouped";
    fs::copy(from / "config.json", folder);
    fs::copy(from / "model.safetensors", folder);
    write("tokenizer.json", "{}");
  }
  ~ModelFolder() override { fs::remove_all(folder); }
  void write(const std::string& name, const std::string& text) {
    ASSERT_TRUE(storage::write_file_durably((folder / name).string(), text).ok());
  }
  [[nodiscard]] Status load() const { return load_model(folder.string()).status(); }

  fs::path folder;
};

TEST_F(ModelFolder, IsReadWithItsTokenizerTemplateAndDefaults) {
  write("tokenizer_config.json", R"({"chat_template": [{"name": "tool", "template": "T"},
                                     {"name": "default", "template": "D"}]})");
  write("generation_config.json",
        R"({"eos_token_id": [2, 7], "temperature": 0.5, "top_k": 40, "do_sample": true})");
  const auto model = load_model(folder.string());
  ASSERT_TRUE(model.ok()) << model.status().to_string();
  EXPECT_EQ(model.value().chat_template, "D");
  EXPECT_EQ(model.value().config.eos_ids, (std::vector<std::int32_t>{2, 7}));
  EXPECT_EQ(model.value().generation.temperature, 0.5);
  EXPECT_EQ(model.value().generation.top_k, 40);
  EXPECT_EQ(model.value().generation.do_sample, true);
  EXPECT_FALSE(model.value().generation.top_p.has_value());
  EXPECT_EQ(model.value().tokenizer.tokenizer_json, "{}");
  std::vector<std::string> names;
  for (const ModelFile& file : model.value().files) names.push_back(file.path);
  EXPECT_EQ(names,
            (std::vector<std::string>{"config.json", "generation_config.json", "model.safetensors",
                                      "tokenizer.json", "tokenizer_config.json"}));
  write("chat_template.jinja", "J");  // the file goes first
  EXPECT_EQ(load_model(folder.string()).value().chat_template, "J");
}

TEST_F(ModelFolder, OfAMadeModelGivesItsWeightsRoundedAndItsConfiguration) {
  const auto made = tools::load_bench_model("", "tiny").value();
  const std::string path = (folder / "made").string();
  ASSERT_TRUE(tools::write_model(path, made.config, *made.source).ok());
  const auto read = load_model(path);
  ASSERT_TRUE(read.ok()) << read.status().to_string();
  ModelConfig config = read->config;
  EXPECT_EQ(config.eos_ids, (std::vector<std::int32_t>{257}));
  config.eos_ids.clear();
  config.bos_id = made.config.bos_id;
  EXPECT_EQ(config.canonical_json(), made.config.canonical_json());
  for (const TensorSpec& spec : expected_tensors(made.config)) {
    ASSERT_TRUE(read->source->has(spec.name, spec.n, spec.i).ok()) << spec.name;
    std::vector<float> want(static_cast<std::size_t>(spec.n * std::max<std::int64_t>(1, spec.i)));
    std::vector<float> got = want;
    made.source->read_rows(spec.name, 0, spec.n, want.data());
    read->source->read_rows(spec.name, 0, spec.n, got.data());
    for (float& value : want) value = to_f32(to_bf16(value));
    ASSERT_EQ(got, want) << spec.name;
  }
  EXPECT_FALSE(read->chat_template.empty());
}

TEST_F(ModelFolder, WhatIsMissingIsNamed) {
  fs::remove(folder / "tokenizer.json");
  EXPECT_NE(load().to_string().find("tokenizer.json"), std::string::npos);
  fs::remove(folder / "config.json");
  EXPECT_NE(load().to_string().find("config.json"), std::string::npos);
  EXPECT_EQ(load().code(), StatusCode::kNotFound);
  EXPECT_EQ(load_model((folder / "nothing").string()).status().code(), StatusCode::kNotFound);
}

TEST_F(ModelFolder, ATensorOfAnotherShapeOrNoneIsFoundBeforeAnyWork) {
  auto config =
      nlohmann::json::parse(storage::read_file((folder / "config.json").string(), 1 << 20).value());
  auto changed = config;
  changed["intermediate_size"] = 80;
  write("config.json", changed.dump());
  EXPECT_NE(load().message().find("gate_proj"), std::string::npos) << load().message();
  EXPECT_NE(load().message().find("[80, 32]"), std::string::npos) << load().message();
  changed = config;
  changed["num_hidden_layers"] = 3;
  write("config.json", changed.dump());
  EXPECT_EQ(load().code(), StatusCode::kNotFound);
  EXPECT_NE(load().message().find("model.layers.2."), std::string::npos) << load().message();
}

TEST_F(ModelFolder, ATensorThatNoProductWouldUseIsRefusedByName) {
  const auto weights = storage::Safetensors::open((folder / "model.safetensors").string()).value();
  const std::vector<float> values(64, 1.0f);
  const auto with = [&](const std::string& name) {
    std::vector<storage::TensorInfo> tensors(weights.tensors().begin(), weights.tensors().end());
    tensors.push_back({name, DType::kF32, {64}, std::as_bytes(std::span(values))});
    const std::string path = (folder / "model.safetensors").string();
    EXPECT_TRUE(storage::write_safetensors(path, tensors, {}).ok());
    return load();
  };
  EXPECT_TRUE(with("model.layers.0.self_attn.rotary_emb.inv_freq").ok());
  for (const char* name : {"model.layers.0.self_attn.q_proj.bias",
                           "model.layers.2.input_layernorm.weight", "score.weight"}) {
    const Status status = with(name);
    EXPECT_EQ(status.code(), StatusCode::kRefused) << status.to_string();
    EXPECT_NE(status.message().find(name), std::string::npos) << status.message();
  }
}

TEST_F(ModelFolder, ATiedHeadThatDiffersFromTheEmbeddingIsRefused) {
  auto config = nlohmann::json::parse(std::ifstream(folder / "config.json"));
  config["tie_word_embeddings"] = true;
  write("config.json", config.dump());
  EXPECT_EQ(load().code(), StatusCode::kRefused);
  for (const char* named : {"lm_head.weight", "model.embed_tokens.weight", "row 0"})
    EXPECT_NE(load().message().find(named), std::string::npos) << load().message();
  // A copy of the embedding is what some converters write.
  const std::string path = (folder / "model.safetensors").string();
  const auto weights = storage::Safetensors::open(path).value();
  std::vector<storage::TensorInfo> tensors = weights.tensors();
  const auto& embedding = *weights.find("model.embed_tokens.weight");
  for (storage::TensorInfo& tensor : tensors)
    if (tensor.name == "lm_head.weight") tensor.bytes = embedding.bytes;
  ASSERT_TRUE(storage::write_safetensors(path, tensors, {}).ok());
  EXPECT_TRUE(load().ok()) << load().to_string();
}

TEST_F(ModelFolder, IsNotMergedIntoADtypeThatCannotHoldIt) {
  const std::string path = (folder / "model.safetensors").string();
  const auto weights = storage::Safetensors::open(path).value();
  std::vector<storage::TensorInfo> tensors = weights.tensors();
  std::vector<float> large(128, 1e6f);
  for (storage::TensorInfo& tensor : tensors)
    if (tensor.name == "model.norm.weight") {
      large.resize(static_cast<std::size_t>(tensor.numel()), 1.0f);
      std::fill(large.begin() + 2, large.end(), 1.0f);
      tensor.dtype = DType::kF32;
      tensor.bytes = std::as_bytes(std::span(large));
    }
  ASSERT_TRUE(storage::write_safetensors(path, tensors, {}).ok());
  const LoadedModel base = load_model(folder.string()).value();
  const std::string merged = str(folder.string(), "/merged");
  fs::create_directories(merged);
  const Status status = write_merged_weights(base, {}, DType::kF16, merged);
  EXPECT_EQ(status.code(), StatusCode::kRefused);
  for (const char* named : {"model.norm.weight", "2 of", "65504", "bf16"})
    EXPECT_NE(status.message().find(named), std::string::npos) << status.message();
  EXPECT_FALSE(fs::exists(merged + "/model.safetensors"));
  EXPECT_TRUE(write_merged_weights(base, {}, DType::kBF16, merged).ok());
}

TEST_F(ModelFolder, GenerationSettingsThatNobodyAppliesAreNamed) {
  write("generation_config.json",
        R"({"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 1.0, "min_length": 0,
            "suppress_tokens": [], "bad_words_ids": null, "stop_strings": ["END"], "top_k": 3})");
  const auto model = load_model(folder.string());
  ASSERT_TRUE(model.ok()) << model.status().message();
  EXPECT_EQ(model->generation.not_applied,
            (std::vector<std::string>{"no_repeat_ngram_size 3", "num_beams 4",
                                      "stop_strings [\"END\"]"}));
}

TEST_F(ModelFolder, GenerationDefaultsOfTheWrongKindOrOutOfRangeAreErrors) {
  for (const char* bad :
       {R"({"temperature": "hot"})", R"({"top_k": 1.5})", R"({"do_sample": 1})",
        R"({"repetition_penalty": 0})", R"({"max_new_tokens": 0})", R"({"eos_token_id": "</s>"})",
        R"({"eos_token_id": [2, 1099511627776]})", R"({"temperature": -0.1})", R"({"top_p": 0})",
        R"({"top_p": 1.5})", R"({"min_p": 2})", R"({"top_k": -3})", R"({"temperature": 11})"}) {
    write("generation_config.json", bad);
    EXPECT_EQ(load().code(), StatusCode::kInvalid) << bad;
    EXPECT_NE(load().message().find("generation_config.json"), std::string::npos);
  }
  write("generation_config.json", R"({"temperature": null, "eos_token_id": null, "top_k": 3})");
  EXPECT_EQ(load_model(folder.string())->generation.top_k, 3);
}

TEST_F(ModelFolder, TruncatedWeightsAreCorrupt) {
  fs::resize_file(folder / "model.safetensors", fs::file_size(folder / "model.safetensors") - 100);
  EXPECT_EQ(load().code(), StatusCode::kCorrupt);
}

TEST_F(ModelFolder, IdentityFollowsContentNotPlace) {
  const auto digest = [](const fs::path& path) {
    const auto manifest = describe_model(path.string(), 2);
    TANDEM_CHECK(manifest.ok(), manifest.status().to_string());
    return storage::manifest_digest(storage::encode_manifest(*manifest).value());
  };
  const Digest first = digest(folder);
  const fs::path moved = folder.string() + "-moved";
  fs::remove_all(moved);
  fs::copy(folder, moved);
  EXPECT_EQ(digest(moved), first);
  ASSERT_TRUE(storage::write_file_durably((moved / "chat_template.jinja").string(), "x").ok());
  EXPECT_NE(digest(moved), first);
  fs::remove_all(moved);
}

}  // namespace
}  // namespace tandem::worker::model
