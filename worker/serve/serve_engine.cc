#include "worker/serve/serve_engine.h"

#include "kernels/arena.h"
#include "kernels/device_error.h"
#include "protocol/base/units.h"
#include "worker/model/adapter_layout.h"
#include "worker/serve/adapter_residency.h"
#include "worker/serve/batch_runner.h"
#include "worker/serve/batch_scheduler.h"
#include "worker/serve/kv_memory.h"
#include "worker/serve/live_request.h"
#include "worker/serve/request_checks.h"
#include "worker/serve/serve_options.h"

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
void average(double& value, double sample) {
  value = value == 0.0 ? sample : (1.0 - kAverageWeight) * value + kAverageWeight * sample;
}

}  // namespace

struct ServeEngine::Impl {
  Impl(const ServeParts& p, const ServeOptions& o)
      : parts(p),
        options(o),
        config(p.weights.base().config()),
        whole(p.weights.base().whole_config()),
        dtype(p.context.compute_dtype),
        layout(kv_layout(config, dtype, o, stage_of(p))),
        limits(runner_limits(whole, p, o)),
        kv_memory(p.allocator, p.ledger, config, stage_of(p), dtype, layout.blocks, o.block_size),
        buffers(p.allocator, p.ledger, kernels::MemoryKind::kActivations, "serve batch buffers",
                BatchRunner::bytes_needed(config, dtype, limits)),
        runner(p.context, buffers, p.weights, p.slot_count > 0 ? p.adapters : nullptr,
               kv_memory.caches(), limits, p.ranks),
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

  /// Every call begins with this: `now` is one time for all of it, on all ranks.
  void begin() {
    settle();
    if (!follows()) now = parts.clock.now_ms();
  }
  /// Of a sharded replica: rank 0, and the others.
  [[nodiscard]] bool leads() const {
    return parts.ranks != nullptr && parts.ranks->model.rank() == 0;
  }
  [[nodiscard]] bool follows() const {
    return parts.ranks != nullptr && parts.ranks->model.rank() != 0;
  }
  /// The others make the call when flush() has sent it.
  void tell(EngineCall call) {
    call.now = now;
    encode(call, unsent);
  }
  void flush() {
    parts.ranks->calls.send(unsent);
    unsent.clear();
  }
  Result<std::shared_ptr<const model::AdapterWeights>> build(
      const std::vector<model::HostAdapterTensor>& tensors);
  Status install(const Digest& digest, std::shared_ptr<const model::AdapterWeights> weights,
                 std::int64_t bytes);
  Status make_room(const Digest& digest, std::int64_t bytes);
  [[nodiscard]] std::int64_t largest_part(
      const std::vector<model::HostAdapterTensor>& tensors) const;
  /// Idle adapters go until all have at most so many bytes; false: those in use have more.
  bool evict_to(std::int64_t bytes_max);
  [[nodiscard]] RequestLimits request_limits() const;
  Status submit(GenerateRequest request);
  void finish(LiveRequest& live, FinishReason reason, Status error);
  void forget(LiveRequest& live);
  void expire_waits();
  [[nodiscard]] bool wait_expired(const LiveRequest& live, TimeMs at) const;
  std::int64_t bind_adapters();
  void settle();
  void collect(StepOutput& out);
  void count(const StepOutput& out, std::int64_t start_ns);
  LiveRequest& live_of(const Sequence& sequence) { return *by_age.at(sequence.age); }
  [[nodiscard]] TimeMs retry_after() const;

  const ServeParts parts;
  const ServeOptions options;
  const model::ModelConfig& config;  ///< as this rank's ops see it
  const model::ModelConfig& whole;   ///< as clients see it
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
  std::int64_t adapter_bytes_max = std::numeric_limits<std::int64_t>::max();

  std::unordered_map<RequestId, std::unique_ptr<LiveRequest>> live;
  std::map<std::int64_t, LiveRequest*> by_age;
  std::int64_t arrivals = 0;
  std::int64_t unready = 0;             ///< requests that wait for their adapter
  std::vector<SequenceOutput> pending;  ///< outcomes that the next step reports
  TimeMs now = 0;
  std::vector<std::byte> unsent;  ///< calls that the others do not know yet
  Batch batch;
  std::vector<RunRows> runs;
  std::vector<Digest> step_adapters;
  RunResult result;
  /// Of a step that was started and not finished: what it says so far, and whether its rows are
  /// under way.
  std::optional<StepOutput> started;
  std::int64_t started_ns = 0;
  bool under_way = false;

