#include "storage/gguf.h"

#include <algorithm>
#include <array>
#include <utility>

namespace tandem::storage {
namespace {

using Pair = std::pair<std::string_view, std::string_view>;

constexpr std::array<Pair, 3> kOuter{
    {{"token_embd", "model.embed_tokens"}, {"output_norm", "model.norm"}, {"output", "lm_head"}}};
constexpr std::array<Pair, 11> kBlock{{{"attn_norm", "input_layernorm"},
                                       {"attn_q", "self_attn.q_proj"},
                                       {"attn_k", "self_attn.k_proj"},
                                       {"attn_v", "self_attn.v_proj"},
                                       {"attn_output", "self_attn.o_proj"},
                                       {"attn_q_norm", "self_attn.q_norm"},
                                       {"attn_k_norm", "self_attn.k_norm"},
                                       {"ffn_norm", "post_attention_layernorm"},
                                       {"ffn_gate", "mlp.gate_proj"},
                                       {"ffn_up", "mlp.up_proj"},
                                       {"ffn_down", "mlp.down_proj"}}};

std::string_view lookup(std::span<const Pair> table, std::string_view name) {
  for (const Pair& pair : table)
    if (pair.first == name) return pair.second;
  return {};
}

template <class T>
Status permute(std::span<T> matrix, std::int64_t rows, std::int64_t heads) {
  TANDEM_ASSIGN_OR_RETURN(const auto order, rope_row_order(rows, heads));
  if (static_cast<std::int64_t>(matrix.size()) % rows != 0)
    return invalid_error(
        str("a matrix of ", matrix.size(), " elements has no ", rows, " equal rows"));
  const std::size_t columns = matrix.size() / static_cast<std::size_t>(rows);
  const std::vector<T> source(matrix.begin(), matrix.end());
  for (std::size_t i = 0; i < order.size(); ++i)
    std::copy_n(
        source.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(order[i]) * columns),
        columns, matrix.begin() + static_cast<std::ptrdiff_t>(i * columns));
  return {};
}

}  // namespace

bool gguf_permutes_rope(std::string_view architecture) {
  return architecture == "llama";
}

Result<std::vector<std::int64_t>> rope_row_order(std::int64_t rows, std::int64_t heads) {
  if (heads <= 0 || rows <= 0 || rows % heads != 0 || (rows / heads) % 2 != 0)
    return invalid_error(str(rows, " rows are not ", heads, " heads of an even size"));
  const std::int64_t half = rows / heads / 2;
  std::vector<std::int64_t> order;
  order.reserve(static_cast<std::size_t>(rows));
  for (std::int64_t head = 0; head < heads; ++head)
    for (std::int64_t part = 0; part < 2; ++part)
      for (std::int64_t i = 0; i < half; ++i) order.push_back((head * half + i) * 2 + part);
  return order;
}

Status unpermute_rope_rows(std::span<float> matrix, std::int64_t rows, std::int64_t heads) {
  return permute(matrix, rows, heads);
}
Status unpermute_rope_rows(std::span<bf16> matrix, std::int64_t rows, std::int64_t heads) {
  return permute(matrix, rows, heads);
}

std::optional<std::string> gguf_to_hf_name(std::string_view name) {
  const auto dot = name.rfind('.');
  if (dot == std::string_view::npos) return {};
  const std::string_view suffix = name.substr(dot);
  if (suffix != ".weight" && suffix != ".bias") return {};
  std::string_view stem = name.substr(0, dot);
  if (!stem.starts_with("blk.")) {
    const std::string_view outer = lookup(kOuter, stem);
    return outer.empty() ? std::nullopt : std::optional(str(outer, suffix));
  }
  stem.remove_prefix(4);
  const auto end = stem.find('.');
  if (end == std::string_view::npos || end == 0 || end > 6) return {};
  const std::string_view layer = stem.substr(0, end);
  if (!std::all_of(layer.begin(), layer.end(), [](char c) { return c >= '0' && c <= '9'; }))
    return {};
  const std::string_view part = lookup(kBlock, stem.substr(end + 1));
  if (part.empty()) return {};
  return str("model.layers.", layer, ".", part, suffix);
}

Result<GgufTokenizer> Gguf::tokenizer() const {
  GgufTokenizer t;
  TANDEM_ASSIGN_OR_RETURN(t.model, text("tokenizer.ggml.model"));
  TANDEM_ASSIGN_OR_RETURN(t.tokens, texts("tokenizer.ggml.tokens"));
  if (has("tokenizer.ggml.pre")) {
    TANDEM_ASSIGN_OR_RETURN(t.pre, text("tokenizer.ggml.pre"));
  }
  if (has("tokenizer.ggml.merges")) {
    TANDEM_ASSIGN_OR_RETURN(t.merges, texts("tokenizer.ggml.merges"));
  }
  if (has("tokenizer.chat_template")) {
    TANDEM_ASSIGN_OR_RETURN(t.chat_template, text("tokenizer.chat_template"));
  }
  if (has("tokenizer.ggml.token_type")) {
    TANDEM_ASSIGN_OR_RETURN(const auto types, integers("tokenizer.ggml.token_type"));
    for (std::int64_t type : types) t.token_types.push_back(static_cast<std::int32_t>(type));
    if (types.size() != t.tokens.size())
      return invalid_error(
          str(path(), ": ", types.size(), " token types for ", t.tokens.size(), " tokens"));
  }
  if (has("tokenizer.ggml.scores")) {
    TANDEM_ASSIGN_OR_RETURN(const auto scores, numbers("tokenizer.ggml.scores"));
    for (double score : scores) t.scores.push_back(static_cast<float>(score));
    if (scores.size() != t.tokens.size())
      return invalid_error(
          str(path(), ": ", scores.size(), " scores for ", t.tokens.size(), " tokens"));
  }
  const std::array<std::pair<const char*, std::optional<std::uint32_t>*>, 4> ids{
      {{"tokenizer.ggml.bos_token_id", &t.bos_id},
       {"tokenizer.ggml.eos_token_id", &t.eos_id},
       {"tokenizer.ggml.unknown_token_id", &t.unk_id},
       {"tokenizer.ggml.padding_token_id", &t.pad_id}}};
  for (const auto& [key, target] : ids) {
    if (!has(key)) continue;
    TANDEM_ASSIGN_OR_RETURN(const std::int64_t id, integer(key));
    if (id < 0 || id >= static_cast<std::int64_t>(t.tokens.size()))
      return invalid_error(
          str(path(), ": ", key, " ", id, " is not one of ", t.tokens.size(), " tokens"));
    *target = static_cast<std::uint32_t>(id);
  }
  const std::array<std::pair<const char*, std::optional<bool>*>, 3> flags{
      {{"tokenizer.ggml.add_bos_token", &t.add_bos},
       {"tokenizer.ggml.add_eos_token", &t.add_eos},
       {"tokenizer.ggml.add_space_prefix", &t.add_space_prefix}}};
  for (const auto& [key, target] : flags) {
    if (!has(key)) continue;
    TANDEM_ASSIGN_OR_RETURN(*target, boolean(key));
  }
  return t;
}

}  // namespace tandem::storage
