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

/// Blocks on the stages of a chunk, or (without `blocks`) a sum of such.
struct Fill {
  bool possible = false;
  std::int64_t largest = 0;  ///< cost of the largest stage
  double squares = 0.0;      ///< of all stages' costs
  std::vector<std::int64_t> blocks{};

  Fill operator+(const Fill& b) const {
    return {possible && b.possible, largest + b.largest, squares + b.squares};
  }
  bool operator<(const Fill& b) const {
    if (!possible || !b.possible) return possible && !b.possible;
    return largest != b.largest ? largest < b.largest : squares < b.squares;
  }
};

/// For 0 to `blocks_max` blocks, the fill of least largest cost and least squares: blocks cost the
/// same, so each further one goes to the stage that costs least.
std::vector<Fill> fill_stages(std::vector<std::int64_t> costs, std::int64_t block,
                              std::size_t blocks_max) {
  std::vector<Fill> fills(blocks_max + 1);
  std::vector<std::int64_t> blocks(costs.size(), 0);
  for (std::size_t n = 1; n <= blocks_max; ++n) {
    const bool first_round = n <= costs.size();
    const std::size_t to = first_round
                               ? n - 1
                               : static_cast<std::size_t>(
                                     std::min_element(costs.begin(), costs.end()) - costs.begin());
    costs[to] += block;
    ++blocks[to];
    if (n < costs.size()) continue;
    Fill& fill = fills[n];
    fill.possible = true;
    fill.blocks = blocks;
    for (const std::int64_t c : costs) {
      fill.largest = std::max(fill.largest, c);
      fill.squares += static_cast<double>(c) * static_cast<double>(c);
    }
  }
  return fills;
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

std::vector<Stage> cut_stages(std::int64_t layers, int ranks, int chunks, const PartCosts& costs) {
  const auto stages = static_cast<std::size_t>(ranks), turns = static_cast<std::size_t>(chunks);
  TANDEM_CHECK(ranks >= 1 && chunks >= 1 && layers >= std::int64_t{ranks} * chunks, layers,
               " blocks in ", ranks, " x ", chunks, " stages");
  const std::size_t all = static_cast<std::size_t>(layers);
  // fills[c][n]: chunk c of n blocks; best[c][n]: the first c chunks of n blocks, the last of which
  // has last[c][n] of them.
  std::vector<std::vector<Fill>> fills, best(turns + 1, std::vector<Fill>(all + 1));
  std::vector<std::vector<std::size_t>> last(turns + 1, std::vector<std::size_t>(all + 1));
  for (std::size_t c = 0; c < turns; ++c) {
    std::vector<std::int64_t> begin(stages, 0);
    if (c == 0) begin.front() += costs.embedding;
    if (c + 1 == turns) begin.back() += costs.head;
    fills.push_back(fill_stages(begin, costs.block, all));
  }
  best[0][0].possible = true;
  for (std::size_t c = 0; c < turns; ++c)
    for (std::size_t n = 0; n <= all; ++n)
      for (std::size_t k = n + 1; k-- > 0;) {  // the smallest last chunk wins among equals
        const Fill sum = best[c][n - k] + fills[c][k];
        if (!sum.possible || best[c + 1][n] < sum) continue;
        best[c + 1][n] = sum;
        last[c + 1][n] = k;
      }
  std::vector<Stage> cut(stages * turns);
  std::int64_t end = layers;
  for (std::size_t c = turns; c-- > 0;) {
    const Fill& fill = fills[c][last[c + 1][static_cast<std::size_t>(end)]];
    for (std::size_t s = stages; s-- > 0;) {
      cut[c * stages + s] = {end - fill.blocks[s], end};
      end -= fill.blocks[s];
    }
  }
  return cut;
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
