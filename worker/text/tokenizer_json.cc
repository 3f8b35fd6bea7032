// tokenizer.json of Hugging Face tokenizers. Each component is either understood completely or
// refused by name; a setting that is skipped here cannot change ids or text.
#include "worker/text/tokenizer.h"

#include "protocol/base/json_nesting.h"
#include "worker/text/tokenizer_impl.h"

#include <nlohmann/json.hpp>

#include <initializer_list>
#include <utility>

namespace tandem::worker::text {
namespace {

using Json = nlohmann::json;

/// Nesting of Sequence components.
constexpr int kComponentNestingMax = 8;

/// A token's id; -1, which no token may have, for anything but a whole number of 32 bits.
std::int32_t read_id(const Json& id) {
  if (!id.is_number_integer()) return -1;
  const auto value = id.get<std::int64_t>();
  return value < 0 || value > INT32_MAX ? -1 : static_cast<std::int32_t>(value);
}

std::string type_of(const Json& component) {
  return component.value("type", std::string("(none)"));
}

Status unsupported(const std::string& what, const std::string& supported) {
  return refused_error(
      str("tokenizer.json: ", what, " is not supported (supported: ", supported, ")"));
}

Status check_keys(const Json& component, const std::string& what,
                  std::initializer_list<const char*> known) {
  for (const auto& [key, value] : component.items()) {
    if (key == "type") continue;
    bool found = false;
    for (const char* name : known) found = found || key == name;
    if (!found) return unsupported(str("the key \"", key, "\" of ", what), "those of tokenizers");
  }
  return Status::ok_status();
}

Result<std::variant<std::string, Regex>> parse_pattern(const Json& component,
                                                       const std::string& what) {
  const Json& pattern = component.at("pattern");
  if (pattern.is_object() && pattern.contains("String")) {
    std::string literal = pattern.at("String").get<std::string>();
    if (literal.empty()) return invalid_error(str("tokenizer.json: empty pattern of ", what));
    return std::variant<std::string, Regex>(std::move(literal));
  }
  if (pattern.is_object() && pattern.contains("Regex")) {
    TANDEM_ASSIGN_OR_RETURN(Regex regex, Regex::compile(pattern.at("Regex").get<std::string>()));
    return std::variant<std::string, Regex>(std::move(regex));
  }
  return unsupported(str("the pattern of ", what), "String, Regex");
}

Status add_normalizer(const Json& component, Normalizer& normalizer, int depth) {
  if (component.is_null()) return Status::ok_status();
  const std::string type = type_of(component);
  if (type == "Sequence" && depth < kComponentNestingMax) {
    for (const Json& part : component.at("normalizers"))
      TANDEM_RETURN_IF_ERROR(add_normalizer(part, normalizer, depth + 1));
  } else if (type == "NFC") {
    normalizer.add(NormalForm::kNfc);
  } else if (type == "NFD") {
    normalizer.add(NormalForm::kNfd);
  } else if (type == "NFKC") {
    normalizer.add(NormalForm::kNfkc);
  } else if (type == "NFKD") {
    normalizer.add(NormalForm::kNfkd);
  } else if (type == "Prepend") {
    normalizer.add(PrependStep{component.at("prepend").get<std::string>()});
  } else if (type == "Replace") {
    TANDEM_ASSIGN_OR_RETURN(auto pattern, parse_pattern(component, "the normalizer Replace"));
    normalizer.add(ReplaceStep{std::move(pattern), component.at("content").get<std::string>()});
  } else {
    return unsupported(str("the normalizer ", type),
                       "NFC, NFD, NFKC, NFKD, Prepend, Replace, Sequence");
  }
  return Status::ok_status();
}

Result<SplitBehavior> parse_behavior(const std::string& name) {
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  return invalid_error(str("tokenizer.json: unknown behavior \"", name, "\" of Split"));
}

Status add_split(const Json& component, PreTokenizer& pre_tokenizer) {
  TANDEM_RETURN_IF_ERROR(check_keys(component, "Split", {"pattern", "behavior", "invert"}));
  SplitStep step;
  TANDEM_ASSIGN_OR_RETURN(step.pattern, parse_pattern(component, "the pre-tokenizer Split"));
  TANDEM_ASSIGN_OR_RETURN(step.behavior,
                          parse_behavior(component.at("behavior").get<std::string>()));
  step.invert = component.value("invert", false);
  pre_tokenizer.add(std::move(step));
  return Status::ok_status();
}

Status add_byte_level(const Json& component, PreTokenizer& pre_tokenizer) {
  TANDEM_RETURN_IF_ERROR(
      check_keys(component, "ByteLevel", {"add_prefix_space", "trim_offsets", "use_regex"}));
  ByteLevelStep step;
  step.add_prefix_space = component.value("add_prefix_space", true);
  if (component.value("use_regex", true)) {
    TANDEM_ASSIGN_OR_RETURN(step.regex, Regex::compile(kGpt2Pattern));
  }
  pre_tokenizer.add(std::move(step));
  return Status::ok_status();
}

/// Of the pre-tokenizer and the decoder Metaspace. Older files say add_prefix_space.
Result<MetaspaceStep> read_metaspace(const Json& component) {
  TANDEM_RETURN_IF_ERROR(
      check_keys(component, "Metaspace",
                 {"replacement", "prepend_scheme", "add_prefix_space", "split", "str_rep"}));
  if (component.value("replacement", std::string(kMetaspace)) != kMetaspace)
    return unsupported("a replacement of Metaspace other than U+2581", "U+2581");
  MetaspaceStep step;
  step.split = component.value("split", true);
  const std::string scheme =
      component.value("prepend_scheme",
                      std::string(component.value("add_prefix_space", true) ? "always" : "never"));
  if (scheme == "never")
    step.prepend = MetaspaceStep::Prepend::kNever;
  else if (scheme == "first")
    step.prepend = MetaspaceStep::Prepend::kFirst;
  else if (scheme != "always")
    return invalid_error(str("tokenizer.json: unknown prepend_scheme \"", scheme, "\""));
  return step;
}

Status add_metaspace(const Json& component, PreTokenizer& pre_tokenizer) {
  TANDEM_ASSIGN_OR_RETURN(const MetaspaceStep step, read_metaspace(component));
  pre_tokenizer.add(step);
  return Status::ok_status();
}

/// `byte_level` becomes true at ByteLevel, after which nothing may follow: text is bytes then.
Status add_pre_tokenizer(const Json& component, PreTokenizer& pre_tokenizer, bool& byte_level,
                         int depth) {
  const std::string type = component.is_null() ? "(none)" : type_of(component);
  if (byte_level) return unsupported(str("the pre-tokenizer ", type, " after ByteLevel"), "none");
  if (type == "Sequence" && depth < kComponentNestingMax) {
    for (const Json& part : component.at("pretokenizers"))
      TANDEM_RETURN_IF_ERROR(add_pre_tokenizer(part, pre_tokenizer, byte_level, depth + 1));
    return Status::ok_status();
  }
  if (type == "Split") return add_split(component, pre_tokenizer);
  if (type == "Digits") {
    pre_tokenizer.add(DigitsStep{component.value("individual_digits", false)});
    return Status::ok_status();
  }
  if (type == "ByteLevel") {
    byte_level = true;
    return add_byte_level(component, pre_tokenizer);
  }
  if (type == "Metaspace") return add_metaspace(component, pre_tokenizer);
  if (component.is_null()) return Status::ok_status();
  return unsupported(str("the pre-tokenizer ", type),
                     "ByteLevel, Metaspace, Split, Digits, Sequence");
}

Status add_template(const Json& component, Tokenizer::Impl& impl) {
  bool before = true;
  for (const Json& part : component.at("single")) {
    if (part.contains("Sequence")) {
      if (!before) return unsupported("a template with two sequences", "one sequence");
      before = false;
      continue;
    }
    const std::string name = part.at("SpecialToken").at("id").get<std::string>();
    auto& ids = before ? impl.prefix_ids : impl.suffix_ids;
    for (const Json& id : component.at("special_tokens").at(name).at("ids"))
      ids.push_back(read_id(id));
  }
  if (before) return invalid_error("tokenizer.json: TemplateProcessing has no Sequence");
  return Status::ok_status();
}

Status add_post_processor(const Json& component, Tokenizer::Impl& impl, int depth) {
  if (component.is_null()) return Status::ok_status();
  const std::string type = type_of(component);
  if (type == "ByteLevel") return Status::ok_status();  // moves offsets, not ids
  if (type == "TemplateProcessing") return add_template(component, impl);
  if (type == "Sequence" && depth < kComponentNestingMax) {
    for (const Json& part : component.at("processors"))
      TANDEM_RETURN_IF_ERROR(add_post_processor(part, impl, depth + 1));
    return Status::ok_status();
  }
  return unsupported(str("the post-processor ", type), "ByteLevel, TemplateProcessing, Sequence");
}

Status check_decoder(const Json& component, int depth) {
  const std::string type = component.is_null() ? "(none)" : type_of(component);
  if (type == "ByteLevel") return Status::ok_status();
  if (type == "Sequence" && depth < kComponentNestingMax) {
    for (const Json& part : component.at("decoders"))
      TANDEM_RETURN_IF_ERROR(check_decoder(part, depth + 1));
    return Status::ok_status();
  }
  return unsupported(str("the decoder ", type), "ByteLevel");
}

/// The decoder of a tokenizer whose tokens are spelled as SentencePiece does.
Status parse_decoder(const Json& component, TokenizerParts& parts, Tokenizer::Impl& impl,
                     int depth) {
  const std::string type = component.is_null() ? "(none)" : type_of(component);
  if (type == "Sequence" && depth < kComponentNestingMax) {
    for (const Json& part : component.at("decoders"))
      TANDEM_RETURN_IF_ERROR(parse_decoder(part, parts, impl, depth + 1));
    return Status::ok_status();
  }
  if (type == "Fuse") return Status::ok_status();  // tokens are put together anyway
  if (type == "ByteFallback") {
    parts.decodes_bytes = true;
    return Status::ok_status();
  }
  if (type == "Replace" && component.at("pattern") == Json{{"String", kMetaspace}} &&
      component.at("content") == " ") {
    parts.decodes_spaces = true;
    return Status::ok_status();
  }
  if (type == "Strip" && component.at("content") == " " && component.at("stop") == 0 &&
      (component.at("start") == 0 || component.at("start") == 1)) {
    if (component.at("start") == 1) impl.leading_space = LeadingSpace::kOneDropped;
    return Status::ok_status();
  }
  if (type == "Metaspace") {
    TANDEM_ASSIGN_OR_RETURN(const MetaspaceStep step, read_metaspace(component));
    parts.decodes_spaces = true;
    if (step.prepend != MetaspaceStep::Prepend::kNever)
      impl.leading_space = LeadingSpace::kOfFirstDropped;
    return Status::ok_status();
  }
  const bool known = type == "Replace" || type == "Strip";
  return unsupported(
      str("the decoder ", known ? component.dump() : type, " of a tokenizer without ByteLevel"),
      "Replace of U+2581 by a space, ByteFallback, Fuse, Strip of one leading "
      "space, Metaspace, Sequence");
}

Result<std::pair<std::string, std::string>> parse_merge(const Json& merge) {
  if (merge.is_array() && merge.size() == 2)
    return std::pair(merge[0].get<std::string>(), merge[1].get<std::string>());
  if (merge.is_string()) {
    const std::string text = merge.get<std::string>();
    const std::size_t space = text.find(' ');
    if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos)
      return std::pair(text.substr(0, space), text.substr(space + 1));
  }
  return invalid_error(
      str("tokenizer.json: a merge is not \"a b\" or [\"a\",\"b\"]: ",
          merge.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 80)));
}

