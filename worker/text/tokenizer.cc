#include "worker/text/tokenizer.h"

#include "worker/text/byte_level.h"
#include "worker/text/tokenizer_impl.h"
#include "worker/text/utf8.h"

#include <algorithm>
#include <charconv>

namespace tandem::worker::text {
namespace {

Status check_parts(const TokenizerParts& parts) {
  if (parts.vocabulary.empty()) return invalid_error("the tokenizer's vocabulary is empty");
  if (parts.vocabulary.size() > kVocabularyMax)
    return refused_error(str("the tokenizer has ", parts.vocabulary.size(), " tokens; at most ",
                             kVocabularyMax, " are supported"));
  if (parts.added.size() > kAddedTokensMax)
    return refused_error(str("the tokenizer has ", parts.added.size(), " added tokens; at most ",
                             kAddedTokensMax, " are supported"));
  return Status::ok_status();
}

Status put_entry(Tokenizer::Impl& impl, std::int32_t id, std::string bytes,
                 const std::string& shown) {
  if (id < 0 || static_cast<std::size_t>(id) >= 2 * kVocabularyMax)
    return invalid_error(
        str("token \"", shown, "\" has the id ", id, ", outside [0, ", 2 * kVocabularyMax, ")"));
  const auto index = static_cast<std::size_t>(id);
  if (impl.entries.size() <= index) impl.entries.resize(index + 1);
  if (impl.entries[index].present)
    return invalid_error(str("the tokenizer gives the id ", id, " twice, once to \"", shown, "\""));
  impl.entries[index] = {std::move(bytes), true, false, false};
  return Status::ok_status();
}

/// What decoding makes of a token's spelling.
std::string decoded(const std::string& spelling, const TokenizerParts& parts) {
  if (!parts.bpe.characters) return bytes_of_spelling(spelling).value_or(spelling);
  if (parts.decodes_bytes && spelling.size() == 6 && spelling.starts_with("<0x") &&
      spelling.ends_with(">")) {
    unsigned byte = 0;
    const char* const digits = spelling.data() + 3;
    if (std::from_chars(digits, digits + 2, byte, 16).ptr == digits + 2)
      return std::string(1, static_cast<char>(byte));
  }
  if (!parts.decodes_spaces) return spelling;
  std::string out = spelling;
  const std::string metaspace = kMetaspace;
  for (std::size_t at = out.find(metaspace); at != std::string::npos; at = out.find(metaspace, at))
    out.replace(at, metaspace.size(), " ");
  return out;
}

Status add_token(const AddedToken& token, const TokenizerParts& parts, Tokenizer::Impl& impl) {
  if (token.content.empty() || token.content.size() > kAddedTokenBytesMax)
    return invalid_error(str("added token ", token.id, " has ", token.content.size(),
                             " bytes; 1 to ", kAddedTokenBytesMax, " are supported"));
  if (find_invalid_utf8(token.content) != std::string::npos)
    return invalid_error(str("added token ", token.id, " is not UTF-8"));
  Tokenizer::Impl::Entry& entry = impl.entries[static_cast<std::size_t>(token.id)];
  entry.bytes = parts.bpe.characters ? decoded(token.content, parts) : token.content;
  entry.special = token.special;
  entry.added = true;
  impl.added_ids[token.content] = token.id;
  if (!token.normalized) {
    impl.raw_matcher.add(token, token.content);
  } else {
    TANDEM_ASSIGN_OR_RETURN(const std::string pattern, impl.normalizer.apply(token.content));
    impl.normalized_matcher.add(token, pattern);
  }
  impl.added.push_back(token);
  return Status::ok_status();
}

}  // namespace

Status build_vocabulary(TokenizerParts parts, Tokenizer::Impl& impl) {
  TANDEM_RETURN_IF_ERROR(check_parts(parts));
  StringMap<std::int32_t> by_bytes;
  by_bytes.reserve(parts.vocabulary.size());
  const auto symbol = [&](const std::string& spelling) {
    return parts.bpe.characters ? std::optional(spelling) : bytes_of_spelling(spelling);
  };
  for (const auto& [spelling, id] : parts.vocabulary) {
    TANDEM_RETURN_IF_ERROR(put_entry(impl, id, decoded(spelling, parts), spelling));
    if (auto bytes = symbol(spelling)) by_bytes.emplace(std::move(*bytes), id);
  }
  for (AddedToken& token : parts.added) {
    const auto known = parts.vocabulary.find(token.content);
    if (known != parts.vocabulary.end())
      token.id = known->second;
    else if (!impl.added_ids.contains(token.content))
      TANDEM_RETURN_IF_ERROR(put_entry(impl, token.id, token.content, token.content));
    else
      return invalid_error(str("added token \"", token.content, "\" is listed twice"));
    TANDEM_RETURN_IF_ERROR(add_token(token, parts, impl));
  }
  std::vector<std::pair<std::string, std::string>> merges;
  merges.reserve(parts.merges.size());
  for (const auto& [left, right] : parts.merges) {
    auto left_bytes = symbol(left), right_bytes = symbol(right);
    if (!left_bytes || !right_bytes)
      return invalid_error(str("merge \"", left, " ", right, "\" is not in byte-level spelling"));
    merges.emplace_back(std::move(*left_bytes), std::move(*right_bytes));
  }
  TANDEM_ASSIGN_OR_RETURN(impl.bpe, Bpe::create(std::move(by_bytes), merges, parts.bpe));
  return Status::ok_status();
}

Status Tokenizer::Impl::encode_text(std::string_view text, bool parse_special, TextPlace place,
                                    std::vector<std::int32_t>& ids) const {
  TANDEM_ASSIGN_OR_RETURN(const std::string normalized, normalizer.apply(text, !place.continues));
  std::string buffer;
  std::vector<Span> pieces;
  for (const TextSegment& segment : normalized_matcher.split(normalized, parse_special)) {
    if (segment.added_id) {
      ids.push_back(*segment.added_id);
      continue;
    }
    buffer.assign(normalized, segment.span.begin, segment.span.size());
    const TextPlace here = segment.span.begin == 0 ? place : TextPlace{false, false};
    TANDEM_RETURN_IF_ERROR(pre_tokenizer.apply(buffer, here, pieces));
    for (const Span& piece : pieces)
      bpe->encode(std::string_view(buffer).substr(piece.begin, piece.size()), ids);
  }
  return Status::ok_status();
}

Result<std::vector<std::int32_t>> Tokenizer::encode(std::string_view text,
                                                    EncodeOptions options) const {
  if (text.size() > kEncodeBytesMax)
    return invalid_error(str("text of ", text.size(), " bytes; at most ", kEncodeBytesMax,
                             " bytes are tokenized at once"));
  if (const std::size_t bad = find_invalid_utf8(text); bad != std::string_view::npos)
    return invalid_error(str("text is not valid UTF-8 at byte ", bad));
  std::vector<std::int32_t> ids;
  if (options.add_special_tokens) ids = impl_->prefix_ids;
  for (const TextSegment& segment : impl_->raw_matcher.split(text, options.parse_special)) {
    if (segment.added_id) {
      ids.push_back(*segment.added_id);
      continue;
    }
    const TextPlace place = segment.span.begin == 0
                                ? TextPlace{!options.continues, options.continues}
                                : TextPlace{false, false};
    TANDEM_RETURN_IF_ERROR(impl_->encode_text(text.substr(segment.span.begin, segment.span.size()),
                                              options.parse_special, place, ids));
  }
  if (options.add_special_tokens)
    ids.insert(ids.end(), impl_->suffix_ids.begin(), impl_->suffix_ids.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  std::string bytes, out;
  bool first = true;
  for (const std::int32_t id : ids) {
    if (skip_special && is_special(id)) continue;
    bytes += drop_leading_space(leading_space(), first, token_bytes(id));
  }
  take_characters(bytes, out, true);
  return out;
}

std::string_view drop_leading_space(LeadingSpace what, bool& first, std::string_view bytes) {
  if (!first || bytes.empty()) return bytes;
  first = false;
  if (what == LeadingSpace::kKept) return bytes;
  const std::size_t spaces = std::min(bytes.find_first_not_of(' '), bytes.size());
  return bytes.substr(what == LeadingSpace::kOneDropped ? std::min<std::size_t>(spaces, 1)
                                                        : spaces);
}

std::string_view Tokenizer::token_bytes(std::int32_t id) const {
  if (id < 0 || static_cast<std::size_t>(id) >= impl_->entries.size()) return {};
  return impl_->entries[static_cast<std::size_t>(id)].bytes;
}

bool Tokenizer::is_added(std::int32_t id) const {
  if (id < 0 || static_cast<std::size_t>(id) >= impl_->entries.size()) return false;
  return impl_->entries[static_cast<std::size_t>(id)].added;
}

bool Tokenizer::is_special(std::int32_t id) const {
  if (id < 0 || static_cast<std::size_t>(id) >= impl_->entries.size()) return false;
  return impl_->entries[static_cast<std::size_t>(id)].special;
}

std::int32_t Tokenizer::vocab_size() const {
  return static_cast<std::int32_t>(impl_->entries.size());
}
std::optional<std::int32_t> Tokenizer::bos_id() const {
  return impl_->bos_id;
}
std::optional<std::int32_t> Tokenizer::eos_id() const {
  return impl_->eos_id;
}
std::optional<std::int32_t> Tokenizer::unk_id() const {
  return impl_->unk_id;
}
std::optional<std::int32_t> Tokenizer::pad_id() const {
  return impl_->pad_id;
}

std::string Tokenizer::bos_token() const {
  return impl_->bos_id ? std::string(token_bytes(*impl_->bos_id)) : std::string();
}
std::string Tokenizer::eos_token() const {
  return impl_->eos_id ? std::string(token_bytes(*impl_->eos_id)) : std::string();
}

std::optional<std::int32_t> Tokenizer::added_token_id(std::string_view content) const {
  const auto found = impl_->added_ids.find(content);
  if (found == impl_->added_ids.end()) return std::nullopt;
  return found->second;
}

LeadingSpace Tokenizer::leading_space() const {
  return impl_->leading_space;
}

bool Tokenizer::adds_bos() const {
  const auto& prefix = impl_->prefix_ids;
  return impl_->bos_id && std::find(prefix.begin(), prefix.end(), *impl_->bos_id) != prefix.end();
}

}  // namespace tandem::worker::text
