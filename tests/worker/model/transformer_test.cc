#include "worker/model/transformer.h"

#include "protocol/base/random.h"
#include "tests/support/engine_fixture.h"
#include "worker/model/adapter_layout.h"
#include "worker/model/flat_layout.h"
#include "worker/train/device_batch.h"

#include <gtest/gtest.h>

namespace tandem::worker::model {
namespace {

constexpr std::int64_t kRank = 3;

/// Notes every use of the doors: "f0+" acquires block 0 for forward, "f0-" gives it back.
class WatchedWeights final : public WeightSource {
 public:
  WatchedWeights(WeightSource& inner, std::string& log) : inner_(inner), log_(log) {}
  const BlockWeights& acquire(std::int64_t layer, Phase phase) override {
    log_ += str(phase == Phase::kForward ? "f" : "b", layer, "+ ");
    return inner_.acquire(layer, phase);
  }
  void release(std::int64_t layer, Phase phase) override {
    log_ += str(phase == Phase::kForward ? "f" : "b", layer, "- ");
    inner_.release(layer, phase);
  }
  [[nodiscard]] const BaseWeights& base() const override { return inner_.base(); }

 private:
  WeightSource& inner_;
  std::string& log_;
};

class WatchedSink final : public GradSink {
 public:
  explicit WatchedSink(std::string& log) : log_(log) {}
  void ready(std::int64_t layer) override { log_ += str("g", layer, " "); }

 private:
  std::string& log_;
};

/// A model of three blocks with a trainable adapter in slot 0, and one packed batch.
class Blocks : public testing::TestWithParam<std::tuple<Recompute, bool>> {
 protected:
  Blocks() : engine(test::cpu_engine(config(), DType::kF32)) {
    Random random(2);
    batch.cu_seqlens.push_back(0);
    for (std::int64_t length : {9, 20, 4}) {
      for (std::int64_t t = 0; t < length; ++t) {
        batch.tokens.push_back(static_cast<std::int32_t>(random.below(96)));
        batch.labels.push_back(static_cast<std::int32_t>(random.below(96)));
        batch.positions.push_back(static_cast<std::int32_t>(t));
      }
      batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
    }
    for (std::int64_t layer = 0; layer < config().layers; ++layer)
      for (int s = 0; s < kSiteCount; ++s) layout.add(config(), layer, Site{s}, kRank, 1.5f);
    flat = engine->table_arena.alloc({layout.elements}, DType::kF32);
    grad = engine->table_arena.alloc({layout.elements}, DType::kF32);
    std::vector<float> host(static_cast<std::size_t>(layout.elements));
    for (float& value : host) value = 0.2f * (random.uniform() - 0.5f);
    engine->backend.ops->upload(engine->exec, std::as_bytes(std::span(host)), flat);
    std::vector<std::array<std::optional<AdapterTable::TrainablePair>, kSiteCount>> pairs(3);
    for (const AdapterLayout::Pair& pair : layout.pairs)
      pairs[static_cast<std::size_t>(pair.layer)][static_cast<std::size_t>(pair.site)] =
          AdapterTable::TrainablePair{{pair_a(pair, flat), pair_b(pair, flat), pair.scale,
                                       static_cast<std::int32_t>(kRank)},
                                      pair_a(pair, grad),
                                      pair_b(pair, grad)};
    engine->adapters.set_trainable(engine->exec, 0, pairs);
  }

  static Recompute recompute() { return std::get<0>(GetParam()); }
  static ModelConfig config() {
    ModelConfig config = test::tiny_config();
    config.layers = 3;
    config.qk_norm = std::get<1>(GetParam());
    return config;
  }

  struct Outcome {
    std::vector<float> hidden, gradients;
  };

