#include "tools/random_model.h"

#include "storage/safetensors.h"
#include "worker/model/base_weights.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

namespace tandem::tools {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kStart = 256, kEnd = 257;

/// The 256 characters that byte-level BPE spells bytes with (GPT-2's bytes_to_unicode).
std::vector<std::string> byte_characters() {
  std::vector<std::string> characters;
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool visible = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    const int code = visible ? byte : next++;
    std::string utf8;
    if (code < 0x80)
      utf8 = std::string(1, static_cast<char>(code));
    else
      utf8 = {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
    characters.push_back(utf8);
  }
  return characters;
}

Json special_token(int id, const std::string& content) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

Json config_json(const worker::model::ModelConfig& c) {
  return {{"architectures", {worker::model::hf_architecture(c.family)}},
          {"model_type", c.family},
          {"vocab_size", c.vocab},
          {"hidden_size", c.width},
          {"num_hidden_layers", c.layers},
          {"num_attention_heads", c.heads},
          {"num_key_value_heads", c.kv_heads},
          {"head_dim", c.head_dim},
          {"intermediate_size", c.mlp_width},
          {"max_position_embeddings", c.context_max},
          {"rms_norm_eps", c.norm_eps},
          {"rope_theta", c.rope_theta},
          {"hidden_act", "silu"},
          {"tie_word_embeddings", c.tied_embedding},
          {"bos_token_id", kStart},
          {"eos_token_id", kEnd},
          {"torch_dtype", "bfloat16"}};
}

Status write_text(const std::string& path, const std::string& text) {
  std::ofstream out(path);
  out << text;
  out.close();
  return out ? Status{} : internal_error(str("cannot write ", path));
}

/// Rows of one tensor that are filled together.
struct Piece {
  const worker::model::TensorSpec* spec;
  std::int64_t row, rows;
};

std::vector<Piece> cut(const std::vector<worker::model::TensorSpec>& specs) {
  constexpr std::int64_t kPieceElements = 1 << 20;
  std::vector<Piece> pieces;
  for (const auto& spec : specs) {
    const std::int64_t rows =
        std::max<std::int64_t>(1, kPieceElements / std::max<std::int64_t>(1, spec.i));
    for (std::int64_t row = 0; row < spec.n; row += rows)
      pieces.push_back({&spec, row, std::min(rows, spec.n - row)});
  }
  return pieces;
}

void fill(const storage::SafetensorsDraft& draft, const std::vector<Piece>& pieces,
          const worker::model::TensorSource& source) {
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    std::vector<float> values;
    std::vector<bf16> rounded;
    for (std::size_t p = next++; p < pieces.size(); p = next++) {
      const Piece& piece = pieces[p];
      const std::int64_t width = std::max<std::int64_t>(1, piece.spec->i);
      values.resize(static_cast<std::size_t>(piece.rows * width));
      rounded.resize(values.size());
      source.read_rows(piece.spec->name, piece.row, piece.rows, values.data());
      std::transform(values.begin(), values.end(), rounded.begin(), to_bf16);
      std::memcpy(draft.room(piece.spec->name).data() + piece.row * width * 2, rounded.data(),
                  rounded.size() * sizeof(bf16));
    }
  };
  std::vector<std::thread> threads;
  for (unsigned t = 1; t < std::thread::hardware_concurrency(); ++t) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

worker::model::TokenizerFiles byte_tokenizer() {
  Json vocab = Json::object();
  const auto characters = byte_characters();
  for (std::size_t i = 0; i < characters.size(); ++i) vocab[characters[i]] = i;
  const Json level{{"type", "ByteLevel"},
                   {"add_prefix_space", false},
                   {"trim_offsets", true},
                   {"use_regex", true}};
  const Json tokenizer{{"version", "1.0"},
                       {"truncation", nullptr},
                       {"padding", nullptr},
                       {"added_tokens", Json::array({special_token(kStart, "<|im_start|>"),
                                                     special_token(kEnd, "<|im_end|>")})},
                       {"normalizer", nullptr},
                       {"pre_tokenizer", level},
                       {"post_processor", nullptr},
                       {"decoder", level},
                       {"model",
                        {{"type", "BPE"},
                         {"dropout", nullptr},
                         {"unk_token", nullptr},
                         {"vocab", vocab},
                         {"merges", Json::array()}}}};
  worker::model::TokenizerFiles files;
  files.tokenizer_json = tokenizer.dump();
  files.tokenizer_config_json = Json{
      {"eos_token", "<|im_end|>"},
      {"bos_token", "<|im_start|>"},
      {"chat_template",
       "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
       "message['content'] + "
       "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
       "'<|im_start|>assistant\n' }}"
       "{% endif %}"}}.dump();
  return files;
}

Status write_model(const std::string& folder, const worker::model::ModelConfig& config,
                   const worker::model::TensorSource& source) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) return internal_error(str("cannot make ", folder, ": ", error.message()));
  const auto tokenizer = byte_tokenizer();
  TANDEM_RETURN_IF_ERROR(write_text(folder + "/config.json", config_json(config).dump(2)));
  TANDEM_RETURN_IF_ERROR(write_text(folder + "/tokenizer.json", tokenizer.tokenizer_json));
  TANDEM_RETURN_IF_ERROR(
      write_text(folder + "/tokenizer_config.json", tokenizer.tokenizer_config_json));
  const auto specs = worker::model::expected_tensors(config);
  std::vector<storage::TensorInfo> tensors;
  for (const auto& spec : specs) {
    storage::TensorInfo& info = tensors.emplace_back();
    info.name = spec.name;
    info.dtype = DType::kBF16;
    info.shape = spec.i > 0 ? std::vector{spec.n, spec.i} : std::vector{spec.n};
  }
  const std::string path = folder + "/model.safetensors";
  TANDEM_RETURN_IF_ERROR(storage::SafetensorsDraft::create(path, tensors, {{"format", "pt"}}));
  TANDEM_ASSIGN_OR_RETURN(const auto draft, storage::SafetensorsDraft::open(path));
  fill(draft, cut(specs), source);
  return {};
}

}  // namespace tandem::tools
