#include "worker/serve/serve_engine.h"

#include "worker/serve/adapter_residency.h"
#include "worker/serve/batch_runner.h"
#include "worker/serve/batch_scheduler.h"
#include "worker/serve/kv_memory.h"
#include "worker/serve/live_request.h"
#include "worker/serve/request_checks.h"

#include <algorithm>
#include <limits>
#include <map>
#include <unordered_map>

namespace tandem::worker::serve {

namespace {

/// Bounds of the "retry after" that a full queue answers.
constexpr TimeMs kRetryAfterMinMs = 100, kRetryAfterMaxMs = 60'000;
/// Weight of the newest value in running averages.
constexpr double kAverageWeight = 0.1;
/// Fewer blocks than this serve nobody.
constexpr std::int64_t kBlocksMin = 2;

void average(double& value, double sample) {
  value = value == 0.0 ? sample : (1.0 - kAverageWeight) * value + kAverageWeight * sample;
}

std::int64_t context_max(const model::ModelConfig& config, const ServeOptions& options) {
  return options.context_max > 0 ? options.context_max : config.context_max;
}

Status check_option(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return {};
  return invalid_error(str(name, " must be between ", low, " and ", high, ", got ", value));
}

Status check_options(const model::ModelConfig& config, DType dtype, const ServeParts& parts,
                     const ServeOptions& o) {
  if (o.block_size != 16 && o.block_size != 32)
    return invalid_error(str("block_size must be 16 or 32, got ", o.block_size));
  constexpr std::int64_t kCountMax = 1 << 20;
  TANDEM_RETURN_IF_ERROR(check_option("max_running", o.max_running, 1, kCountMax));
  TANDEM_RETURN_IF_ERROR(
      check_option("max_batch_tokens", o.max_batch_tokens, o.max_running + 1, kCountMax));
  TANDEM_RETURN_IF_ERROR(check_option("prefill_chunk_max", o.prefill_chunk_max, 0, kCountMax));
  TANDEM_RETURN_IF_ERROR(check_option("max_waiting", o.max_waiting, 1, kCountMax));
  TANDEM_RETURN_IF_ERROR(check_option("context_max", o.context_max, 0, config.context_max));
  TANDEM_RETURN_IF_ERROR(check_option("adapter_rank_max", o.adapter_rank_max, 1, kCountMax));
  TANDEM_RETURN_IF_ERROR(check_option("adapters_max", o.adapters_max, 1, kCountMax));
  const std::int64_t table = parts.adapters ? parts.adapters->slots() : 0;
  TANDEM_RETURN_IF_ERROR(check_option("slot_begin", parts.slot_begin, 0, table));
  TANDEM_RETURN_IF_ERROR(check_option("slot_count", parts.slot_count, 0, table - parts.slot_begin));
  if (!std::is_sorted(o.token_buckets.begin(), o.token_buckets.end()) ||
      (!o.token_buckets.empty() &&
       (o.token_buckets.front() < 1 || o.token_buckets.back() < o.max_batch_tokens)))
    return invalid_error(str("token_buckets must ascend and end at max_batch_tokens (",
                             o.max_batch_tokens, ") or above"));
  const KvLayout layout = kv_layout(config, dtype, o);
  if (layout.blocks < kBlocksMin || layout.blocks > std::numeric_limits<std::int32_t>::max())
    return invalid_error(str("kv_bytes_max of ", o.kv_bytes_max, " B holds ", layout.blocks,
                             " blocks of ", layout.block_bytes, " B; at least ", kBlocksMin,
                             " are needed"));
  return {};
}

/// Few enough for one recording each, close enough that inert rows cost little.
std::vector<std::int64_t> default_token_buckets(std::int64_t most) {
  std::vector<std::int64_t> buckets;
  const auto step = [](std::int64_t at) -> std::int64_t {
    return at < 2      ? 1
           : at < 4    ? 2
           : at < 8    ? 4
           : at < 64   ? 8
           : at < 256  ? 32
           : at < 1024 ? 64
                       : 256;
  };
  for (std::int64_t at = 1; at < most; at += step(at)) buckets.push_back(at);
  buckets.push_back(most);
  return buckets;
}

RunnerLimits runner_limits(const model::ModelConfig& config, const ServeParts& parts,
                           const ServeOptions& o) {
  RunnerLimits l;
  l.tokens_max = o.token_buckets.empty() ? o.max_batch_tokens : o.token_buckets.back();
  l.sequences_max = o.max_running;
  l.slots = parts.slot_count;
  l.context_max = context_max(config, o);
  l.block_size = o.block_size;
  l.rank_max = parts.slot_count > 0 ? o.adapter_rank_max : 0;
  // Distinct tokens of the longest sequence there can be, and several of the usual length.
  l.history_max = std::max(l.context_max, std::min<std::int64_t>(config.vocab, 4096) * 8);
  l.top_logprobs_max = std::min(kLogprobsMax, config.vocab);
  l.token_buckets = o.token_buckets;
  return l;
}

BatchLimits batch_limits(const ServeParts& parts, const ServeOptions& o, const RunnerLimits& l) {
  return {.token_budget = o.max_batch_tokens,
          .prefill_chunk_max = o.prefill_chunk_max,
          .running_max = o.max_running,
          .adapters_max = parts.slot_count,
          .history_max = l.history_max,
          .block_size = o.block_size};
}

}  // namespace

struct ServeEngine::Impl {
  Impl(const ServeParts& p, const ServeOptions& o)
      : parts(p),
        options(o),
        config(p.weights.base().config()),
        dtype(p.context.compute_dtype),
        layout(kv_layout(config, dtype, o)),
        limits(runner_limits(config, p, o)),
        kv_memory(p.allocator, p.ledger, config, dtype, layout.blocks, o.block_size),
        buffers(p.allocator, p.ledger, kernels::MemoryKind::kActivations, "serve batch buffers",
                BatchRunner::bytes_needed(config, dtype, limits)),
        runner(p.context, buffers, p.weights, p.slot_count > 0 ? p.adapters : nullptr,
               kv_memory.caches(), limits),
        blocks(layout.blocks, o.prefix_cache),
        scheduler(blocks, batch_limits(p, o, limits), o.base_digest),
        residency(p.slot_begin, p.slot_count, o.adapters_max,
                  [this](std::int64_t slot, const AdapterResidency::Weights& weights) {
                    if (weights)
                      parts.adapters->set(parts.context.exec, slot, weights);
                    else
                      parts.adapters->clear(parts.context.exec, slot);
                  }),
        eos_ids(o.eos_ids) {
    eos_ids.insert(eos_ids.end(), config.eos_ids.begin(), config.eos_ids.end());
  }

