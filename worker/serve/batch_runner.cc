#include "worker/serve/batch_runner.h"

#include "protocol/base/random.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>

namespace tandem::worker::serve {

using kernels::ArenaScope;
using kernels::Shape;
using kernels::Tensor;

namespace {

/// From here on a batch of one adapter was faster by its own products than by those of any mix; at
/// 512 rows it was slower.
constexpr std::int64_t kOneAdapterTokens = 1024;
/// Of eight adapters, rows without one and inert rows.
constexpr std::int64_t kFewSegments = 10;

std::int64_t input_bytes(const RunnerLimits& l) {
  const std::int64_t blocks = (l.context_max + l.block_size - 1) / l.block_size;
  std::int64_t bytes = 3 * Staging::bytes<std::int32_t>(l.tokens_max);  // ids, positions, slots
  bytes += 2 * Staging::bytes<std::int32_t>(l.sequences_max + 1);       // q_offsets, kv_lens
  bytes += Staging::bytes<std::int32_t>(l.sequences_max * blocks);
  bytes += 2 * Staging::bytes<std::int32_t>(l.slots + 3);          // segments
  bytes += 2 * Staging::bytes<std::int32_t>(l.sequences_max + 1);  // index, history offsets
  bytes += 7 * Staging::bytes<float>(l.sequences_max);             // sampling, 4 bytes each
  bytes += 2 * Staging::bytes<std::int64_t>(l.sequences_max);      // seed, position
  bytes += 3 * Staging::bytes<std::int32_t>(l.history_max);
  return bytes;
}

std::int64_t output_bytes(const RunnerLimits& l) {
  return Staging::bytes<std::int32_t>(l.sequences_max) + Staging::bytes<float>(l.sequences_max) +
         Staging::bytes<std::int32_t>(l.sequences_max * l.top_logprobs_max) +
         Staging::bytes<float>(l.sequences_max * l.top_logprobs_max);
}

std::int32_t i32(std::int64_t value) {
  return static_cast<std::int32_t>(value);
}

}  // namespace

// The row of token p gives the distribution of token p + 1.
ScoredRows scored_rows(const RunRows& run) {
  if (run.score_from < 0) return {};
  const std::int64_t first = std::max(run.rows.begin, run.score_from - 1);
  const std::int64_t end = std::min(run.rows.begin + run.rows.count, run.rows.sequence->prompt - 1);
  return {first, std::max<std::int64_t>(0, end - first)};
}

namespace {
std::uint64_t next_runner() {
  static std::atomic<std::uint64_t> count{0};
  return ++count;
}
}  // namespace

BatchRunner::BatchRunner(model::Context& context, kernels::Arena& arena,
                         model::WeightSource& weights, const model::AdapterTable* adapters,
                         const std::vector<kernels::KvCache>& caches, const RunnerLimits& limits,
                         const ReplicaRanks* ranks)
    : runner_(next_runner()),
      context_(context),
      limits_(limits),
      ranks_(ranks),
      stage_(weights.base().shard().stage_of(weights.base().whole_config())),
      layers_(weights.base().config().layers),
      transformer_(weights, adapters, stage_),
      inputs_(arena, input_bytes(limits)),
      outputs_(arena, output_bytes(limits)) {
  const model::ModelConfig& config = weights.base().config();
  hidden_ = arena.alloc(Shape{limits.tokens_max, config.width}, context.compute_dtype);
  gathered_ = arena.alloc(Shape{limits.sequences_max, config.width}, context.compute_dtype);
  logits_ = arena.alloc(Shape{limits.sequences_max, limits.vocab}, DType::kF32);
  paged_.caches = caches;
  batch_.paged = &paged_;
}

std::int64_t BatchRunner::bytes_needed(const model::ModelConfig& config, DType dtype,
                                       const RunnerLimits& l) {
  const auto aligned = [](std::int64_t bytes) {
    return round_up(bytes, kernels::kDeviceAlignment);
  };
  return aligned(input_bytes(l)) + aligned(output_bytes(l)) +
         aligned(l.tokens_max * config.width * dtype_bytes(dtype)) +
         aligned(l.sequences_max * config.width * dtype_bytes(dtype)) +
         aligned(l.sequences_max * l.vocab * dtype_bytes(DType::kF32));
}

BatchRunner::Extent BatchRunner::extent(std::span<const RunRows> rows, std::int64_t tokens,
                                        std::int64_t samples) const {
  Extent e{tokens, static_cast<std::int64_t>(rows.size()), 1, 1, samples};
  for (std::size_t i = 0; i < rows.size(); ++i) {
    e.blocks = std::max(e.blocks, static_cast<std::int64_t>(rows[i].rows.sequence->blocks.size()));
    if (i > 0 && rows[i].slot != rows[i - 1].slot) ++e.segments;
  }
  if (limits_.token_buckets.empty()) return e;
  e.tokens = *std::lower_bound(limits_.token_buckets.begin(), limits_.token_buckets.end(), tokens);
  e.sequences = std::min(e.tokens, limits_.sequences_max);
  e.samples = samples > 0 ? e.sequences : 0;
  // A long prompt by itself is worth products that know of its one adapter; a recorded step serves
  // any. How low-rank parts are made depends on how many there may be, so few is a bound too.
  if (e.segments > 1 || e.tokens < kOneAdapterTokens)
    e.segments =
        e.segments < kFewSegments ? std::min(kFewSegments, limits_.slots + 2) : limits_.slots + 2;
  const std::int64_t blocks_max =
      (limits_.context_max + limits_.block_size - 1) / limits_.block_size;
  e.blocks = std::min(
      blocks_max, static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(e.blocks))));
  return e;
}

