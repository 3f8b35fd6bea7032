#include "worker/model/model_config.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <cmath>

namespace tandem::worker::model {
namespace {

using Json = nlohmann::json;

/// config.json of SmolLM2-135M-Instruct, as published.
Json smollm2() {
  return Json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
    "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
    "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
    "torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152})");
}

std::string refusal(const Json& json) {
  const auto config = ModelConfig::from_hf_json(json.dump());
  return config.ok() ? "" : config.status().to_string();
}

TEST(ModelConfig, ReadsARealModelsFile) {
  const auto config = ModelConfig::from_hf_json(smollm2().dump());
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config.value().family, "llama");
  EXPECT_EQ(config.value().width, 576);
  EXPECT_EQ(config.value().head_dim, 64);
  EXPECT_EQ(config.value().kv_heads, 3);
  EXPECT_TRUE(config.value().tied_embedding);
  EXPECT_EQ(config.value().rope_theta, 100000.0);
  EXPECT_EQ(config.value().eos_ids, std::vector<std::int32_t>{2});
}

TEST(ModelConfig, WhatChangesTheMathematicsIsRefusedByNameAndValue) {
  const std::vector<std::pair<std::string, Json>> changes{
      {"attention_bias", true},
      {"mlp_bias", true},
      {"hidden_act", "gelu"},
      {"attention_dropout", 0.1},
      {"partial_rotary_factor", 0.5},
      {"pretraining_tp", 2},
      {"rope_interleaved", true},
      {"sliding_window", 4096},
      {"use_sliding_window", true},
      {"quantization_config", Json{{"quant_method", "gptq"}}},
      {"layer_types", Json::array({"full_attention", "sliding_attention"})},
      {"rope_scaling", Json{{"rope_type", "longrope"}, {"factor", 4.0}}},
      {"rope_scaling", Json{{"rope_type", "linear"}, {"factor", 4.0}, {"mscale", 0.7}}},
      {"embedding_multiplier", 12.0},  // of another family: unknown here
      {"architectures", Json::array({"MambaForCausalLM"})}};
  for (const auto& [key, value] : changes) {
    Json json = smollm2();
    json[key] = value;
    const std::string message = refusal(json);
    EXPECT_TRUE(message.starts_with("refused")) << key << ": " << message;
    const std::string shown = value.is_object() || value.is_array() ? "" : value.dump();
    EXPECT_NE(message.find(shown), std::string::npos) << key << ": " << message;
    EXPECT_NE(message.find(key == "architectures" ? "MambaForCausalLM" : key), std::string::npos)
        << message;
  }
}

/// What config.json of a Qwen3 holds, with the sizes of Qwen3-0.6B.
Json qwen3() {
  return Json::parse(R"({
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": true, "use_sliding_window": false, "vocab_size": 151936})");
}

/// What config.json of a Mistral with a window holds, with the sizes of Mistral-7B-v0.1.
Json mistral() {
  return Json::parse(R"({
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000})");
}

ModelConfig read(const Json& json) {
  auto config = ModelConfig::from_hf_json(json.dump());
  TANDEM_CHECK(config.ok(), config.status().to_string());
  return *std::move(config);
}

TEST(ModelConfig, ReadsAQwen3sFile) {
  const ModelConfig config = read(qwen3());
  EXPECT_EQ(config.family, "qwen3");
  EXPECT_TRUE(config.qk_norm);
  EXPECT_FALSE(config.qkv_bias);
  EXPECT_EQ(config.head_dim, 128);  // not 1024 / 16
  EXPECT_EQ(config.context_max, 40960);
  EXPECT_EQ(config.norm_eps, 1e-6f);
  Json json = qwen3();
  json.erase("head_dim");
  json.erase("num_key_value_heads");
  json["num_attention_heads"] = 64;
  EXPECT_EQ(read(json).head_dim, 128);
  EXPECT_EQ(read(json).kv_heads, 32);
  json.erase("architectures");
  EXPECT_EQ(read(json).family, "qwen3");
  json = qwen3();
  json["attention_bias"] = true;
  EXPECT_TRUE(refusal(json).starts_with("refused")) << refusal(json);
  EXPECT_NE(refusal(json).find("attention_bias is true"), std::string::npos) << refusal(json);
  json = qwen3();
  json["head_dim"] = 2048;
  EXPECT_NE(refusal(json).find("head_dim 2048"), std::string::npos) << refusal(json);
}