Status check_model(const Json& model) {
  const std::string type =
      model.value("type", std::string(model.contains("merges") ? "BPE" : "(none)"));
  if (type != "BPE") return unsupported(str("the model ", type), "BPE");
  TANDEM_RETURN_IF_ERROR(
      check_keys(model, "the model",
                 {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                  "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"}));
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (model.contains(affix) && !model.at(affix).is_null() && model.at(affix) != "")
      return unsupported(str("the model's ", affix), "none");
  if (model.contains("dropout") && !model.at("dropout").is_null() && model.at("dropout") != 0.0)
    return unsupported("the model's dropout", "none");
  return Status::ok_status();
}

Status parse_model(const Json& model, TokenizerParts& parts) {
  TANDEM_RETURN_IF_ERROR(check_model(model));
  parts.bpe.ignore_merges = model.value("ignore_merges", false);
  parts.bpe.fuse_unk = model.value("fuse_unk", false);
  parts.bpe.byte_fallback = model.value("byte_fallback", false);
  for (const auto& [spelling, id] : model.at("vocab").items())
    parts.vocabulary.emplace(spelling, read_id(id));
  for (const Json& merge : model.at("merges")) {
    TANDEM_ASSIGN_OR_RETURN(auto pair, parse_merge(merge));
    parts.merges.push_back(std::move(pair));
  }
  if (model.contains("unk_token") && model.at("unk_token").is_string()) {
    const auto found = parts.vocabulary.find(model.at("unk_token").get<std::string>());
    if (found == parts.vocabulary.end())
      return invalid_error("tokenizer.json: unk_token is not in the vocabulary");
    parts.bpe.unk_id = found->second;
  }
  return Status::ok_status();
}

