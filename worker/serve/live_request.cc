#include "worker/serve/live_request.h"

#include <algorithm>
#include <cmath>

namespace tandem::worker::serve {

namespace {

/// The same on every worker that gets the request.
std::uint64_t seed_of(const RequestId& id) {
  const Digest digest = sha256(id.value);
  std::uint64_t seed = 0;
  for (int i = 0; i < 8; ++i) seed = (seed << 8) | digest.bytes[static_cast<std::size_t>(i)];
  return seed;
}

bool has_penalties(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

}  // namespace

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kError:
      return "error";
  }
  return "";
}

Result<std::unique_ptr<LiveRequest>> LiveRequest::create(
    GenerateRequest request, std::int64_t tokens_max, std::int64_t age,
    const std::vector<std::int32_t>& eos_ids, const std::optional<text::Tokenizer>& tokenizer,
    TimeMs now) {
  std::unique_ptr<LiveRequest> live(new LiveRequest());
  // The prompt's scores were delivered with token 0.
  if (request.start_index > 0) request.sampling.prompt_logprobs_from.reset();
  const SamplingParams& p = request.sampling;
  if (tokenizer) {
    TANDEM_ASSIGN_OR_RETURN(live->text_, text::Detokenizer::create(
                                             *tokenizer, {.stop_strings = p.stop,
                                                          .include_stop_string = p.include_stop,
                                                          .skip_special = p.skip_special_tokens}));
  }
  live->tokens_max_ = tokens_max;
  live->submitted_at_ = now;
  live->seed_ = p.seed ? *p.seed : seed_of(request.id);
  live->ending_ = p.stop_token_ids;
  if (!p.ignore_eos) live->ending_.insert(live->ending_.end(), eos_ids.begin(), eos_ids.end());
  Sequence& s = live->sequence_;
  s.adapter = request.adapter;
  s.age = age;
  s.tokens = std::move(request.prompt);
  s.prompt = s.size();
  s.wants_token = tokens_max > 0;
  if (p.prompt_logprobs_from) s.reusable = *p.prompt_logprobs_from - 1;
  s.penalized = has_penalties(p);
  if (s.penalized && p.repetition_penalty != 1.0f) s.history.add_prompt(s.tokens);
  live->request_ = std::move(request);
  return live;
}

RunRows LiveRequest::run_rows(const BatchRows& rows, std::int32_t slot) const {
  RunRows run;
  run.rows = rows;
  run.slot = slot;
  run.sampling = &request_.sampling;
  run.seed = seed_;
  if (generated() < request_.sampling.min_tokens) run.banned = ending_;
  if (const auto from = request_.sampling.prompt_logprobs_from;
      from && rows.begin < sequence_.prompt)
    run.score_from = *from;
  return run;
}

void LiveRequest::add_scores(std::span<const float> scores, std::int64_t first_row,
                             SequenceOutput& out) {
  const std::int64_t from = *request_.sampling.prompt_logprobs_from;
  if (static_cast<std::int64_t>(scores_.size()) >= sequence_.prompt - from) return;  // recomputed
  const std::int64_t at = std::max(first_row + 1, from) - from;
  scores_.resize(static_cast<std::size_t>(at));  // after a preemption rows come again
  scores_.insert(scores_.end(), scores.begin(), scores.end());
  if (static_cast<std::int64_t>(scores_.size()) < sequence_.prompt - from) return;
  sequence_.reusable = sequence_.prompt;
  out.prompt_logprobs = scores_;
}

void LiveRequest::add_token(std::int32_t id, float logprob, std::span<const std::int32_t> top_ids,
                            std::span<const float> top_logprobs, SequenceOutput& out) {
  const std::int64_t index = generated();
  const bool report = index >= request_.start_index;
  sequence_.tokens.push_back(id);
  if (sequence_.penalized) sequence_.history.add_output(id);
  out.index = std::max(index, request_.start_index);
  if (!std::isfinite(logprob)) {
    out.finish = FinishReason::kError;
    out.error = internal_error(str(
        "token ", index, " of request ", request_.id, ": the model's output is not finite; check ",
        request_.adapter.empty() ? std::string("the base weights")
                                 : str("the adapter ", request_.adapter, " and the base weights")));
    return;
  }
  const bool ended = std::find(ending_.begin(), ending_.end(), id) != ending_.end();
  text::Detokenizer::Update update;
  if (text_ && !ended) update = text_->append(id);
  if (ended || update.stopped) {
    out.finish = FinishReason::kStop;
    out.matched_stop = update.stop_string;
  } else if (generated() >= tokens_max_) {
    out.finish = FinishReason::kLength;
  }
  if (text_ && out.finish != FinishReason::kNone && !update.stopped) {
    const text::Detokenizer::Update rest = text_->finish();
    update.text += rest.text;
    if (rest.stopped) {
      out.finish = FinishReason::kStop;
      out.matched_stop = rest.stop_string;
    }
  }
  if (!report) return;
  out.token_ids.push_back(id);
  out.text = std::move(update.text);
  if (!request_.sampling.logprobs) return;
  TokenLogprobs& entry = out.logprobs.emplace_back();
  entry.logprob = logprob;
  const auto n = static_cast<std::size_t>(*request_.sampling.logprobs);
  for (std::size_t j = 0; j < n; ++j) entry.top.push_back({top_ids[j], top_logprobs[j]});
}

void LiveRequest::describe(SequenceOutput& out) const {
  out.id = request_.id;
  out.usage.prompt_tokens = sequence_.prompt;
  out.usage.completion_tokens = generated();
  out.usage.cached_prompt_tokens = std::min(sequence_.cached_tokens, sequence_.prompt);
}

}  // namespace tandem::worker::serve
