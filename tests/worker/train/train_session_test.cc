#include "worker/train/train_session.h"

#include "protocol/base/random.h"
#include "tests/support/engine_fixture.h"
#include "worker/train/lora_params.h"

#include <gtest/gtest.h>

#include <cmath>

namespace tandem::worker::train {
namespace {

using test::Engine;

data::MicroBatch random_batch(Random& random, std::int64_t documents, std::int64_t vocab) {
  data::MicroBatch batch;
  batch.cu_seqlens.push_back(0);
  for (std::int64_t d = 0; d < documents; ++d) {
    const auto length = static_cast<std::int64_t>(5 + random.below(20));
    for (std::int64_t t = 0; t < length; ++t) {
      batch.tokens.push_back(
          static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(vocab))));
      batch.positions.push_back(static_cast<std::int32_t>(t));
      const bool trained = t >= 2 && t + 1 < length;
      batch.labels.push_back(
          trained ? static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(vocab)))
                  : data::kIgnore);
      batch.trained_tokens += trained;
    }
    batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
  }
  return batch;
}

/// Steps of several micro-batches; the last one of fewer, as at an epoch's end.
std::vector<data::OptimizerStep> random_steps(std::int64_t count, std::int64_t accumulation,
                                              std::int64_t vocab) {
  Random random(99);
  std::vector<data::OptimizerStep> steps;
  for (std::int64_t s = 0; s < count; ++s) {
    data::OptimizerStep step;
    for (std::int64_t m = 0; m < (s + 1 == count ? 1 : accumulation); ++m) {
      step.micro_batches.push_back(random_batch(random, 3, vocab));
      step.trained_tokens += step.micro_batches.back().trained_tokens;
    }
    steps.push_back(std::move(step));
  }
  return steps;
}

SessionOptions small_options() {
  SessionOptions options;
  options.settings.lora_r = 4;
  options.settings.lora_alpha = 8.0;
  options.settings.learning_rate = 1e-2;
  options.settings.weight_decay = 0.1;
  options.settings.warmup_steps = 2;
  options.settings.save_steps = 0;
  return options;
}

std::unique_ptr<BatchSource> small_batches(std::int64_t epochs = 2) {
  return make_fixed_batches(random_steps(4, 2, test::tiny_config().vocab), {}, epochs);
}

std::unique_ptr<TrainSession> start(Engine& engine, const SessionOptions& options,
                                    std::unique_ptr<BatchSource> batches) {
  auto session = TrainSession::create(engine.session_parts(), options, std::move(batches));
  TANDEM_CHECK(session.ok(), session.status().to_string());
  return std::move(*session);
}

/// Runs to the end, or until `slices` slices are done; the steps seen.
std::vector<StepDone> run(TrainSession& session, std::int64_t slices = 1'000'000) {
  std::vector<StepDone> steps;
  while (slices-- > 0 && !session.finished()) {
    const auto event = session.run_slice();
    TANDEM_CHECK(event.ok(), event.status().to_string());
    if (const auto* done = std::get_if<StepDone>(&event.value())) steps.push_back(*done);
  }
  return steps;
}

void expect_same_bits(const std::vector<model::HostAdapterTensor>& a,
                      const std::vector<model::HostAdapterTensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t p = 0; p < a.size(); ++p) {
    EXPECT_EQ(a[p].a, b[p].a) << model::site_path(a[p].layer, a[p].site);
    EXPECT_EQ(a[p].b, b[p].b) << model::site_path(a[p].layer, a[p].site);
  }
}

class Resume : public testing::TestWithParam<DType> {};

TEST_P(Resume, AfterAnySliceEndsWithTheSameBitsAsTheUninterruptedRun) {
  SessionOptions options = small_options();
  options.settings.lora_dropout = 0.25;
  options.settings.gradient_accumulation_steps = 2;
  auto engine = test::cpu_engine(test::tiny_config(), GetParam());
  std::vector<model::HostAdapterTensor> whole;
  std::vector<StepDone> whole_steps;
  {
    auto session = start(*engine, options, small_batches());
    whole_steps = run(*session);
    whole = session->host_adapter(DType::kF32);
  }
  // 8 steps of 2, 2, 2, 1 micro-batches: stops before the first slice, inside an accumulation,
  // right after a step, near the end.
  for (std::int64_t slices : {0, 1, 2, 3, 7, 10, 13}) {
    TrainState state;
    std::vector<StepDone> steps;
    {
      auto session = start(*engine, options, small_batches());
      steps = run(*session, slices);
      state = session->export_state();
    }
    auto other = test::cpu_engine(test::tiny_config(), GetParam());
    auto session = start(*other, options, small_batches());
    ASSERT_TRUE(session->import_state(state).ok());
    EXPECT_EQ(session->step(), static_cast<std::int64_t>(steps.size()));
    const std::vector<StepDone> rest = run(*session);
    steps.insert(steps.end(), rest.begin(), rest.end());
    expect_same_bits(session->host_adapter(DType::kF32), whole);
    ASSERT_EQ(steps.size(), whole_steps.size()) << slices;
    for (std::size_t s = 0; s < steps.size(); ++s) {
      EXPECT_EQ(steps[s].loss, whole_steps[s].loss) << "stop after " << slices << ", step " << s;
      EXPECT_EQ(steps[s].step, whole_steps[s].step);
    }
  }
}