  /// Forward and backward through stages that meet at `cuts`, as a pipeline would.
  Outcome run(const std::vector<std::int64_t>& cuts, Recompute recompute) {
    WatchedWeights weights(*engine->weights, log);
    WatchedSink sink(log);
    std::vector<Transformer> stages;
    for (std::size_t c = 0; c + 1 < cuts.size(); ++c)
      stages.emplace_back(weights, &engine->adapters, Stage{cuts[c], cuts[c + 1]});
    kernels::Arena& arena = engine->activation_arena;
    kernels::ArenaScope scope(arena);
    engine->backend.ops->fill_zero(engine->exec, grad);
    train::BatchBounds bounds;
    bounds.include(batch);
    const auto device = train::upload_batch(engine->context, batch, bounds, 0, kRank);
    const kernels::Shape shape{device.tokens.tokens(), config().width};
    std::vector<kernels::Tensor> hidden;
    std::vector<Saved> saved(stages.size());
    for (std::size_t s = 0; s < stages.size(); ++s) {
      hidden.push_back(arena.alloc(shape, DType::kF32));
      stages[s].forward(engine->context, device.tokens, s ? hidden[s - 1] : kernels::Tensor{},
                        hidden[s], &saved[s], recompute);
    }
    const auto loss = arena.alloc({shape[0]}, DType::kF32);
    kernels::Tensor dhidden = arena.alloc(shape, DType::kF32);
    stages.back().loss(engine->context, hidden.back(), device.labels, 0.1f, loss, {}, dhidden);
    for (std::size_t s = stages.size(); s-- > 0;) {
      const kernels::Tensor din = s ? arena.alloc(shape, DType::kF32) : kernels::Tensor{};
      stages[s].backward(engine->context, device.tokens, dhidden, saved[s], recompute, din, sink);
      dhidden = din;
    }
    return {engine->download(hidden.back()), engine->download(grad)};
  }

