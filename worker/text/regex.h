// Regular expressions as tokenizers write them (Oniguruma's dialect), matched by PCRE2 over valid
// UTF-8 with Unicode properties. The only file that knows PCRE2.
#pragma once

#include "protocol/base/result.h"

#include <cstddef>
#include <memory>
#include <string_view>
#include <vector>

namespace tandem::worker::text {

/// Longest pattern in bytes, and the backtracking that one match may use before it is an error.
inline constexpr std::size_t kRegexBytesMax = 16384;
inline constexpr unsigned kRegexMatchLimit = 20'000'000;

/// A range of bytes [begin, end).
struct Span {
  std::size_t begin = 0, end = 0;
  bool operator==(const Span&) const = default;
  [[nodiscard]] std::size_t size() const { return end - begin; }
};

/// A compiled expression; immutable, copies share it, any thread.
class Regex {
 public:
  /// Read as Oniguruma with Ruby's syntax reads it: \s is White_Space, \w what is alphabetic, a
  /// mark, a decimal digit or a connector, \b ends such a word, x{1,3}+ repeats x{1,3}. Invalid: a
  /// syntax error. Refused, so that no pattern is silently misread: nested classes, class
  /// intersections, \X.
  static Result<Regex> compile(std::string_view pattern);

  /// Appends every match in `text` (valid UTF-8), in order and disjoint; some may be empty, but
  /// none where the one before ended. Refused: the match limit was hit.
  Status find_all(std::string_view text, std::vector<Span>& matches) const;

 private:
  struct Compiled;
  explicit Regex(std::shared_ptr<const Compiled> compiled) : compiled_(std::move(compiled)) {}
  std::shared_ptr<const Compiled> compiled_;
};

}  // namespace tandem::worker::text