/// An update writes the weights that forward reads as it goes, where it can; a loaded state is
/// rounded to them by an op of its own.
TEST_P(Resume, OfAFullFineTuneAfterAnyStepEndsWithTheSameBits) {
  SessionOptions options = small_options();
  options.settings.method = "full";
  options.settings.gradient_accumulation_steps = 2;
  const auto source = model::make_random_source(test::tiny_config(), 7);
  auto engine = test::cpu_engine(test::tiny_config(), GetParam());
  SessionParts parts = engine->session_parts();
  parts.source = source.get();
  const auto begin = [&] {
    auto session = TrainSession::create(parts, options, small_batches());
    TANDEM_CHECK(session.ok(), session.status().to_string());
    return std::move(*session);
  };
  auto whole = begin();
  const std::vector<StepDone> whole_steps = run(*whole);
  const TrainState end = whole->export_state();
  std::vector<StepDone> steps;
  TrainState state;
  auto session = begin();
  while (!session->finished()) {
    const std::vector<StepDone> one = run(*session, 1);
    if (one.empty()) continue;
    steps.push_back(one[0]);
    state = session->export_state();
    session = begin();
    ASSERT_TRUE(session->import_state(state).ok());
  }
  ASSERT_EQ(steps.size(), whole_steps.size());
  for (std::size_t s = 0; s < steps.size(); ++s)
    EXPECT_EQ(steps[s].loss, whole_steps[s].loss) << "step " << s;
  ASSERT_EQ(state.tensors.size(), end.tensors.size());
  for (std::size_t t = 0; t < end.tensors.size(); ++t)
    EXPECT_EQ(state.tensors[t].values, end.tensors[t].values) << end.tensors[t].name;
}

INSTANTIATE_TEST_SUITE_P(Dtypes, Resume, testing::ValuesIn(test::test_dtypes()),
                         [](const auto& one) { return std::string(dtype_name(one.param)); });

TEST(TrainSession, DropoutChangesTheResult) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kF32);
  SessionOptions options = small_options();
  auto plain = start(*engine, options, small_batches());
  run(*plain);
  const auto without = plain->host_adapter(DType::kF32);
  plain.reset();
  options.settings.lora_dropout = 0.25;
  auto session = start(*engine, options, small_batches());
  run(*session);
  EXPECT_NE(session->host_adapter(DType::kF32)[0].a, without[0].a);
}

TEST(TrainSession, GradientDoesNotDependOnHowTheStepIsCut) {
  // The same documents as one micro-batch and as one micro-batch each.
  Random random(5);
  const std::int64_t vocab = test::tiny_config().vocab;
  data::OptimizerStep cut, whole;
  whole.micro_batches.emplace_back();
  data::MicroBatch& all = whole.micro_batches[0];
  all.cu_seqlens.push_back(0);
  for (int d = 0; d < 4; ++d) {
    const data::MicroBatch one = random_batch(random, 1, vocab);
    all.tokens.insert(all.tokens.end(), one.tokens.begin(), one.tokens.end());
    all.labels.insert(all.labels.end(), one.labels.begin(), one.labels.end());
    all.positions.insert(all.positions.end(), one.positions.begin(), one.positions.end());
    all.cu_seqlens.push_back(static_cast<std::int32_t>(all.tokens.size()));
    all.trained_tokens += one.trained_tokens;
    cut.trained_tokens += one.trained_tokens;
    cut.micro_batches.push_back(one);
  }
  whole.trained_tokens = cut.trained_tokens;
  const auto norm_and_loss = [](const data::OptimizerStep& step) {
    auto engine = test::cpu_engine(test::tiny_config(), DType::kF32);
    auto session = start(*engine, small_options(), make_fixed_batches({step}, {}));
    return run(*session).at(0);
  };
  const StepDone a = norm_and_loss(cut), b = norm_and_loss(whole);
  EXPECT_NEAR(a.loss, b.loss, 1e-6 * b.loss);
  EXPECT_NEAR(a.grad_norm, b.grad_norm, 1e-5 * b.grad_norm);
  EXPECT_GT(b.grad_norm, 0.0);
}