void parse_added(const Json& list, TokenizerParts& parts) {
  for (const Json& item : list) {
    AddedToken token;
    token.id = read_id(item.at("id"));
    token.content = item.at("content").get<std::string>();
    token.special = item.value("special", false);
    token.single_word = item.value("single_word", false);
    token.lstrip = item.value("lstrip", false);
    token.rstrip = item.value("rstrip", false);
    token.normalized = item.value("normalized", !token.special);
    parts.added.push_back(std::move(token));
  }
}

/// The id of a token that tokenizer_config.json names, as text or as {"content": ...}. One that the
/// tokenizer does not have is an error where it would be written (`needed`), else there is none.
Result<std::optional<std::int32_t>> named_token(const Json& config, const char* key, bool needed,
                                                const Tokenizer::Impl& impl,
                                                const TokenizerParts& parts) {
  if (!config.contains(key) || config.at(key).is_null()) return std::optional<std::int32_t>();
  const Json& value = config.at(key);
  const std::string content =
      value.is_object() ? value.at("content").get<std::string>() : value.get<std::string>();
  if (const auto added = impl.added_ids.find(content); added != impl.added_ids.end())
    return std::optional(added->second);
  if (const auto known = parts.vocabulary.find(content); known != parts.vocabulary.end())
    return std::optional(known->second);
  if (!needed) return std::optional<std::int32_t>();
  return invalid_error(str("tokenizer_config.json: ", key, " is \"", content,
                           "\", which the tokenizer does not have"));
}