  Status submit(GenerateRequest request);
  void finish(LiveRequest& live, FinishReason reason, Status error);
  void forget(LiveRequest& live);
  void expire_waits();
  [[nodiscard]] bool wait_expired(const LiveRequest& live) const;
  std::int64_t bind_adapters();
  void collect(StepOutput& out);
  void count(const StepOutput& out, std::int64_t start_ns);
  LiveRequest& live_of(const Sequence& sequence) { return *by_age.at(sequence.age); }
  [[nodiscard]] TimeMs retry_after() const;

  const ServeParts parts;
  const ServeOptions options;
  const model::ModelConfig& config;
  const DType dtype;
  const KvLayout layout;
  const RunnerLimits limits;
  KvMemory kv_memory;
  kernels::Arena buffers;
  BatchRunner runner;
  KvBlocks blocks;
  BatchScheduler scheduler;
  AdapterResidency residency;
  std::vector<std::int32_t> eos_ids;

  std::unordered_map<RequestId, std::unique_ptr<LiveRequest>> live;
  std::map<std::int64_t, LiveRequest*> by_age;
  std::int64_t arrivals = 0;
  std::int64_t unready = 0;             ///< requests that wait for their adapter
  std::vector<SequenceOutput> pending;  ///< outcomes that the next step reports
  Batch batch;
  std::vector<RunRows> runs;
  std::vector<Digest> step_adapters;
  RunResult result;

