// The estimator's promise for every rank of every layout: the dry run's peaks are those of the real
// ledger, byte for byte.
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/rank_job.h"
#include "worker/memory/layout_planner.h"

#include <gtest/gtest.h>

namespace tandem::test {
namespace {

using worker::memory::Estimate;
using worker::memory::estimate_training;

TEST(EstimatorOfRanks, IsTheLedgerOfEachRankByteForByte) {
  for (const auto& layout : tested_layouts())
    for (const bool full : {false, true})
      for (const auto& [recompute, qk_norm] :
           {std::pair{"none", false}, {"block", false}, {"none", true}}) {
        RankJob job;
        job.layout = layout;
        job.full = full;
        job.recompute = recompute;
        job.qk_norm = qk_norm;
        job.uniform = true;
        job.steps = 1;
        const auto real = run_as_threads(job);
        for (int rank = 0; rank < layout.ranks(); ++rank) {
          worker::memory::TrainingPlan plan;
          plan.layout = layout;
          plan.rank = rank;
          const auto estimate =
              estimate_training(kernels::cpu_profile({1, 0}), rank_job_model(job), DType::kF32,
                                rank_job_settings(job), rank_job_bounds(job), plan);
          ASSERT_TRUE(estimate.ok()) << estimate.status().to_string();
          const auto& peaks = real[static_cast<std::size_t>(rank)].peak_bytes;
          for (int kind = 0; kind < kernels::kMemoryKindCount; ++kind)
            EXPECT_EQ(estimate->of(kernels::MemoryKind{kind}),
                      peaks[static_cast<std::size_t>(kind)])
                << layout_name(layout) << (full ? " full " : " lora ") << recompute
                << (qk_norm ? " qk_norm" : "") << " rank " << rank << " "
                << kernels::memory_kind_name(kernels::MemoryKind{kind});
          EXPECT_EQ(estimate->peak_total, peaks.back());
        }
      }
}

TEST(EstimatorOfRanks, CountsAnEvaluationWhereThereIsOneAndOnlyThere) {
  for (const worker::comm::Layout& layout :
       {worker::comm::Layout{2, 1, 1, 0}, {1, 2, 1, 0}, {1, 1, 2, 0}, {2, 1, 2, 3}})
    for (const bool full : {false, true}) {
      RankJob job;
      job.layout = layout;
      job.full = full;
      job.uniform = true;
      job.steps = 1;
      for (const bool eval : {false, true}) {
        job.eval = eval;
        const auto real = run_as_threads(job);
        const auto ranks = worker::memory::estimate_gang(
            kernels::cpu_profile({1, 0}), rank_job_model(job), DType::kF32,
            worker::memory::with_layout(rank_job_settings(job), layout), rank_job_bounds(job),
            eval);
        ASSERT_TRUE(ranks.ok()) << ranks.status().to_string();
        for (std::size_t rank = 0; rank < real.size(); ++rank)
          EXPECT_EQ((*ranks)[rank].peak_total, real[rank].peak_bytes.back())
              << layout_name(layout) << (full ? " full " : " lora ") << (eval ? "eval" : "")
              << " rank " << rank;
      }
    }
}

/// A loss without gradients takes more scratch than one with them.
TEST(EstimatorOfRanks, CountsTheEvaluationOfEveryDataParallelRank) {
  RankJob job;
  job.full = job.uniform = true;
  worker::model::ModelConfig config = rank_job_model(job);
  config.width = 96;
  config.heads = 8;
  config.kv_heads = 4;
  config.head_dim = 16;
  config.mlp_width = 200;
  config.vocab = 1009;
  config.context_max = 1024;
  const worker::train::BatchBounds bounds{6993, 9, 777};
  worker::memory::TrainingPlan plan;
  plan.eval = true;
  plan.layout.dp = 2;
  std::vector<std::int64_t> workspace;
  for (plan.rank = 0; plan.rank < 2; ++plan.rank) {
    const auto estimate = estimate_training(kernels::cpu_profile({1, 0}), config, DType::kF32,
                                            rank_job_settings(job), bounds, plan);
    ASSERT_TRUE(estimate.ok()) << estimate.status().to_string();
    workspace.push_back(estimate->of(kernels::MemoryKind::kWorkspace));
  }
  EXPECT_EQ(workspace[0], workspace[1]);
  plan.eval = false;
  plan.rank = 0;
  const auto without = estimate_training(kernels::cpu_profile({1, 0}), config, DType::kF32,
                                         rank_job_settings(job), bounds, plan);
  EXPECT_LT(without->of(kernels::MemoryKind::kWorkspace), workspace[0]);
}

TEST(EstimatorOfRanks, CountsThePublishOfAFullFineTuneOfOneRank) {
  RankJob job;
  job.full = job.uniform = job.publish = true;
  job.steps = 1;
  const auto real = run_as_threads(job);
  worker::memory::TrainingPlan plan;
  plan.publish = true;
  const auto estimate =
      estimate_training(kernels::cpu_profile({1, 0}), rank_job_model(job), DType::kF32,
                        rank_job_settings(job), rank_job_bounds(job), plan);
  ASSERT_TRUE(estimate.ok()) << estimate.status().to_string();
  EXPECT_EQ(estimate->peak_total, real[0].peak_bytes.back());
  // One copy of the weights alone: nothing of the base lies beside it.
  const auto& weights = real[0].peak_bytes[static_cast<std::size_t>(kernels::MemoryKind::kWeights)];
  EXPECT_EQ(estimate->of(kernels::MemoryKind::kWeights), weights);
  RankJob lora = job;
  lora.full = lora.publish = false;
  EXPECT_LT(weights,
            1.1 * static_cast<double>(run_as_threads(lora)[0].peak_bytes[static_cast<std::size_t>(
                      kernels::MemoryKind::kWeights)]));
}

/// Llama-3-8B's sizes.
worker::model::ModelConfig eight_billion() {
  worker::model::ModelConfig config;
  config.family = "llama";
  config.vocab = 128'256;
  config.width = 4096;
  config.layers = 32;
  config.heads = 32;
  config.kv_heads = 8;
  config.head_dim = 128;
  config.mlp_width = 14'336;
  config.context_max = 8192;
  return config;
}

TEST(EstimatorOfRanks, ShardingAnEightBillionModelSavesWhatItShould) {
  protocol::TrainSettings settings;
  settings.method = "full";
  settings.recompute = "block";
  settings.gradient_accumulation_steps = 4;
  const worker::train::BatchBounds bounds{4096, 1, 4096};
  const auto bytes = [&](const worker::comm::Layout& layout, kernels::MemoryKind kind) {
    worker::memory::TrainingPlan plan;
    plan.layout = layout;
    const auto estimate = estimate_training(kernels::cpu_profile({1, 0}), eight_billion(),
                                            DType::kBF16, settings, bounds, plan);
    TANDEM_CHECK(estimate.ok(), estimate.status().to_string());
    return static_cast<double>(estimate->of(kind));
  };
  using kernels::MemoryKind;
  const double parameters = 8.03e9, blocks = parameters - 2.0 * 128'256 * 4096;
  // Master and two moments, f32, over four ranks.
  EXPECT_NEAR(bytes({4, 1, 1, 1}, MemoryKind::kOptimizer), 3 * parameters, 0.01 * 3 * parameters);
  // Gradients: whole; and with ZeRO 2 a quarter, and room for the largest that is reduced: an end.
  EXPECT_NEAR(bytes({4, 1, 1, 1}, MemoryKind::kGradients), 4 * parameters, 0.01 * 4 * parameters);
  const double end = 128'256.0 * 4096, reduced = 4 * parameters / 4 + 4 * end;
  EXPECT_NEAR(bytes({4, 1, 1, 2}, MemoryKind::kGradients), reduced, 0.01 * reduced);
  // Weights with ZeRO 3: the ends; two blocks, and a third as it comes, for CPUs pack them; and
  // twice a rank's part of one.
  const double resident = 2 * (2 * end + 3 * blocks / 32 + 2 * blocks / 32 / 4);
  EXPECT_NEAR(bytes({4, 1, 1, 3}, MemoryKind::kWeights), resident, 0.01 * resident);
}

TEST(EstimatorOfRanks, WhatLiesBesideTheLedgerDependsOnTheDevice) {
  worker::memory::Estimate rank;
  rank.peak_bytes[static_cast<std::size_t>(kernels::MemoryKind::kOptimizer)] = 1000;
  kernels::DeviceProfile gpu;
  gpu.type = kernels::DeviceType::kCuda;
  const auto on_cpu = worker::memory::beside_ledger({}, {1, 2, 2, 0}, rank);
  EXPECT_EQ(on_cpu.total(), 1000) << "a checkpoint is copied where the rank computes";
  const auto on_gpu = worker::memory::beside_ledger(gpu, {1, 2, 2, 0}, rank);
  EXPECT_EQ(on_gpu.checkpoint_copy, 0);
  EXPECT_GT(on_gpu.context, 0);
  const auto two = worker::memory::beside_ledger(gpu, {2, 1, 1, 0}, rank);
  EXPECT_GT(two.nccl, 0);
  EXPECT_EQ(on_gpu.nccl, 3 * two.nccl) << "a communicator each for all, tp and pp";
  EXPECT_EQ(worker::memory::beside_ledger(gpu, {}, rank).nccl, 0) << "a gang of one has none";
}

TEST(EstimatorOfRanks, SequenceParallelismCutsWhatLiesBetweenBlocks) {
  protocol::TrainSettings settings;
  settings.recompute = "block";
  const worker::train::BatchBounds bounds{4096, 1, 4096};
  const auto activations = [&](bool sequence_parallel) {
    worker::memory::TrainingPlan plan;
    plan.layout.tp = 4;
    plan.layout.sequence_parallel = sequence_parallel;
    const auto estimate = estimate_training(kernels::cpu_profile({1, 0}), eight_billion(),
                                            DType::kBF16, settings, bounds, plan);
    TANDEM_CHECK(estimate.ok(), estimate.status().to_string());
    return estimate->of(kernels::MemoryKind::kActivations);
  };
  const std::int64_t streams = 32 * std::int64_t{4096} * 4096 * 2;
  EXPECT_GE(activations(false) - activations(true), streams * 3 / 4);
}

}  // namespace
}  // namespace tandem::test
