// The tokenizer inside a GGUF file. The file names its splitting rules only by a word ("smollm"),
// so the rules stand here.
#include "storage/gguf.h"
#include "worker/text/tokenizer.h"
#include "worker/text/tokenizer_impl.h"

#include <nlohmann/json.hpp>

#include <array>
#include <map>

namespace tandem::worker::text {
namespace {

using Json = nlohmann::json;

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

/// The rules of add_rules as tokenizer.json's components.
void rules_json(Rules rules, bool add_prefix_space, Json& json) {
  const auto byte_level = [](bool prefix_space, bool regex) {
    return Json{{"type", "ByteLevel"},
                {"add_prefix_space", prefix_space},
                {"trim_offsets", true},
                {"use_regex", regex}};
  };
  const auto sequence = [&](Json first, Json second) {
    json["pre_tokenizer"] = {{"type", "Sequence"},
                             {"pretokenizers", {std::move(first), std::move(second)}}};
  };
  json["normalizer"] = nullptr;
  json["decoder"] = byte_level(true, true);
  if (rules == Rules::kGpt2) {
    json["pre_tokenizer"] = byte_level(add_prefix_space, true);
  } else if (rules == Rules::kDigitsThenGpt2) {
    sequence({{"type", "Digits"}, {"individual_digits", true}}, byte_level(add_prefix_space, true));
  } else {
    if (rules == Rules::kQwen2) json["normalizer"] = {{"type", "NFC"}};
    sequence({{"type", "Split"},
              {"pattern", {{"Regex", rules == Rules::kQwen2 ? kQwen2Pattern : kLlama3Pattern}}},
              {"behavior", "Isolated"},
              {"invert", false}},
             byte_level(false, false));
  }
}

/// Writes bos before (and eos after) every text, where the file says so.
Json template_json(const std::vector<std::string>& before, const std::vector<std::string>& after,
                   const std::map<std::string, std::uint32_t>& ids) {
  if (before.empty() && after.empty()) return nullptr;
  Json single = Json::array(), pair, tokens = Json::object();
  const auto special = [&](const std::string& name, int type) {
    tokens[name] = {{"id", name}, {"ids", {ids.at(name)}}, {"tokens", {name}}};
    return Json{{"SpecialToken", {{"id", name}, {"type_id", type}}}};
  };
  const auto add = [&](Json& to, const char* sequence, int type) {
    for (const auto& name : before) to.push_back(special(name, type));
    to.push_back({{"Sequence", {{"id", sequence}, {"type_id", type}}}});
    for (const auto& name : after) to.push_back(special(name, type));
  };
  add(single, "A", 0);
  pair = single;
  add(pair, "B", 1);
  return {{"type", "TemplateProcessing"},
          {"single", std::move(single)},
          {"pair", std::move(pair)},
          {"special_tokens", std::move(tokens)}};
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

Result<HfTokenizerFiles> hf_tokenizer_files(const storage::GgufTokenizer& data) {
  TANDEM_RETURN_IF_ERROR(Tokenizer::from_gguf(data).status());  // every error is found there
  TANDEM_ASSIGN_OR_RETURN(const PreName pre, find_pre(data.pre));
  Json json{{"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}};
  rules_json(pre.rules, data.add_space_prefix.value_or(false), json);
  Json added = Json::array(), vocabulary = Json::object();
  for (std::size_t id = 0; id < data.tokens.size(); ++id) {
    vocabulary[data.tokens[id]] = id;
    const std::int32_t type = data.token_types.empty() ? 1 : data.token_types[id];
    if (type == kTypeControl || type == kTypeUserDefined)
      added.push_back({{"id", id},
                       {"content", data.tokens[id]},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false},
                       {"special", type == kTypeControl}});
  }
  json["added_tokens"] = std::move(added);
  json["model"] = {{"type", "BPE"},
                   {"dropout", nullptr},
                   {"unk_token", nullptr},
                   {"continuing_subword_prefix", nullptr},
                   {"end_of_word_suffix", nullptr},
                   {"fuse_unk", false},
                   {"byte_fallback", false},
                   {"ignore_merges", pre.rules == Rules::kLlama3},
                   {"vocab", std::move(vocabulary)},
                   {"merges", data.merges}};
  Json config{{"tokenizer_class", "PreTrainedTokenizerFast"},
              {"clean_up_tokenization_spaces", false}};
  std::map<std::string, std::uint32_t> ids;
  const auto name = [&](const char* key, std::optional<std::uint32_t> id) {
    if (!id) return;
    config[key] = data.tokens[*id];
    ids[data.tokens[*id]] = *id;
  };
  name("bos_token", data.bos_id);
  name("eos_token", data.eos_id);
  name("unk_token", data.unk_id);
  name("pad_token", data.pad_id);
  std::vector<std::string> before, after;
  if (data.add_bos.value_or(pre.adds_bos) && data.bos_id)
    before.push_back(data.tokens[*data.bos_id]);
  if (data.add_eos.value_or(false) && data.eos_id) after.push_back(data.tokens[*data.eos_id]);
  json["post_processor"] = template_json(before, after, ids);
  if (!data.chat_template.empty()) config["chat_template"] = data.chat_template;
  return HfTokenizerFiles{json.dump(), config.dump(2) + "\n"};
}

}  // namespace tandem::worker::text