  std::int64_t steps = 0, prefill_tokens = 0, decode_tokens = 0;
  double decode_rate = 0, prefill_rate = 0, service_ms = 0;
};

Result<std::unique_ptr<ServeEngine>> ServeEngine::create(const ServeParts& parts,
                                                         const ServeOptions& options) {
  const model::BaseWeights& base = parts.weights.base();
  TANDEM_CHECK(base.dtype() == parts.context.compute_dtype, dtype_name(base.dtype()),
               " weights in ", dtype_name(parts.context.compute_dtype), " context");
  TANDEM_RETURN_IF_ERROR(check_options(base.config(), base.dtype(), parts, options));
  ServeOptions filled = options;
  if (filled.token_buckets.empty() && parts.context.ops.profile().records_graphs)
    filled.token_buckets = default_token_buckets(filled.max_batch_tokens);
  return std::unique_ptr<ServeEngine>(new ServeEngine(std::make_unique<Impl>(parts, filled)));
}

ServeEngine::ServeEngine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ServeEngine::~ServeEngine() = default;

void ServeEngine::reserve_worst_case() {
  impl_->runner.run_worst_case();
}

Status ServeEngine::submit(GenerateRequest request) {
  return impl_->submit(std::move(request));
}

TimeMs ServeEngine::Impl::retry_after() const {
  // Time until the first of those ahead ends, if they end evenly.
  const double ahead = service_ms / static_cast<double>(options.max_running);
  return std::clamp(static_cast<TimeMs>(ahead), kRetryAfterMinMs, kRetryAfterMaxMs);
}

Status ServeEngine::Impl::submit(GenerateRequest request) {
  TANDEM_ASSIGN_OR_RETURN(const std::int64_t tokens,
                          check_request(request, {.vocab = config.vocab,
                                                  .context_max = limits.context_max,
                                                  .kv_tokens = blocks.limit() * options.block_size,
                                                  .has_text = parts.tokenizer.has_value(),
                                                  .has_adapters = parts.slot_count > 0}));
  if (live.contains(request.id))
    return conflict_error(str("request ", request.id, " is already being served here"));
  if (scheduler.waiting() >= options.max_waiting)
    return busy_error(str("the queue of this worker is full (", options.max_waiting,
                          " requests wait); retry after ", retry_after(), " ms"));
  // Priorities shift the order of service by whole places, so that ages stay distinct and nobody is
  // overtaken for ever.
  const std::int64_t age =
      (arrivals++ - request.priority * kPriorityHeadStart) * (2 * kPriorityMax + 1) +
      request.priority;
  TANDEM_ASSIGN_OR_RETURN(auto owned, LiveRequest::create(std::move(request), tokens, age, eos_ids,
                                                          parts.tokenizer, parts.clock.now_ms()));
  LiveRequest& added = *owned;
  Sequence& sequence = added.sequence();
  if (!sequence.adapter.empty()) {
    sequence.adapter_ready = residency.installed(sequence.adapter);
    if (sequence.adapter_ready)
      residency.acquire(sequence.adapter);
    else
      ++unready;
  }
  // The end of an earlier life under this id that was not reported yet must not end this one.
  std::erase_if(pending, [&](const SequenceOutput& out) { return out.id == added.request().id; });
  by_age.emplace(age, &added);
  scheduler.add(&sequence);
  live.emplace(added.request().id, std::move(owned));
  return {};
}

// Bookkeeping of an ended request; the scheduler no longer knows it.
void ServeEngine::Impl::forget(LiveRequest& ended) {
  const Sequence& sequence = ended.sequence();
  if (!sequence.adapter_ready)
    --unready;
  else if (!sequence.adapter.empty())
    residency.release(sequence.adapter);
  average(service_ms, static_cast<double>(parts.clock.now_ms() - ended.submitted_at()));
  by_age.erase(sequence.age);
  const RequestId id = ended.request().id;
  live.erase(id);
}

void ServeEngine::Impl::finish(LiveRequest& ended, FinishReason reason, Status error) {
  SequenceOutput& out = pending.emplace_back();
  ended.describe(out);
  out.index = std::max(ended.generated(), ended.request().start_index);
  out.finish = reason;
  out.error = std::move(error);
  scheduler.remove(&ended.sequence());
  forget(ended);
}

void ServeEngine::cancel(const RequestId& id) {
  if (const auto at = impl_->live.find(id); at != impl_->live.end())
    impl_->finish(*at->second, FinishReason::kCancelled, {});
}

void ServeEngine::fail_all(const Status& why) {
  while (!impl_->by_age.empty())
    impl_->finish(*impl_->by_age.begin()->second, FinishReason::kError, why);
}

std::vector<Digest> ServeEngine::missing_adapters() const {
  std::vector<Digest> missing;
  if (impl_->unready == 0) return missing;
  for (const Sequence* s : impl_->scheduler.waiting_list())
    if (!s->adapter_ready && std::find(missing.begin(), missing.end(), s->adapter) == missing.end())
      missing.push_back(s->adapter);
  return missing;
}

Status ServeEngine::install_adapter(const Digest& digest,
                                    std::shared_ptr<const model::AdapterWeights> weights) {
  Impl& impl = *impl_;
  TANDEM_CHECK(weights != nullptr && !digest.empty(), "adapter ", digest);
  if (weights->rank_max > impl.options.adapter_rank_max)
    return refused_error(str("adapter ", digest, " has rank ", weights->rank_max,
                             ", this worker serves up to ", impl.options.adapter_rank_max,
                             "; raise adapter_rank_max"));
  TANDEM_RETURN_IF_ERROR(impl.residency.install(digest, std::move(weights)));
  if (impl.unready == 0) return {};
  for (Sequence* s : impl.scheduler.waiting_list())
    if (!s->adapter_ready && s->adapter == digest) {
      s->adapter_ready = true;
      impl.residency.acquire(digest);
      --impl.unready;
    }
  return {};
}

void ServeEngine::fail_adapter(const Digest& digest, const Status& why) {
  const std::vector<Sequence*> waiting = impl_->scheduler.waiting_list();
  for (const Sequence* s : waiting)
    if (!s->adapter_ready && s->adapter == digest)
      impl_->finish(impl_->live_of(*s), FinishReason::kError, why);
}

void ServeEngine::drop_adapter(const Digest& digest) {
  impl_->residency.drop(digest);
}

bool ServeEngine::Impl::wait_expired(const LiveRequest& waiting) const {
  return !waiting.sequence().adapter_ready &&
         parts.clock.now_ms() - waiting.submitted_at() >= scaled_ms(options.adapter_wait_ms);
}

void ServeEngine::Impl::expire_waits() {
  if (unready == 0) return;
  const std::vector<Sequence*> waiting = scheduler.waiting_list();
  for (const Sequence* s : waiting)
    if (LiveRequest& request = live_of(*s); wait_expired(request))
      finish(request, FinishReason::kError,
             unavailable_error(str("adapter ", s->adapter, " did not arrive on this worker within ",
                                   options.adapter_wait_ms, " ms; try again")));
}

bool ServeEngine::has_work() const {
  const Impl& impl = *impl_;
  if (!impl.pending.empty() || impl.scheduler.has_runnable()) return true;
  return impl.unready > 0 &&
         std::any_of(impl.live.begin(), impl.live.end(),
                     [&](const auto& entry) { return impl.wait_expired(*entry.second); });
}

// Binds the batch's adapters to slots and describes its rows; returns the largest rank.
std::int64_t ServeEngine::Impl::bind_adapters() {
  step_adapters.clear();
  for (const BatchRows& rows : batch.rows)
    if (const Digest& adapter = rows.sequence->adapter;
        !adapter.empty() && (step_adapters.empty() || step_adapters.back() != adapter))
      step_adapters.push_back(adapter);
  residency.begin_step(step_adapters);
  std::int64_t rank_max = 0;
  runs.clear();
  for (const BatchRows& rows : batch.rows) {
    std::int32_t slot = -1;
    if (const Digest& adapter = rows.sequence->adapter; !adapter.empty()) {
      slot = residency.bind(adapter);
      rank_max = std::max(rank_max, residency.rank_max(adapter));
    }
    runs.push_back(live_of(*rows.sequence).run_rows(rows, slot));
  }
  return rank_max;
}

StepOutput ServeEngine::step() {
  Impl& impl = *impl_;
  const std::int64_t start = steady_ns();
  StepOutput out;
  impl.expire_waits();
  impl.scheduler.next(impl.batch);
  for (Sequence* s : impl.batch.too_large) {
    LiveRequest& request = impl.live_of(*s);
    impl.scheduler.add(s);  // finish() takes it out again
    impl.finish(request, FinishReason::kError,
                unavailable_error(str("request ", request.request().id, " needs KV for ", s->size(),
                                      " tokens, this worker now holds ",
                                      impl.blocks.limit() * impl.options.block_size,
                                      "; send it to another worker or later")));
  }
  out.outputs = std::move(impl.pending);
  impl.pending.clear();
  if (impl.batch.rows.empty()) return out;
  const std::int64_t rank_max = impl.bind_adapters();
  impl.runner.run(impl.runs, rank_max, impl.result);
  impl.scheduler.commit(impl.batch);
  impl.collect(out);
  impl.count(out, start);
  return out;
}

void ServeEngine::Impl::collect(StepOutput& out) {
  out.prefill_tokens = batch.prefill_tokens;
  out.decode_tokens = batch.tokens - batch.prefill_tokens;
  std::size_t sampled = 0, score_at = 0;
  const auto n = static_cast<std::size_t>(result.top_count);
  for (const RunRows& run : runs) {
    LiveRequest& request = live_of(*run.rows.sequence);
    SequenceOutput news;
    if (run.score_from >= 0) {
      const ScoredRows scored = scored_rows(run);
      const auto scores =
          std::span(result.scores).subspan(score_at, static_cast<std::size_t>(scored.count));
      score_at += scores.size();
      request.add_scores(scores, run.rows.begin, news);
    }
    if (run.rows.sample) {
      request.add_token(result.ids[sampled], result.logprobs[sampled],
                        std::span(result.top_ids).subspan(sampled * n, n),
                        std::span(result.top_logprobs).subspan(sampled * n, n), news);
      ++sampled;
    } else if (!run.rows.sequence->wants_token && run.rows.sequence->pending() == 0) {
      news.finish = FinishReason::kLength;
    }
    if (news.finish == FinishReason::kNone && news.token_ids.empty() &&
        news.prompt_logprobs.empty())
      continue;
    request.describe(news);
    if (news.finish != FinishReason::kNone) {
      scheduler.remove(run.rows.sequence);
      forget(request);
    }
    out.outputs.push_back(std::move(news));
  }
}

void ServeEngine::Impl::count(const StepOutput& out, std::int64_t start_ns) {
  ++steps;
  prefill_tokens += out.prefill_tokens;
  decode_tokens += out.decode_tokens;
  const double seconds = static_cast<double>(steady_ns() - start_ns) * 1e-9;
  if (seconds <= 0.0) return;
  if (out.prefill_tokens > 0)
    average(prefill_rate, static_cast<double>(out.prefill_tokens) / seconds);
  if (out.decode_tokens > 0) average(decode_rate, static_cast<double>(out.decode_tokens) / seconds);
}

void ServeEngine::set_token_budget(std::int64_t tokens) {
  impl_->scheduler.set_token_budget(
      std::clamp(tokens, impl_->options.max_running + 1, impl_->options.max_batch_tokens));
}

std::int64_t ServeEngine::set_kv_limit(std::int64_t limit) {
  Impl& impl = *impl_;
  limit = std::clamp<std::int64_t>(limit, 0, impl.layout.blocks);
  const bool grows = limit > impl.blocks.limit();
  if (!grows) impl.scheduler.set_kv_limit(limit);  // nobody may hold what is unmapped
  const std::int64_t bytes = impl.kv_memory.set_blocks(limit);
  if (grows) impl.scheduler.set_kv_limit(limit);
  return bytes;
}

ServeStats ServeEngine::stats() const {
  const Impl& impl = *impl_;
  ServeStats s;
  s.running = impl.scheduler.running();
  s.waiting = impl.scheduler.waiting();
  s.kv_blocks_free = impl.blocks.available();
  s.kv_blocks_total = impl.blocks.limit();
  s.kv_block_bytes = impl.layout.block_bytes;
  s.prefix_queries = impl.scheduler.prefix_queries();
  s.prefix_hits = impl.scheduler.prefix_hits();
  s.preemptions = impl.scheduler.preemptions();
  s.steps = impl.steps;
  s.prefill_tokens = impl.prefill_tokens;
  s.decode_tokens = impl.decode_tokens;
  s.decode_tokens_per_s = impl.decode_rate;
  s.prefill_tokens_per_s = impl.prefill_rate;
  s.resident_adapters = impl.residency.resident();
  return s;
}

}  // namespace tandem::worker::serve