  std::int64_t steps = 0, prefill_tokens = 0, decode_tokens = 0;
  double decode_rate = 0, prefill_rate = 0, service_ms = 0;
};

Result<std::unique_ptr<ServeEngine>> ServeEngine::create(const ServeParts& parts,
                                                         const ServeOptions& options) {
  const model::BaseWeights& base = parts.weights.base();
  TANDEM_CHECK(base.dtype() == parts.context.compute_dtype, dtype_name(base.dtype()),
               " weights in ", dtype_name(parts.context.compute_dtype), " context");
  TANDEM_RETURN_IF_ERROR(check_options(parts, options));
  TANDEM_ASSIGN_OR_RETURN(const ServeOptions filled, fill_options(parts, options));
  return std::unique_ptr<ServeEngine>(new ServeEngine(std::make_unique<Impl>(parts, filled)));
}

ServeEngine::ServeEngine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ServeEngine::~ServeEngine() = default;

void ServeEngine::reserve_worst_case() {
  impl_->begin();
  if (impl_->leads()) {
    impl_->tell({.kind = EngineCall::Kind::kReserveWorstCase});
    impl_->flush();
  }
  impl_->runner.run_worst_case();
}

Status ServeEngine::submit(GenerateRequest request) {
  impl_->begin();
  if (impl_->leads()) impl_->tell({.kind = EngineCall::Kind::kSubmit, .request = request});
  return impl_->submit(std::move(request));
}

TimeMs ServeEngine::Impl::retry_after() const {
  // Time until the first of those ahead ends, if they end evenly.
  const double ahead = service_ms / static_cast<double>(options.max_running);
  return std::clamp(static_cast<TimeMs>(ahead), kRetryAfterMinMs, kRetryAfterMaxMs);
}

RequestLimits ServeEngine::Impl::request_limits() const {
  return {.vocab = whole.vocab,
          .context_max = limits.context_max,
          .kv_tokens = blocks.limit() * options.block_size,
          .has_text = parts.tokenizer.has_value(),
          .has_adapters = parts.slot_count > 0};
}

std::int64_t ServeEngine::room(std::int64_t prompt_tokens) const {
  return room_after(prompt_tokens, impl_->request_limits());
}

Status ServeEngine::Impl::submit(GenerateRequest request) {
  TANDEM_ASSIGN_OR_RETURN(const std::int64_t tokens, check_request(request, request_limits()));
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
                                                          parts.tokenizer, now));
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
  else if (!sequence.adapter.empty()) {
    residency.release(sequence.adapter);
    evict_to(adapter_bytes_max);  // it may have been lowered while this one was in use
  }
  average(service_ms, static_cast<double>(now - ended.submitted_at()));
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
  impl_->begin();
  if (impl_->leads()) impl_->tell({.kind = EngineCall::Kind::kCancel, .id = id});
  if (const auto at = impl_->live.find(id); at != impl_->live.end())
    impl_->finish(*at->second, FinishReason::kCancelled, {});
}

void ServeEngine::fail_all(const Status& why) {
  impl_->begin();
  if (impl_->leads()) impl_->tell({.kind = EngineCall::Kind::kFailAll, .status = why});
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
  TANDEM_CHECK(impl_->parts.ranks == nullptr, "ranks of a replica take parts of whole tensors");
  impl_->begin();
  const std::int64_t bytes = weights->bytes;
  return impl_->install(digest, std::move(weights), bytes);
}

Status ServeEngine::install_adapter(const Digest& digest,
                                    const std::vector<model::HostAdapterTensor>& tensors) {
  impl_->begin();
  if (impl_->leads()) {
    impl_->tell({.kind = EngineCall::Kind::kInstallAdapter, .adapter = digest, .tensors = tensors});
    impl_->flush();
  }
  TANDEM_RETURN_IF_ERROR(model::check_adapter(impl_->whole, tensors));
  const std::int64_t bytes = impl_->largest_part(tensors);
  TANDEM_RETURN_IF_ERROR(impl_->make_room(digest, bytes));
  auto weights = impl_->build(tensors);
  if (impl_->parts.ranks != nullptr)
    TANDEM_RETURN_IF_ERROR(impl_->parts.ranks->calls.agree(weights.status()));
  TANDEM_RETURN_IF_ERROR(weights.status());
  return impl_->install(digest, std::move(*weights), bytes);
}

