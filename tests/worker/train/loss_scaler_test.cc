// The state machine alone; and a session that trains by it, in f32, where a power of two changes no
// bit until something overflows.
#include "worker/train/loss_scaler.h"

#include "protocol/base/random.h"
#include "tests/support/engine_fixture.h"

#include <gtest/gtest.h>

#include <cmath>

namespace tandem::worker::train {
namespace {

TEST(LossScaler, OnlyF16NeedsOne) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF64}) {
    LossScaler none = LossScaler::of(dtype);
    EXPECT_FALSE(none.active());
    EXPECT_FALSE(none.can_lower());
    for (int step = 0; step < 5000; ++step) none.took();
    EXPECT_EQ(none.scale(), 1.0);
    EXPECT_EQ(none.to_json(), "");
  }
  EXPECT_EQ(LossScaler::of(DType::kF16).scale(), 65536.0);
}

TEST(LossScaler, AnOverflowHalvesAndGoodStepsInARowDouble) {
  LossScaler scaler = LossScaler::of(DType::kF16);
  for (int step = 0; step < 1999; ++step) scaler.took();
  EXPECT_EQ(scaler.scale(), 65536.0);
  scaler.skip();  // one step before it would have grown: counting begins anew
  EXPECT_EQ(scaler.scale(), 32768.0);
  for (int step = 0; step < 1999; ++step) scaler.took();
  EXPECT_EQ(scaler.scale(), 32768.0);
  scaler.took();
  EXPECT_EQ(scaler.scale(), 65536.0);
  EXPECT_EQ(scaler.skipped(), 1);
}

TEST(LossScaler, StaysBetweenOneAndItsMost) {
  LossScaler scaler(LossScaling{4.0, 1, 16.0});
  for (int step = 0; step < 10; ++step) scaler.took();
  EXPECT_EQ(scaler.scale(), 16.0);
  for (int step = 0; step < 4; ++step) scaler.skip();
  EXPECT_EQ(scaler.scale(), 1.0);
  EXPECT_FALSE(scaler.can_lower());
  EXPECT_EQ(scaler.skipped(), 4);
}

TEST(LossScaler, ItsStateContinuesWhereItStood) {
  LossScaler scaler = LossScaler::of(DType::kF16), again = LossScaler::of(DType::kF16);
  scaler.skip();
  for (int step = 0; step < 1500; ++step) scaler.took();
  ASSERT_TRUE(again.read(scaler.to_json()).ok());
  EXPECT_EQ(again.to_json(), scaler.to_json());
  for (int step = 0; step < 500; ++step) again.took();
  EXPECT_EQ(again.scale(), 65536.0);
  EXPECT_EQ(again.skipped(), 1);
}

TEST(LossScaler, ADamagedStateIsRefused) {
  LossScaler scaler = LossScaler::of(DType::kF16);
  const std::string before = scaler.to_json();
  for (const char* text :
       {"", "7", "{}", R"({"scale":3,"good_steps":0,"skipped_steps":0})",
        R"({"scale":0.5,"good_steps":0,"skipped_steps":0})",
        R"({"scale":2,"good_steps":-1,"skipped_steps":0})", R"({"scale":2,"good_steps":0})"})
    EXPECT_EQ(scaler.read(text).code(), StatusCode::kCorrupt) << text;
  EXPECT_EQ(scaler.to_json(), before);
}

// -- in a session
// ------------------------------------------------------------------------------

data::MicroBatch batch_of(std::uint64_t seed) {
  Random random(seed);
  data::MicroBatch batch;
  batch.cu_seqlens = {0, 24};
  for (std::int32_t t = 0; t < 24; ++t) {
    batch.tokens.push_back(static_cast<std::int32_t>(random.below(96)));
    batch.labels.push_back(static_cast<std::int32_t>(random.below(96)));
    batch.positions.push_back(t);
  }
  batch.trained_tokens = 24;
  return batch;
}

constexpr std::int64_t kSteps = 8;

/// A session of eight steps over a fresh engine.
struct Job {
  explicit Job(const std::string& method, std::optional<LossScaling> scaling,
               const TrainState* from = nullptr)
      : engine(test::cpu_engine(test::tiny_config(), DType::kF32)),
        source(model::make_random_source(test::tiny_config(), 7)) {
    SessionOptions options;
    options.settings.method = method;
    options.settings.lora_r = 4;
    options.settings.learning_rate = 1e-2;
    options.settings.weight_decay = 0.1;
    options.settings.save_steps = 0;
    options.settings.warmup_ratio = 0.0;
    options.loss_scaling = scaling;
    std::vector<data::OptimizerStep> steps(kSteps);
    for (std::size_t s = 0; s < steps.size(); ++s) steps[s] = {{batch_of(s)}, 24};
    SessionParts parts = engine->session_parts();
    parts.source = source.get();
    session =
        TrainSession::create(parts, options, make_fixed_batches(std::move(steps), {})).value();
    if (from != nullptr) TANDEM_CHECK(session->import_state(*from).ok());
  }
  std::vector<StepDone> run(std::int64_t until = kSteps) {
    std::vector<StepDone> done;
    while (session->step() < until) {
      const SliceEvent event = session->run_slice().value();
      if (const auto* step = std::get_if<StepDone>(&event)) done.push_back(*step);
    }
    return done;
  }
  std::unique_ptr<test::Engine> engine;
  std::unique_ptr<model::TensorSource> source;
  std::unique_ptr<TrainSession> session;
};

