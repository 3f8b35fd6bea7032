// One accepted request while it lives: its scheduling state, its text so far, and the rules that
// end it. Owned by the engine; one device thread.
#pragma once

#include "protocol/base/clock.h"
#include "worker/serve/batch_runner.h"
#include "worker/serve/request.h"
#include "worker/serve/sequence.h"
#include "worker/text/detokenizer.h"

#include <memory>
#include <optional>

namespace tandem::worker::serve {

class LiveRequest {
 public:
  /// `request` was checked; `tokens_max` is what check_request gave. invalid_error: a stop string.
  static Result<std::unique_ptr<LiveRequest>> create(
      GenerateRequest request, std::int64_t tokens_max, std::int64_t age,
      const std::vector<std::int32_t>& eos_ids, const std::optional<text::Tokenizer>& tokenizer,
      TimeMs now);

  /// Adds a drawn token and says what is to be reported for it.
  void add_token(std::int32_t id, float logprob, std::span<const std::int32_t> top_ids,
                 std::span<const float> top_logprobs, SequenceOutput& out);
  /// Adds log-probabilities that the prompt's rows from `first_row` on gave; all of them go to
  /// `out` when they are complete.
  void add_scores(std::span<const float> scores, std::int64_t first_row, SequenceOutput& out);
  /// Fills in id and usage.
  void describe(SequenceOutput& out) const;

  /// What the runner needs for these rows.
  [[nodiscard]] RunRows run_rows(const BatchRows& rows, std::int32_t slot) const;

  [[nodiscard]] const GenerateRequest& request() const { return request_; }
  [[nodiscard]] Sequence& sequence() { return sequence_; }
  [[nodiscard]] const Sequence& sequence() const { return sequence_; }
  [[nodiscard]] TimeMs submitted_at() const { return submitted_at_; }
  [[nodiscard]] std::int64_t generated() const { return sequence_.size() - sequence_.prompt; }

 private:
  LiveRequest() = default;

  GenerateRequest request_;
  Sequence sequence_;
  std::optional<text::Detokenizer> text_;
  std::int64_t tokens_max_ = 0;
  std::uint64_t seed_ = 0;
  std::vector<std::int32_t> ending_;  ///< eos and stop tokens that end it
  std::vector<float> scores_;
  TimeMs submitted_at_ = 0;
};

}  // namespace tandem::worker::serve