// Of the rank that has most of it: every rank knows it, for all cut alike.
std::int64_t ServeEngine::Impl::largest_part(
    const std::vector<model::HostAdapterTensor>& tensors) const {
  const int stages = parts.ranks == nullptr ? 1 : parts.ranks->pp.size();
  std::int64_t largest = 0;
  for (int s = 0; s < stages; ++s) {
    const model::Stage stage = model::stage_at(whole.layers, stages, s);
    model::AdapterLayout part;
    for (const model::HostAdapterTensor& t : tensors)
      if (t.layer >= stage.first && t.layer < stage.last)
        part.add(config, t.layer, t.site, t.rank, t.scale);
    largest = std::max(largest, part.elements * dtype_bytes(dtype));
  }
  return largest;
}

// This rank's part, of tensors that are right. Memory for it may lack on one rank alone, which is
// then no reason to end the others.
Result<std::shared_ptr<const model::AdapterWeights>> ServeEngine::Impl::build(
    const std::vector<model::HostAdapterTensor>& tensors) {
  const auto local = model::shard_adapter(whole, parts.weights.base().shard(), tensors);
  if (!local.empty()) try {
      return model::build_adapter(parts.context.ops, parts.context.exec, parts.allocator,
                                  parts.ledger, config, dtype, local);
    } catch (const kernels::DeviceError& error) {
      return unavailable_error(str("no memory for an adapter: ", error.what()));
    }
  auto nothing = std::make_shared<model::AdapterWeights>();
  nothing->pairs.resize(static_cast<std::size_t>(config.layers));
  return std::shared_ptr<const model::AdapterWeights>(std::move(nothing));
}

Status ServeEngine::Impl::install(const Digest& digest,
                                  std::shared_ptr<const model::AdapterWeights> weights,
                                  std::int64_t bytes) {
  TANDEM_CHECK(weights != nullptr && !digest.empty(), "adapter ", digest);
  if (weights->rank_max > options.adapter_rank_max)
    return refused_error(str("adapter ", digest, " has rank ", weights->rank_max,
                             ", workers serve up to ", options.adapter_rank_max));
  TANDEM_RETURN_IF_ERROR(residency.install(digest, std::move(weights), bytes));
  if (unready == 0) return {};
  for (Sequence* s : scheduler.waiting_list())
    if (!s->adapter_ready && s->adapter == digest) {
      s->adapter_ready = true;
      residency.acquire(digest);
      --unready;
    }
  return {};
}

void ServeEngine::set_adapter_bytes_max(std::int64_t bytes) {
  impl_->begin();
  impl_->adapter_bytes_max = bytes;
  impl_->evict_to(bytes);
}

Status ServeEngine::make_adapter_room(const Digest& digest, std::int64_t bytes) {
  impl_->begin();
  return impl_->make_room(digest, bytes);
}

Status ServeEngine::Impl::make_room(const Digest& digest, std::int64_t bytes) {
  const std::int64_t max = adapter_bytes_max;
  const std::int64_t needed = round_up(bytes, kernels::kMapGranularity);
  if (residency.installed(digest) || evict_to(max - needed)) return {};
  const std::string what =
      str("adapter ", digest, " needs ", format_bytes(needed), " and adapters may take ",
          format_bytes(std::max<std::int64_t>(max, 0)), " of this engine's memory beside all else");
  if (needed > max)
    return refused_error(str(what, "; raise memory_bytes_max or lower kv_bytes_max"));
  return busy_error(str(what, ", of which ", format_bytes(residency.bytes()),
                        " are in use; retry after ", retry_after(), " ms"));
}

bool ServeEngine::Impl::evict_to(std::int64_t bytes_max) {
  while (residency.bytes() > bytes_max) {
    const auto oldest = residency.oldest_idle();
    if (!oldest) return false;
    residency.drop(*oldest);
  }
  return true;
}

void ServeEngine::fail_adapter(const Digest& digest, const Status& why) {
  impl_->begin();
  if (impl_->leads())
    impl_->tell({.kind = EngineCall::Kind::kFailAdapter, .adapter = digest, .status = why});
  const std::vector<Sequence*> waiting = impl_->scheduler.waiting_list();
  for (const Sequence* s : waiting)
    if (!s->adapter_ready && s->adapter == digest)
      impl_->finish(impl_->live_of(*s), FinishReason::kError, why);
}

void ServeEngine::drop_adapter(const Digest& digest) {
  impl_->begin();
  if (impl_->leads()) impl_->tell({.kind = EngineCall::Kind::kDropAdapter, .adapter = digest});
  impl_->residency.drop(digest);
}

bool ServeEngine::Impl::wait_expired(const LiveRequest& waiting, TimeMs at) const {
  return !waiting.sequence().adapter_ready &&
         at - waiting.submitted_at() >= scaled_ms(options.adapter_wait_ms);
}

