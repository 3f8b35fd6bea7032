#include "tests/support/tiny_model.h"

#include "protocol/base/random.h"
#include "storage/safetensors.h"
#include "tools/random_model.h"
#include "worker/model/model_config.h"

#include <nlohmann/json.hpp>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <list>
#include <vector>

namespace tandem::test {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::int64_t kWidth = 64, kHeads = 4, kKvHeads = 2, kMlp = 96, kVocab = 260;
constexpr int kStart = 256, kEnd = 257;

void write(const std::string& path, const std::string& text) {
  std::ofstream(path) << text;
}

void write_tokenizer(const std::string& folder) {
  const auto files = tools::byte_tokenizer();
  write(folder + "/tokenizer.json", files.tokenizer_json);
  write(folder + "/tokenizer_config.json", files.tokenizer_config_json);
}

}  // namespace

void write_tiny_model(const std::string& folder, std::uint64_t seed, std::int64_t layers,
                      const std::string& family) {
  std::filesystem::create_directories(folder);
  const std::int64_t head = kWidth / kHeads;
  write(folder + "/config.json", Json{{"architectures", {worker::model::hf_architecture(family)}},
                                      {"model_type", family},
                                      {"vocab_size", kVocab},
                                      {"hidden_size", kWidth},
                                      {"num_hidden_layers", layers},
                                      {"num_attention_heads", kHeads},
                                      {"num_key_value_heads", kKvHeads},
                                      {"head_dim", head},
                                      {"sliding_window", nullptr},
                                      {"intermediate_size", kMlp},
                                      {"max_position_embeddings", 512},
                                      {"rms_norm_eps", 1e-5},
                                      {"rope_theta", 10000.0},
                                      {"hidden_act", "silu"},
                                      {"tie_word_embeddings", true},
                                      {"bos_token_id", kStart},
                                      {"eos_token_id", kEnd},
                                      {"torch_dtype", "float32"}}
                                     .dump());
  write_tokenizer(folder);
  Random random(seed);
  std::list<std::vector<float>> values;
  std::vector<storage::TensorInfo> tensors;
  auto add = [&](const std::string& name, std::vector<std::int64_t> shape, bool norm) {
    std::int64_t n = 1;
    for (auto d : shape) n *= d;
    auto& data = values.emplace_back(static_cast<std::size_t>(n));
    const float scale = 1.0f / std::sqrt(static_cast<float>(shape.back()));
    for (float& x : data) x = norm ? 1.0f : random.normal() * scale;
    storage::TensorInfo info;
    info.name = name;
    info.shape = std::move(shape);
    info.bytes = std::as_bytes(std::span(data));
    tensors.push_back(std::move(info));
  };
  add("model.embed_tokens.weight", {kVocab, kWidth}, false);
  add("model.norm.weight", {kWidth}, true);
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    const std::string at = "model.layers." + std::to_string(layer) + ".";
    add(at + "input_layernorm.weight", {kWidth}, true);
    add(at + "post_attention_layernorm.weight", {kWidth}, true);
    add(at + "self_attn.q_proj.weight", {kWidth, kWidth}, false);
    add(at + "self_attn.k_proj.weight", {kKvHeads * head, kWidth}, false);
    add(at + "self_attn.v_proj.weight", {kKvHeads * head, kWidth}, false);
    if (family == "qwen2")
      for (const auto& [site, n] : {std::pair{"q", kHeads}, {"k", kKvHeads}, {"v", kKvHeads}})
        add(at + "self_attn." + site + "_proj.bias", {n * head}, false);
    if (family == "qwen3")
      for (const char* norm : {"q_norm", "k_norm"})
        add(at + "self_attn." + norm + ".weight", {head}, true);
    add(at + "self_attn.o_proj.weight", {kWidth, kWidth}, false);
    add(at + "mlp.gate_proj.weight", {kMlp, kWidth}, false);
    add(at + "mlp.up_proj.weight", {kMlp, kWidth}, false);
    add(at + "mlp.down_proj.weight", {kWidth, kMlp}, false);
  }
  const Status status =
      storage::write_safetensors(folder + "/model.safetensors", tensors, {{"format", "pt"}});
  TANDEM_CHECK(status.ok(), status.to_string());
}

void write_tiny_dataset(const std::string& path, int rows, std::uint64_t seed) {
  static const char* kWords[] = {"red", "blue", "green", "north", "south", "salt", "stone", "wind"};
  Random random(seed);
  std::ofstream out(path);
  for (int i = 0; i < rows; ++i) {
    const std::string word = kWords[random.below(8)], other = kWords[random.below(8)];
    out << Json{{"messages",
                 {{{"role", "user"}, {"content", "say " + word + " " + std::to_string(i)}},
                  {{"role", "assistant"}, {"content", other + " " + word}}}}}
               .dump()
        << "\n";
  }
}

}  // namespace tandem::test
