#include "worker/model/shard.h"

#include "worker/model/base_weights.h"

#include <algorithm>
#include <limits>
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

Stage ModelShard::stage_of(const ModelConfig& config) const {
  const std::vector<Stage> all = stages_of(config);
  TANDEM_CHECK_EQ(all.size(), std::size_t{1}, "virtual stages");
  return all.front();
}

std::vector<std::int64_t> ModelShard::blocks(const ModelConfig& config) const {
  std::vector<std::int64_t> numbers;
  for (const Stage& stage : stages_of(config))
    for (std::int64_t layer = stage.first; layer < stage.last; ++layer) numbers.push_back(layer);
  return numbers;
}

Stage stage_at(std::int64_t layers, int pp_size, int pp_rank) {
  const std::int64_t each = layers / pp_size, more = layers % pp_size;
  const std::int64_t first = pp_rank * each + std::min<std::int64_t>(pp_rank, more);
  return {first, first + each + (pp_rank < more ? 1 : 0)};
}

PartCosts compute_costs(const ModelConfig& config) {
  PartCosts costs{0, 0, config.vocab * config.width};
  for (int s = 0; s < kSiteCount; ++s) {
    const SiteShape shape = site_shape(config, Site{s});
    costs.block += shape.n * shape.i;
  }
  return costs;
}

PartCosts parameter_costs(const ModelConfig& config) {
  PartCosts costs = compute_costs(config);
  costs.embedding = costs.head;
  return costs;
}

std::vector<Stage> cut_stages(std::int64_t layers, int count, const PartCosts& costs) {
  TANDEM_CHECK(count >= 1 && count <= layers, layers, " blocks in ", count, " stages");
  const auto cost = [&](std::int64_t first, std::int64_t last) {
    return (last - first) * costs.block + (first == 0 ? costs.embedding : 0) +
           (last == layers ? costs.head : 0);
  };
  // best[s][n]: of the first n blocks in s stages, by (largest cost, where `limit` allows it the
  // sum of squares); from[s][n]: where the last of them begins.
  constexpr double kNever = std::numeric_limits<double>::infinity();
  const auto n_max = static_cast<std::size_t>(layers) + 1, s_max = static_cast<std::size_t>(count);
  std::vector<std::vector<std::int64_t>> from(s_max + 1, std::vector<std::int64_t>(n_max, 0));
  const auto solve = [&](double limit) {
    const bool squares = limit < kNever;
    std::vector<double> best(n_max, kNever);
    best[0] = 0.0;
    for (std::size_t s = 1; s <= s_max; ++s) {
      std::vector<double> next(n_max, kNever);
      for (std::size_t n = s; n < n_max; ++n)
        for (std::size_t m = s - 1; m < n; ++m) {
          const auto c =
              static_cast<double>(cost(static_cast<std::int64_t>(m), static_cast<std::int64_t>(n)));
          if (best[m] == kNever || c > limit) continue;
          const double value = squares ? best[m] + c * c : std::max(best[m], c);
          if (value <= next[n]) {
            next[n] = value;
            from[s][n] = static_cast<std::int64_t>(m);
          }
        }
      best = std::move(next);
    }
    return best[n_max - 1];
  };
  solve(solve(kNever));
  std::vector<Stage> stages(s_max);
  std::int64_t last = layers;
  for (std::size_t s = s_max; s > 0; --s) {
    const std::int64_t first = from[s][static_cast<std::size_t>(last)];
    stages[s - 1] = {first, last};
    last = first;
  }
  return stages;
}

Status check_shard(const ModelConfig& config, int tp_size, int pp_size, int virtual_pp) {
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
  if (pp_size * static_cast<std::int64_t>(virtual_pp) > config.layers)
    return refused_error(str("pp ", pp_size, " x virtual_pipeline_size ", virtual_pp,
                             " leave a stage without a block; the model has ", config.layers,
                             ", which allow virtual_pipeline_size ", config.layers / pp_size));
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
