// The tokenizer inside a GGUF file. The file names its splitting rules only by a word ("smollm"),
// so the rules stand here.
#include "storage/gguf.h"
#include "worker/text/tokenizer.h"
#include "worker/text/tokenizer_impl.h"

#include <array>

namespace tandem::worker::text {
namespace {

/// tokenizer.ggml.token_type, as llama.cpp numbers them.
constexpr std::int32_t kTypeControl = 3;
constexpr std::int32_t kTypeUserDefined = 4;

constexpr const char* kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";

enum class Rules { kGpt2, kDigitsThenGpt2, kLlama3, kQwen2 };

struct PreName {
  const char* name;
  Rules rules;
  bool adds_bos;  ///< the family's habit, for files that do not say
};
/// Source: the tokenizers that the models publish; llama.cpp's names for them.
constexpr std::array<PreName, 15> kPreNames{{
    {"gpt-2", Rules::kGpt2, false},
    {"gpt2", Rules::kGpt2, false},
    {"phi-2", Rules::kGpt2, false},
    {"olmo", Rules::kGpt2, false},
    {"smollm", Rules::kDigitsThenGpt2, false},
    {"starcoder", Rules::kDigitsThenGpt2, false},
    {"refact", Rules::kDigitsThenGpt2, false},
    {"command-r", Rules::kDigitsThenGpt2, true},
    {"llama-bpe", Rules::kLlama3, true},
    {"llama3", Rules::kLlama3, true},
    {"llama-v3", Rules::kLlama3, true},
    {"smaug-bpe", Rules::kLlama3, true},
    {"dbrx", Rules::kLlama3, false},
    {"falcon3", Rules::kLlama3, false},
    {"qwen2", Rules::kQwen2, false},
}};

Result<PreName> find_pre(const std::string& name) {
  std::vector<std::string_view> names;
  for (const PreName& known : kPreNames) {
    if (name == known.name) return known;
    names.emplace_back(known.name);
  }
  std::string list;
  for (const std::string_view known : names) list += str(list.empty() ? "" : ", ", known);
  return refused_error(str("GGUF: tokenizer.ggml.pre is \"", name,
                           "\", which is not supported (supported: ", list,
                           "); use the model's Hugging Face folder instead"));
}

Status add_split(const char* pattern, PreTokenizer& pre_tokenizer) {
  SplitStep step;
  TANDEM_ASSIGN_OR_RETURN(step.pattern, Regex::compile(pattern));
  pre_tokenizer.add(std::move(step));
  pre_tokenizer.add(ByteLevelStep{});
  return Status::ok_status();
}

Status add_rules(Rules rules, bool add_prefix_space, Tokenizer::Impl& impl) {
  switch (rules) {
    case Rules::kLlama3:
      return add_split(kLlama3Pattern, impl.pre_tokenizer);
    case Rules::kQwen2:
      impl.normalizer.add(NormalForm::kNfc);  // in Qwen's tokenizer.json, unknown to GGUF
      return add_split(kQwen2Pattern, impl.pre_tokenizer);
    case Rules::kDigitsThenGpt2:
      impl.pre_tokenizer.add(DigitsStep{true});
      [[fallthrough]];
    case Rules::kGpt2:
      break;
  }
  ByteLevelStep step;
  step.add_prefix_space = add_prefix_space;
  TANDEM_ASSIGN_OR_RETURN(step.regex, Regex::compile(kGpt2Pattern));
  impl.pre_tokenizer.add(std::move(step));
  return Status::ok_status();
}

Status parse_tokens(const storage::GgufTokenizer& data, TokenizerParts& parts) {
  if (!data.token_types.empty() && data.token_types.size() != data.tokens.size())
    return invalid_error(
        str("GGUF: ", data.tokens.size(), " tokens but ", data.token_types.size(), " token types"));
  for (std::size_t i = 0; i < data.tokens.size(); ++i) {
    const auto id = static_cast<std::int32_t>(i);
    if (!parts.vocabulary.emplace(data.tokens[i], id).second)
      return invalid_error(str("GGUF: token ", i, " repeats \"", data.tokens[i], "\""));
    const std::int32_t type = data.token_types.empty() ? 1 : data.token_types[i];
    if (type != kTypeControl && type != kTypeUserDefined) continue;
    AddedToken token;
    token.id = id;
    token.content = data.tokens[i];
    token.special = type == kTypeControl;
    parts.added.push_back(std::move(token));
  }
  for (const std::string& merge : data.merges) {
    const std::size_t space = merge.find(' ');
    if (space == std::string::npos || merge.find(' ', space + 1) != std::string::npos)
      return invalid_error(str("GGUF: merge \"", merge, "\" is not two tokens and a space"));
    parts.merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
  }
  return Status::ok_status();
}

Status take_ids(const storage::GgufTokenizer& data, bool adds_bos, Tokenizer::Impl& impl) {
  const auto take = [&](const char* name, std::optional<std::uint32_t> id,
                        std::optional<std::int32_t>& to) -> Status {
    if (id && *id >= impl.entries.size())
      return invalid_error(str("GGUF: ", name, " token id ", *id, " is outside the vocabulary of ",
                               impl.entries.size()));
    if (id) to = static_cast<std::int32_t>(*id);
    return Status::ok_status();
  };
  TANDEM_RETURN_IF_ERROR(take("bos", data.bos_id, impl.bos_id));
  TANDEM_RETURN_IF_ERROR(take("eos", data.eos_id, impl.eos_id));
  TANDEM_RETURN_IF_ERROR(take("unknown", data.unk_id, impl.unk_id));
  TANDEM_RETURN_IF_ERROR(take("padding", data.pad_id, impl.pad_id));
  if (data.add_bos.value_or(adds_bos) && impl.bos_id) impl.prefix_ids = {*impl.bos_id};
  if (data.add_eos.value_or(false) && impl.eos_id) impl.suffix_ids = {*impl.eos_id};
  return Status::ok_status();
}

}  // namespace

Result<Tokenizer> Tokenizer::from_gguf(const storage::GgufTokenizer& data) {
  if (data.model != "gpt2")
    return refused_error(str("GGUF: tokenizer.ggml.model is \"", data.model,
                             "\", which is not supported (supported: gpt2, byte-level BPE)"));
  TANDEM_ASSIGN_OR_RETURN(const PreName pre, find_pre(data.pre));
  auto impl = std::make_shared<Impl>();
  TANDEM_RETURN_IF_ERROR(add_rules(pre.rules, data.add_space_prefix.value_or(false), *impl));
  TokenizerParts parts;
  // Llama 3's vocabulary holds whole words that its merges cannot reach.
  parts.bpe.ignore_merges = pre.rules == Rules::kLlama3;
  TANDEM_RETURN_IF_ERROR(parse_tokens(data, parts));
  TANDEM_RETURN_IF_ERROR(build_vocabulary(std::move(parts), *impl));
  TANDEM_RETURN_IF_ERROR(take_ids(data, pre.adds_bos, *impl));
  return Tokenizer(std::move(impl));
}

}  // namespace tandem::worker::text