bool BatchRunner::replays(const Extent& e) const {
  return !limits_.token_buckets.empty() && e.tokens <= kReplayTokensMax &&
         !sample_args_.history_offsets.defined() &&
         (ranks_ == nullptr || (ranks_->pp.size() == 1 && context_.comm.records()));
}

std::uint64_t BatchRunner::replay_key(const Extent& e) const {
  // Its tensors are nobody else's; mixed first, or 1 with 24 tokens would be 17 with 8.
  std::uint64_t key = mix64(runner_);
  for (const std::int64_t part :
       {e.tokens, e.sequences, e.segments, e.blocks, e.samples, batch_.adapters.rank_max,
        paged_.kv_len_max, sample_args_.top_logprobs, context_.activations.mark(),
        context_.exec.workspace.mark()})
    key = mix64(key ^ static_cast<std::uint64_t>(part));
  return key;
}

void BatchRunner::stage_rows(std::span<const RunRows> rows, const Extent& e,
                             std::int64_t rank_max) {
  inputs_.clear();
  const auto ids = inputs_.take<std::int32_t>(Shape{e.tokens}, batch_.ids);
  const auto positions = inputs_.take<std::int32_t>(Shape{e.tokens}, batch_.positions);
  const auto slots = inputs_.take<std::int32_t>(Shape{e.tokens}, paged_.cache_slots);
  const auto offsets = inputs_.take<std::int32_t>(Shape{e.sequences + 1}, paged_.q_offsets);
  const auto lens = inputs_.take<std::int32_t>(Shape{e.sequences}, paged_.kv_lens);
  const auto tables = inputs_.take<std::int32_t>(Shape{e.sequences, e.blocks}, paged_.block_tables);
  std::size_t t = 0, s = 0;
  paged_.kv_len_max = 0;
  for (const RunRows& run : rows) {
    const Sequence& sequence = *run.rows.sequence;
    offsets[s] = i32(static_cast<std::int64_t>(t));
    for (std::int64_t p = run.rows.begin; p < run.rows.begin + run.rows.count; ++p, ++t) {
      ids[t] = sequence.tokens[static_cast<std::size_t>(p)];
      positions[t] = i32(p);
      const std::int32_t block = sequence.blocks[static_cast<std::size_t>(p / limits_.block_size)];
      slots[t] = i32(block * limits_.block_size + p % limits_.block_size);
    }
    const std::int64_t len = run.rows.begin + run.rows.count;
    lens[s] = i32(len);
    paged_.kv_len_max = std::max(paged_.kv_len_max, len);
    const auto table =
        tables.subspan(s * static_cast<std::size_t>(e.blocks), static_cast<std::size_t>(e.blocks));
    std::fill(std::copy(sequence.blocks.begin(), sequence.blocks.end(), table.begin()), table.end(),
              0);
    ++s;
  }
  // With buckets a bound, so that few differ.
  if (!limits_.token_buckets.empty()) paged_.kv_len_max = e.blocks * limits_.block_size;
  std::fill(ids.begin() + static_cast<std::ptrdiff_t>(t), ids.end(), 0);
  std::fill(positions.begin() + static_cast<std::ptrdiff_t>(t), positions.end(), 0);
  std::fill(slots.begin() + static_cast<std::ptrdiff_t>(t), slots.end(), -1);
  std::fill(offsets.begin() + static_cast<std::ptrdiff_t>(s), offsets.end(),
            i32(static_cast<std::int64_t>(t)));
  std::fill(lens.begin() + static_cast<std::ptrdiff_t>(s), lens.end(), 0);
  std::fill(tables.begin() + static_cast<std::ptrdiff_t>(s) * e.blocks, tables.end(), 0);
  stage_segments(rows, e, rank_max);
}

