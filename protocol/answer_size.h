// How large a part of an answer may become. Chunks of one request are put together where nothing is
// streamed; an answer that would not fit into one message travels in several.
#pragma once

#include "protocol/messages.h"

#include <cstdint>

namespace tandem::protocol {

/// Far enough below kFrameBytesMax and kTextBytesMax for one more chunk on top.
inline constexpr std::int64_t kAnswerPartBytesMax = 512 << 10;

/// What a chunk takes in a frame, but for a few hundred bytes.
inline std::int64_t answer_bytes(const GenerateChunk& chunk) {
  constexpr std::size_t kLogprobBytes = 24, kTopBytes = 8;  // Cap'n Proto's
  std::size_t bytes = chunk.text.size() + 4 * chunk.tokens.size();
  bytes += 4 * chunk.prompt_logprobs.size();
  for (const TokenLogprob& token : chunk.logprobs)
    bytes += kLogprobBytes + kTopBytes * token.top.size();
  return static_cast<std::int64_t>(bytes);
}

}  // namespace tandem::protocol
