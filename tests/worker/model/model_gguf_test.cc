// Models in GGUF files: the golden models written as converters write them are the golden models.
#include "storage/file_io.h"
#include "storage/gguf.h"
#include "tests/support/gguf_writer.h"
#include "tests/support/model_golden.h"
#include "worker/model/model_loader.h"
#include "worker/model/tensor_source.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>

namespace tandem::worker::model {
namespace {

namespace fs = std::filesystem;

/// "model.layers.1.mlp.up_proj.weight" -> "blk.1.ffn_up.weight", by the reader's own table.
std::string gguf_name(const std::string& name, std::int64_t layers) {
  std::vector<std::string> candidates{"token_embd.weight", "output_norm.weight", "output.weight"};
  for (std::int64_t layer = 0; layer < layers; ++layer)
    for (const char* part :
         {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm",
          "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"})
      for (const char* ending : {".weight", ".bias"})
        candidates.push_back(str("blk.", layer, ".", part, ending));
  for (const std::string& candidate : candidates)
    if (storage::gguf_to_hf_name(candidate) == name) return candidate;
  TANDEM_CHECK(false, name);
  return "";
}

class GgufModel : public testing::Test {
 protected:
  GgufModel() : folder(fs::path(testing::TempDir()) / str("gguf-", ::getpid())) {
    fs::create_directories(folder);
  }
  ~GgufModel() override { fs::remove_all(folder); }

  /// The golden's sizes under `arch`, and its tensors.
  static test::GgufWriter writer(const test::ModelGolden& golden, const std::string& arch) {
    const ModelConfig& c = golden.config();
    test::GgufWriter file;
    file.text("general.architecture", arch);
    for (const auto& [key, value] : {std::pair{"block_count", c.layers},
                                     {"embedding_length", c.width},
                                     {"feed_forward_length", c.mlp_width},
                                     {"context_length", c.context_max},
                                     {"attention.head_count", c.heads},
                                     {"attention.head_count_kv", c.kv_heads},
                                     {"attention.key_length", c.head_dim},
                                     {"attention.value_length", c.head_dim}})
      file.integer(arch + "." + key, static_cast<std::uint32_t>(value));
    file.number(arch + ".attention.layer_norm_rms_epsilon", c.norm_eps);
    file.number(arch + ".rope.freq_base", static_cast<float>(c.rope_theta));
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "qwen2");
    std::vector<std::string> tokens;
    for (std::int64_t v = 0; v < c.vocab; ++v) tokens.push_back(str("t", v));
    file.texts("tokenizer.ggml.tokens", tokens);
    const auto source = make_safetensors_source(golden.weights());
    for (const TensorSpec& spec : expected_tensors(c)) {
      const std::int64_t width = std::max<std::int64_t>(1, spec.i);
      std::vector<float> values(static_cast<std::size_t>(spec.n * width)), rows = values;
      source->read_rows(spec.name, 0, spec.n, values.data());
      const bool q = spec.name.ends_with("q_proj.weight"), k = spec.name.ends_with("k_proj.weight");
      if ((q || k) && storage::gguf_permutes_rope(arch)) {
        const auto order = storage::rope_row_order(spec.n, q ? c.heads : c.kv_heads).value();
        for (std::int64_t row = 0; row < spec.n; ++row)
          std::copy_n(values.begin() + row * width, width,
                      rows.begin() + order[static_cast<std::size_t>(row)] * width);
        values = rows;
      }
      file.tensor(gguf_name(spec.name, c.layers),
                  spec.i == 0 ? std::vector{spec.n} : std::vector{spec.n, spec.i}, values);
    }
    return file;
  }
  [[nodiscard]] std::string write(const test::GgufWriter& file) const {
    const std::string path = (folder / "model.gguf").string();
    TANDEM_CHECK(storage::write_file_durably(path, file.bytes()).ok());
    return path;
  }

  fs::path folder;
};

struct Case {
  const char *golden, *arch;
};

TEST_F(GgufModel, HasTheConfigurationAndTheWeightsOfItsFolder) {
  for (const Case& one : {Case{"llama_grouped", "llama"}, Case{"qwen2", "qwen2"},
                          Case{"qwen3", "qwen3"}, Case{"mistral", "llama"}}) {
    const test::ModelGolden golden(one.golden);
    const auto model = load_model(write(writer(golden, one.arch)));
    ASSERT_TRUE(model.ok()) << one.golden << ": " << model.status().to_string();
    ModelConfig want = golden.config();
    want.family = one.arch;  // converters call Mistral a llama
    want.bos_id = -1;        // not said in this file
    want.eos_ids.clear();
    EXPECT_EQ(model->config.canonical_json(), want.canonical_json()) << one.golden;
    const auto source = make_safetensors_source(golden.weights());
    for (const TensorSpec& spec : expected_tensors(want)) {
      std::vector<float> got(static_cast<std::size_t>(spec.n * std::max<std::int64_t>(1, spec.i)));
      std::vector<float> expected = got;
      source->read_rows(spec.name, 0, spec.n, expected.data());
      model->source->read_rows(spec.name, 0, spec.n, got.data());
      EXPECT_EQ(got, expected) << one.golden << " " << spec.name;
    }
  }
}

TEST_F(GgufModel, AWindowIsTheEndOfTheContext) {
  const test::ModelGolden golden("qwen3");
  test::GgufWriter file = writer(golden, "qwen3");
  file.integer("qwen3.attention.sliding_window", 100);
  const auto model = load_model(write(file));
  ASSERT_TRUE(model.ok()) << model.status().to_string();
  EXPECT_EQ(model->config.context_max, 100);
  test::GgufWriter wide = writer(golden, "qwen3");
  wide.integer("qwen3.attention.sliding_window", 1 << 20);
  EXPECT_EQ(load_model(write(wide))->config.context_max, golden.config().context_max);
}

TEST_F(GgufModel, WhatTheFamilyDoesNotHaveIsRefusedByName) {
  const test::ModelGolden golden("qwen3");
  test::GgufWriter biased = writer(golden, "qwen3");
  biased.tensor("blk.0.attn_q.bias", {48}, std::vector<float>(48, 1.0f));
  Status status = load_model(write(biased)).status();
  EXPECT_EQ(status.code(), StatusCode::kRefused) << status.to_string();
  EXPECT_NE(status.message().find("blk.0.attn_q.bias"), std::string::npos) << status.message();
  // A llama with norms of q and k, which a product would leave out.
  status = load_model(write(writer(golden, "llama"))).status();
  EXPECT_EQ(status.code(), StatusCode::kRefused) << status.to_string();
  EXPECT_NE(status.message().find("attn_k_norm"), std::string::npos) << status.message();
  for (const bool causal : {true, false}) {
    test::GgufWriter file = writer(golden, "qwen3");
    file.boolean("qwen3.attention.causal", causal);
    status = load_model(write(file)).status();
    EXPECT_EQ(status.code(), causal ? StatusCode::kOk : StatusCode::kRefused) << status.message();
  }
  EXPECT_NE(status.message().find("qwen3.attention.causal"), std::string::npos);
  status = load_model(write(writer(golden, "qwen3moe"))).status();
  EXPECT_EQ(status.code(), StatusCode::kRefused) << status.to_string();
  EXPECT_NE(status.message().find("qwen3moe"), std::string::npos) << status.message();
  // And a Qwen3 without them.
  status = load_model(write(writer(test::ModelGolden("llama_grouped"), "qwen3"))).status();
  EXPECT_EQ(status.code(), StatusCode::kNotFound) << status.to_string();
  EXPECT_NE(status.message().find("q_norm"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace tandem::worker::model