void BatchRunner::stage_segments(std::span<const RunRows> rows, const Extent& e,
                                 std::int64_t rank_max) {
  kernels::AdapterRows& adapters = batch_.adapters;
  adapters.segments_max = e.segments;
  adapters.rank_max = rank_max;
  const auto offsets = inputs_.take<std::int32_t>(Shape{e.segments + 1}, adapters.segment_offsets);
  const auto slots = inputs_.take<std::int32_t>(Shape{e.segments}, adapters.segment_slots);
  std::fill(offsets.begin(), offsets.end(), i32(e.tokens));
  std::fill(slots.begin(), slots.end(), -1);
  std::int64_t t = 0;
  std::size_t segment = 0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (i == 0 || rows[i].slot != rows[i - 1].slot) {
      offsets[segment] = i32(t);
      slots[segment++] = rows[i].slot;
    }
    t += rows[i].rows.count;
  }
  if (t < e.tokens && segment < slots.size()) offsets[segment] = i32(t);  // inert rows: no adapter
}

void BatchRunner::stage_sampling(std::span<const RunRows> rows, const Extent& e) {
  kernels::SampleArgs& a = sample_args_;
  a = {};
  const Shape shape{e.samples};
  const auto index = inputs_.take<std::int32_t>(shape, sample_index_);
  const auto temperature = inputs_.take<float>(shape, a.temperature);
  const auto top_k = inputs_.take<std::int32_t>(shape, a.top_k);
  const auto top_p = inputs_.take<float>(shape, a.top_p);
  const auto min_p = inputs_.take<float>(shape, a.min_p);
  const auto seed = inputs_.take<std::int64_t>(shape, a.seed);
  const auto position = inputs_.take<std::int64_t>(shape, a.position);
  for (std::size_t i = 0; i < index.size(); ++i) {  // greedy, where nobody samples
    index[i] = top_k[i] = 0;
    temperature[i] = min_p[i] = 0.0f;
    top_p[i] = 1.0f;
    seed[i] = position[i] = 0;
  }
  std::size_t r = 0;
  std::int64_t t = 0;
  bool penalized = false;
  for (const RunRows& run : rows) {
    t += run.rows.count;
    if (!run.rows.sample) continue;
    const SamplingParams& p = *run.sampling;
    index[r] = i32(t - 1);
    temperature[r] = p.temperature;
    top_k[r] = i32(p.top_k);
    top_p[r] = p.top_p;
    min_p[r] = p.min_p;
    seed[r] = static_cast<std::int64_t>(run.seed);
    position[r++] = run.rows.begin + run.rows.count;
    penalized |= run.rows.sequence->penalized;
    a.top_logprobs = std::max(a.top_logprobs, p.logprobs.value_or(0));
  }
  if (penalized) stage_history(rows, e);
}

void BatchRunner::stage_history(std::span<const RunRows> rows, const Extent& e) {
  kernels::SampleArgs& a = sample_args_;
  const Shape shape{e.samples};
  const auto repetition = inputs_.take<float>(shape, a.repetition_penalty);
  const auto presence = inputs_.take<float>(shape, a.presence_penalty);
  const auto frequency = inputs_.take<float>(shape, a.frequency_penalty);
  const auto offsets = inputs_.take<std::int32_t>(Shape{e.samples + 1}, a.history_offsets);
  std::int64_t total = 0;
  for (const RunRows& run : rows)
    if (run.rows.sample && run.rows.sequence->penalized) total += run.rows.sequence->history.size();
  const auto ids = inputs_.take<std::int32_t>(Shape{total}, a.history_ids);
  const auto prompt = inputs_.take<std::int32_t>(Shape{total}, a.history_prompt_counts);
  const auto output = inputs_.take<std::int32_t>(Shape{total}, a.history_output_counts);
  std::fill(repetition.begin(), repetition.end(), 1.0f);
  std::fill(presence.begin(), presence.end(), 0.0f);
  std::fill(frequency.begin(), frequency.end(), 0.0f);
  std::size_t r = 0;
  std::ptrdiff_t at = 0;
  for (const RunRows& run : rows) {
    if (!run.rows.sample) continue;
    offsets[r] = i32(at);
    if (run.rows.sequence->penalized) {
      const PenaltyHistory& h = run.rows.sequence->history;
      repetition[r] = run.sampling->repetition_penalty;
      presence[r] = run.sampling->presence_penalty;
      frequency[r] = run.sampling->frequency_penalty;
      std::copy(h.ids().begin(), h.ids().end(), ids.begin() + at);
      std::copy(h.prompt_counts().begin(), h.prompt_counts().end(), prompt.begin() + at);
      std::copy(h.output_counts().begin(), h.output_counts().end(), output.begin() + at);
      at += h.size();
    }
    ++r;
  }
  std::fill(offsets.begin() + static_cast<std::ptrdiff_t>(r), offsets.end(), i32(at));
}