SessionOptions eventful_options() {
  SessionOptions options = small_options();
  options.settings.save_steps = 2;
  options.settings.eval_steps = 3;
  return options;
}

std::unique_ptr<BatchSource> batches_with_eval() {
  Random random(3);
  const std::int64_t vocab = test::tiny_config().vocab;
  return make_fixed_batches(random_steps(5, 1, vocab),
                            {random_batch(random, 2, vocab), random_batch(random, 1, vocab)});
}

/// Runs to the end, or until `slices` slices are done; the events seen.
std::string events(TrainSession& session, std::int64_t slices = 1'000'000) {
  std::string seen;
  while (slices-- > 0 && !session.finished()) {
    const SliceEvent event = session.run_slice().value();
    if (const auto* step = std::get_if<StepDone>(&event)) seen += str("s", step->step, " ");
    if (const auto* eval = std::get_if<EvalDone>(&event))
      seen += str(eval->base ? "b" : "e", eval->step, " ");
    if (const auto* due = std::get_if<CheckpointDue>(&event))
      seen += str(due->last ? "C" : "c", due->step, " ");
  }
  return seen;
}

TEST(TrainSession, EventsComeInOrderAndWhenDue) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kF32);
  auto session = start(*engine, eventful_options(), batches_with_eval());
  EXPECT_EQ(events(*session), "b0 s1 s2 c2 s3 e3 s4 c4 s5 e5 C5 ");
  EXPECT_TRUE(std::holds_alternative<Finished>(session->run_slice().value()));
}

TEST(TrainSession, AnEvaluationThatAStopLeftUndoneIsDoneOnResume) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kF32);
  // b0 is two slices; so s3 is the sixth, and e3 the seventh and eighth.
  for (const std::int64_t slices : {6, 7, 8}) {
    auto session = start(*engine, eventful_options(), batches_with_eval());
    std::string seen = events(*session, slices);
    const TrainState state = session->export_state();
    session.reset();
    session = start(*engine, eventful_options(), batches_with_eval());
    ASSERT_TRUE(session->import_state(state).ok());
    seen += events(*session);
    EXPECT_EQ(seen, "b0 s1 s2 c2 s3 e3 s4 c4 s5 e5 C5 ") << "stopped after slice " << slices;
  }
}

TEST(TrainSession, TheFreshAdapterIsTheBase) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kF32);
  SessionOptions options = small_options();
  options.settings.learning_rate = 1e-30;  // every step changes nothing
  Random random(3);
  auto session = start(*engine, options,
                       make_fixed_batches(random_steps(1, 1, test::tiny_config().vocab),
                                          {random_batch(random, 2, test::tiny_config().vocab)}));
  std::vector<double> losses;
  while (!session->finished()) {
    const SliceEvent event = session->run_slice().value();
    if (const auto* eval = std::get_if<EvalDone>(&event)) losses.push_back(eval->loss);
  }
  ASSERT_EQ(losses.size(), 2u);
  EXPECT_EQ(losses[0], losses[1]);
  EXPECT_GT(losses[0], 1.0);
}

TEST(TrainSession, LossFallsOnDataThatRepeats) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kBF16);
  SessionOptions options = small_options();
  options.settings.learning_rate = 2e-2;
  auto session = start(*engine, options, small_batches(20));
  const std::vector<StepDone> steps = run(*session);
  EXPECT_LT(steps[steps.size() - 2].loss, 0.7 * steps[2].loss);
}

class Probe : public testing::TestWithParam<DType> {};

