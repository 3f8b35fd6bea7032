// What a client asks of the serving engine and what it gets back, in the engine's own types. Plain
// data; any thread.
#pragma once

#include "protocol/base/digest.h"
#include "protocol/base/ids.h"
#include "protocol/base/sampling_limits.h"
#include "protocol/base/status.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tandem::worker::serve {

/// Ranges that submit() enforces beside those of sampling_limits.h; an error names the field, the
/// range and the value.
inline constexpr std::int64_t kLogprobsMax = 20;
inline constexpr std::size_t kStopTokensMax = 64;
inline constexpr std::int32_t kPriorityMax = 8;  ///< [-max, max]
/// A step of priority is worth this many places in the order of arrival, so nobody starves.
inline constexpr std::int64_t kPriorityHeadStart = 64;

/// How tokens are drawn and when generation ends. Order of operations: see kernels::SampleArgs.
struct SamplingParams {
  /// New tokens at most. Absent: to the end of the context (or of what KV memory holds). 0 only
  /// with prompt_logprobs_from: the prompt is scored and nothing generated.
  std::optional<std::int64_t> max_tokens;
  /// Before so many tokens no eos and no stop token can be drawn; stop strings are not affected.
  std::int64_t min_tokens = 0;
  float temperature = 1.0f;         ///< 0: greedy, ties to the lowest id
  std::int64_t top_k = 0;           ///< 0: off
  float top_p = 1.0f;               ///< (0, 1]; 1: off
  float min_p = 0.0f;               ///< [0, 1]; 0: off
  float repetition_penalty = 1.0f;  ///< (0, max]; 1: off; prompt and output tokens (CTRL, 2019)
  float presence_penalty = 0.0f, frequency_penalty = 0.0f;  ///< output tokens (OpenAI's formula)
  std::optional<std::uint64_t> seed;                        ///< absent: derived from the request id
  std::vector<std::string> stop;                            ///< see kStopStringsMax
  std::vector<std::int32_t> stop_token_ids;
  bool include_stop = false;  ///< keeps the matched stop string in the text
  bool ignore_eos = false;
  bool skip_special_tokens = true;       ///< special tokens add no text
  std::optional<std::int64_t> logprobs;  ///< 0: of the drawn token; n <= 20: n most likely as well
  /// Log-probabilities of prompt tokens [from, prompt) given those before them; from >= 1.
  std::optional<std::int64_t> prompt_logprobs_from;
};

struct GenerateRequest {
  RequestId id;
  Digest adapter;  ///< empty: the base model
  std::vector<std::int32_t> prompt;
  SamplingParams sampling;
  /// Tokens already delivered under this id, by another worker or before a crash: they are
  /// generated again (the same, by counter-based randomness) but not reported again, nor are their
  /// text and the prompt's log-probabilities, which came with the first of them.
  std::int64_t start_index = 0;
  /// Each step of priority overtakes at most kPriorityHeadStart requests that came earlier.
  std::int32_t priority = 0;
};

enum class FinishReason : int { kNone = 0, kStop, kLength, kCancelled, kError };
/// "stop", "length", "cancelled", "error"; "" for kNone.
const char* finish_reason_name(FinishReason reason);

struct TokenLogprob {
  std::int32_t id = 0;
  float logprob = 0.0f;
};
/// Of one generated token, under the unmodified distribution (temperature and penalties aside).
struct TokenLogprobs {
  float logprob = 0.0f;           ///< of the drawn token
  std::vector<TokenLogprob> top;  ///< most likely first
};

struct Usage {
  std::int64_t prompt_tokens = 0;
  std::int64_t completion_tokens = 0;     ///< those before start_index included
  std::int64_t cached_prompt_tokens = 0;  ///< taken from the prefix cache at admission
};

/// What one step added to one request.
struct SequenceOutput {
  RequestId id;
  std::int64_t index = 0;  ///< of token_ids[0] among the generated tokens, >= start_index
  std::vector<std::int32_t> token_ids;  ///< as drawn, an ending eos included; may be empty
  std::string text;                     ///< whole characters only; never part of a stop string
  std::vector<TokenLogprobs> logprobs;  ///< one per token id where asked for
  std::vector<float> prompt_logprobs;   ///< complete, once, with the first output after prefill
  FinishReason finish = FinishReason::kNone;
  std::string matched_stop;  ///< the stop string that ended it; "" for eos and stop tokens
  Status error;              ///< why, with kError
  Usage usage;               ///< so far
};

}  // namespace tandem::worker::serve