void BatchRunner::forward() {
  const ArenaScope scope(context_.activations);
  const Tensor hidden = hidden_.rows(0, batch_.tokens());
  Tensor in;
  if (stage_.first > 0) {
    in = context_.activations.alloc(hidden.shape, hidden.dtype);
    ranks_->pp.exchange(context_.exec, {}, 0, in, ranks_->pp.rank() - 1);
  }
  transformer_.forward(context_, batch_, in, hidden, nullptr, model::Recompute::kNone);
  if (!has_head()) ranks_->pp.exchange(context_.exec, hidden, ranks_->pp.rank() + 1, {}, 0);
}

void BatchRunner::share_outputs() {
  if (ranks_ == nullptr || ranks_->pp.size() == 1) return;
  ranks_->pp.broadcast(context_.exec, outputs_.device(), ranks_->pp.size() - 1);
}

// Few values, few rows, only while min_tokens is not reached: not worth an op of its own.
void BatchRunner::ban(std::span<const RunRows> rows) {
  const float never = -std::numeric_limits<float>::infinity();
  std::int64_t r = 0;
  for (const RunRows& run : rows) {
    if (!run.rows.sample) continue;
    for (const std::int32_t id : run.banned) {
      const Tensor logit = logits_.rows(r, 1).reshaped(Shape{logits_.dim(1)}).rows(id, 1);
      context_.ops.upload(context_.exec, std::as_bytes(std::span(&never, 1)), logit);
    }
    ++r;
  }
}

// Apart from the op: a replayed step does not come by, and scoring leaves another layout behind.
void BatchRunner::stage_outputs(const Extent& e) {
  kernels::SampleArgs& a = sample_args_;
  a.logits = logits_.rows(0, e.samples);
  outputs_.clear();
  sampled_ids_ = outputs_.take<std::int32_t>(Shape{e.samples}, a.ids);
  sampled_logprobs_ = outputs_.take<float>(Shape{e.samples}, a.logprob);
  top_ids_ = outputs_.take<std::int32_t>(Shape{e.samples, a.top_logprobs}, a.top_ids);
  top_logprobs_ = outputs_.take<float>(Shape{e.samples, a.top_logprobs}, a.top_logprob);
}

void BatchRunner::sample() {
  if (has_head()) context_.ops.sample(context_.exec, sample_args_);
  share_outputs();
}

void BatchRunner::download_samples(std::int64_t real, RunResult& result) {
  outputs_.download(context_.ops, context_.exec);
  const std::int64_t n = sample_args_.top_logprobs;
  result.ids.assign(sampled_ids_.begin(), sampled_ids_.begin() + real);
  result.logprobs.assign(sampled_logprobs_.begin(), sampled_logprobs_.begin() + real);
  result.top_count = n;
  result.top_ids.assign(top_ids_.begin(), top_ids_.begin() + real * n);
  result.top_logprobs.assign(top_logprobs_.begin(), top_logprobs_.begin() + real * n);
}

void BatchRunner::forward_and_sample(const Extent& e, std::span<const RunRows> banned) {
  forward();
  if (has_head()) {
    const Tensor gathered = gathered_.rows(0, e.samples);
    context_.ops.gather_rows(context_.exec, {hidden_.rows(0, e.tokens), sample_index_, gathered});
    transformer_.logits(context_, gathered, logits_.rows(0, e.samples));
    ban(banned);
  }
  sample();
}