void ServeEngine::Impl::expire_waits() {
  if (unready == 0) return;
  const std::vector<Sequence*> waiting = scheduler.waiting_list();
  for (const Sequence* s : waiting)
    if (LiveRequest& request = live_of(*s); wait_expired(request, now))
      finish(request, FinishReason::kError,
             unavailable_error(str("adapter ", s->adapter, " did not arrive on this worker within ",
                                   options.adapter_wait_ms, " ms; try again")));
}

bool ServeEngine::has_work() const {
  const Impl& impl = *impl_;
  if (!impl.pending.empty() || impl.scheduler.has_runnable()) return true;
  return impl.unready > 0 &&
         std::any_of(impl.live.begin(), impl.live.end(), [&](const auto& entry) {
           return impl.wait_expired(*entry.second, impl.parts.clock.now_ms());
         });
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
  (void)start_step();
  return finish_step();
}

std::int64_t ServeEngine::start_step() {
  Impl& impl = *impl_;
  TANDEM_CHECK(!impl.started, "the step before was not finished");
  impl.started_ns = steady_ns();
  impl.begin();
  if (impl.leads()) {
    impl.tell({.kind = EngineCall::Kind::kStep});
    impl.flush();
  }
  StepOutput& out = impl.started.emplace();
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
  if (impl.batch.rows.empty()) return 0;
  const std::int64_t rank_max = impl.bind_adapters();
  impl.runner.start(impl.runs, rank_max);
  impl.under_way = true;
  return impl.batch.tokens;
}

bool ServeEngine::step_ready() const {
  return !impl_->under_way || impl_->runner.passed();
}

StepOutput ServeEngine::finish_step() {
  TANDEM_CHECK(impl_->started.has_value(), "no step was started");
  impl_->settle();
  StepOutput out = std::move(*impl_->started);
  impl_->started.reset();
  return out;
}

void ServeEngine::Impl::settle() {
  if (!under_way) return;
  under_way = false;
  runner.finish(runs, result);
  scheduler.commit(batch);
  collect(*started);
  count(*started, started_ns);
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
  impl_->begin();
  if (impl_->leads()) impl_->tell({.kind = EngineCall::Kind::kSetTokenBudget, .number = tokens});
  impl_->scheduler.set_token_budget(
      std::clamp(tokens, impl_->options.max_running + 1, impl_->options.max_batch_tokens));
}

std::int64_t ServeEngine::set_kv_limit(std::int64_t limit) {
  Impl& impl = *impl_;
  impl.begin();
  if (impl.leads()) impl.tell({.kind = EngineCall::Kind::kSetKvLimit, .number = limit});
  limit = std::clamp<std::int64_t>(limit, 0, impl.layout.blocks);
  const bool grows = limit > impl.blocks.limit();
  if (!grows) impl.scheduler.set_kv_limit(limit);  // nobody may hold what is unmapped
  const std::int64_t bytes = impl.kv_memory.set_blocks(limit);
  if (grows) impl.scheduler.set_kv_limit(limit);
  return bytes;
}

bool ServeEngine::follow() {
  using Kind = EngineCall::Kind;
  Impl& impl = *impl_;
  TANDEM_CHECK(impl.follows(), "only the other ranks of a replica follow");
  const std::vector<std::byte> frame = impl.parts.ranks->calls.receive();
  std::span<const std::byte> rest(frame);
  while (!rest.empty()) {
    EngineCall call = decode(rest);
    impl.now = call.now;
    switch (call.kind) {
      case Kind::kSubmit:
        (void)submit(std::move(call.request));
        break;
      case Kind::kCancel:
        cancel(call.id);
        break;
      case Kind::kFailAll:
        fail_all(call.status);
        break;
      case Kind::kInstallAdapter:
        (void)install_adapter(call.adapter, call.tensors);
        break;
      case Kind::kFailAdapter:
        fail_adapter(call.adapter, call.status);
        break;
      case Kind::kDropAdapter:
        drop_adapter(call.adapter);
        break;
      case Kind::kSetTokenBudget:
        set_token_budget(call.number);
        break;
      case Kind::kSetKvLimit:
        set_kv_limit(call.number);
        break;
      case Kind::kReserveWorstCase:
        reserve_worst_case();
        break;
      case Kind::kStep:
        (void)step();
        break;
      case Kind::kEnd:
        return false;
    }
  }
  return true;
}

void ServeEngine::keep_alive() {
  if (impl_->leads()) impl_->flush();
}

void ServeEngine::end() {
  if (!impl_->leads()) return;
  impl_->tell({.kind = EngineCall::Kind::kEnd});
  impl_->flush();
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
