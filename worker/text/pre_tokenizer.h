// How a tokenizer splits text into pieces; byte pairs merge only inside a piece.
#pragma once

#include "worker/text/regex.h"

#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace tandem::worker::text {

/// Where the text that a pattern matched goes (the names of Hugging Face tokenizers).
enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

/// Where a stretch of text stands.
struct TextPlace {
  bool begins = true;      ///< nothing stands before it
  bool continues = false;  ///< plain text stands before it, so nothing is put there
};

/// SentencePiece's space.
inline constexpr const char* kMetaspace = "\u2581";

struct SplitStep {
  std::variant<std::string, Regex> pattern;  ///< a literal or an expression
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  ///< the pattern describes the pieces, not what is between them
};
/// Splits at numeric characters: each alone, or runs of them.
struct DigitsStep {
  bool individual = false;
};
/// GPT-2's splitting; always the last step, since text is bytes after it.
struct ByteLevelStep {
  bool add_prefix_space = false;
  std::optional<Regex> regex;  ///< GPT-2's expression, unless another step has split already
};

/// SentencePiece's splitting: spaces become U+2581, one is put before a text that begins with none,
/// and (`split`) each begins a piece.
struct MetaspaceStep {
  /// Before no piece, before one that begins the text, before every one.
  enum class Prepend { kNever, kFirst, kAlways } prepend = Prepend::kAlways;
  bool split = true;
};

/// GPT-2's expression, used by ByteLevel with use_regex.
extern const char* const kGpt2Pattern;

/// Immutable; any thread.
class PreTokenizer {
 public:
  using Step = std::variant<SplitStep, DigitsStep, ByteLevelStep, MetaspaceStep>;
  template <class OneStep>
  void add(OneStep step) {
    steps_.emplace_back(std::in_place_type<OneStep>, std::move(step));
  }

  /// Splits `buffer` (valid UTF-8) into `pieces`, none empty. The buffer is rewritten where a step
  /// adds characters; the pieces are ranges of it afterwards. Refused: an expression that gave up.
  Status apply(std::string& buffer, TextPlace place, std::vector<Span>& pieces) const;

 private:
  std::vector<Step> steps_;
};

}  // namespace tandem::worker::text
