// Generate and GenerateChunk, which both the client and the worker side carry, and Status.
#include "protocol/codec/shared.h"

#include "protocol/utf8.h"

namespace tandem::protocol::codec {

static void put(wire::ChatMessage::Builder b, const ChatMessage& m) {
  b.setRole(text(m.role));
  b.setContent(text(m.content));
}

static void put(wire::PromptInput::Builder b, const PromptInput& m) {
  put_structs(b.initMessages(count(m.messages)), m.messages,
              [](auto item, const auto& message) { put(item, message); });
  b.setPrompt(text(m.prompt));
  put_scalars(b.initTokens(count(m.tokens)), m.tokens);
  b.setRaw(m.raw);
}

static PromptInput get(wire::PromptInput::Reader r) {
  PromptInput m;
  m.messages = get_structs<ChatMessage>(r.getMessages(), "generate.messages", [](auto item) {
    return ChatMessage{get_text(item.getRole(), "generate.messages.role"),
                       get_text(item.getContent(), "generate.messages.content")};
  });
  m.prompt = get_text(r.getPrompt(), "generate.prompt");
  m.tokens = get_scalars<std::int32_t>(r.getTokens(), "generate.tokens");
  m.raw = r.getRaw();
  return m;
}

static void put(wire::Sampling::Builder b, const SamplingParams& m) {
  if (m.max_tokens) b.getMaxTokens().setValue(*m.max_tokens);
  if (m.temperature) b.getTemperature().setValue(*m.temperature);
  if (m.top_k) b.getTopK().setValue(*m.top_k);
  if (m.top_p) b.getTopP().setValue(*m.top_p);
  if (m.min_p) b.getMinP().setValue(*m.min_p);
  if (m.repetition_penalty)
    b.getRepetitionPenalty().setValue(*m.repetition_penalty);
  else
    b.getRepetitionPenalty().setUnset();
  b.setPresencePenalty(m.presence_penalty);
  b.setFrequencyPenalty(m.frequency_penalty);
  if (m.seed) b.getSeed().setValue(*m.seed);
  auto stop = b.initStop(count(m.stop));
  for (unsigned i = 0; i < count(m.stop); ++i) stop.set(i, text(m.stop[i]));
  put_scalars(b.initStopTokenIds(count(m.stop_token_ids)), m.stop_token_ids);
  b.setLogprobs(m.logprobs);
  b.setMinTokens(m.min_tokens);
  b.setIgnoreEos(m.ignore_eos);
  b.setPromptLogprobsFrom(m.prompt_logprobs_from);
}

/// A member of a union { unset, value }; a member that a newer peer added is refused.
template <class T, class Group>
static std::optional<T> get_optional(Group group, const char* field) {
  if (group.isUnset()) return std::nullopt;
  if (!group.isValue()) refuse_unknown(field, static_cast<unsigned>(group.which()));
  return group.getValue();
}

static SamplingParams get(wire::Sampling::Reader r) {
  SamplingParams m;
  m.max_tokens = get_optional<std::int64_t>(r.getMaxTokens(), "sampling.max_tokens");
  m.temperature = get_optional<float>(r.getTemperature(), "sampling.temperature");
  m.top_k = get_optional<std::int64_t>(r.getTopK(), "sampling.top_k");
  m.top_p = get_optional<float>(r.getTopP(), "sampling.top_p");
  m.min_p = get_optional<float>(r.getMinP(), "sampling.min_p");
  m.repetition_penalty =
      get_optional<float>(r.getRepetitionPenalty(), "sampling.repetition_penalty");
  m.presence_penalty = r.getPresencePenalty();
  m.frequency_penalty = r.getFrequencyPenalty();
  m.seed = get_optional<std::int64_t>(r.getSeed(), "sampling.seed");
  m.stop = get_structs<std::string>(r.getStop(), "sampling.stop",
                                    [](auto item) { return get_text(item, "sampling.stop"); });
  m.stop_token_ids = get_scalars<std::int32_t>(r.getStopTokenIds(), "sampling.stop_token_ids");
  m.logprobs = r.getLogprobs();
  m.min_tokens = r.getMinTokens();
  m.ignore_eos = r.getIgnoreEos();
  m.prompt_logprobs_from = r.getPromptLogprobsFrom();
  return m;
}

static void put(wire::TokenLogprob::Builder b, const TokenLogprob& m) {
  b.setToken(m.token);
  b.setLogprob(m.logprob);
  auto top = b.initTop(count(m.top));
  for (unsigned i = 0; i < count(m.top); ++i) {
    top[i].setToken(m.top[i].first);
    top[i].setLogprob(m.top[i].second);
  }
}

static TokenLogprob get(wire::TokenLogprob::Reader r) {
  return {
      r.getToken(), r.getLogprob(),
      get_structs<std::pair<std::int32_t, float>>(r.getTop(), "chunk.logprobs.top", [](auto item) {
        return std::pair(item.getToken(), item.getLogprob());
      })};
}

void put(wire::Version::Builder b, const Version& m) {
  b.setMajor(m.major);
  b.setMinor(m.minor);
}
Version get(wire::Version::Reader r) {
  return {r.getMajor(), r.getMinor()};
}

void put(wire::Status::Builder b, const Status& m) {
  b.setCode(static_cast<wire::StatusCode>(m.code()));
  if (m.message().empty()) return;
  // What a status quotes may be anything, and it must arrive.
  std::string message = to_utf8(m.message());
  if (message.size() > static_cast<std::size_t>(kStatusTextBytesMax)) {
    message.resize(static_cast<std::size_t>(kStatusTextBytesMax));
    message.resize(utf8_valid_prefix(message));
  }
  b.setMessage(text(message));
}
Status get(wire::Status::Reader r) {
  const auto code = get_enum(r.getCode(), StatusCode::kConflict, "status.code");
  return {code, get_text(r.getMessage(), "status.message", kStatusTextBytesMax)};
}

void put(wire::Generate::Builder b, const Generate& m) {
  b.setId(text(m.id.value));
  b.setModel(text(m.model));
  put(b.initInput(), m.input);
  put(b.initSampling(), m.sampling);
  b.setStream(m.stream);
  b.setNoCache(m.no_cache);
  b.setNextIndex(m.next_index);
  b.setDeadlineMs(m.deadline_ms);
}
Generate get(wire::Generate::Reader r) {
  Generate m;
  m.id = get_id<RequestId>(r.getId(), "generate.id");
  m.model = get_text(r.getModel(), "generate.model", kNameBytesMax);
  m.input = get(r.getInput());
  m.sampling = get(r.getSampling());
  m.stream = r.getStream();
  m.no_cache = r.getNoCache();
  m.next_index = get_count(r.getNextIndex(), "generate.next_index");
  m.deadline_ms = get_count(r.getDeadlineMs(), "generate.deadline_ms");
  return m;
}

void put(wire::GenerateChunk::Builder b, const GenerateChunk& m) {
  b.setId(text(m.id.value));
  b.setIndex(m.index);
  if (!m.text.empty()) b.setText(text(m.text));
  put_scalars(b.initTokens(count(m.tokens)), m.tokens);
  if (!m.logprobs.empty())
    put_structs(b.initLogprobs(count(m.logprobs)), m.logprobs,
                [](auto item, const auto& logprob) { put(item, logprob); });
  b.setFinish(static_cast<wire::FinishReason>(m.finish));
  if (!(m.status == Status())) put(b.initStatus(), m.status);
  if (!(m.usage == Usage())) {
    auto usage = b.initUsage();
    usage.setPromptTokens(m.usage.prompt_tokens);
    usage.setCompletionTokens(m.usage.completion_tokens);
    usage.setCachedPromptTokens(m.usage.cached_prompt_tokens);
  }
  if (!m.model.empty()) b.setModel(data(m.model));
  if (!m.adapter.empty()) b.setAdapter(data(m.adapter));
  b.setCached(m.cached);
  b.setQueueUs(m.queue_us);
  b.setFirstTokenUs(m.first_token_us);
  b.setRetryAfterMs(m.retry_after_ms);
  if (!m.prompt_logprobs.empty())
    put_scalars(b.initPromptLogprobs(count(m.prompt_logprobs)), m.prompt_logprobs);
}
GenerateChunk get(wire::GenerateChunk::Reader r) {
  GenerateChunk m;
  m.id = get_id<RequestId>(r.getId(), "chunk.id");
  m.index = get_count(r.getIndex(), "chunk.index");
  m.text = get_text(r.getText(), "chunk.text");
  m.tokens = get_scalars<std::int32_t>(r.getTokens(), "chunk.tokens");
  m.logprobs = get_structs<TokenLogprob>(r.getLogprobs(), "chunk.logprobs",
                                         [](auto item) { return get(item); });
  m.finish = get_enum(r.getFinish(), FinishReason::kError, "chunk.finish");
  m.status = get(r.getStatus());
  const auto usage = r.getUsage();
  m.usage = {get_count(usage.getPromptTokens(), "chunk.usage.prompt_tokens"),
             get_count(usage.getCompletionTokens(), "chunk.usage.completion_tokens"),
             get_count(usage.getCachedPromptTokens(), "chunk.usage.cached_prompt_tokens")};
  m.model = get_digest(r.getModel(), "chunk.model");
  m.adapter = get_digest(r.getAdapter(), "chunk.adapter");
  m.cached = r.getCached();
  m.queue_us = r.getQueueUs();
  m.first_token_us = r.getFirstTokenUs();
  m.retry_after_ms = get_count(r.getRetryAfterMs(), "chunk.retry_after_ms");
  m.prompt_logprobs = get_scalars<float>(r.getPromptLogprobs(), "chunk.prompt_logprobs");
  return m;
}

}  // namespace tandem::protocol::codec