Status parse_config(const Json& config, const TokenizerParts& parts, Tokenizer::Impl& impl) {
  TANDEM_ASSIGN_OR_RETURN(impl.bos_id, named_token(config, "bos_token", true, impl, parts));
  TANDEM_ASSIGN_OR_RETURN(impl.eos_id, named_token(config, "eos_token", true, impl, parts));
  TANDEM_ASSIGN_OR_RETURN(impl.unk_id, named_token(config, "unk_token", false, impl, parts));
  TANDEM_ASSIGN_OR_RETURN(impl.pad_id, named_token(config, "pad_token", false, impl, parts));
  return Status::ok_status();
}

Status check_template_ids(const Tokenizer::Impl& impl) {
  for (const auto* ids : {&impl.prefix_ids, &impl.suffix_ids})
    for (const std::int32_t id : *ids)
      if (id < 0 || static_cast<std::size_t>(id) >= impl.entries.size() ||
          !impl.entries[static_cast<std::size_t>(id)].present)
        return invalid_error(str("tokenizer.json: TemplateProcessing names the id ", id,
                                 ", which the tokenizer does not have"));
  return Status::ok_status();
}

Result<Tokenizer> parse(std::string_view tokenizer_json, std::string_view config_json) {
  for (const auto& [json, file] :
       {std::pair{tokenizer_json, "tokenizer.json"}, {config_json, "tokenizer_config.json"}})
    if (json_nests_too_deep(json))
      return invalid_error(str(file, " nests deeper than ", kJsonNestingMax, " levels"));
  const Json root = Json::parse(tokenizer_json);
  auto impl = std::make_shared<Tokenizer::Impl>();
  TANDEM_RETURN_IF_ERROR(add_normalizer(root.value("normalizer", Json()), impl->normalizer, 0));
  TokenizerParts parts;
  TANDEM_RETURN_IF_ERROR(parse_model(root.at("model"), parts));
  bool byte_level = false;
  TANDEM_RETURN_IF_ERROR(
      add_pre_tokenizer(root.value("pre_tokenizer", Json()), impl->pre_tokenizer, byte_level, 0));
  parts.bpe.characters = !byte_level;
  if (byte_level && parts.bpe.byte_fallback)
    return unsupported("the model's byte_fallback beside ByteLevel", "one of the two");
  TANDEM_RETURN_IF_ERROR(add_post_processor(root.value("post_processor", Json()), *impl, 0));
  const Json decoder = root.value("decoder", Json());
  TANDEM_RETURN_IF_ERROR(byte_level ? check_decoder(decoder, 0)
                                    : parse_decoder(decoder, parts, *impl, 0));
  if (root.contains("added_tokens") && !root.at("added_tokens").is_null())
    parse_added(root.at("added_tokens"), parts);
  TANDEM_RETURN_IF_ERROR(build_vocabulary(parts, *impl));
  TANDEM_RETURN_IF_ERROR(check_template_ids(*impl));
  if (!config_json.empty()) {
    TANDEM_RETURN_IF_ERROR(parse_config(Json::parse(config_json), parts, *impl));
  }
  return Tokenizer(std::move(impl));
}

}  // namespace

Result<Tokenizer> Tokenizer::from_json(std::string_view tokenizer_json,
                                       std::string_view tokenizer_config_json) {
  if (tokenizer_json.size() > kTokenizerJsonBytesMax)
    return refused_error(str("tokenizer.json has ", tokenizer_json.size(), " bytes; at most ",
                             kTokenizerJsonBytesMax, " are read"));
  try {
    return parse(tokenizer_json, tokenizer_config_json);
  } catch (const Json::exception& e) {
    return invalid_error(str("tokenizer.json cannot be read: ", e.what()));
  }
}

}  // namespace tandem::worker::text
