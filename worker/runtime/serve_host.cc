#include "worker/runtime/serve_host.h"

#include "protocol/answer_size.h"
#include "protocol/base/log.h"

#include <nlohmann/json.hpp>

namespace tandem::worker::runtime {
namespace {

/// A request's own value, else the model's generation config's, else the default.
template <class T, class U, class V>
T choose(const std::optional<U>& asked, const std::optional<V>& configured, T otherwise) {
  if (asked) return static_cast<T>(*asked);
  return configured ? static_cast<T>(*configured) : otherwise;
}

protocol::FinishReason finish_reason(serve::FinishReason reason) {
  switch (reason) {
    case serve::FinishReason::kNone:
      return protocol::FinishReason::kNone;
    case serve::FinishReason::kStop:
      return protocol::FinishReason::kStop;
    case serve::FinishReason::kLength:
      return protocol::FinishReason::kLength;
    case serve::FinishReason::kCancelled:
      return protocol::FinishReason::kCancelled;
    case serve::FinishReason::kError:
      return protocol::FinishReason::kError;
  }
  return protocol::FinishReason::kError;
}

protocol::TokenLogprob convert(std::int32_t token, const serve::TokenLogprobs& from) {
  protocol::TokenLogprob to;
  to.token = token;
  to.logprob = from.logprob;
  for (const auto& top : from.top) to.top.emplace_back(top.id, top.logprob);
  return to;
}

}  // namespace

void describe_serving(const serve::ServeStats& stats, const kernels::MemoryLedger& ledger,
                      const ModelHostOptions& options, protocol::Heartbeat& beat) {
  beat.running = stats.running;
  beat.waiting = stats.waiting;
  beat.kv_blocks_free = stats.kv_blocks_free;
  beat.kv_blocks_total = stats.kv_blocks_total;
  beat.tokens_per_second = stats.decode_tokens_per_s;
  beat.adapters = stats.resident_adapters;
  nlohmann::json kinds;
  for (int i = 0; i < kernels::kMemoryKindCount; ++i) {
    const auto kind = static_cast<kernels::MemoryKind>(i);
    kinds[kernels::memory_kind_name(kind)] = ledger.live(kind);
  }
  beat.stats_json = nlohmann::json{{"prefix_hits", stats.prefix_hits},
                                   {"prefix_queries", stats.prefix_queries},
                                   {"preemptions", stats.preemptions},
                                   {"steps", stats.steps},
                                   {"prefill_tokens", stats.prefill_tokens},
                                   {"decode_tokens", stats.decode_tokens},
                                   {"memory_bytes", kinds},
                                   {"memory_peak_bytes", ledger.peak_total()},
                                   {"memory_bytes_max", options.memory_bytes_max},
                                   {"dtype", dtype_name(options.dtype)}}
                        .dump();
}

serve::SamplingParams resolve_sampling(const protocol::SamplingParams& asked,
                                       const model::GenerationDefaults& defaults,
                                       std::int64_t vocab, std::int64_t room) {
  serve::SamplingParams to;
  to.max_tokens = asked.max_tokens;
  to.min_tokens = asked.min_tokens;
  if (const auto length = defaults.max_new_tokens; length && !to.max_tokens && *length < room)
    to.max_tokens = std::min(std::max(*length, to.min_tokens), room);
  const bool says_how = asked.temperature || asked.top_k || asked.top_p || asked.min_p;
  to.temperature = choose<float>(asked.temperature, defaults.temperature, 1.0f);
  if (defaults.do_sample == false && !says_how) to.temperature = 0.0f;
  to.top_k = asked.top_k ? *asked.top_k : std::min(defaults.top_k.value_or(0), vocab);
  to.top_p = choose<float>(asked.top_p, defaults.top_p, 1.0f);
  to.min_p = choose<float>(asked.min_p, defaults.min_p, 0.0f);
  to.repetition_penalty =
      choose<float>(asked.repetition_penalty, defaults.repetition_penalty, 1.0f);
  to.presence_penalty = asked.presence_penalty;
  to.frequency_penalty = asked.frequency_penalty;
  if (asked.seed) to.seed = static_cast<std::uint64_t>(*asked.seed);
  to.stop = asked.stop;
  to.stop_token_ids = asked.stop_token_ids;
  if (asked.logprobs >= 0) to.logprobs = asked.logprobs;
  to.ignore_eos = asked.ignore_eos;
  if (asked.prompt_logprobs_from >= 0) to.prompt_logprobs_from = asked.prompt_logprobs_from;
  return to;
}

void ServeHost::set_model(ServedModel* model) {
  if (model_ == model) return;
  auto requests = std::move(requests_);
  requests_.clear();
  model_ = model;
  manifests_.clear();
  loading_.clear();
  for (const auto& [id, request] : requests)
    fail(id, request.attempt, unavailable_error("the engine changed its base model"));
}

Result<serve::GenerateRequest> ServeHost::translate(const protocol::Infer& infer) const {
  serve::GenerateRequest request;
  request.id = infer.request.id;
  request.adapter = infer.adapter;
  request.start_index = infer.request.next_index;
  TANDEM_ASSIGN_OR_RETURN(request.prompt, model_->tokenize(infer.request.input));
  request.sampling =
      resolve_sampling(infer.request.sampling, model_->generation(), model_->config().vocab,
                       model_->serve().room(static_cast<std::int64_t>(request.prompt.size())));
  return request;
}

void ServeHost::submit(const protocol::Infer& infer) {
  const RequestId& id = infer.request.id;
  if (!model_ || model_->ref().digest != infer.model.digest)
    return fail(id, infer.attempt,
                unavailable_error(str("this engine does not hold model ", infer.model.name)));
  if (auto live = requests_.find(id); live != requests_.end()) {
    if (live->second.attempt == infer.attempt) return;  // the coordinator repeated itself
    cancel(id);  // an older attempt's sequence; its end is not reported once the id is taken again
    requests_.erase(live);
  }
  auto request = translate(infer);
  if (!request.ok()) return fail(id, infer.attempt, request.status());
  if (const Status status = model_->serve().submit(std::move(*request)); !status.ok())
    return fail(id, infer.attempt, status);
  Request live;
  live.attempt = infer.attempt;
  live.adapter = infer.adapter;
  live.arrived_ns = steady_ns();
  live.stream = infer.request.stream;
  requests_.emplace(id, std::move(live));
  if (!infer.adapter.empty()) manifests_[infer.adapter] = infer.adapter_manifest;
  request_missing();
}

void ServeHost::cancel(const RequestId& id) {
  if (model_) model_->serve().cancel(id);
}

void ServeHost::prefetch(const protocol::Announce& announce) {
  if (!model_ || model_->ref().digest != announce.model) return;
  for (const Digest& resident : model_->serve().stats().resident_adapters)
    if (resident == announce.adapter) return;
  load_adapter(announce.adapter, announce.adapter_manifest);
}

void ServeHost::request_missing() {
  for (const Digest& adapter : model_->serve().missing_adapters())
    if (auto manifest = manifests_.find(adapter); manifest != manifests_.end())
      load_adapter(adapter, manifest->second);
}

void ServeHost::load_adapter(const Digest& adapter, const std::string& manifest) {
  if (!loading_.insert(adapter).second) return;
  using Tensors = std::vector<model::HostAdapterTensor>;
  auto outcome = std::make_shared<Result<Tensors>>(Tensors{});
  const bool posted =
      tasks_.post([=, this, &bulk = bulk_, base = model_->ref().digest, config = model_->config(),
                   to_device = to_device_, alive = alive_, model = model_] {
        *outcome =
            unpack_adapter(manifest, base, config, [&](auto digests) { return bulk.get(digests); });
        to_device([=, this] {
          if (!*alive || model_ != model) return;
          loading_.erase(adapter);
          Status status = outcome->status();
          if (outcome->ok()) status = model_->load_adapter(adapter, **outcome);
          if (!status.ok()) model_->serve().fail_adapter(adapter, status);
        });
      });
  if (!posted) {
    loading_.erase(adapter);
    model_->serve().fail_adapter(adapter,
                                 busy_error("too many transfers wait; retry after 1000 ms"));
  }
}

void ServeHost::step() {
  (void)start_step();
  finish_step();
}

void ServeHost::finish_step() {
  const serve::StepOutput out = model_->serve().finish_step();
  for (const auto& output : out.outputs) deliver(output);
  request_missing();
}

void ServeHost::deliver(const serve::SequenceOutput& output) {
  auto found = requests_.find(output.id);
  if (found == requests_.end()) return;
  Request& request = found->second;
  if (request.first_token_ns == 0 && !output.token_ids.empty())
    request.first_token_ns = steady_ns();
  const bool last = output.finish != serve::FinishReason::kNone;
  protocol::GenerateChunk& chunk = request.collected;
  chunk.id = output.id;
  if (chunk.tokens.empty()) chunk.index = output.index;
  chunk.text += output.text;
  chunk.tokens.insert(chunk.tokens.end(), output.token_ids.begin(), output.token_ids.end());
  for (std::size_t i = 0; i < output.logprobs.size(); ++i)
    chunk.logprobs.push_back(convert(output.token_ids[i], output.logprobs[i]));
  if (!output.prompt_logprobs.empty()) chunk.prompt_logprobs = output.prompt_logprobs;
  chunk.finish = finish_reason(output.finish);
  chunk.status = output.error;
  const bool full = protocol::answer_bytes(chunk) > protocol::kAnswerPartBytesMax;
  if (!last && ((!request.stream && !full) || chunk.tokens.empty())) return;
  if (last || request.first) {
    chunk.model = model_->ref().digest;
    chunk.adapter = request.adapter;
  }
  if (last) {
    chunk.usage = {output.usage.prompt_tokens, output.usage.completion_tokens,
                   output.usage.cached_prompt_tokens};
    chunk.first_token_us =
        request.first_token_ns ? (request.first_token_ns - request.arrived_ns) / 1000 : 0;
  }
  io_.send(protocol::InferChunk{request.attempt, std::move(chunk)});
  request.first = false;
  chunk = {};
  if (!last) return;
  const Digest adapter = request.adapter;
  requests_.erase(found);
  bool needed = adapter.empty();
  for (const auto& [id, other] : requests_) needed = needed || other.adapter == adapter;
  if (!needed) manifests_.erase(adapter);
}

std::vector<RequestId> ServeHost::live() const {
  std::vector<RequestId> ids;
  for (const auto& [id, request] : requests_) ids.push_back(id);
  return ids;
}

void ServeHost::fail(const RequestId& id, std::uint32_t attempt, const Status& status) {
  protocol::GenerateChunk chunk;
  chunk.id = id;
  chunk.finish = protocol::FinishReason::kError;
  chunk.status = status;
  if (status.code() == StatusCode::kBusy) chunk.retry_after_ms = 1000;
  io_.send(protocol::InferChunk{attempt, std::move(chunk)});
}

}  // namespace tandem::worker::runtime
