#include "worker/memory/estimator.h"

#include "protocol/base/clock.h"
#include "protocol/base/random.h"
#include "tests/support/engine_fixture.h"
#include "worker/train/train_session.h"

#include <gtest/gtest.h>

#include <fstream>

namespace tandem::worker::memory {
namespace {

/// Large enough that every kind spans several of the pages that the ledger counts.
model::ModelConfig medium_config() {
  model::ModelConfig config;
  config.family = "llama";
  config.vocab = 4096;
  config.width = 256;
  config.layers = 3;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 64;
  config.mlp_width = 640;
  config.context_max = 2048;
  return config;
}

struct Case {
  const char* name;
  DType dtype = DType::kF32;
  std::string recompute = "none";
  std::vector<std::int64_t> lengths{200, 100, 148};  ///< documents of the largest micro-batch
  std::int64_t rank = 8;
  double dropout = 0.0;
  bool eval = false, publish = false;
  std::vector<std::string> targets{"all-linear"};
  bool tied = false, bias = false;
  int threads = 2;
  std::int64_t slots = 2;
};

std::vector<Case> cases() {
  std::vector<Case> all(12);
  all[0] = {.name = "f32"};
  all[1] = {.name = "bf16", .dtype = DType::kBF16};
  all[2] = {.name = "recompute_mlp", .recompute = "mlp"};
  all[3] = {.name = "recompute_block", .dtype = DType::kBF16, .recompute = "block"};
  all[4] = {.name = "dropout", .dropout = 0.1};
  all[5] = {.name = "dropout_bf16", .dtype = DType::kBF16, .dropout = 0.1};
  all[6] = {.name = "one_long_document", .dtype = DType::kBF16, .lengths = {1023}};
  all[7] = {.name = "many_short_documents", .lengths = std::vector<std::int64_t>(90, 7)};
  all[8] = {.name = "large_rank_few_targets",
            .dtype = DType::kBF16,
            .rank = 64,
            .targets = {"q_proj", "v_proj"}};
  all[9] = {
      .name = "evaluated_and_published", .dtype = DType::kBF16, .eval = true, .publish = true};
  all[10] = {.name = "tied_with_bias", .tied = true, .bias = true, .threads = 1};
  all[11] = {.name = "tiny_batch_many_slots", .lengths = {3, 2}, .publish = true, .slots = 40};
  return all;
}

class TrainingEstimate : public testing::TestWithParam<Case> {};

data::MicroBatch random_batch(const std::vector<std::int64_t>& lengths, std::int64_t vocab) {
  Random random(11);
  data::MicroBatch batch;
  batch.cu_seqlens.push_back(0);
  for (std::int64_t length : lengths) {
    for (std::int64_t t = 0; t < length; ++t) {
      batch.tokens.push_back(
          static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(vocab))));
      batch.labels.push_back(t + 1 < length ? static_cast<std::int32_t>(
                                                  random.below(static_cast<std::uint64_t>(vocab)))
                                            : data::kIgnore);
      batch.positions.push_back(static_cast<std::int32_t>(t));
      batch.trained_tokens += t + 1 < length;
    }
    batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
  }
  return batch;
}

protocol::TrainSettings settings_of(const Case& c) {
  protocol::TrainSettings settings;
  settings.lora_r = c.rank;
  settings.lora_dropout = c.dropout;
  settings.target_modules = c.targets;
  settings.recompute = c.recompute;
  return settings;
}

model::ModelConfig config_of(const Case& c) {
  model::ModelConfig config = medium_config();
  config.tied_embedding = c.tied;
  config.qkv_bias = c.bias;
  return config;
}

/// The same job for real: two steps, the smaller micro-batch first.
Estimate run_for_real(const Case& c, train::BatchBounds& bounds) {
  const model::ModelConfig config = config_of(c);
  test::Engine engine(test::make_test_backend(c.threads), config, c.dtype,
                      *model::make_random_source(config, 1), c.slots);
  const data::MicroBatch large = random_batch(c.lengths, config.vocab);
  const data::MicroBatch small = random_batch({2}, config.vocab);
  std::vector<data::OptimizerStep> steps{
      {{small, large}, small.trained_tokens + large.trained_tokens},
      {{large}, large.trained_tokens}};
  std::vector<data::MicroBatch> eval;
  if (c.eval) eval = {small, large};
  auto batches = train::make_fixed_batches(std::move(steps), std::move(eval));
  bounds = batches->bounds();
  train::SessionOptions options;
  options.settings = settings_of(c);
  auto session =
      train::TrainSession::create(engine.session_parts(), options, std::move(batches)).value();
  while (!session->finished()) TANDEM_CHECK(session->run_slice().ok());
  if (c.publish) {
    const auto snapshot = session->snapshot_adapter();
    auto reloaded = model::build_adapter(*engine.backend.ops, engine.exec,
                                         *engine.backend.allocator, *engine.backend.ledger, config,
                                         c.dtype, session->flat_adapter(c.dtype));
    session->probe(std::vector<std::int32_t>(train::kProbeTokens, 1), std::move(reloaded));
  }
  return read_ledger(*engine.backend.ledger);
}