TEST(ModelConfig, ReadsAMistralsFile) {
  ModelConfig config = read(mistral());
  EXPECT_EQ(config.family, "mistral");
  EXPECT_FALSE(config.qk_norm || config.qkv_bias);
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_EQ(config.kv_heads, 8);
  EXPECT_EQ(config.window, 0);
  // Nemo's heads are wider than its stream; newer files say null where there is no window.
  Json json = mistral();
  json["hidden_size"] = 5120;
  json["head_dim"] = 128;
  json["sliding_window"] = nullptr;
  json["max_position_embeddings"] = 131072;
  config = read(json);
  EXPECT_EQ(config.heads * config.head_dim, 4096);
  EXPECT_EQ(config.context_max, 131072);
  json.erase("head_dim");
  EXPECT_EQ(read(json).head_dim, 160);
  json.erase("num_key_value_heads");
  EXPECT_EQ(read(json).kv_heads, 8) << "transformers' default";
  json["num_key_value_heads"] = nullptr;
  EXPECT_EQ(read(json).kv_heads, 32);
  json.erase("max_position_embeddings");
  EXPECT_EQ(read(json).context_max, 131072);
  json.erase("architectures");
  EXPECT_EQ(read(json).family, "mistral");
  json["attention_bias"] = true;
  EXPECT_NE(refusal(json).find("attention_bias is true"), std::string::npos) << refusal(json);
}

