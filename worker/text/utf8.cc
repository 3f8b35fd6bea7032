#include "worker/text/utf8.h"

namespace tandem::worker::text {
namespace {

enum class Scan { kCharacter, kInvalid, kIncomplete };

struct Scanned {
  Scan kind;
  std::size_t bytes;  ///< of the character or of the maximal invalid or incomplete part
};

/// What begins at `offset`; Unicode 15, table 3-7, gives the ranges of second bytes.
Scanned scan(std::string_view s, std::size_t offset) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(s[offset + i]); };
  const std::size_t left = s.size() - offset;
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {Scan::kCharacter, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Scan::kInvalid, 1};
  const std::size_t length = utf8_length(lead);
  unsigned char low = 0x80, high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (std::size_t i = 1; i < length; ++i) {
    if (i >= left) return {Scan::kIncomplete, i};
    if (byte(i) < low || byte(i) > high) return {Scan::kInvalid, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Scan::kCharacter, length};
}

}  // namespace

std::size_t find_invalid_utf8(std::string_view bytes) {
  std::size_t i = 0;
  while (i < bytes.size()) {
    if (static_cast<unsigned char>(bytes[i]) < 0x80) {
      ++i;
      continue;
    }
    const Scanned found = scan(bytes, i);
    if (found.kind != Scan::kCharacter) return i;
    i += found.bytes;
  }
  return std::string_view::npos;
}

char32_t next_code_point(std::string_view text, std::size_t& offset) {
  const auto lead = static_cast<unsigned char>(text[offset]);
  std::size_t length = utf8_length(lead);
  if (length > text.size() - offset) length = text.size() - offset;
  if (length == 1) {
    ++offset;
    return lead;
  }
  char32_t c = lead & (0x7Fu >> length);
  for (std::size_t i = 1; i < length; ++i)
    c = (c << 6) | (static_cast<unsigned char>(text[offset + i]) & 0x3Fu);
  offset += length;
  return c;
}

void append_code_point(std::string& out, char32_t c) {
  const auto put = [&](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | (c >> 6));
    put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | (c >> 12));
    put(0x80 | ((c >> 6) & 0x3F));
    put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | (c >> 18));
    put(0x80 | ((c >> 12) & 0x3F));
    put(0x80 | ((c >> 6) & 0x3F));
    put(0x80 | (c & 0x3F));
  }
}

void take_characters(std::string& bytes, std::string& out, bool at_end) {
  std::size_t i = 0;
  while (i < bytes.size()) {
    const Scanned found = scan(bytes, i);
    if (found.kind == Scan::kIncomplete && !at_end) break;
    if (found.kind == Scan::kCharacter)
      out.append(bytes, i, found.bytes);
    else
      out.append("\xEF\xBF\xBD");
    i += found.bytes;
  }
  bytes.erase(0, i);
}

}  // namespace tandem::worker::text