TEST_P(TrainingEstimate, EqualsTheRealLedgerByteForByte) {
  const Case& c = GetParam();
  train::BatchBounds bounds;
  const Estimate real = run_for_real(c, bounds);
  const Estimate dry =
      estimate_training(test::make_test_backend(c.threads).ops->profile(), config_of(c), c.dtype,
                        settings_of(c), bounds, TrainingPlan{c.slots, c.eval, c.publish})
          .value();
  EXPECT_EQ(dry.to_json(), real.to_json());
  EXPECT_GT(real.of(kernels::MemoryKind::kActivations), 0);
  EXPECT_GT(real.of(kernels::MemoryKind::kWorkspace), 0);
}

INSTANTIATE_TEST_SUITE_P(Configurations, TrainingEstimate, testing::ValuesIn(cases()),
                         [](const auto& one) { return std::string(one.param.name); });

TEST(TrainingEstimate, KnownWithoutTheDeviceAndWithoutMemory) {
  // A model of 70 billion weights on a machine that could never hold it.
  model::ModelConfig config;
  config.family = "llama";
  config.vocab = 128256;
  config.width = 8192;
  config.layers = 80;
  config.heads = 64;
  config.kv_heads = 8;
  config.head_dim = 128;
  config.mlp_width = 28672;
  config.context_max = 8192;
  kernels::DeviceProfile profile;
  profile.threads = 64;
  protocol::TrainSettings settings;
  const auto estimate = estimate_training(profile, config, DType::kBF16, settings,
                                          worst_case_bounds(settings), 1, false);
  ASSERT_TRUE(estimate.ok()) << estimate.status().to_string();
  EXPECT_GT(estimate->of(kernels::MemoryKind::kWeights), std::int64_t{140} << 30 >> 1);
  EXPECT_GE(estimate->peak_total, estimate->of(kernels::MemoryKind::kWeights));
}

TEST(TrainingEstimate, RecomputingTakesLess) {
  const auto of = [](const char* recompute) {
    protocol::TrainSettings settings;
    settings.recompute = recompute;
    return estimate_training(kernels::cpu_profile({2, 0}), medium_config(), DType::kBF16, settings,
                             {2048, 4, 512}, 1, false)
        ->of(kernels::MemoryKind::kActivations);
  };
  EXPECT_LT(of("mlp"), of("none"));
  EXPECT_LT(of("block"), of("mlp"));
}

TEST(TrainingEstimate, ImpossibleBoundsAndSettingsAreRefused) {
  protocol::TrainSettings settings;
  const auto estimate = [&](train::BatchBounds bounds) {
    return estimate_training(kernels::cpu_profile({2, 0}), medium_config(), DType::kF32, settings,
                             bounds, 1, false)
        .status();
  };
  EXPECT_EQ(estimate({10, 1, 11}).code(), StatusCode::kInvalid);
  EXPECT_EQ(estimate({0, 1, 0}).code(), StatusCode::kInvalid);
  EXPECT_EQ(estimate({4096, 1, 4096}).code(), StatusCode::kInvalid);  // over the context
  settings.target_modules = {"nothing"};
  EXPECT_EQ(estimate({10, 1, 10}).code(), StatusCode::kInvalid);
}

TEST(ServingEstimate, EqualsTheRealLedgerByteForByte) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    serve::ServeOptions options;
    options.kv_bytes_max = 8 << 20;
    options.max_batch_tokens = 200;
    options.max_running = 8;
    const model::ModelConfig config = medium_config();
    test::Engine engine(test::make_test_backend(2), config, dtype,
                        *model::make_random_source(config, 1), 4);
    const ManualClock clock;
    auto serving = serve::ServeEngine::create(
                       {*engine.backend.allocator, *engine.backend.ledger, engine.context,
                        *engine.weights, &engine.adapters, 0, 4, std::nullopt, clock},
                       options)
                       .value();
    serving->reserve_worst_case();
    const Estimate dry =
        estimate_serving(engine.backend.ops->profile(), config, dtype, options, 4).value();
    EXPECT_EQ(dry.to_json(), read_ledger(*engine.backend.ledger).to_json());
    EXPECT_GT(dry.of(kernels::MemoryKind::kKv), 0);
  }
}

}  // namespace
}  // namespace tandem::worker::memory
