// Against transformers and PEFT: same tiny models, same numbers (see
// tests/golden/model_goldens.py).
#include "tests/support/model_golden.h"
#include "protocol/base/ids.h"
#include "tests/support/engine_fixture.h"
#include "worker/model/adapter_layout.h"
#include "worker/model/merge.h"
#include "worker/train/device_batch.h"
#include "worker/train/train_session.h"

#include <gtest/gtest.h>

#include <filesystem>

namespace tandem::test {
namespace {

using worker::model::AdapterLayout;
using worker::model::HostAdapterTensor;
using worker::model::kSiteCount;
using worker::model::Recompute;
using worker::model::Transformer;

constexpr std::int64_t kRank = 4;
constexpr float kScale = 2.5f;  // lora_alpha 10 / r 4
constexpr double kTolerance = 1e-4;

class NoSink final : public worker::model::GradSink {
 public:
  void ready(std::int64_t) override {}
};

/// The adapter of the golden's PEFT folder, read from its safetensors file.
std::vector<HostAdapterTensor> golden_adapter(const ModelGolden& golden) {
  const auto file =
      storage::Safetensors::open(golden.folder() + "/adapter/adapter_model.safetensors").value();
  std::vector<HostAdapterTensor> tensors;
  const auto read = [&](const std::string& name) {
    const storage::TensorInfo* tensor = file.find(name);
    TANDEM_CHECK(tensor != nullptr && tensor->dtype == DType::kF32, name);
    std::vector<float> values(static_cast<std::size_t>(tensor->numel()));
    std::memcpy(values.data(), tensor->bytes.data(), tensor->bytes.size());
    return values;
  };
  for (std::int64_t layer = 0; layer < golden.config().layers; ++layer)
    for (int s = 0; s < kSiteCount; ++s) {
      const worker::model::Site site{s};
      const std::string path = "base_model.model." + worker::model::site_path(layer, site);
      tensors.push_back({layer, site, kRank, kScale, read(path + ".lora_A.weight"),
                         read(path + ".lora_B.weight")});
    }
  return tensors;
}

class ModelGoldens : public testing::TestWithParam<std::string> {
 protected:
  ModelGoldens()
      : golden(GetParam()),
        engine(make_test_backend(2), golden.config(), DType::kF32,
               *worker::model::make_safetensors_source(golden.weights())),
        transformer(*engine.weights, &engine.adapters, {0, golden.config().layers}),
        batch(golden.pack("", 0, 4)) {
    bounds.include(batch);
  }

  std::vector<float> logits(std::int64_t slot) { return logits(engine, transformer, slot); }
  std::vector<float> logits(Engine& on, const Transformer& model, std::int64_t slot) {
    kernels::ArenaScope scope(on.activation_arena);
    const auto device =
        worker::train::upload_batch(on.context, batch, bounds, slot, slot < 0 ? 0 : kRank);
    const std::int64_t rows = device.tokens.tokens();
    const auto hidden =
        on.activation_arena.alloc({rows, golden.config().width}, on.context.compute_dtype);
    const auto out = on.activation_arena.alloc({rows, golden.config().vocab}, DType::kF32);
    model.forward(on.context, device.tokens, {}, hidden, nullptr, Recompute::kNone);
    model.logits(on.context, hidden, out);
    return on.download(out.rows(0, device.real_tokens));
  }