TEST_P(Probe, ReloadedAdapterAndSnapshotGiveTheTrainedLogitsExactly) {
  auto engine = test::cpu_engine(test::tiny_config(), GetParam());
  auto session = start(*engine, small_options(), small_batches());
  run(*session);
  const std::vector<std::int32_t> prompt{5, 60};
  const auto reload = [&](const auto& published) {
    return Result(model::build_adapter(*engine->backend.ops, engine->exec,
                                       *engine->backend.allocator, *engine->backend.ledger,
                                       engine->base->config(), GetParam(), published))
        .value();
  };
  for (const DType published : {GetParam(), DType::kF32}) {
    EXPECT_EQ(session->probe(prompt, reload(session->host_adapter(published))), 0.0);
    EXPECT_EQ(session->probe(prompt, reload(session->flat_adapter(published))), 0.0);
  }
  EXPECT_EQ(session->probe(prompt, session->snapshot_adapter()), 0.0);
  // An adapter that differs is seen.
  auto other = session->host_adapter(GetParam());
  for (float& value : other[3].b) value += 0.5f;
  EXPECT_GT(session->probe(prompt, reload(other)), 1e-3);
  // The slot is the session's own again.
  EXPECT_EQ(session->probe(prompt, session->snapshot_adapter()), 0.0);
}

TEST_P(Probe, OneWrongValueInAnyTensorIsSeen) {
  auto engine = test::cpu_engine(test::tiny_config(), GetParam());
  auto session = start(*engine, small_options(), small_batches());
  run(*session);
  const auto trained = session->host_adapter(GetParam());
  ASSERT_EQ(std::ssize(trained), test::tiny_config().layers * model::kSiteCount);
  const std::vector<std::int32_t> prompt = probe_prompt(std::vector<std::int32_t>{7, 7, 41, 3});
  for (std::size_t pair = 0; pair < trained.size(); ++pair)
    for (const bool half : {false, true})
      for (const bool last : {false, true}) {
        auto damaged = trained;
        auto& values = half ? damaged[pair].b : damaged[pair].a;
        float& value = last ? values.back() : values.front();
        value += 1.0f;
        const auto reloaded =
            Result(model::build_adapter(*engine->backend.ops, engine->exec,
                                        *engine->backend.allocator, *engine->backend.ledger,
                                        engine->base->config(), GetParam(), damaged))
                .value();
        EXPECT_GT(session->probe(prompt, reloaded), 0.0)
            << model::site_path(damaged[pair].layer, damaged[pair].site) << (half ? " B " : " A ")
            << (last ? "last" : "first");
      }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, Probe, testing::ValuesIn(test::test_dtypes()),
                         [](const auto& one) { return std::string(dtype_name(one.param)); });

TEST(ProbePrompt, IsTwoTokensThatDiffer) {
  using Tokens = std::vector<std::int32_t>;
  EXPECT_EQ(probe_prompt(Tokens{5, 9, 60}), (Tokens{5, 9}));
  EXPECT_EQ(probe_prompt(Tokens{5, 5, 5, 60, 2}), (Tokens{5, 60}));
  EXPECT_EQ(probe_prompt(Tokens{5, 5}), (Tokens{5, 0}));
  EXPECT_EQ(probe_prompt(Tokens{0}), (Tokens{0, 1}));
}

TEST(TrainSession, SnapshotDoesNotChangeWhenTrainingGoesOn) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kBF16);
  auto session = start(*engine, small_options(), small_batches());
  run(*session, 4);
  const auto snapshot = session->snapshot_adapter();
  const auto before = engine->download(snapshot->pairs[1][2]->a);
  run(*session);
  EXPECT_EQ(engine->download(snapshot->pairs[1][2]->a), before);
  EXPECT_GT(session->probe({1, 2}, snapshot), 0.0);
}

TEST(TrainSession, ServingBetweenSlicesChangesNoBit) {
  const auto train = [](bool interleave) {
    auto engine = test::cpu_engine(test::tiny_config(), DType::kF32);
    auto session = start(*engine, small_options(), small_batches());
    while (!session->finished()) {
      TANDEM_CHECK(session->run_slice().ok());
      if (interleave) session->probe({4, 8}, session->snapshot_adapter());
    }
    return session->host_adapter(DType::kF32);
  };
  expect_same_bits(train(true), train(false));
}

TEST(TrainSession, AStateThatDoesNotFitIsRefusedByName) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kF32);
  auto session = start(*engine, small_options(), small_batches());
  const TrainState good = session->export_state();
  session.reset();
  const auto import = [&](const SessionOptions& options, const TrainState& state) {
    return start(*engine, options, small_batches())->import_state(state);
  };
  EXPECT_TRUE(import(small_options(), good).ok());

  SessionOptions other = small_options();
  other.settings.learning_rate = 3e-3;
  EXPECT_EQ(import(other, good).code(), StatusCode::kConflict);
  EXPECT_NE(import(other, good).message().find("learning_rate"), std::string::npos);
  other = small_options();
  other.settings.save_steps = 17;  // changes nothing in the result
  EXPECT_TRUE(import(other, good).ok());

  TrainState missing = good;
  missing.tensors.pop_back();
  EXPECT_EQ(import(small_options(), missing).code(), StatusCode::kCorrupt);
  EXPECT_NE(import(small_options(), missing).message().find(good.tensors.back().name),
            std::string::npos);
  TrainState reshaped = good;
  reshaped.tensors[0].shape[0] += 1;
  EXPECT_EQ(import(small_options(), reshaped).code(), StatusCode::kCorrupt);
  TrainState garbage = good;
  garbage.json = "{\"version\": 1";
  EXPECT_EQ(import(small_options(), garbage).code(), StatusCode::kCorrupt);
}