// As many rows at once as there are logits rows; after the sampler is done with them.
void BatchRunner::score(std::span<const RunRows> rows, RunResult& result) {
  std::vector<std::int32_t> index, targets;
  std::int64_t t = 0;
  for (const RunRows& run : rows) {
    const ScoredRows scored = scored_rows(run);
    for (std::int64_t p = scored.first; p < scored.first + scored.count; ++p) {
      index.push_back(i32(t + p - run.rows.begin));
      targets.push_back(run.rows.sequence->tokens[static_cast<std::size_t>(p + 1)]);
    }
    t += run.rows.count;
  }
  const auto total = static_cast<std::int64_t>(index.size());
  for (std::int64_t at = 0; at < total; at += limits_.sequences_max) {
    const std::int64_t count = std::min(limits_.sequences_max, total - at);
    Tensor index_view, target_view, logprob_view;
    inputs_.clear();
    const auto index_part = inputs_.take<std::int32_t>(Shape{count}, index_view);
    const auto target_part = inputs_.take<std::int32_t>(Shape{count}, target_view);
    std::copy_n(index.begin() + at, count, index_part.begin());
    std::copy_n(targets.begin() + at, count, target_part.begin());
    inputs_.upload(context_.ops, context_.exec);
    outputs_.clear();
    const auto logprobs = outputs_.take<float>(Shape{count}, logprob_view);
    if (has_head()) {
      context_.ops.gather_rows(context_.exec, {hidden_, index_view, gathered_.rows(0, count)});
      transformer_.logits(context_, gathered_.rows(0, count), logits_.rows(0, count));
      context_.ops.logprob(context_.exec, {logits_.rows(0, count), target_view, logprob_view});
    }
    share_outputs();
    outputs_.download(context_.ops, context_.exec);
    result.scores.insert(result.scores.end(), logprobs.begin(), logprobs.end());
  }
}

void BatchRunner::start(std::span<const RunRows> rows, std::int64_t rank_max) {
  std::int64_t tokens = 0, samples = 0;
  bool banned = false;
  for (const RunRows& run : rows) {
    tokens += run.rows.count;
    samples += run.rows.sample ? 1 : 0;
    banned |= run.rows.sample && !run.banned.empty();
  }
  const Extent e = extent(rows, tokens, samples);
  stage_rows(rows, e, rank_max);
  stage_sampling(rows, e);
  stage_outputs(e);
  inputs_.upload(context_.ops, context_.exec);
  if (samples == 0) {
    forward();
  } else if (banned) {
    forward_and_sample(e, rows);
  } else if (replays(e)) {
    context_.comm.issue_recorded(context_.exec, [&] {
      context_.ops.replay(context_.exec, replay_key(e), [&] { forward_and_sample(e); });
    });
  } else {
    forward_and_sample(e);
  }
  started_ = context_.ops.mark(context_.exec);
}

void BatchRunner::finish(std::span<const RunRows> rows, RunResult& result) {
  std::int64_t samples = 0;
  bool scored = false;
  for (const RunRows& run : rows) {
    samples += run.rows.sample ? 1 : 0;
    scored |= run.score_from >= 0;
  }
  result.ids.clear();
  result.scores.clear();
  result.top_count = 0;
  if (samples > 0) download_samples(samples, result);
  if (scored) score(rows, result);
}

void BatchRunner::run_worst_case() {
  // A device that records steps loads a kernel when it is first called, and prompts without an
  // adapter, and with one alone, take others.
  if (!limits_.token_buckets.empty())
    for (const std::int64_t rank_max : {std::int64_t{0}, limits_.rank_max}) run_inert(1, rank_max);
  const Extent e = run_inert(limits_.slots + 2, limits_.rank_max);
  Tensor ids, logprob;
  inputs_.clear();
  outputs_.clear();
  const auto targets = inputs_.take<std::int32_t>(Shape{e.samples}, ids);
  std::fill(targets.begin(), targets.end(), 0);
  outputs_.take<float>(Shape{e.samples}, logprob);
  inputs_.upload(context_.ops, context_.exec);
  if (has_head()) context_.ops.logprob(context_.exec, {logits_, ids, logprob});
}

BatchRunner::Extent BatchRunner::run_inert(std::int64_t segments, std::int64_t rank_max) {
  const std::int64_t blocks = (limits_.context_max + limits_.block_size - 1) / limits_.block_size;
  const Extent e{limits_.tokens_max, limits_.sequences_max, segments, blocks,
                 limits_.sequences_max};
  stage_rows({}, e, rank_max);
  paged_.kv_len_max = blocks * limits_.block_size;
  stage_sampling({}, e);
  stage_history({}, e);
  sample_args_.top_logprobs = limits_.top_logprobs_max;
  stage_outputs(e);
  inputs_.upload(context_.ops, context_.exec);
  RunResult result;
  forward_and_sample(e);
  download_samples(e.samples, result);
  return e;
}

}  // namespace tandem::worker::serve
