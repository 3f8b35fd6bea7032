#include "worker/text/byte_level.h"

#include "worker/text/utf8.h"

#include <array>
#include <cstdint>

namespace tandem::worker::text {
namespace {

constexpr char32_t kLastSpelling = 0x143;  // 256 plus the 68 bytes that have no glyph, less one

constexpr bool is_printable(unsigned byte) {
  return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

/// Printable bytes stand for themselves, the others follow from U+0100 on (GPT-2, encoder.py).
constexpr std::array<char32_t, 256> character_of_byte_table() {
  std::array<char32_t, 256> table{};
  char32_t next = 256;
  for (unsigned b = 0; b < 256; ++b) table[b] = is_printable(b) ? b : next++;
  return table;
}
constexpr std::array<char32_t, 256> kCharacterOfByte = character_of_byte_table();

constexpr std::array<std::int16_t, kLastSpelling + 1> byte_of_character_table() {
  std::array<std::int16_t, kLastSpelling + 1> table{};
  for (auto& entry : table) entry = -1;
  for (unsigned b = 0; b < 256; ++b) table[kCharacterOfByte[b]] = static_cast<std::int16_t>(b);
  return table;
}
constexpr std::array<std::int16_t, kLastSpelling + 1> kByteOfCharacter = byte_of_character_table();

}  // namespace

std::optional<std::string> bytes_of_spelling(std::string_view spelling) {
  std::string bytes;
  for (std::size_t i = 0; i < spelling.size();) {
    const char32_t c = next_code_point(spelling, i);
    if (c > kLastSpelling || kByteOfCharacter[c] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(kByteOfCharacter[c]));
  }
  return bytes;
}

std::string spelling_of_bytes(std::string_view bytes) {
  std::string out;
  for (const char c : bytes)
    append_code_point(out, kCharacterOfByte[static_cast<unsigned char>(c)]);
  return out;
}

}  // namespace tandem::worker::text
