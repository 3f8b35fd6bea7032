// The tokenizer inside a GGUF file. The file names its splitting rules only by a word ("smollm"),
// so the rules stand here.
#include "storage/gguf.h"
#include "worker/text/tokenizer.h"
#include "worker/text/tokenizer_impl.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

namespace tandem::worker::text {
namespace {

using Json = nlohmann::json;

/// tokenizer.ggml.token_type, as llama.cpp numbers them.
constexpr std::int32_t kTypeNormal = 1;
constexpr std::int32_t kTypeUnknown = 2;
constexpr std::int32_t kTypeControl = 3;
constexpr std::int32_t kTypeUserDefined = 4;

bool is_sentencepiece(const storage::GgufTokenizer& data) {
  return data.model == "llama";
}

bool is_added(std::int32_t type, const storage::GgufTokenizer& data) {
  return type == kTypeControl || type == kTypeUserDefined ||
         (type == kTypeUnknown && is_sentencepiece(data));
}

constexpr const char* kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";

// Mistral's since Nemo: a word ends where an upper-case letter follows a lower-case one.
constexpr const char* kTekkenPattern =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"(|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

enum class Rules { kGpt2, kDigitsThenGpt2, kLlama3, kQwen2, kTekken };

/// Vocabularies that hold whole words which their merges cannot reach.
bool ignores_merges(Rules rules) {
  return rules == Rules::kLlama3 || rules == Rules::kTekken;
}

/// The pattern of rules that are one split; others have no text of their own here.
const char* split_of(Rules rules) {
  if (rules == Rules::kLlama3) return kLlama3Pattern;
  return rules == Rules::kQwen2 ? kQwen2Pattern : kTekkenPattern;
}

struct PreName {
  const char* name;
  Rules rules;
  bool adds_bos;  ///< the family's habit, for files that do not say
};
/// Source: the tokenizers that the models publish; llama.cpp's names for them.
constexpr std::array<PreName, 16> kPreNames{{
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
    {"tekken", Rules::kTekken, true},
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
    case Rules::kQwen2:
      impl.normalizer.add(NormalForm::kNfc);  // in Qwen's tokenizer.json, unknown to GGUF
      [[fallthrough]];
    case Rules::kLlama3:
    case Rules::kTekken:
      return add_split(split_of(rules), impl.pre_tokenizer);
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
              {"pattern", {{"Regex", split_of(rules)}}},
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
    if (!is_added(type, data)) continue;
    AddedToken token;
    token.id = id;
    token.content = data.tokens[i];
    token.special = type != kTypeUserDefined;
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

/// SentencePiece has no list of merges: any two neighbours that are a token together merge, the
/// best score first. As a list: every way to cut a token into two, in the order of the scores (as
/// transformers' SentencePieceExtractor writes it).
Result<std::vector<std::pair<std::string, std::string>>> merges_of_scores(
    const storage::GgufTokenizer& data) {
  const std::size_t count = data.tokens.size();
  if (data.scores.size() != count || data.token_types.size() != count)
    return invalid_error(str("GGUF: ", count, " tokens but ", data.scores.size(), " scores and ",
                             data.token_types.size(), " token types"));
  StringMap<std::size_t> normal;
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < count; ++i) {
    if (data.token_types[i] != kTypeNormal) continue;
    if (std::isnan(data.scores[i]))
      return invalid_error(str("GGUF: the score of token ", i, " is NaN"));
    normal.emplace(data.tokens[i], i);
    order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return data.scores[a] > data.scores[b]; });
  std::vector<std::pair<std::string, std::string>> merges;
  for (const std::size_t token : order) {
    const std::string_view spelling = data.tokens[token];
    std::vector<std::array<std::size_t, 3>> cuts;  // left, right, where
    for (std::size_t at = 1; at < spelling.size(); ++at) {
      if ((static_cast<unsigned char>(spelling[at]) & 0xC0) == 0x80) continue;
      const auto left = normal.find(spelling.substr(0, at)),
                 right = normal.find(spelling.substr(at));
      if (left != normal.end() && right != normal.end())
        cuts.push_back({left->second, right->second, at});
    }
    std::sort(cuts.begin(), cuts.end());
    for (const auto& cut : cuts)
      merges.emplace_back(spelling.substr(0, cut[2]), spelling.substr(cut[2]));
  }
  return merges;
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

Result<Tokenizer> from_scores(const storage::GgufTokenizer& data) {
  auto impl = std::make_shared<Tokenizer::Impl>();
  if (data.add_space_prefix.value_or(true)) {
    impl->normalizer.add(PrependStep{kMetaspace});
    impl->leading_space = LeadingSpace::kOneDropped;
  }
  impl->normalizer.add(ReplaceStep{std::string(" "), kMetaspace});
  TokenizerParts parts;
  parts.decodes_spaces = parts.decodes_bytes = true;
  parts.bpe.characters = parts.bpe.byte_fallback = parts.bpe.fuse_unk = true;
  if (data.unk_id && *data.unk_id < data.tokens.size())
    parts.bpe.unk_id = static_cast<std::int32_t>(*data.unk_id);
  TANDEM_ASSIGN_OR_RETURN(auto merges, merges_of_scores(data));
  TANDEM_RETURN_IF_ERROR(parse_tokens(data, parts));
  parts.merges = std::move(merges);
  TANDEM_RETURN_IF_ERROR(build_vocabulary(std::move(parts), *impl));
  TANDEM_RETURN_IF_ERROR(take_ids(data, true, *impl));
  return Tokenizer(std::move(impl));
}

/// The same as tokenizer.json's components, but for the vocabulary.
void scores_json(const storage::GgufTokenizer& data,
                 const std::vector<std::pair<std::string, std::string>>& merges, Json& json) {
  const bool prefix = data.add_space_prefix.value_or(true);
  const auto replace = [](const char* from, const char* to) {
    return Json{{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
  };
  Json normalizers = Json::array(), decoders = Json::array();
  if (prefix) normalizers.push_back({{"type", "Prepend"}, {"prepend", kMetaspace}});
  normalizers.push_back(replace(" ", kMetaspace));
  decoders.push_back(replace(kMetaspace, " "));
  decoders.push_back({{"type", "ByteFallback"}});
  decoders.push_back({{"type", "Fuse"}});
  if (prefix) decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  json["normalizer"] = {{"type", "Sequence"}, {"normalizers", std::move(normalizers)}};
  json["pre_tokenizer"] = nullptr;
  json["decoder"] = {{"type", "Sequence"}, {"decoders", std::move(decoders)}};
  Json& model = json["model"];
  model["byte_fallback"] = model["fuse_unk"] = true;
  model["merges"] = merges;
  if (data.unk_id) model["unk_token"] = data.tokens[*data.unk_id];
}

}  // namespace

Result<Tokenizer> Tokenizer::from_gguf(const storage::GgufTokenizer& data) {
  if (is_sentencepiece(data)) return from_scores(data);
  if (data.model != "gpt2")
    return refused_error(str("GGUF: tokenizer.ggml.model is \"", data.model,
                             "\", which is not supported (supported: gpt2, byte-level BPE, and "
                             "llama, SentencePiece's BPE)"));
  TANDEM_ASSIGN_OR_RETURN(const PreName pre, find_pre(data.pre));
  auto impl = std::make_shared<Impl>();
  TANDEM_RETURN_IF_ERROR(add_rules(pre.rules, data.add_space_prefix.value_or(false), *impl));
  TokenizerParts parts;
  parts.bpe.ignore_merges = ignores_merges(pre.rules);
  TANDEM_RETURN_IF_ERROR(parse_tokens(data, parts));
  TANDEM_RETURN_IF_ERROR(build_vocabulary(std::move(parts), *impl));
  TANDEM_RETURN_IF_ERROR(take_ids(data, pre.adds_bos, *impl));
  return Tokenizer(std::move(impl));
}

Result<HfTokenizerFiles> hf_tokenizer_files(const storage::GgufTokenizer& data) {
  TANDEM_RETURN_IF_ERROR(Tokenizer::from_gguf(data).status());  // every error is found there
  PreName pre{"", Rules::kGpt2, true};
  if (!is_sentencepiece(data)) {
    TANDEM_ASSIGN_OR_RETURN(pre, find_pre(data.pre));
  }
  Json json{{"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}};
  rules_json(pre.rules, data.add_space_prefix.value_or(false), json);
  Json added = Json::array(), vocabulary = Json::object();
  for (std::size_t id = 0; id < data.tokens.size(); ++id) {
    vocabulary[data.tokens[id]] = id;
    const std::int32_t type = data.token_types.empty() ? 1 : data.token_types[id];
    if (is_added(type, data))
      added.push_back({{"id", id},
                       {"content", data.tokens[id]},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false},
                       {"special", type != kTypeUserDefined}});
  }
  json["added_tokens"] = std::move(added);
  json["model"] = {{"type", "BPE"},
                   {"dropout", nullptr},
                   {"unk_token", nullptr},
                   {"continuing_subword_prefix", nullptr},
                   {"end_of_word_suffix", nullptr},
                   {"fuse_unk", false},
                   {"byte_fallback", false},
                   {"ignore_merges", ignores_merges(pre.rules)},
                   {"vocab", std::move(vocabulary)},
                   {"merges", data.merges}};
  if (is_sentencepiece(data)) {
    TANDEM_ASSIGN_OR_RETURN(const auto merges, merges_of_scores(data));
    scores_json(data, merges, json);
  }
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