TEST(ModelConfig, AWindowIsTheEndOfTheContext) {
  EXPECT_EQ(read(mistral()).context_max, 4096);
  Json json = mistral();
  json["sliding_window"] = 40000;
  EXPECT_EQ(read(json).context_max, 32768);
  json.erase("sliding_window");
  EXPECT_EQ(read(json).context_max, 4096) << "transformers' default where a file is silent";
  json["sliding_window"] = 0;
  EXPECT_NE(refusal(json).find("sliding_window is 0"), std::string::npos) << refusal(json);
  json["sliding_window"] = 300;
  json["max_window_layers"] = 32;  // a key of Qwen's
  EXPECT_EQ(read(json).context_max, 300);
  json = mistral();
  json["use_sliding_window"] = false;  // no key of Mistral's: transformers would slide
  EXPECT_NE(refusal(json).find("use_sliding_window"), std::string::npos) << refusal(json);
  // Qwen's window needs a switch, and blocks that have it.
  json = qwen3();
  json["sliding_window"] = 1000;
  EXPECT_EQ(read(json).context_max, 40960);
  json["use_sliding_window"] = true;
  EXPECT_EQ(read(json).context_max, 40960) << "from block 28 of 28 on";
  json["max_window_layers"] = 20;
  EXPECT_EQ(read(json).context_max, 1000);
  EXPECT_EQ(read(json).window, 0);
  json["layer_types"] = Json(28, "full_attention");
  EXPECT_EQ(read(json).context_max, 40960);
  json["layer_types"][3] = "sliding_attention";
  EXPECT_EQ(read(json).context_max, 1000);
  json["layer_types"][3] = "chunked_attention";
  EXPECT_NE(refusal(json).find("chunked_attention"), std::string::npos) << refusal(json);
  json["layer_types"][3] = "sliding_attention";
  json["use_sliding_window"] = false;
  EXPECT_NE(refusal(json).find("sliding_attention"), std::string::npos) << refusal(json);
  // What scales positions knows the file's length, not the window.
  json = qwen3();
  json["use_sliding_window"] = true;
  json["sliding_window"] = 1000;
  json["max_window_layers"] = 0;
  json["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}};
  EXPECT_EQ(read(json).rope_scaling.original_max_position_embeddings, 40960);
}

TEST(ModelConfig, ModelsWithoutNormsOfQAndKKeepTheirCanonicalText) {
  const std::string text = read(smollm2()).canonical_json();
  EXPECT_EQ(text.find("qk_norm"), std::string::npos) << "their digests are those of before";
  EXPECT_NE(read(qwen3()).canonical_json().find(R"("qk_norm":true)"), std::string::npos);
}

TEST(ModelConfig, MalformedFilesAreErrorsThatNameTheField) {
  Json json = smollm2();
  json.erase("hidden_size");
  EXPECT_NE(refusal(json).find("hidden_size is missing"), std::string::npos);
  json = smollm2();
  json["num_hidden_layers"] = "thirty";
  EXPECT_NE(refusal(json).find("num_hidden_layers"), std::string::npos);
  json = smollm2();
  json["num_key_value_heads"] = 4;  // does not divide 9
  EXPECT_NE(refusal(json).find("no multiple"), std::string::npos);
  json = smollm2();
  json["vocab_size"] = -5;
  EXPECT_NE(refusal(json).find("vocab_size"), std::string::npos);
  json = smollm2();
  json["num_attention_heads"] = 0;
  EXPECT_NE(refusal(json).find("num_attention_heads"), std::string::npos);
  EXPECT_FALSE(ModelConfig::from_hf_json("[1, 2").ok());
  EXPECT_FALSE(ModelConfig::from_hf_json("[1, 2]").ok());
  EXPECT_FALSE(ModelConfig::from_hf_json("{}").ok());
}

TEST(ModelConfig, OldAndNewNamesOfRopeScalingMeanTheSame) {
  Json old = smollm2(), now = smollm2();
  old["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  now.erase("rope_theta");
  now.erase("rope_scaling");
  now["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 100000.0}};
  const auto a = ModelConfig::from_hf_json(old.dump()), b = ModelConfig::from_hf_json(now.dump());
  ASSERT_TRUE(a.ok()) << a.status().to_string();
  ASSERT_TRUE(b.ok()) << b.status().to_string();
  EXPECT_EQ(a.value().canonical_json(), b.value().canonical_json());
}

TEST(ModelConfig, DynamicRopeIsTheDefaultWithinTheContext) {
  Json dynamic = smollm2();
  dynamic["rope_scaling"] = {{"type", "dynamic"}, {"factor", 2.0}};
  const auto config = ModelConfig::from_hf_json(dynamic.dump());
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->canonical_json(),
            ModelConfig::from_hf_json(smollm2().dump())->canonical_json());
  dynamic["rope_scaling"].erase("factor");
  EXPECT_NE(refusal(dynamic).find("factor is missing"), std::string::npos);
}

TEST(ModelConfig, AModelTypeStandsInForMissingArchitectures) {
  Json json = smollm2();
  json.erase("architectures");
  json["model_type"] = "llama";
  EXPECT_EQ(ModelConfig::from_hf_json(json.dump())->family, "llama");
  json["model_type"] = "mamba";
  EXPECT_NE(refusal(json).find("architectures"), std::string::npos);
}

TEST(ModelConfig, TokenIdsThatDoNotFitAreErrors) {
  for (const char* key : {"bos_token_id", "eos_token_id"}) {
    Json json = smollm2();
    json[key] = std::int64_t{1} << 40;  // as 32 bits it would be token 0
    EXPECT_NE(refusal(json).find(key), std::string::npos) << refusal(json);
  }
}

TEST(ModelConfig, CanonicalTextDiffersWhereTheMathematicsDoes) {
  ModelConfig config = ModelConfig::from_hf_json(smollm2().dump()).value();
  const std::string text = config.canonical_json();
  EXPECT_EQ(text, ModelConfig::from_hf_json(smollm2().dump()).value().canonical_json());
  config.norm_eps = 1e-6f;
  EXPECT_NE(config.canonical_json(), text);
}

TEST(RopeTable, DefaultIsThetaToThePower) {
  ModelConfig config = ModelConfig::from_hf_json(smollm2().dump()).value();
  const RopeTable table = make_rope_table(config);
  ASSERT_EQ(table.inv_freq.size(), 32u);
  for (std::size_t d = 0; d < 32; ++d)
    EXPECT_FLOAT_EQ(table.inv_freq[d],
                    static_cast<float>(std::pow(1e5, -static_cast<double>(d) / 32.0)));
  EXPECT_EQ(table.attention_factor, 1.0f);
}

TEST(RopeTable, GgufFactorsDivide) {
  ModelConfig config = ModelConfig::from_hf_json(smollm2().dump()).value();
  const RopeTable plain = make_rope_table(config);
  config.rope_scaling.factors.assign(32, 1.0f);
  config.rope_scaling.factors[31] = 8.0f;
  const RopeTable scaled = make_rope_table(config);
  EXPECT_EQ(scaled.inv_freq[0], plain.inv_freq[0]);
  EXPECT_FLOAT_EQ(scaled.inv_freq[31], plain.inv_freq[31] / 8.0f);
}

}  // namespace
}  // namespace tandem::worker::model