  ModelGolden golden;
  Engine engine;
  Transformer transformer;
  worker::data::MicroBatch batch;
  worker::train::BatchBounds bounds;
};

TEST_P(ModelGoldens, LogitsOfTheBaseAreThoseOfTransformers) {
  EXPECT_LT(relative_error(logits(-1), golden.get("logits_base")), kTolerance);
}

/// In 16 bits a block rounds some sixteen tensors on the way of the stream (weights, the norms'
/// outputs, qkv, rotated q and k, attention's weights and output, gate and up, their product, both
/// additions), each off by u at most and independent of the others; four times that.
TEST_P(ModelGoldens, LogitsInSixteenBitsAreThoseOfTransformersWithinTheirRoundings) {
  for (const DType dtype : test_dtypes()) {
    if (!is_16_bit(dtype)) continue;
    Engine narrow(make_test_backend(2), golden.config(), dtype,
                  *worker::model::make_safetensors_source(golden.weights()));
    const Transformer model(*narrow.weights, &narrow.adapters, {0, golden.config().layers});
    auto adapter = worker::model::build_adapter(*narrow.backend.ops, narrow.exec,
                                                *narrow.backend.allocator, *narrow.backend.ledger,
                                                golden.config(), dtype, golden_adapter(golden));
    ASSERT_TRUE(adapter.ok()) << adapter.status().to_string();
    narrow.adapters.set(narrow.exec, 1, *adapter);
    const double u = dtype == DType::kBF16 ? 0x1p-8 : 0x1p-11;
    const double allowed =
        4.0 * u * std::sqrt(16.0 * static_cast<double>(golden.config().layers) + 2.0);
    const auto names = {std::pair(std::int64_t{-1}, "logits_base"),
                        std::pair(std::int64_t{1}, "logits")};
    for (const auto& [slot, name] : names)
      EXPECT_LT(relative_error(logits(narrow, model, slot), golden.get(name)), allowed)
          << dtype_name(dtype) << " " << name;
    narrow.adapters.clear(narrow.exec, 1);
  }
}

TEST_P(ModelGoldens, LogitsWithAnImportedPeftAdapterAreThoseOfPeft) {
  auto adapter = worker::model::build_adapter(*engine.backend.ops, engine.exec,
                                              *engine.backend.allocator, *engine.backend.ledger,
                                              golden.config(), DType::kF32, golden_adapter(golden));
  ASSERT_TRUE(adapter.ok()) << adapter.status().to_string();
  engine.adapters.set(engine.exec, 1, *adapter);
  EXPECT_LT(relative_error(logits(1), golden.get("logits")), kTolerance);
  EXPECT_LT(relative_error(logits(-1), golden.get("logits_base")), kTolerance);
  engine.adapters.clear(engine.exec, 1);
}

TEST_P(ModelGoldens, AMergedModelGivesTheLogitsOfBaseAndAdapter) {
  const std::string folder =
      str(std::filesystem::temp_directory_path().string(), "/", random_id("merge-", 12));
  std::filesystem::create_directory(folder);
  worker::model::LoadedModel base;
  base.config = golden.config();
  base.source = worker::model::make_safetensors_source(golden.weights());
  const Status written =
      worker::model::write_merged_weights(base, golden_adapter(golden), DType::kF32, folder);
  ASSERT_TRUE(written.ok()) << written.to_string();
  // What config.json of ours says reads back as the same model.
  const auto text = worker::model::hf_config_json(golden.config(), DType::kF32);
  ASSERT_TRUE(text.ok()) << text.status().to_string();
  auto config = worker::model::ModelConfig::from_hf_json(*text);
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->canonical_json(), golden.config().canonical_json());
  Engine merged(kernels::make_cpu_backend({2, 0}), *config, DType::kF32,
                *worker::model::make_safetensors_source(
                    storage::Safetensors::open(folder + "/model.safetensors").value()));
  const Transformer plain(*merged.weights, &merged.adapters, {0, config->layers});
  kernels::ArenaScope scope(merged.activation_arena);
  const auto device = worker::train::upload_batch(merged.context, batch, bounds, -1, 0);
  const auto rows = device.tokens.tokens();
  const auto hidden = merged.activation_arena.alloc({rows, config->width}, DType::kF32);
  const auto out = merged.activation_arena.alloc({rows, config->vocab}, DType::kF32);
  plain.forward(merged.context, device.tokens, {}, hidden, nullptr, Recompute::kNone);
  plain.logits(merged.context, hidden, out);
  EXPECT_LT(relative_error(merged.download(out.rows(0, device.real_tokens)), golden.get("logits")),
            kTolerance);
  std::filesystem::remove_all(folder);
}

/// Loss and gradients of the golden's batch with trainable copies of the golden's adapter.
struct Gradients {
  double loss = 0.0;
  std::vector<HostAdapterTensor> values;  ///< dA, dB in a and b
};

Gradients gradients(Engine& engine, const Transformer& transformer,
                    const std::vector<HostAdapterTensor>& adapter,
                    const worker::data::MicroBatch& batch, const worker::train::BatchBounds& bounds,
                    Recompute recompute) {
  const worker::model::ModelConfig& config = engine.base->config();
  AdapterLayout layout;
  for (const HostAdapterTensor& t : adapter) layout.add(config, t.layer, t.site, t.rank, t.scale);
  kernels::ArenaScope scope(engine.activation_arena);
  const auto flat = engine.activation_arena.alloc({layout.elements}, DType::kF32);
  const auto grad = engine.activation_arena.alloc({layout.elements}, DType::kF32);
  engine.backend.ops->fill_zero(engine.exec, grad);
  std::vector<float> host(static_cast<std::size_t>(layout.elements));
  std::vector<std::array<std::optional<worker::model::AdapterTable::TrainablePair>, kSiteCount>>
      pairs(static_cast<std::size_t>(config.layers));
  for (std::size_t p = 0; p < adapter.size(); ++p) {
    const AdapterLayout::Pair& pair = layout.pairs[p];
    std::copy(adapter[p].a.begin(), adapter[p].a.end(), host.begin() + pair.a_begin);
    std::copy(adapter[p].b.begin(), adapter[p].b.end(), host.begin() + pair.b_begin);
    pairs[static_cast<std::size_t>(pair.layer)][static_cast<std::size_t>(pair.site)] =
        worker::model::AdapterTable::TrainablePair{
            {pair_a(pair, flat), pair_b(pair, flat), pair.scale,
             static_cast<std::int32_t>(pair.rank)},
            pair_a(pair, grad),
            pair_b(pair, grad)};
  }
  engine.backend.ops->upload(engine.exec, std::as_bytes(std::span(host)), flat);
  engine.adapters.set_trainable(engine.exec, 0, pairs);

  const auto device = worker::train::upload_batch(engine.context, batch, bounds, 0, kRank);
  const std::int64_t rows = device.tokens.tokens();
  const auto hidden = engine.activation_arena.alloc({rows, config.width}, DType::kF32);
  const auto dhidden = engine.activation_arena.alloc({rows, config.width}, DType::kF32);
  const auto loss = engine.activation_arena.alloc({rows}, DType::kF32);
  worker::model::Saved saved;
  NoSink sink;
  transformer.forward(engine.context, device.tokens, {}, hidden, &saved, recompute);
  transformer.loss(engine.context, hidden, device.labels,
                   1.0f / static_cast<float>(batch.trained_tokens), loss, {}, dhidden);
  transformer.backward(engine.context, device.tokens, dhidden, saved, recompute, {}, sink);
  Gradients out;
  for (float row : engine.download(loss)) out.loss += row;
  out.loss /= static_cast<double>(batch.trained_tokens);
  const std::vector<float> all = engine.download(grad);
  for (std::size_t p = 0; p < adapter.size(); ++p) {
    HostAdapterTensor t = adapter[p];
    const auto a = all.begin() + layout.pairs[p].a_begin, b = all.begin() + layout.pairs[p].b_begin;
    t.a.assign(a, a + static_cast<std::ptrdiff_t>(t.a.size()));
    t.b.assign(b, b + static_cast<std::ptrdiff_t>(t.b.size()));
    out.values.push_back(std::move(t));
  }
  engine.adapters.clear(engine.exec, 0);
  return out;
}

TEST_P(ModelGoldens, LossAndEveryLoraGradientAreThoseOfPeft) {
  const Gradients ours =
      gradients(engine, transformer, golden_adapter(golden), batch, bounds, Recompute::kNone);
  const double loss = golden.get("loss")[0];
  EXPECT_NEAR(ours.loss, loss, kTolerance * loss);
  for (const HostAdapterTensor& t : ours.values) {
    const std::string path = "grad." + worker::model::site_path(t.layer, t.site);
    EXPECT_LT(relative_error(t.a, golden.get(path + ".lora_A")), kTolerance) << path;
    EXPECT_LT(relative_error(t.b, golden.get(path + ".lora_B")), kTolerance) << path;
  }
}

TEST_P(ModelGoldens, RecomputingInsteadOfKeepingGivesTheSameBits) {
  const auto adapter = golden_adapter(golden);
  const Gradients kept = gradients(engine, transformer, adapter, batch, bounds, Recompute::kNone);
  for (Recompute recompute : {Recompute::kElementwise, Recompute::kMlp, Recompute::kBlock}) {
    const Gradients again = gradients(engine, transformer, adapter, batch, bounds, recompute);
    EXPECT_EQ(kept.loss, again.loss);
    for (std::size_t p = 0; p < kept.values.size(); ++p) {
      EXPECT_EQ(kept.values[p].a, again.values[p].a) << p;
      EXPECT_EQ(kept.values[p].b, again.values[p].b) << p;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, ModelGoldens,
                         testing::Values("llama_tied", "llama_grouped", "llama_rope_llama3",
                                         "llama_rope_linear", "llama_rope_yarn", "qwen2", "qwen3",
                                         "mistral"),
                         [](const auto& one) { return one.param; });

class TrainedGoldens : public testing::TestWithParam<std::string> {};

TEST_P(TrainedGoldens, FiftyStepsFollowPeft) {
  const ModelGolden golden(GetParam());
  Engine engine(make_test_backend(2), golden.config(), DType::kF32,
                *worker::model::make_safetensors_source(golden.weights()));
  const auto micro = golden.get<std::int32_t>("train_micro");
  std::vector<worker::data::OptimizerStep> steps;
  for (std::size_t m = 0; m + 1 < micro.size(); m += 2) {
    worker::data::OptimizerStep step;
    for (std::size_t k = m; k < m + 2; ++k) {
      step.micro_batches.push_back(golden.pack("train_", micro[k], micro[k + 1]));
      step.trained_tokens += step.micro_batches.back().trained_tokens;
    }
    steps.push_back(std::move(step));
  }
  const auto losses = golden.get("train_losses"), norms = golden.get("train_grad_norms");

  worker::train::SessionOptions options;
  protocol::TrainSettings& s = options.settings;
  s.lora_r = kRank;
  s.lora_alpha = 10.0;
  s.learning_rate = 5e-3;
  s.adam_beta2 = 0.98;
  s.weight_decay = 0.05;
  s.warmup_steps = 5;
  s.save_steps = 0;
  // The source passes over its 4 steps 13 times; the schedule must see 50.
  struct FirstFifty final : worker::train::BatchSource {
    std::unique_ptr<worker::train::BatchSource> all;
    [[nodiscard]] std::int64_t total_steps() const override { return 50; }
    [[nodiscard]] std::int64_t steps_per_epoch() const override { return 4; }
    Result<worker::data::OptimizerStep> step(std::int64_t index) override {
      return all->step(index);
    }
    [[nodiscard]] const std::vector<worker::data::MicroBatch>& eval_batches() const override {
      return all->eval_batches();
    }
    [[nodiscard]] const worker::train::BatchBounds& bounds() const override {
      return all->bounds();
    }
  };
  auto batches = std::make_unique<FirstFifty>();
  batches->all = worker::train::make_fixed_batches(std::move(steps), {}, 13);
  const auto initial = golden.adapter("train", kRank, kScale);
  options.initial = &initial;
  auto session =
      worker::train::TrainSession::create(engine.session_parts(), options, std::move(batches));
  ASSERT_TRUE(session.ok()) << session.status().to_string();
  std::size_t step = 0;
  while (!(*session)->finished()) {
    const auto event = (*session)->run_slice();
    ASSERT_TRUE(event.ok()) << event.status().to_string();
    if (const auto* done = std::get_if<worker::train::StepDone>(&event.value())) {
      EXPECT_NEAR(done->loss, losses[step], 1e-3) << "step " << step;
      EXPECT_NEAR(done->grad_norm, norms[step], 1e-2 * norms[step]) << "step " << step;
      ++step;
    }
  }
  EXPECT_EQ(step, losses.size());
  // Fifty steps of Adam magnify rounding: the whole adapter stays within 1e-2 of PEFT's.
  const auto ours = (*session)->host_adapter(DType::kF32);
  const auto theirs = golden.adapter("trained", kRank, kScale);
  std::vector<float> a, b;
  for (std::size_t p = 0; p < ours.size(); ++p) {
    a.insert(a.end(), ours[p].a.begin(), ours[p].a.end());
    a.insert(a.end(), ours[p].b.begin(), ours[p].b.end());
    b.insert(b.end(), theirs[p].a.begin(), theirs[p].a.end());
    b.insert(b.end(), theirs[p].b.begin(), theirs[p].b.end());
  }
  EXPECT_LT(relative_error(a, b), 1e-2);
}

INSTANTIATE_TEST_SUITE_P(Cases, TrainedGoldens, testing::Values("llama_grouped", "qwen2", "qwen3"),
                         [](const auto& one) { return one.param; });

}  // namespace
}  // namespace tandem::test
