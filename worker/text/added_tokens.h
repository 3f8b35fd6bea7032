// Tokens that are found in text before anything splits it: "<|im_start|>", "<tool_call>", ...
#pragma once

#include "worker/text/regex.h"

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::worker::text {

/// Limits of one tokenizer's added tokens.
inline constexpr std::size_t kAddedTokensMax = 65536;
inline constexpr std::size_t kAddedTokenBytesMax = 1024;

struct AddedToken {
  std::int32_t id = 0;
  std::string content;
  bool special = false;
  bool single_word = false;  ///< not found inside a word
  bool lstrip = false;       ///< takes white space on its left with it
  bool rstrip = false;       ///< and on its right
  bool normalized = false;   ///< looked for in the normalized text
};

/// A stretch of text: an added token, or text to be tokenized.
struct TextSegment {
  Span span;
  std::optional<std::int32_t> added_id;
};

/// Finds added tokens, leftmost and longest first. Immutable once filled; any thread.
class AddedTokenMatcher {
 public:
  AddedTokenMatcher() : nodes_(1) {}
  /// `pattern`: the content as it stands in the text (normalized or not).
  void add(const AddedToken& token, std::string_view pattern);
  /// Cuts `text` into segments, none of them empty text. Special tokens stay text when
  /// `parse_special` is false.
  [[nodiscard]] std::vector<TextSegment> split(std::string_view text, bool parse_special) const;

 private:
  struct Node {
    std::map<unsigned char, std::size_t> children;
    std::optional<std::size_t> token;
  };
  /// The longest token that begins at `offset`, and the offset after it.
  [[nodiscard]] const AddedToken* longest_at(std::string_view text, std::size_t offset,
                                             std::size_t& end) const;

  std::vector<Node> nodes_;
  std::vector<AddedToken> tokens_;
  std::array<bool, 256> begins_{};  ///< bytes that begin any token
};

}  // namespace tandem::worker::text
