// Full fine-tuning against transformers: the same tiny models, the same numbers (see
// tests/golden/full_goldens.py), and what is published is what was trained.
#include "tests/support/engine_fixture.h"
#include "tests/support/model_golden.h"
#include "worker/model/model_loader.h"
#include "worker/model/tensor_source.h"
#include "worker/train/model_export.h"
#include "worker/train/train_session.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

namespace tandem::test {
namespace {

using worker::train::SessionOptions;
using worker::train::StateTensor;
using worker::train::TrainSession;
using worker::train::TrainState;

constexpr double kTolerance = 1e-4;

const StateTensor& find(const TrainState& state, const std::string& name) {
  const auto it = std::find_if(state.tensors.begin(), state.tensors.end(),
                               [&](const StateTensor& t) { return t.name == name; });
  TANDEM_CHECK(it != state.tensors.end(), name);
  return *it;
}

class FullGoldens : public testing::TestWithParam<std::string> {
 protected:
  FullGoldens()
      : golden(GetParam()),
        full(storage::Safetensors::open(golden.folder() + "/full.safetensors").value()),
        source(worker::model::make_safetensors_source(golden.weights())),
        engine(kernels::make_cpu_backend({2, 0}), golden.config(), DType::kF32, *source) {
    options.settings.method = "full";
    options.settings.save_steps = 0;
  }
  std::unique_ptr<TrainSession> start(std::vector<worker::data::OptimizerStep> steps) {
    auto parts = engine.session_parts();
    parts.source = source.get();
    auto session = TrainSession::create(parts, options,
                                        worker::train::make_fixed_batches(std::move(steps), {}));
    TANDEM_CHECK(session.ok(), session.status().to_string());
    return std::move(*session);
  }
  [[nodiscard]] std::vector<float> want(const std::string& name) const {
    const storage::TensorInfo* tensor = full.find(name);
    TANDEM_CHECK(tensor != nullptr, name);
    std::vector<float> out(tensor->bytes.size() / sizeof(float));
    std::memcpy(out.data(), tensor->bytes.data(), tensor->bytes.size());
    return out;
  }
  /// The losses and norms of a whole run.
  static std::pair<std::vector<float>, std::vector<float>> run(TrainSession& session) {
    std::pair<std::vector<float>, std::vector<float>> seen;
    while (!session.finished()) {
      const auto event = session.run_slice();
      TANDEM_CHECK(event.ok(), event.status().to_string());
      if (const auto* done = std::get_if<worker::train::StepDone>(&event.value())) {
        seen.first.push_back(static_cast<float>(done->loss));
        seen.second.push_back(static_cast<float>(done->grad_norm));
      }
    }
    return seen;
  }
  /// The golden's training run: pairs of micro-batches, round and round.
  [[nodiscard]] std::vector<worker::data::OptimizerStep> training_steps(std::size_t count) const {
    const auto micro = golden.get<std::int32_t>("train_micro");
    std::vector<worker::data::OptimizerStep> steps;
    for (std::size_t s = 0; s < count; ++s) {
      const std::size_t first = s * 2 % (micro.size() - 1);
      worker::data::OptimizerStep step;
      for (std::size_t m = first; m < first + 2; ++m) {
        step.micro_batches.push_back(golden.pack("train_", micro[m], micro[m + 1]));
        step.trained_tokens += step.micro_batches.back().trained_tokens;
      }
      steps.push_back(std::move(step));
    }
    return steps;
  }
  void use_golden_optimizer() {
    options.settings.learning_rate = 1e-3;
    options.settings.adam_beta2 = 0.98;
    options.settings.weight_decay = 0.5;
    options.settings.warmup_steps = 3;
    options.settings.gradient_accumulation_steps = 2;
  }

