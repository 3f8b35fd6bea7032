#include "worker/memory/estimator.h"

#include "protocol/base/clock.h"
#include "protocol/base/random.h"
#include "tests/support/engine_fixture.h"
#include "tools/bench_training.h"
#include "worker/train/train_session.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>

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
  bool tied = false, bias = false, qk_norm = false;
  int threads = 2;
  std::int64_t slots = 2;
};

/// What the driver counts beside the ledger. On a CPU nothing: resident bytes say little.
class DriverWatch {
 public:
  explicit DriverWatch(const kernels::Backend& backend)
      : in_use_(backend.bytes_in_use), context_(in_use_()) {}
  void look() { most_ = std::max(most_, in_use_()); }
  /// Between the estimate and 1 % or 128 MiB more (code of kernels and libraries that is loaded at
  /// its first use), the larger; the context, which was there before, apart.
  void expect(const std::string& name, std::int64_t estimate) const {
    if (!test::on_gpu()) return;
    constexpr std::int64_t kMiB = std::int64_t{1} << 20;
    const std::int64_t peak = most_ - context_;
    std::cout << "driver: " << name << ": estimate " << estimate / kMiB << " MiB, driver "
              << peak / kMiB << " MiB, context and libraries before it " << context_ / kMiB
              << " MiB\n";
    EXPECT_GE(peak, estimate) << name;
    EXPECT_LE(peak, estimate + std::max(estimate / 100, 128 * kMiB)) << name;
  }

 private:
  std::function<std::int64_t()> in_use_;
  std::int64_t context_, most_ = 0;
};

std::vector<Case> cases() {
  std::vector<Case> all(20);
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
  all[12] = {.name = "elementwise", .recompute = "elementwise"};
  all[13] = {.name = "elementwise_bf16",
             .dtype = DType::kBF16,
             .recompute = "elementwise",
             .lengths = {700, 300}};
  all[14] = {.name = "rank_1", .dtype = DType::kBF16, .rank = 1};
  all[15] = {.name = "rank_128", .dtype = DType::kBF16, .recompute = "elementwise", .rank = 128};
  all[16] = {.name = "sixteen_documents_recomputed",
             .dtype = DType::kBF16,
             .recompute = "block",
             .lengths = std::vector<std::int64_t>(16, 128),
             .publish = true};
  all[17] = {.name = "qk_norm", .qk_norm = true};
  all[18] = {.name = "qk_norm_block", .dtype = DType::kBF16, .recompute = "block", .qk_norm = true};
  all[19] = {.name = "qk_norm_elementwise",
             .dtype = DType::kBF16,
             .recompute = "elementwise",
             .eval = true,
             .publish = true,
             .qk_norm = true};
  if (test::on_gpu()) all.push_back({.name = "f16", .dtype = DType::kF16, .publish = true});
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
  config.qk_norm = c.qk_norm;
  return config;
}