void expect_same_state(const TrainState& a, const TrainState& b) {
  ASSERT_EQ(a.tensors.size(), b.tensors.size());
  for (std::size_t t = 0; t < a.tensors.size(); ++t)
    EXPECT_EQ(a.tensors[t].values, b.tensors[t].values) << a.tensors[t].name;
}

const std::vector<float>& find(const TrainState& state, const std::string& name) {
  for (const StateTensor& tensor : state.tensors)
    if (tensor.name == name) return tensor.values;
  TANDEM_CHECK(false, name);
  std::abort();
}

/// Large enough that the square of the gradient's norm is beyond f32 for some steps.
constexpr LossScaling kTooLarge{0x1p66, 3, 0x1p24};

class ScaledSession : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Methods, ScaledSession, testing::Values("lora", "full"),
                         [](const auto& one) { return one.param; });

TEST_P(ScaledSession, AScaleChangesNoBit) {
  Job plain(GetParam(), std::nullopt), scaled(GetParam(), LossScaling{65536.0, 3, 0x1p24});
  const auto want = plain.run(), got = scaled.run();
  for (std::size_t s = 0; s < want.size(); ++s) {
    EXPECT_EQ(got[s].loss, want[s].loss) << "step " << s;
    EXPECT_EQ(got[s].grad_norm, want[s].grad_norm) << "step " << s;
    EXPECT_EQ(want[s].loss_scale, 1.0);
    EXPECT_EQ(got[s].loss_scale, std::ldexp(65536.0, static_cast<int>(s / 3))) << "step " << s;
    EXPECT_FALSE(got[s].skipped);
  }
  expect_same_state(scaled.session->export_state(), plain.session->export_state());
}

TEST_P(ScaledSession, AnOverflowSkipsTheStepAndLeavesNoTrace) {
  Job fresh(GetParam(), std::nullopt), job(GetParam(), kTooLarge);
  const TrainState before = fresh.session->export_state();
  std::int64_t skipped = 0;
  std::vector<StepDone> steps;
  while (true) {
    steps = job.run(job.session->step() + 1);
    if (!steps[0].skipped) break;
    ++skipped;
    EXPECT_EQ(steps[0].loss_scale, std::ldexp(kTooLarge.initial, static_cast<int>(1 - skipped)));
    EXPECT_EQ(steps[0].skipped_steps, skipped);
    EXPECT_TRUE(std::isfinite(steps[0].loss));
    EXPECT_FALSE(std::isfinite(steps[0].grad_norm));
    expect_same_state(job.session->export_state(), before);
    ASSERT_LT(job.session->step(), kSteps) << "never small enough";
  }
  ASSERT_GT(skipped, 0) << "nothing overflowed: the test is not one";
  // AdamW counts the updates that it made: the first of them moves by the whole rate, as a first
  // one does.
  const TrainState after = job.session->export_state();
  std::int64_t seen = 0;
  for (const StateTensor& square : after.tensors) {
    if (!square.name.ends_with(".exp_avg_sq")) continue;
    const std::string name = square.name.substr(0, square.name.rfind('.'));
    const auto &m = find(after, name + ".exp_avg"), &p = find(after, name + ".param"),
               &old = find(before, name + ".param");
    const double decay = name.ends_with("norm.weight") ? 0.0 : 0.1;  // norms do not
    for (std::size_t e = 0; e < m.size(); ++e) {
      if (square.values[e] < 1e-9f) continue;  // epsilon counts there
      const double rate = steps[0].learning_rate;
      const double moved = static_cast<double>(p[e]) - old[e] * (1.0 - rate * decay);
      ASSERT_NEAR(moved, m[e] > 0.0f ? -rate : rate, 1e-4 * rate + 1e-6 * std::abs(old[e])) << name;
      ++seen;
    }
  }
  EXPECT_GT(seen, 100);
}

TEST_P(ScaledSession, ACheckpointContinuesWithTheSameBits) {
  Job whole(GetParam(), kTooLarge);
  const auto want = whole.run();
  for (const std::int64_t stop : {1, 3, 6}) {
    Job first(GetParam(), kTooLarge);
    first.run(stop);
    const TrainState state = first.session->export_state();
    Job second(GetParam(), kTooLarge, &state);
    const auto rest = second.run();
    ASSERT_EQ(static_cast<std::int64_t>(rest.size()), kSteps - stop);
    for (std::size_t s = 0; s < rest.size(); ++s) {
      const StepDone& other = want[static_cast<std::size_t>(stop) + s];
      EXPECT_EQ(rest[s].loss, other.loss) << stop << " " << s;
      EXPECT_EQ(rest[s].loss_scale, other.loss_scale) << stop << " " << s;
      EXPECT_EQ(rest[s].skipped_steps, other.skipped_steps) << stop << " " << s;
    }
    expect_same_state(second.session->export_state(), whole.session->export_state());
  }
}

TEST(ScaledState, OfAnUnscaledJobIsAConflict) {
  Job plain("lora", std::nullopt), scaled("lora", kTooLarge);
  plain.run(1);
  const Status status = scaled.session->import_state(plain.session->export_state());
  EXPECT_EQ(status.code(), StatusCode::kConflict) << status.to_string();
}

}  // namespace
}  // namespace tandem::worker::train