  ModelGolden golden;
  storage::Safetensors full;
  std::unique_ptr<worker::model::TensorSource> source;
  Engine engine;
  SessionOptions options;
};
INSTANTIATE_TEST_SUITE_P(Models, FullGoldens, testing::Values("llama_grouped", "qwen2", "qwen3"));

TEST_P(FullGoldens, GradientsOfEveryWeightAreThoseOfTransformers) {
  options.settings.max_grad_norm = 0.0;
  options.settings.adam_beta1 = 0.5;  // exp_avg is then exactly half the gradient
  const auto batch = golden.pack("", 0, 4);
  auto session = start({{{batch}, batch.trained_tokens}});
  const auto [losses, norms] = run(*session);
  EXPECT_LT(relative_error(losses, want("loss")), kTolerance);
  const TrainState state = session->export_state();
  for (const auto& spec : worker::model::expected_tensors(golden.config())) {
    std::vector<float> gradient = find(state, spec.name + ".exp_avg").values;
    for (float& value : gradient) value *= 2.0f;
    EXPECT_LT(relative_error(gradient, want("grad." + spec.name)), kTolerance) << spec.name;
  }
}

TEST_P(FullGoldens, ARunEndsWhereThatOfTransformersEnds) {
  use_golden_optimizer();
  const auto losses = want("losses"), norms = want("grad_norms");
  auto session = start(training_steps(losses.size()));
  const auto got = run(*session);
  ASSERT_EQ(got.first.size(), losses.size());
  for (std::size_t s = 0; s < losses.size(); ++s) {
    EXPECT_NEAR(got.first[s], losses[s], 1e-3) << "step " << s + 1;
    EXPECT_NEAR(got.second[s], norms[s], 1e-2 * norms[s]) << "step " << s + 1;
  }
  const TrainState state = session->export_state();
  int compared = 0;
  for (const auto& spec : worker::model::expected_tensors(golden.config())) {
    if (full.find("trained." + spec.name) == nullptr) continue;
    EXPECT_LT(
        relative_error(find(state, spec.name + ".param").values, want("trained." + spec.name)),
        1e-3)
        << spec.name;
    ++compared;
  }
  EXPECT_GE(compared, 5);
}

/// As a job publishes: pieces into one file, read back, compared, and taken as the weights.
TEST_P(FullGoldens, AFileWrittenInPiecesHoldsTheTrainedWeightsAndTheProbeSeesADifference) {
  use_golden_optimizer();
  auto session = start(training_steps(3));
  run(*session);
  const std::vector<std::int32_t> prompt{1, 2};
  const std::string path = testing::TempDir() + "tandem_pieces_" + GetParam() + ".safetensors";
  const auto pieces = session->export_weights();
  const TrainState state = session->export_state();
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    ASSERT_TRUE(worker::train::create_weights(path, golden.config(), dtype).ok());
    const Status written = worker::train::write_pieces(path, pieces);
    ASSERT_TRUE(written.ok()) << written.to_string();
    const auto published =
        worker::model::make_safetensors_source(storage::Safetensors::open(path).value());
    for (const auto& spec : worker::model::expected_tensors(golden.config())) {
      std::vector<float> values = find(state, spec.name + ".param").values, got(values.size());
      published->read_rows(spec.name, 0, spec.n, got.data());
      if (dtype == DType::kBF16)
        for (float& value : values) value = to_f32(to_bf16(value));
      EXPECT_EQ(got, values) << spec.name;
    }
    EXPECT_EQ(worker::train::largest_difference(pieces, *published, dtype), 0.0);
    if (dtype == DType::kF32) {
      EXPECT_GT(session->probe_published(prompt, *published), 0.0) << "it had bf16's values";
      EXPECT_EQ(session->probe_published(prompt, *published), 0.0);
    } else {
      EXPECT_GT(worker::train::largest_difference(pieces, *published, DType::kF32), 0.0);
      EXPECT_GT(session->probe_published(prompt, *published), 0.0) << "f32 rounded to bf16";
    }
  }
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace tandem::test
