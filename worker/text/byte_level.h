// GPT-2's spelling of bytes as printable characters ("Ġ" is a space): how vocabularies write their
// tokens. Pure functions; any thread.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace tandem::worker::text {

/// The bytes that a token's spelling stands for; nothing when a character stands for no byte.
std::optional<std::string> bytes_of_spelling(std::string_view spelling);

/// The spelling of bytes.
std::string spelling_of_bytes(std::string_view bytes);

}  // namespace tandem::worker::text
