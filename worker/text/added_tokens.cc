#include "worker/text/added_tokens.h"

#include "worker/text/unicode.h"
#include "worker/text/utf8.h"

namespace tandem::worker::text {
namespace {

/// The offset of the last character of `text`, which is not empty.
std::size_t last_character(std::string_view text) {
  std::size_t i = text.size() - 1;
  while (i > 0 && (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80) --i;
  return i;
}

bool ends_with_word(std::string_view text) {
  if (text.empty()) return false;
  std::size_t i = last_character(text);
  return is_word(next_code_point(text, i));
}

bool starts_with_word(std::string_view text) {
  if (text.empty()) return false;
  std::size_t i = 0;
  return is_word(next_code_point(text, i));
}

/// Where the white space at the end of `text` begins.
std::size_t space_at_end(std::string_view text) {
  while (!text.empty()) {
    const std::size_t last = last_character(text);
    std::size_t i = last;
    if (!is_white_space(next_code_point(text, i))) break;
    text = text.substr(0, last);
  }
  return text.size();
}

std::size_t space_at_start(std::string_view text) {
  std::size_t i = 0;
  while (i < text.size()) {
    std::size_t after = i;
    if (!is_white_space(next_code_point(text, after))) break;
    i = after;
  }
  return i;
}

}  // namespace

void AddedTokenMatcher::add(const AddedToken& token, std::string_view pattern) {
  if (pattern.empty()) return;
  begins_[static_cast<unsigned char>(pattern[0])] = true;
  std::size_t at = 0;
  for (const char c : pattern) {
    const auto byte = static_cast<unsigned char>(c);
    const auto found = nodes_[at].children.find(byte);
    if (found != nodes_[at].children.end()) {
      at = found->second;
      continue;
    }
    nodes_.emplace_back();
    nodes_[at].children[byte] = nodes_.size() - 1;
    at = nodes_.size() - 1;
  }
  nodes_[at].token = tokens_.size();
  tokens_.push_back(token);
}

const AddedToken* AddedTokenMatcher::longest_at(std::string_view text, std::size_t offset,
                                                std::size_t& end) const {
  const AddedToken* best = nullptr;
  std::size_t at = 0;
  for (std::size_t i = offset; i < text.size(); ++i) {
    const auto child = nodes_[at].children.find(static_cast<unsigned char>(text[i]));
    if (child == nodes_[at].children.end()) break;
    at = child->second;
    if (nodes_[at].token) {
      best = &tokens_[*nodes_[at].token];
      end = i + 1;
    }
  }
  return best;
}

std::vector<TextSegment> AddedTokenMatcher::split(std::string_view text, bool parse_special) const {
  std::vector<TextSegment> segments;
  std::size_t text_begin = 0;
  for (std::size_t i = 0; i < text.size();) {
    std::size_t end = i;
    const AddedToken* token =
        begins_[static_cast<unsigned char>(text[i])] ? longest_at(text, i, end) : nullptr;
    if (token == nullptr) {
      ++i;
      continue;
    }
    std::size_t begin = i;
    i = end;
    if (token->special && !parse_special) continue;
    if (token->single_word &&
        (ends_with_word(text.substr(0, begin)) || starts_with_word(text.substr(end))))
      continue;
    // White space that an earlier match took with it is not taken twice.
    if (token->lstrip && begin > text_begin)
      begin = text_begin + space_at_end(text.substr(text_begin, begin - text_begin));
    if (token->rstrip) end += space_at_start(text.substr(end));
    if (token->lstrip && end <= text_begin) continue;  // an earlier match took all of it
    if (begin > text_begin) segments.push_back({{text_begin, begin}, std::nullopt});
    segments.push_back({{begin, end}, token->id});
    text_begin = end;
    // Stripped white space may itself be an added token: as in the reference it still counts, so
    // the search goes on after the match, not after the white space.
  }
  if (text_begin < text.size()) segments.push_back({{text_begin, text.size()}, std::nullopt});
  return segments;
}

}  // namespace tandem::worker::text
