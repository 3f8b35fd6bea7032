// Unicode normalization and character classes. The only file that knows utf8proc. Any thread.
#pragma once

#include "protocol/base/result.h"

#include <string>
#include <string_view>

namespace tandem::worker::text {

/// Longest run of combining characters in text to be normalized: putting a run in canonical order
/// takes time quadratic in its length.
inline constexpr int kCombiningRunMax = 256;

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

/// `text` (valid UTF-8) in a normal form. Refused: a run over kCombiningRunMax.
Result<std::string> normalize(std::string_view text, NormalForm form);

bool is_white_space(char32_t c);  ///< property White_Space
bool is_numeric(char32_t c);      ///< categories Nd, Nl, No (Rust's char::is_numeric)
bool is_word(char32_t c);         ///< letters, marks, numbers, connectors: regex \w

/// Python's str.isprintable() of one character: no control, format, separator (but the space),
/// surrogate, private or unassigned character.
bool is_printable(char32_t c);

/// Letters and numbers that the reference's tables (Unicode 16) have and those of the libraries
/// here (Unicode 14) may not; kNone for all other characters.
enum class NewerClass { kNone, kLetter, kNumber };
NewerClass newer_class(char32_t c);

/// One code point to one; characters whose case form is longer (such as sharp s) stay, except
/// where noted by the caller.
char32_t to_lower(char32_t c);
char32_t to_upper(char32_t c);
bool is_cased_lower(char32_t c);
bool is_cased_upper(char32_t c);

}  // namespace tandem::worker::text
