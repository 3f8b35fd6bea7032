#include "worker/serve/request_checks.h"

#include <algorithm>

namespace tandem::worker::serve {

namespace {

/// NaN is outside every range.
template <class T>
Status in_range(const char* name, T value, T low, T high) {
  if (value >= low && value <= high) return {};
  return invalid_error(str(name, " must be between ", low, " and ", high, ", got ", value));
}

template <class T>
Status above_zero(const char* name, T value, T high) {
  if (value > T{0} && value <= high) return {};
  return invalid_error(str(name, " must be above 0 and at most ", high, ", got ", value));
}

Status check_tokens(const char* what, const std::vector<std::int32_t>& ids, std::int64_t vocab) {
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= vocab)
      return invalid_error(str(what, " token ", i, " has id ", ids[i],
                               ", the model's vocabulary is [0, ", vocab, ")"));
  return {};
}

Status check_sampling(const SamplingParams& p, const RequestLimits& limits) {
  TANDEM_RETURN_IF_ERROR(in_range("temperature", p.temperature, 0.0f, kTemperatureMax));
  TANDEM_RETURN_IF_ERROR(in_range<std::int64_t>("top_k", p.top_k, 0, limits.vocab));
  TANDEM_RETURN_IF_ERROR(above_zero("top_p", p.top_p, 1.0f));
  TANDEM_RETURN_IF_ERROR(in_range("min_p", p.min_p, 0.0f, 1.0f));
  TANDEM_RETURN_IF_ERROR(
      above_zero("repetition_penalty", p.repetition_penalty, kRepetitionPenaltyMax));
  TANDEM_RETURN_IF_ERROR(
      in_range("presence_penalty", p.presence_penalty, -kTokenPenaltyMax, kTokenPenaltyMax));
  TANDEM_RETURN_IF_ERROR(
      in_range("frequency_penalty", p.frequency_penalty, -kTokenPenaltyMax, kTokenPenaltyMax));
  if (p.logprobs)
    TANDEM_RETURN_IF_ERROR(
        in_range<std::int64_t>("logprobs", *p.logprobs, 0, std::min(kLogprobsMax, limits.vocab)));
  if (p.stop_token_ids.size() > kStopTokensMax)
    return invalid_error(str("stop_token_ids has ", p.stop_token_ids.size(), " entries; at most ",
                             kStopTokensMax, " are allowed"));
  TANDEM_RETURN_IF_ERROR(check_tokens("stop", p.stop_token_ids, limits.vocab));
  if (!p.stop.empty() && !limits.has_text)
    return invalid_error(
        "stop strings need a tokenizer and this model has none; use stop_token_ids");
  return {};
}

Result<std::int64_t> new_tokens(const GenerateRequest& r, const RequestLimits& limits) {
  const auto prompt = static_cast<std::int64_t>(r.prompt.size());
  const SamplingParams& p = r.sampling;
  const bool scores_only = p.max_tokens == 0 && p.prompt_logprobs_from.has_value();
  if (prompt > limits.context_max || (prompt == limits.context_max && !scores_only))
    return invalid_error(str("the prompt has ", prompt, " tokens, the context holds ",
                             limits.context_max,
                             " with at least one new token; shorten the prompt"));
  if (prompt > limits.kv_tokens)
    return refused_error(str("the prompt has ", prompt,
                             " tokens, the KV cache of this worker holds ", limits.kv_tokens,
                             "; shorten it or raise kv_bytes_max"));
  const std::int64_t room = room_after(prompt, limits);
  if (!p.max_tokens) return room;
  if (*p.max_tokens < 0 || (*p.max_tokens == 0 && !scores_only))
    return invalid_error(
        str("max_tokens must be at least 1 (0 only together with "
            "prompt_logprobs_from), got ",
            *p.max_tokens));
  // Compared by subtraction: the sum may not fit.
  if (*p.max_tokens > limits.context_max - prompt)
    return invalid_error(str("prompt (", prompt, " tokens) and max_tokens (", *p.max_tokens,
                             ") exceed the context of ", limits.context_max,
                             " tokens; lower max_tokens to ", limits.context_max - prompt,
                             " or shorten the prompt"));
  if (*p.max_tokens > room)
    return refused_error(str(
        "prompt (", prompt, " tokens) and max_tokens (", *p.max_tokens, ") exceed the ",
        limits.kv_tokens, " tokens that this worker's KV cache holds; lower max_tokens to ", room));
  return *p.max_tokens;
}

}  // namespace

/// Keys and values of the last drawn token are never computed.
std::int64_t room_after(std::int64_t prompt_tokens, const RequestLimits& limits) {
  return std::min(limits.context_max, limits.kv_tokens + 1) - prompt_tokens;
}

Result<std::int64_t> check_request(const GenerateRequest& r, const RequestLimits& limits) {
  if (r.id.empty()) return invalid_error("the request has no id");
  if (r.prompt.empty()) return invalid_error("the prompt is empty; it needs at least one token");
  if (!r.adapter.empty() && !limits.has_adapters)
    return refused_error(str("adapter ", r.adapter, " cannot be served: no adapter slots here"));
  TANDEM_ASSIGN_OR_RETURN(const std::int64_t tokens, new_tokens(r, limits));
  TANDEM_RETURN_IF_ERROR(check_tokens("prompt", r.prompt, limits.vocab));
  TANDEM_RETURN_IF_ERROR(check_sampling(r.sampling, limits));
  TANDEM_RETURN_IF_ERROR(in_range<std::int64_t>("min_tokens", r.sampling.min_tokens, 0, tokens));
  // Begun where more is held, perhaps: an open end is cut to what is held here.
  if (r.start_index > tokens && limits.kv_tokens + 1 < limits.context_max &&
      tokens == room_after(std::ssize(r.prompt), limits))
    return refused_error(str("the answer has ", r.start_index, " tokens, behind a prompt of ",
                             r.prompt.size(), " this worker holds ", tokens));
  TANDEM_RETURN_IF_ERROR(in_range<std::int64_t>("start_index", r.start_index, 0, tokens));
  TANDEM_RETURN_IF_ERROR(
      in_range<std::int32_t>("priority", r.priority, -kPriorityMax, kPriorityMax));
  if (const auto from = r.sampling.prompt_logprobs_from)
    TANDEM_RETURN_IF_ERROR(in_range<std::int64_t>("prompt_logprobs_from", *from, 1,
                                                  static_cast<std::int64_t>(r.prompt.size())));
  return tokens;
}

}  // namespace tandem::worker::serve
