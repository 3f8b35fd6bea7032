#include "worker/model/shard.h"

#include "worker/model/base_weights.h"

#include <algorithm>
#include <numeric>

namespace tandem::worker::model {

namespace {

/// The part of `n` that a rank holds: ceil(n / size) each, the last ones less.
TensorSlice cut_rows(std::int64_t n, std::int64_t i, const ModelShard& shard) {
  const std::int64_t part = (n + shard.tp_size - 1) / shard.tp_size;
  const std::int64_t begin = std::min(n, shard.tp_rank * part);
  return {begin, std::min(n, begin + part) - begin, 0, i};
}

TensorSlice cut_columns(std::int64_t n, std::int64_t i, const ModelShard& shard) {
  const TensorSlice cut = cut_rows(i, 1, shard);
  return {0, n, cut.row, cut.rows};
}

}  // namespace

Stage stage_at(std::int64_t layers, int pp_size, int pp_rank) {
  const std::int64_t each = layers / pp_size, more = layers % pp_size;
  const std::int64_t first = pp_rank * each + std::min<std::int64_t>(pp_rank, more);
  return {first, first + each + (pp_rank < more ? 1 : 0)};
}

Status check_shard(const ModelConfig& config, int tp_size, int pp_size) {
  const std::int64_t common = std::gcd(std::gcd(config.heads, config.kv_heads), config.mlp_width);
  if (common % tp_size != 0)
    return refused_error(str("tp ", tp_size, " does not divide the model: ", config.heads,
                             " heads, ", config.kv_heads, " kv heads, mlp width ", config.mlp_width,
                             "; tp can be a divisor of ", common));
  if ((config.vocab + tp_size - 1) / tp_size * (tp_size - 1) >= config.vocab)
    return refused_error(
        str("tp ", tp_size, " leaves a rank without an entry of the vocabulary of ", config.vocab));
  if (pp_size > config.layers)
    return refused_error(
        str("pp ", pp_size, " leaves a stage without a block; the model has ", config.layers));
  return {};
}

ModelConfig local_config(const ModelConfig& config, const ModelShard& shard) {
  ModelConfig local = config;
  local.heads /= shard.tp_size;
  local.kv_heads /= shard.tp_size;
  local.mlp_width /= shard.tp_size;
  local.vocab = vocab_slice(config, shard).rows;
  return local;
}

bool cut_by_outputs(Site site) {
  return site != Site::kO && site != Site::kDown;
}

TensorSlice vocab_slice(const ModelConfig& config, const ModelShard& shard) {
  return cut_rows(config.vocab, config.width, shard);
}

TensorSlice weight_slice(const ModelConfig& config, Site site, const ModelShard& shard) {
  const SiteShape shape = site_shape(config, site);
  return cut_by_outputs(site) ? cut_rows(shape.n, shape.i, shard)
                              : cut_columns(shape.n, shape.i, shard);
}

TensorSlice bias_slice(const ModelConfig& config, Site site, const ModelShard& shard) {
  return cut_rows(site_shape(config, site).n, 1, shard);
}

TensorSlice lora_a_slice(const ModelConfig& config, Site site, std::int64_t rank,
                         const ModelShard& shard) {
  const std::int64_t i = site_shape(config, site).i;
  return cut_by_outputs(site) ? TensorSlice{0, rank, 0, i} : cut_columns(rank, i, shard);
}

TensorSlice lora_b_slice(const ModelConfig& config, Site site, std::int64_t rank,
                         const ModelShard& shard) {
  const std::int64_t n = site_shape(config, site).n;
  return cut_by_outputs(site) ? cut_rows(n, rank, shard) : TensorSlice{0, n, 0, rank};
}

}  // namespace tandem::worker::model
