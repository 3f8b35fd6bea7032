#include "worker/serve/serve_options.h"

#include <algorithm>
#include <limits>

namespace tandem::worker::serve {

namespace {

/// Fewer blocks than this serve nobody.
constexpr std::int64_t kBlocksMin = 2;

std::int64_t context_max(const model::ModelConfig& config, const ServeOptions& options) {
  return options.context_max > 0 ? options.context_max : config.context_max;
}

Status check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return {};
  return invalid_error(str(name, " must be between ", low, " and ", high, ", got ", value));
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

}  // namespace

model::Stage stage_of(const ServeParts& parts) {
  const model::BaseWeights& base = parts.weights.base();
  return base.shard().stage_of(base.whole_config());
}

Status check_options(const ServeParts& parts, const ServeOptions& o) {
  const model::ModelConfig& config = parts.weights.base().whole_config();
  if (o.block_size != 16 && o.block_size != 32)
    return invalid_error(str("block_size must be 16 or 32, got ", o.block_size));
  constexpr std::int64_t kCountMax = 1 << 20;
  TANDEM_RETURN_IF_ERROR(check_range("max_running", o.max_running, 1, kCountMax));
  TANDEM_RETURN_IF_ERROR(
      check_range("max_batch_tokens", o.max_batch_tokens, o.max_running + 1, kCountMax));
  TANDEM_RETURN_IF_ERROR(check_range("prefill_chunk_max", o.prefill_chunk_max, 0, kCountMax));
  TANDEM_RETURN_IF_ERROR(check_range("max_waiting", o.max_waiting, 1, kCountMax));
  TANDEM_RETURN_IF_ERROR(check_range("context_max", o.context_max, 0, config.context_max));
  TANDEM_RETURN_IF_ERROR(check_range("adapter_rank_max", o.adapter_rank_max, 1, kCountMax));
  TANDEM_RETURN_IF_ERROR(check_range("adapters_max", o.adapters_max, 1, kCountMax));
  const std::int64_t table = parts.adapters ? parts.adapters->slots() : 0;
  TANDEM_RETURN_IF_ERROR(check_range("slot_begin", parts.slot_begin, 0, table));
  TANDEM_RETURN_IF_ERROR(check_range("slot_count", parts.slot_count, 0, table - parts.slot_begin));
  if (!std::is_sorted(o.token_buckets.begin(), o.token_buckets.end()) ||
      (!o.token_buckets.empty() &&
       (o.token_buckets.front() < 1 || o.token_buckets.back() < o.max_batch_tokens)))
    return invalid_error(str("token_buckets must ascend and end at max_batch_tokens (",
                             o.max_batch_tokens, ") or above"));
  return {};
}

Result<ServeOptions> fill_options(const ServeParts& parts, const ServeOptions& options) {
  ServeOptions o = options;
  if (o.token_buckets.empty() && parts.context.ops.profile().records_graphs)
    o.token_buckets = default_token_buckets(o.max_batch_tokens);
  const model::BaseWeights& base = parts.weights.base();
  const DType dtype = parts.context.compute_dtype;
  KvLayout layout = kv_layout(base.config(), dtype, o, stage_of(parts));
  if (parts.ranks != nullptr) {
    // The first stage is the largest: all hold as many blocks as it.
    const model::Stage first = model::stage_at(base.config().layers, parts.ranks->pp.size(), 0);
    layout.blocks = kv_layout(base.config(), dtype, o, first).blocks;
    o.kv_bytes_max = layout.blocks * layout.block_bytes;
  }
  if (layout.blocks < kBlocksMin || layout.blocks > std::numeric_limits<std::int32_t>::max())
    return invalid_error(str("kv_bytes_max of ", o.kv_bytes_max, " B holds ", layout.blocks,
                             " blocks of ", layout.block_bytes, " B; at least ", kBlocksMin,
                             " are needed"));
  return o;
}

/// `config` is the whole model's.
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
  l.vocab = config.vocab;
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

}  // namespace tandem::worker::serve