TEST(TrainSession, BadSettingsAreRefusedBeforeAnyWork) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kF32);
  const auto refusal = [&](auto change) {
    SessionOptions options = small_options();
    change(options);
    auto session = TrainSession::create(engine->session_parts(), options, small_batches());
    return session.ok() ? std::string("accepted") : session.status().message();
  };
  EXPECT_NE(refusal([](SessionOptions& o) {
              o.settings.target_modules = {"q_proj", "qproj"};
            }).find("did you mean q_proj"),
            std::string::npos);
  EXPECT_NE(refusal([](SessionOptions& o) { o.settings.target_modules.clear(); }).find("empty"),
            std::string::npos);
  EXPECT_NE(refusal([](SessionOptions& o) { o.settings.method = "full"; }).find("full"),
            std::string::npos);
  const std::vector<model::HostAdapterTensor> nothing(1);
  EXPECT_NE(refusal([&](SessionOptions& o) { o.initial = &nothing; }).find("rank"),
            std::string::npos);
}

TEST(TrainSession, DivergenceIsAnErrorThatSaysWhatToDo) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kF32);
  SessionOptions options = small_options();
  options.settings.learning_rate = 1e30;
  options.settings.max_grad_norm = 0.0;
  options.settings.warmup_steps = 1;
  auto session = start(*engine, options, small_batches(4));
  Status status;
  for (int slice = 0; slice < 100 && status.ok(); ++slice) status = session->run_slice().status();
  EXPECT_EQ(status.code(), StatusCode::kRefused);
  EXPECT_NE(status.message().find("learning_rate"), std::string::npos);
}

TEST(TrainSession, ReturnsAllItsMemory) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kBF16);
  const std::int64_t adapters = engine->backend.ledger->live(kernels::MemoryKind::kAdapters);
  {
    auto session = start(*engine, small_options(), small_batches());
    run(*session, 3);
    const auto snapshot = session->snapshot_adapter();
    EXPECT_GT(engine->backend.ledger->live(kernels::MemoryKind::kOptimizer), 0);
    EXPECT_GT(engine->backend.ledger->live(kernels::MemoryKind::kAdapters), adapters);
  }
  EXPECT_EQ(engine->backend.ledger->live(kernels::MemoryKind::kOptimizer), 0);
  EXPECT_EQ(engine->backend.ledger->live(kernels::MemoryKind::kGradients), 0);
  EXPECT_EQ(engine->backend.ledger->live(kernels::MemoryKind::kAdapters), adapters);
  EXPECT_EQ(engine->activation_arena.used(), 0);
}

TEST(LoraInit, IsKaimingUniformInAAndZeroInB) {
  auto engine = test::cpu_engine(test::tiny_config(), DType::kF32);
  auto session = start(*engine, small_options(), small_batches());
  double sum = 0.0, squares = 0.0, count = 0.0, largest = 0.0;
  for (const auto& tensor : session->host_adapter(DType::kF32)) {
    const double bound =
        1.0 /
        std::sqrt(static_cast<double>(model::site_shape(engine->base->config(), tensor.site).i));
    for (float value : tensor.a) {
      const double unit = static_cast<double>(value) / bound;  // uniform in [-1, 1]
      sum += unit;
      squares += unit * unit;
      largest = std::max(largest, std::fabs(unit));
      count += 1.0;
    }
    for (float value : tensor.b) ASSERT_EQ(value, 0.0f);
  }
  EXPECT_LE(largest, 1.0 + 1e-6);
  EXPECT_GT(largest, 0.99);
  // Mean 0 and variance 1/3, each within five standard errors.
  EXPECT_LT(std::fabs(sum / count), 5.0 * std::sqrt(1.0 / 3.0 / count));
  EXPECT_NEAR(squares / count, 1.0 / 3.0, 5.0 * std::sqrt(4.0 / 45.0 / count));
}

}  // namespace
}  // namespace tandem::worker::train
