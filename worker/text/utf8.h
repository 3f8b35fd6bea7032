// UTF-8 (RFC 3629): checking, stepping and repairing. Pure functions; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tandem::worker::text {

/// The offset of the first byte that does not belong to a valid character, or npos.
std::size_t find_invalid_utf8(std::string_view bytes);

/// Bytes of the character that a lead byte begins (1 to 4); 1 for bytes that begin none.
constexpr std::size_t utf8_length(unsigned char lead) {
  if (lead < 0xC0) return 1;
  if (lead < 0xE0) return 2;
  return lead < 0xF0 ? 3 : 4;
}

/// The character at `offset` of valid UTF-8; advances `offset` past it.
char32_t next_code_point(std::string_view text, std::size_t& offset);

void append_code_point(std::string& out, char32_t c);

/// Moves whole characters from the front of `bytes` to `out`, each maximal invalid part as one
/// U+FFFD (Unicode 15, section 3.9, as Rust's from_utf8_lossy does). What may still become a
/// character, at most 3 bytes, stays in `bytes` unless `at_end`.
void take_characters(std::string& bytes, std::string& out, bool at_end);

}  // namespace tandem::worker::text
