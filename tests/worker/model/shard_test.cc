#include "worker/model/shard.h"

#include "protocol/base/random.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

namespace tandem::worker::model {
namespace {

std::int64_t cost(const Stage& stage, std::int64_t layers, const PartCosts& costs) {
  return stage.blocks() * costs.block + (stage.first == 0 ? costs.embedding : 0) +
         (stage.last == layers ? costs.head : 0);
}

struct Worth {
  std::int64_t waited = 0;  ///< sum over chunks of the largest stage
  double squares = 0.0;
};
Worth worth(const std::vector<Stage>& stages, int ranks, std::int64_t layers,
            const PartCosts& costs) {
  Worth w;
  for (std::size_t first = 0; first < stages.size(); first += static_cast<std::size_t>(ranks)) {
    std::int64_t largest = 0;
    for (std::size_t s = first; s < first + static_cast<std::size_t>(ranks); ++s) {
      const std::int64_t c = cost(stages[s], layers, costs);
      largest = std::max(largest, c);
      w.squares += static_cast<double>(c) * static_cast<double>(c);
    }
    w.waited += largest;
  }
  return w;
}

/// The best of every way to cut.
Worth best(std::int64_t layers, int ranks, int chunks, const PartCosts& costs) {
  Worth found{INT64_MAX, 0.0};
  std::vector<Stage> stages;
  const std::function<void(std::int64_t)> go = [&](std::int64_t first) {
    const auto left = ranks * chunks - static_cast<int>(stages.size());
    if (left == 1) {
      stages.push_back({first, layers});
      const Worth w = worth(stages, ranks, layers, costs);
      if (w.waited < found.waited || (w.waited == found.waited && w.squares < found.squares))
        found = w;
      stages.pop_back();
      return;
    }
    for (std::int64_t last = first + 1; last <= layers - left + 1; ++last) {
      stages.push_back({first, last});
      go(last);
      stages.pop_back();
    }
  };
  go(0);
  return found;
}

TEST(CutStages, IsTheBestOfEveryWayToCut) {
  Random random(3);
  for (int trial = 0; trial < 600; ++trial) {
    const auto below = [&](int n) {
      return static_cast<int>(random.below(static_cast<std::uint64_t>(n)));
    };
    const int ranks = 1 + below(4), chunks = ranks == 1 ? 1 : 1 + below(3);
    const std::int64_t layers = ranks * chunks + below(ranks * chunks > 6 ? 4 : 7);
    const PartCosts costs{1 + below(10), below(30), below(60)};
    const std::vector<Stage> stages = cut_stages(layers, ranks, chunks, costs);
    ASSERT_EQ(stages.size(), static_cast<std::size_t>(ranks * chunks));
    std::int64_t at = 0;
    for (const Stage& stage : stages) {
      EXPECT_EQ(stage.first, at);
      EXPECT_GE(stage.blocks(), 1);
      at = stage.last;
    }
    EXPECT_EQ(at, layers);
    const Worth got = worth(stages, ranks, layers, costs),
                want = best(layers, ranks, chunks, costs);
    EXPECT_EQ(got.waited, want.waited) << layers << " blocks in " << ranks << " x " << chunks;
    EXPECT_EQ(got.squares, want.squares) << layers << " blocks in " << ranks << " x " << chunks;
  }
}

TEST(CutStages, OfBlocksAloneIsWhatServingUses) {
  for (std::int64_t layers = 1; layers <= 33; ++layers)
    for (int count = 1; count <= std::min<std::int64_t>(layers, 8); ++count)
      for (int at = 0; at < count; ++at)
        EXPECT_EQ(cut_stages(layers, count, 1, {})[static_cast<std::size_t>(at)],
                  stage_at(layers, count, at));
}

TEST(CutStages, TakesBlocksFromTheStageWithALargeHead) {
  ModelConfig config;  // SmolLM2-135M's sizes: the head costs as much as eight blocks
  config.vocab = 49'152;
  config.width = 576;
  config.layers = 30;
  config.heads = 9;
  config.kv_heads = 3;
  config.head_dim = 64;
  config.mlp_width = 1536;
  const PartCosts costs = compute_costs(config);
  EXPECT_EQ(costs.head, 8 * costs.block);
  EXPECT_EQ(costs.embedding, 0);
  const auto by_compute = cut_stages(30, 2, 1, costs),
             by_memory = cut_stages(30, 2, 1, parameter_costs(config));
  EXPECT_EQ(by_compute[0], (Stage{0, 19}));
  EXPECT_EQ(by_memory[0], (Stage{0, 15}));
  // Of three chunks the last one takes what the head leaves room for.
  EXPECT_EQ(cut_stages(30, 2, 3, costs),
            (std::vector<Stage>{{0, 5}, {5, 10}, {10, 15}, {15, 20}, {20, 29}, {29, 30}}));
}

TEST(ModelShard, OfSeveralStagesHoldsTheBlocksOfAll) {
  ModelConfig config;
  config.layers = 8;
  const ModelShard shard{0, 1, {{0, 2}, {4, 5}}}, tail{0, 1, {{2, 4}, {5, 8}}};
  EXPECT_EQ(shard.blocks(config), (std::vector<std::int64_t>{0, 1, 4}));
  EXPECT_TRUE(shard.embeds(config));
  EXPECT_FALSE(shard.has_head(config));
  EXPECT_FALSE(tail.embeds(config));
  EXPECT_TRUE(tail.has_head(config));
  EXPECT_TRUE(ModelShard{}.is_whole(config));
  EXPECT_FALSE(shard.is_whole(config));
}

TEST(CheckShard, NamesWhatAllowsVirtualStages) {
  ModelConfig config;
  config.vocab = 97;
  config.layers = 10;
  config.heads = config.kv_heads = 4;
  config.mlp_width = 8;
  EXPECT_TRUE(check_shard(config, 1, 4, 2).ok());
  EXPECT_NE(check_shard(config, 1, 4, 3).message().find("virtual_pipeline_size 2"),
            std::string::npos);
}

}  // namespace
}  // namespace tandem::worker::model
