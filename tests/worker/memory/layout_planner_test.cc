// What `layout: auto` rests on: the dry run counts the work that formulas say, the simulation waits
// as ranks do, and the planner takes the fastest layout that fits.
#include "worker/memory/layout_planner.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/engine_fixture.h"
#include "worker/train/ranks.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace tandem::worker::memory {
namespace {

using comm::CommCall;
using comm::Layout;
using Kind = CommCall::Kind;

/// Links that cost nothing.
CostModel free_links() {
  CostModel model;
  const LinkCost link{0.0, 1e30};
  model.all_reduce = model.all_gather = model.reduce_scatter = model.exchange = link;
  model.background_gather = model.background_reduce = link;
  model.product_flops_bf16 = model.product_flops_f32 = model.attention_flops = 1e9;
  model.logits_per_second = model.row_bytes_per_second = model.memory_bytes_per_second = 1e30;
  return model;
}

TraceEvent exchange(double seconds, int to, int from) {
  CommCall call{Kind::kExchange, {0, 1}};
  if (to >= 0) call.sends.push_back({to, 8});
  if (from >= 0) call.receives.push_back({from, 8});
  return {seconds, call};
}

TEST(Simulation, ACollectiveBeginsWhenItsLastRankHasCome) {
  CostModel model = free_links();
  model.all_reduce = {0.25, 4.0};
  const CommCall sum{Kind::kAllReduce, {0, 1}, 8};  // 2 hops of 0.25 s, 8 bytes at 4 a second
  const auto step = simulate({{{1.0, sum}, {1.0, {}}}, {{3.0, sum}, {2.0, {}}}}, model);
  EXPECT_DOUBLE_EQ(step.seconds, 3.0 + 2.5 + 2.0);
  EXPECT_DOUBLE_EQ(step.compute_seconds, (2.0 + 5.0) / 2);
  EXPECT_DOUBLE_EQ(step.collective_seconds, (4.5 + 2.5) / 2);
  EXPECT_DOUBLE_EQ(step.bubble_seconds, 1.0 / 2);  // rank 0 ends a second before rank 1
}

TEST(Simulation, AGatherInTheBackgroundCostsOnlyWhatWorkDoesNotHide) {
  CostModel model = free_links();
  model.background_gather = {0.0, 2.0};
  CommCall start{Kind::kStartGather, {0, 1}, 16}, wait{Kind::kWait, {0, 1}, 16};  // 4 s
  const StepTrace hidden{{1.0, start}, {5.0, wait}, {1.0, {}}};
  EXPECT_DOUBLE_EQ(simulate({hidden, hidden}, model).seconds, 7.0);
  const StepTrace shown{{1.0, start}, {1.0, wait}, {1.0, {}}};
  EXPECT_DOUBLE_EQ(simulate({shown, shown}, model).seconds, 1.0 + 4.0 + 1.0);
}

TEST(Simulation, AReductionInTheBackgroundStandsBehindTheGathersBefore) {
  CostModel model = free_links();
  model.background_gather = {0.0, 2.0};
  model.background_reduce = {0.0, 4.0};
  CommCall gather{Kind::kStartGather, {0, 1}, 16};         // 4 s
  CommCall reduce{Kind::kStartReduceScatter, {0, 1}, 16};  // 2 s
  CommCall wait{Kind::kWait, {0, 1}, 16};
  reduce.begun = wait.begun = 1;
  const StepTrace trace{{1.0, gather}, {1.0, reduce}, {1.0, wait}, {1.0, {}}};
  EXPECT_DOUBLE_EQ(simulate({trace, trace}, model).seconds, 1.0 + 4.0 + 2.0 + 1.0);
}

TEST(Simulation, WorkIsSlowerOnlyWhileSomethingGoesOnInTheBackground) {
  CostModel model = free_links();
  model.background_gather = {0.0, 2.0};
  model.background_slowdown = 2.0;
  const CommCall start{Kind::kStartGather, {0, 1}, 16}, wait{Kind::kWait, {0, 1}, 16};  // 4 s
  // 1 s before; 4 s beside the gather do 2 s of work, 3 s behind it the rest; 1 s after.
  const StepTrace longer{{1.0, start}, {5.0, wait}, {1.0, {}}};
  EXPECT_DOUBLE_EQ(simulate({longer, longer}, model).seconds, 1.0 + (4.0 + 3.0) + 1.0);
  // 1 s of work takes 2 s, then 2 s of waiting.
  const StepTrace shorter{{1.0, start}, {1.0, wait}, {1.0, {}}};
  EXPECT_DOUBLE_EQ(simulate({shorter, shorter}, model).seconds, 1.0 + 4.0 + 1.0);
}

TEST(Simulation, TwoStagesWaitForEachOthersMessages) {
  // Stage 0: forward 1 s, send, wait for the gradient, backward 2 s; stage 1: 3 s both ways.
  const StepTrace first{exchange(1.0, 1, -1), exchange(0.0, -1, 1), {2.0, {}}};
  const StepTrace second{exchange(0.0, -1, 0), exchange(3.0, 0, -1), {0.0, {}}};
  const auto step = simulate({first, second}, free_links());
  EXPECT_DOUBLE_EQ(step.seconds, 1.0 + 3.0 + 2.0);
  EXPECT_DOUBLE_EQ(step.bubble_seconds, (3.0 + 1.0 + 2.0) / 2);
}

protocol::TrainSettings settings_of(std::int64_t micro_batches) {
  protocol::TrainSettings settings;
  settings.gradient_accumulation_steps = micro_batches;
  settings.lora_r = 4;
  return settings;
}

constexpr train::BatchBounds kBounds{64, 2, 32};

std::vector<StepTrace> traces(const model::ModelConfig& config,
                              const protocol::TrainSettings& settings, const CostModel& costs) {
  std::vector<StepTrace> ranks;
  const Layout layout = train::layout_of(settings);
  for (int rank = 0; rank < layout.ranks(); ++rank) {
    auto step = trace_training(kernels::cpu_profile({1, 0}), config, DType::kF32, settings, kBounds,
                               {1, false, false, layout, rank}, costs);
    EXPECT_TRUE(step.ok()) << step.status().to_string();
    ranks.push_back(std::move(step->trace));
  }
  return ranks;
}

TEST(StepTrace, CountsTheProductsOfAStep) {
  const auto config = test::tiny_config();
  CostModel costs = free_links();
  costs.product_flops_f32 = 1.0;  // seconds are operations
  costs.attention_flops = 1e30;
  const auto settings = settings_of(3);
  const std::vector<StepTrace> ranks = traces(config, settings, costs);
  double counted = 0.0;
  for (const TraceEvent& event : ranks[0]) counted += event.seconds;
  // Base: forward and input gradient of every matrix, head included. Adapters: forward, and dy B,
  // dB, dA and the input's share in backward.
  double weights = static_cast<double>(config.vocab * config.width), lora = 0.0;
  for (int s = 0; s < model::kSiteCount; ++s) {
    const auto shape = model::site_shape(config, model::Site{s});
    weights += static_cast<double>(config.layers * shape.n * shape.i);
    lora += static_cast<double>(config.layers * settings.lora_r * (shape.n + shape.i));
  }
  // Nobody wants the gradient of the first block's input: its q, k and v give none.
  double unwanted = 0.0;
  for (const model::Site site : {model::Site::kQ, model::Site::kK, model::Site::kV}) {
    const auto shape = model::site_shape(config, site);
    unwanted += 2.0 * static_cast<double>((shape.n + settings.lora_r) * shape.i);
  }
  const double tokens = 3.0 * 64.0;
  EXPECT_NEAR(counted / (tokens * (4.0 * weights + 6.0 * lora - unwanted)), 1.0, 1e-9);
}

TEST(StepTrace, EveryLayoutsCallsMatchAndShareTheWork) {
  auto config = test::tiny_config();
  config.layers = 4;
  const CostModel model = free_links();
  const auto one = settings_of(4);
  const double alone = simulate(traces(config, one, model), model).seconds;
  for (const Layout& layout : possible_layouts(config, one, 4)) {
    const auto ranks = traces(config, with_layout(one, layout), model);
    const auto step = simulate(ranks, model);
    std::vector<StepTrace> stages;
    std::vector<int> trace_of;
    for (int rank = 0; rank < layout.ranks(); ++rank) trace_of.push_back(layout.pp_rank(rank));
    for (int stage = 0; stage < layout.pp; ++stage)
      stages.push_back(ranks[static_cast<std::size_t>(layout.rank_of(0, 0, stage))]);
    EXPECT_NEAR(simulate(stages, model, trace_of).seconds / step.seconds, 1.0, 0.02)
        << layout.to_string();
    // Free links: n ranks take a share of the time, and what waits is a bubble.
    EXPECT_GE(step.seconds, 0.99 * alone / layout.ranks()) << layout.to_string();
    EXPECT_LE(step.seconds, 1.01 * alone) << layout.to_string();
    if (layout.pp == 1) {
      EXPECT_NEAR(step.bubble_seconds / step.seconds, 0.0, 0.02) << layout.to_string();
    } else {
      EXPECT_GT(step.bubble_seconds, 0.0) << layout.to_string();
    }
  }
}

TEST(LayoutPlanner, TakesOnlyLayoutsThatModelAndSettingsAllow) {
  const auto config = test::tiny_config();
  const auto layouts = possible_layouts(config, settings_of(3), 4);
  EXPECT_TRUE(std::all_of(layouts.begin(), layouts.end(), [&](const Layout& layout) {
    return config.kv_heads % layout.tp == 0 && layout.pp <= config.layers && 3 % layout.dp == 0;
  }));
  EXPECT_EQ(std::count_if(layouts.begin(), layouts.end(),
                          [](const Layout& layout) { return layout.ranks() == 1; }),
            1);
  EXPECT_TRUE(std::any_of(layouts.begin(), layouts.end(),
                          [](const Layout& layout) { return layout.dp == 3 && layout.zero == 3; }));
}

std::vector<PlannedLayout> planned(const LayoutLimits& limits, const CostModel& model) {
  auto config = test::tiny_config();
  config.layers = 4;
  config.width = 256;  // memory is mapped 2 MiB at a time
  config.mlp_width = 1024;
  config.vocab = 4096;
  auto list = plan_layouts(kernels::cpu_profile({1, 0}), config, DType::kF32, settings_of(4),
                           kBounds, limits, model);
  EXPECT_TRUE(list.ok()) << list.status().to_string();
  return *list;
}

TEST(LayoutPlanner, BytesAreTheRanksOwnWithAndWithoutEvaluation) {
  const auto config = test::tiny_config();
  const auto profile = kernels::cpu_profile({1, 0});
  for (const bool full : {false, true})
    for (const bool evaluates : {false, true}) {
      auto settings = settings_of(4);
      if (full) settings.method = "full";
      const auto list = plan_layouts(profile, config, DType::kF32, settings, kBounds,
                                     {4, std::int64_t{1} << 40}, free_links(), evaluates);
      ASSERT_TRUE(list.ok()) << list.status().to_string();
      for (const PlannedLayout& plan : *list) {
        if (plan.layout.ranks() == 1 && !full) continue;  // it runs in an engine
        const auto ranks = estimate_gang(profile, config, DType::kF32,
                                         with_layout(settings, plan.layout), kBounds, evaluates);
        std::int64_t largest = 0;
        for (const Estimate& rank : *ranks) largest = std::max(largest, rank.peak_total);
        EXPECT_EQ(plan.peak_bytes, largest) << plan.layout.to_string();
      }
    }
}

TEST(LayoutPlanner, UsesAllRanksWhereLinksAreFreeAndOneWhereTheyAreSlow) {
  constexpr std::int64_t kAmple = std::int64_t{1} << 40;
  EXPECT_EQ(planned({4, kAmple}, free_links())[0].layout.ranks(), 4);
  CostModel slow = free_links();
  slow.all_reduce = slow.all_gather = slow.reduce_scatter = slow.exchange = {1.0, 1.0};
  EXPECT_EQ(planned({4, kAmple}, slow)[0].layout.ranks(), 1);
}

TEST(LayoutPlanner, OfEquallyFastLayoutsTakesTheOneThatWaitsLeast) {
  CostModel model = free_links();
  model.memory_bytes_per_second = 3e9;  // the optimizer's share of a step is small, not none
  const auto list = planned({4, std::int64_t{1} << 40}, model);
  const double fastest =
      std::max_element(list.begin(), list.end(), [](const auto& a, const auto& b) {
        return a.tokens_per_second < b.tokens_per_second;
      })->tokens_per_second;
  EXPECT_GE(list[0].tokens_per_second, 0.99 * fastest);
  EXPECT_LT(list[0].tokens_per_second, fastest) << "another is a little faster";
  EXPECT_EQ(list[0].layout.to_string(), (Layout{.dp = 4}).to_string());
}

TEST(LayoutPlanner, PrefersASlowerLayoutThatFits) {
  const auto ample = planned({4, std::int64_t{1} << 40}, free_links());
  const auto smallest = std::min_element(
      ample.begin(), ample.end(),
      [](const PlannedLayout& a, const PlannedLayout& b) { return a.peak_bytes < b.peak_bytes; });
  ASSERT_LT(smallest->peak_bytes, ample[0].peak_bytes);
  const auto tight = planned({4, smallest->peak_bytes}, free_links());
  EXPECT_TRUE(tight[0].fits);
  EXPECT_EQ(tight[0].peak_bytes, smallest->peak_bytes);
  EXPECT_FALSE(tight.back().fits);
  EXPECT_FALSE(planned({4, 1}, free_links())[0].fits);
}

/// Only the rate that is asked about is finite.
double seconds_of(const kernels::OpCost& cost, double CostModel::*rate, double value) {
  CostModel model;
  model.product_flops_bf16 = model.product_flops_f32 = 1e30;
  model.attention_flops = model.logits_per_second = 1e30;
  model.row_bytes_per_second = model.memory_bytes_per_second = 1e30;
  model.*rate = value;
  return model.seconds(cost, DType::kBF16);
}

TEST(CostModel, EveryKindOfWorkHasItsRate) {
  kernels::OpCost cost;
  cost.product_flops = 8.0;
  cost.weight_grad_flops = 0.0;
  cost.low_rank_products = 3.0;
  cost.attention_flops = 12.0;
  cost.logits = 20.0;
  cost.bytes = 28.0;
  cost.row_bytes = 36.0;
  EXPECT_DOUBLE_EQ(seconds_of(cost, &CostModel::product_flops_bf16, 4.0), 2.0);
  EXPECT_NEAR(seconds_of(cost, &CostModel::product_flops_f32, 4.0), 0.0, 1e-9);
  EXPECT_DOUBLE_EQ(seconds_of(cost, &CostModel::low_rank_seconds, 2.0), 6.0);
  EXPECT_DOUBLE_EQ(seconds_of(cost, &CostModel::attention_flops, 4.0), 3.0);
  EXPECT_DOUBLE_EQ(seconds_of(cost, &CostModel::logits_per_second, 4.0), 5.0);
  EXPECT_DOUBLE_EQ(seconds_of(cost, &CostModel::memory_bytes_per_second, 4.0), 7.0);
  EXPECT_DOUBLE_EQ(seconds_of(cost, &CostModel::row_bytes_per_second, 4.0), 9.0);
  EXPECT_DOUBLE_EQ(seconds_of(cost, &CostModel::op_seconds, 4.0), 4.0);

  CostModel model;  // rates of 1
  model.memory_bytes_per_second = model.row_bytes_per_second = 1e30;
  model.weight_grad_share = 0.5;
  model.low_rank_share = 0.25;
  kernels::OpCost shares;
  shares.product_flops = 1.0;
  shares.weight_grad_flops = 2.0;
  shares.low_rank_flops = 3.0;
  EXPECT_DOUBLE_EQ(model.seconds(shares, DType::kBF16), 1.0 + 4.0 + 12.0);
}

TEST(CostModel, SumsIn16BitsAndInTheBackgroundHaveTheirRates) {
  CostModel model = free_links();
  model.all_reduce = {0.25, 4.0};
  model.background_reduce = {0.5, 2.0};
  model.sum_16_bit_slowdown = 3.0;
  CommCall sum{Kind::kAllReduce, {0, 1}, 8};
  EXPECT_DOUBLE_EQ(model.seconds(sum), 0.5 + 2.0);
  sum.dtype = DType::kBF16;
  EXPECT_DOUBLE_EQ(model.seconds(sum), 0.5 + 6.0);
  sum.kind = Kind::kStartReduceScatter;
  EXPECT_DOUBLE_EQ(model.seconds(sum), 0.5 + 6.0);
}

TEST(CostModel, ReadsWhatItWroteAndNamesWhatIsMissing) {
  const CostModel model = default_cost_model(kernels::cpu_profile({2, 0}));
  const auto again = CostModel::parse(model.to_json(), "f.json");
  ASSERT_TRUE(again.ok()) << again.status().to_string();
  EXPECT_EQ(again->to_json(), model.to_json());
  const auto missing = CostModel::parse("{\"product_flops_bf16\": 1e12}", "f.json");
  EXPECT_EQ(missing.status().message(), "f.json: the number product_flops_f32 is missing");
  EXPECT_FALSE(CostModel::parse(std::string(400'000, '['), "f.json").ok());
  EXPECT_FALSE(read_cost_model("/nowhere/f.json").ok());
}

}  // namespace
}  // namespace tandem::worker::memory
