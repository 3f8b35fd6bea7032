// Turns the ids of one generated sequence into text as they come: never half a UTF-8 character,
// and never the beginning of what may become a stop string.
#pragma once

#include "protocol/base/sampling_limits.h"
#include "worker/text/tokenizer.h"

#include <cstdint>
#include <string>
#include <vector>

namespace tandem::worker::text {

/// Of one stop string; how many there may be: kStopStringsMax.
inline constexpr std::size_t kStopStringBytesMax = 1024;

struct DetokenizerOptions {
  std::vector<std::string> stop_strings{};  ///< not empty ones; UTF-8
  bool include_stop_string = false;         ///< keeps the matched stop string in the text
  bool skip_special = true;                 ///< special tokens add no text
};

/// Owned by one sequence; one thread at a time.
class Detokenizer {
 public:
  /// What one token added.
  struct Update {
    std::string text;         ///< new text, whole characters; may be empty while something is held
    bool stopped = false;     ///< a stop string was completed; the text ends before it
    std::string stop_string;  ///< the one that matched, when stopped
  };

  /// Invalid: too many stop strings, an empty, over-long or non-UTF-8 one.
  static Result<Detokenizer> create(Tokenizer tokenizer, DetokenizerOptions options = {});

  /// Adds a token. The concatenation of all updates and finish() equals Tokenizer::decode() of all
  /// ids, cut at the stop string that ends first (of several, the longest), whatever the tokens.
  /// After `stopped` nothing is added any more.
  Update append(std::int32_t id);

  /// The end without a stop string: releases what was held (an unfinished character as U+FFFD).
  Update finish();

 private:
  Detokenizer(Tokenizer tokenizer, DetokenizerOptions options)
      : tokenizer_(std::move(tokenizer)), options_(std::move(options)) {}
  Update release(bool at_end);

  Tokenizer tokenizer_;
  DetokenizerOptions options_;
  std::string bytes_;  ///< the unfinished character, at most 3 bytes
  std::string held_;   ///< whole characters that may begin a stop string
  bool first_ = true;  ///< no token with text yet
  bool stopped_ = false;
};

}  // namespace tandem::worker::text
