// UTF-8 (RFC 3629: no surrogates, no over-long forms, at most U+10FFFF). Pure; any thread.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace tandem::protocol {

/// Bytes of the longest valid prefix; text.size() when all of it is valid.
std::size_t utf8_valid_prefix(std::string_view text);
inline bool is_utf8(std::string_view text) {
  return utf8_valid_prefix(text) == text.size();
}
/// A copy with every byte that belongs to no character replaced by U+FFFD.
std::string to_utf8(std::string_view text);

}  // namespace tandem::protocol