  std::unique_ptr<test::Engine> engine;
  data::MicroBatch batch;
  AdapterLayout layout;
  kernels::Tensor flat, grad;
  std::string log;
};

TEST_P(Blocks, StagesOneAfterAnotherAreTheWholeModelBitForBit) {
  const Outcome whole = run({0, 3}, recompute());
  double norm = 0.0;
  for (float g : whole.gradients) norm += static_cast<double>(g) * static_cast<double>(g);
  ASSERT_GT(norm, 0.0);
  for (const std::vector<std::int64_t>& cuts :
       {std::vector<std::int64_t>{0, 1, 3}, {0, 2, 3}, {0, 1, 2, 3}}) {
    const Outcome staged = run(cuts, recompute());
    EXPECT_EQ(staged.hidden, whole.hidden);
    EXPECT_EQ(staged.gradients, whole.gradients);
  }
}

TEST_P(Blocks, WeightsComeThroughTheDoorsAndGradientsAreAnnouncedInBackwardOrder) {
  run({0, 3}, recompute());
  EXPECT_EQ(log, "f0+ f0- f1+ f1- f2+ f2- b2+ b2- g2 b1+ b1- g1 b0+ b0- g0 ");
}

TEST_P(Blocks, ForwardWithoutBackwardGivesTheSameBitsAndLeavesNothing) {
  const Outcome whole = run({0, 3}, recompute());
  const Transformer transformer(*engine->weights, &engine->adapters, {0, 3});
  kernels::Arena& arena = engine->activation_arena;
  kernels::ArenaScope scope(arena);
  train::BatchBounds bounds;
  bounds.include(batch);
  const auto device = train::upload_batch(engine->context, batch, bounds, 0, kRank);
  const auto hidden = arena.alloc({device.tokens.tokens(), config().width}, DType::kF32);
  const std::int64_t mark = arena.mark();
  transformer.forward(engine->context, device.tokens, {}, hidden, nullptr, recompute());
  EXPECT_EQ(engine->download(hidden), whole.hidden);
  EXPECT_EQ(arena.mark(), mark);
}

std::string policy_name(const testing::TestParamInfo<std::tuple<Recompute, bool>>& info) {
  const Recompute recompute = std::get<0>(info.param);
  return str(recompute == Recompute::kNone          ? "none"
             : recompute == Recompute::kElementwise ? "elementwise"
             : recompute == Recompute::kMlp         ? "mlp"
                                                    : "block",
             std::get<1>(info.param) ? "_qk_norm" : "");
}
INSTANTIATE_TEST_SUITE_P(Policies, Blocks,
                         testing::Combine(testing::Values(Recompute::kNone, Recompute::kElementwise,
                                                          Recompute::kMlp, Recompute::kBlock),
                                          testing::Bool()),
                         policy_name);

/// What an update of a buffer writes by plain_block() is what unpack_block() would.
TEST(FlatLayout, PlainRowsAreTheStacksOfABufferInTheWeightsMemory) {
  kernels::DeviceProfile gpu;
  gpu.type = kernels::DeviceType::kCuda;
  for (const std::string family : {"llama", "qwen2", "qwen3"})
    for (const bool tied : {false, true}) {
      ModelConfig config = test::tiny_config();
      config.family = family;
      config.qkv_bias = family == "qwen2";
      config.qk_norm = family == "qwen3";
      config.tied_embedding = tied;
      test::Engine engine(kernels::make_meta_backend(gpu), config, DType::kBF16,
                          *make_random_source(config, 7));
      const auto expect = [&](const FlatLayout& layout, const std::vector<PlainRows>& got,
                              const kernels::Tensor& flat,
                              const std::vector<std::pair<kernels::Tensor, const void*>>& want) {
        ASSERT_EQ(got.size(), want.size());
        std::int64_t elements = 0, held = 0;
        for (std::size_t s = 0; s < want.size(); ++s) {
          const auto& [view, memory] = want[s];
          EXPECT_EQ(flat.rows(got[s].begin, 0).data, view.data) << "stack " << s;
          EXPECT_EQ(got[s].values.bytes(), view.bytes()) << "stack " << s;
          EXPECT_EQ(got[s].values.data, memory) << "stack " << s;
          elements += got[s].values.elements();
        }
        for (const FlatTensor& tensor : layout.tensors) held += tensor.slice.elements();
        EXPECT_EQ(elements, held);
      };
      const auto buffer = [&](const FlatLayout& layout) {
        return engine.activation_arena.alloc({layout.elements}, DType::kBF16);
      };
      const FlatLayout layout = block_layout(config, engine.base->shard(), 1);
      const kernels::Tensor flat = buffer(layout);
      const BlockGrads views = block_views(layout, flat);
      const BlockWeights& block = engine.base->block(1);
      std::vector<std::pair<kernels::Tensor, const void*>> want{
          {views.attention_norm, block.attention_norm.data},
          {views.mlp_norm, block.mlp_norm.data},
          {views.qkv, block.qkv.storage.data}};
      if (config.qkv_bias) want.emplace_back(views.qkv_bias, block.qkv_bias.data);
      if (config.qk_norm) want.emplace_back(views.qk_norm, block.qk_norm.data);
      want.emplace_back(views.o, block.o.storage.data);
      want.emplace_back(views.gate_up, block.gate_up.storage.data);
      want.emplace_back(views.down, block.down.storage.data);
      expect(layout, plain_block(layout, block), flat, want);

      const FlatLayout ends = ends_layout(config, engine.base->shard());
      const kernels::Tensor flat_ends = buffer(ends);
      const EndGrads end = end_views(ends, flat_ends);
      want = {{end.embedding, engine.base->embedding().storage.data}};
      if (!tied) want.emplace_back(end.head, engine.base->lm_head().storage.data);
      want.emplace_back(end.final_norm, engine.base->final_norm().data);
      expect(ends, plain_ends(ends, *engine.base), flat_ends, want);
    }
}

}  // namespace
}  // namespace tandem::worker::model