/// The same job for real: two steps, the smaller micro-batch first.
Estimate run_for_real(const Case& c, train::BatchBounds& bounds) {
  const model::ModelConfig config = config_of(c);
  auto backend = test::make_test_backend(c.threads);
  DriverWatch driver(backend);
  test::Engine engine(std::move(backend), config, c.dtype, *model::make_random_source(config, 1),
                      c.slots);
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
  while (!session->finished()) {
    TANDEM_CHECK(session->run_slice().ok());
    driver.look();
  }
  if (c.publish) {
    const auto snapshot = session->snapshot_adapter();
    const auto reloaded = model::build_adapter(*engine.backend.ops, engine.exec,
                                               *engine.backend.allocator, *engine.backend.ledger,
                                               config, c.dtype, session->flat_adapter(c.dtype));
    session->probe(std::vector<std::int32_t>(train::kProbeTokens, 1), reloaded);
    driver.look();
  }
  driver.expect(c.name, engine.backend.ledger->peak_total());
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

/// Training without the base beside it (full), and the shape of a job that is a single batch.
struct WholeCase {
  const char* name;
  tools::TrainingCase training;
  bool tied = false, qk_norm = false;
};

std::vector<WholeCase> whole_cases() {
  const auto of = [](const char* name, const char* dtype, const char* recompute, std::int64_t rows,
                     std::int64_t length, bool tied = false, bool qk_norm = false) {
    tools::TrainingCase c;
    c.method = "full";
    c.dtype = dtype;
    c.recompute = recompute;
    c.rows = rows;
    c.length = length;
    c.steps = 1;
    return WholeCase{name, c, tied, qk_norm};
  };
  return {of("f32", "f32", "none", 3, 100),
          of("bf16", "bf16", "none", 3, 100),
          of("elementwise", "bf16", "elementwise", 4, 128),
          of("mlp", "bf16", "mlp", 2, 300),
          of("block", "bf16", "block", 8, 64),
          of("long", "bf16", "block", 1, 1000),
          of("tied", "bf16", "none", 2, 70, true),
          of("qk_norm", "f32", "none", 3, 100, false, true),
          of("qk_norm_block", "bf16", "block", 3, 200, true, true)};
}

class FullEstimate : public testing::TestWithParam<WholeCase> {};

TEST_P(FullEstimate, EqualsTheRealLedgerAndTheDriversPeak) {
  const WholeCase& c = GetParam();
  model::LoadedModel loaded;
  loaded.config = medium_config();
  loaded.config.tied_embedding = c.tied;
  loaded.config.qk_norm = c.qk_norm;
  loaded.source = model::make_random_source(loaded.config, 1);
  kernels::Backend backend = test::make_test_backend(2);
  DriverWatch driver(backend);
  kernels::Arena workspace(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                           "workspace", test::kEngineArenaBytes);
  kernels::Exec exec{workspace};
  const auto comm =
      comm::make_single_communicator([&](kernels::Exec& e, kernels::Tensor from,
                                         kernels::Tensor to) { backend.ops->copy(e, from, to); });
  const auto rig = tools::TrainingRig::create(backend, exec, *comm, {}, loaded, c.training).value();
  while (!rig->session().finished()) {
    ASSERT_TRUE(rig->session().run_slice().ok());
    driver.look();
  }
  EXPECT_EQ(rig->estimate().to_json(), read_ledger(*backend.ledger).to_json());
  EXPECT_GT(rig->estimate().of(kernels::MemoryKind::kGradients), 0);
  driver.expect(str("full ", c.name), rig->estimate().peak_total);
}

INSTANTIATE_TEST_SUITE_P(Configurations, FullEstimate, testing::ValuesIn(whole_cases()),
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

struct ServingCase {
  const char* name;
  DType dtype;
  std::int64_t kv_bytes, batch_tokens, running, slots;
  bool qk_norm = false;
};

class ServingEstimate : public testing::TestWithParam<ServingCase> {};

TEST_P(ServingEstimate, EqualsTheRealLedgerByteForByte) {
  const ServingCase& c = GetParam();
  serve::ServeOptions options;
  options.kv_bytes_max = c.kv_bytes;
  options.max_batch_tokens = c.batch_tokens;
  options.max_running = c.running;
  model::ModelConfig config = medium_config();
  config.qk_norm = c.qk_norm;
  auto backend = test::make_test_backend(2);
  DriverWatch driver(backend);
  test::Engine engine(std::move(backend), config, c.dtype, *model::make_random_source(config, 1),
                      c.slots);
  const ManualClock clock;
  auto serving = serve::ServeEngine::create(
                     {*engine.backend.allocator, *engine.backend.ledger, engine.context,
                      *engine.weights, &engine.adapters, 0, c.slots, std::nullopt, clock},
                     options)
                     .value();
  serving->reserve_worst_case();
  driver.look();
  const Estimate dry =
      estimate_serving(engine.backend.ops->profile(), config, c.dtype, options, c.slots).value();
  EXPECT_EQ(dry.to_json(), read_ledger(*engine.backend.ledger).to_json());
  EXPECT_GT(dry.of(kernels::MemoryKind::kKv), 0);
  driver.expect(str("serving ", c.name), dry.peak_total);
}

std::vector<ServingCase> serving_cases() {
  std::vector<ServingCase> all{{"f32", DType::kF32, 8 << 20, 200, 8, 4},
                               {"bf16", DType::kBF16, 8 << 20, 200, 8, 4},
                               {"small_pool", DType::kBF16, 2 << 20, 64, 4, 1},
                               {"large_pool", DType::kBF16, 64 << 20, 512, 32, 4},
                               {"many_slots", DType::kF32, 16 << 20, 256, 16, 40},
                               {"qk_norm", DType::kBF16, 8 << 20, 200, 8, 4, true}};
  if (test::on_gpu()) all.push_back({"f16", DType::kF16, 8 << 20, 200, 8, 4});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Configurations, ServingEstimate, testing::ValuesIn(serving_cases()),
                         [](const auto& one) { return std::string(one.param.name); });

}  // namespace
}  // namespace tandem::worker::memory
