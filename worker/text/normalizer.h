// What a tokenizer does to text before it splits it: Unicode normal forms, replacements, prefixes.
#pragma once

#include "worker/text/regex.h"
#include "worker/text/unicode.h"

#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace tandem::worker::text {

/// Replaces every match of a literal or an expression.
struct ReplaceStep {
  std::variant<std::string, Regex> pattern;
  std::string content;
};
/// Puts a prefix before text that is not empty.
struct PrependStep {
  std::string prefix;
};

/// Immutable; any thread.
class Normalizer {
 public:
  using Step = std::variant<NormalForm, ReplaceStep, PrependStep>;
  template <class OneStep>
  void add(OneStep step) {
    steps_.emplace_back(std::in_place_type<OneStep>, std::move(step));
  }
  [[nodiscard]] bool empty() const { return steps_.empty(); }
  /// All steps in order. Refused: a limit of a step. Text may grow to at most kNormalizedBytesMax.
  /// Without `prepend` nothing is put before it.
  [[nodiscard]] Result<std::string> apply(std::string_view text, bool prepend = true) const;

 private:
  std::vector<Step> steps_;
};

/// Longest text after normalization, in bytes.
inline constexpr std::size_t kNormalizedBytesMax = std::size_t{64} << 20;

}  // namespace tandem::worker::text
