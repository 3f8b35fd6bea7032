// The Invariant bar: a row's tokens and log-probabilities are bitwise the same alone and in any
// company, however it was cut, cached, preempted or padded.
#include "tests/worker/serve/serve_fixture.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace tandem::worker::serve {
namespace {

void expect_same(const Outcome& expected, const Outcome& got, const std::string& where) {
  EXPECT_EQ(expected.ids, got.ids) << where;
  ASSERT_EQ(expected.logprobs.size(), got.logprobs.size()) << where;
  for (std::size_t i = 0; i < expected.logprobs.size(); ++i)
    EXPECT_EQ(expected.logprobs[i], got.logprobs[i]) << where << " token " << i;
  ASSERT_EQ(expected.top.size(), got.top.size()) << where;
  for (std::size_t i = 0; i < expected.top.size(); ++i) {
    EXPECT_EQ(expected.top[i].id, got.top[i].id) << where;
    EXPECT_EQ(expected.top[i].logprob, got.top[i].logprob) << where;
  }
  EXPECT_EQ(expected.prompt_logprobs, got.prompt_logprobs) << where;
  EXPECT_EQ(expected.text, got.text) << where;
  EXPECT_EQ(expected.finish, got.finish) << where;
}

/// The tiny model, and one whose heads are normed before they are rotated.
std::vector<model::ModelConfig> tiny_models() {
  std::vector<model::ModelConfig> models(2, tiny_config());
  models[1].family = "qwen3";
  models[1].qk_norm = true;
  return models;
}

TEST(ServeNumerics, GreedyIsTheArgmaxOfThePackedForward) {
  for (const model::ModelConfig& config : tiny_models()) {
    ServeBench bench(ServeBench::cpu(), config);
    const auto weights = bench.adapter(1);
    for (const bool adapted : {false, true}) {
      auto engine = bench.engine();
      ASSERT_TRUE(engine->install_adapter(ServeBench::name(1), weights).ok());
      Random random(adapted ? 3 : 4);
      GenerateRequest r = request("r", random_prompt(random, 21), 20);
      if (adapted) r.adapter = ServeBench::name(1);
      const Outcome got = run_alone(*engine, r);
      ASSERT_EQ(got.ids.size(), 20u);
      std::vector<std::int32_t> tokens = r.prompt;
      for (std::size_t i = 0; i < got.ids.size(); ++i) {
        const auto logits = packed_logits(bench, tokens, adapted ? 0 : -1, weights->rank_max);
        const auto row = std::span(logits).last(static_cast<std::size_t>(bench.config.vocab));
        const auto argmax = std::max_element(row.begin(), row.end()) - row.begin();
        ASSERT_EQ(got.ids[i], argmax) << "token " << i;
        double sum = 0;
        for (float l : row) sum += std::exp(static_cast<double>(l) - row[argmax]);
        EXPECT_NEAR(got.logprobs[i], -std::log(sum), 1e-5) << "token " << i;
        tokens.push_back(got.ids[i]);
      }
    }
  }
}

/// Of each token but the first, as the trainer computes it with the adapter in `slot` (-1: none).
std::vector<float> trainer_losses(ServeBench& bench, const std::vector<std::int32_t>& tokens,
                                  std::int32_t slot, std::int64_t rank_max) {
  const auto t = static_cast<std::int64_t>(tokens.size());
  const kernels::ArenaScope scope(bench.activations);
  std::vector<std::int32_t> labels(tokens.begin() + 1, tokens.end());
  labels.push_back(static_cast<std::int32_t>(kernels::kIgnoreLabel));
  const model::Transformer transformer(*bench.weights, &bench.table, {0, bench.config.layers});
  const kernels::Tensor hidden = packed_hidden(bench, transformer, tokens, slot, rank_max);
  const kernels::Tensor loss = bench.activations.alloc({t}, DType::kF32);
  transformer.loss(bench.context, hidden, bench.upload(labels), 0.0f, loss, {}, {});
  std::vector<float> losses(tokens.size());
  bench.backend.ops->download(bench.exec, loss, std::as_writable_bytes(std::span(losses)));
  losses.pop_back();
  return losses;
}

// What the trainer calls loss, the server calls minus log-probability: the same bits.
TEST(ServeNumerics, PromptLogprobsAreTheTrainersLossesBitForBit) {
  for (const model::ModelConfig& config : tiny_models()) {
    ServeBench bench(ServeBench::cpu(), config);
    const auto weights = bench.adapter(5);
    Random random(9);
    const std::vector<std::int32_t> tokens = random_prompt(random, 90);
    for (const std::int64_t chunk : {1, 7, 16, 0}) {
      ServeOptions o = bench.options();
      o.prefill_chunk_max = chunk;
      auto engine = bench.engine(o);
      ASSERT_TRUE(engine->install_adapter(ServeBench::name(5), weights).ok());
      GenerateRequest r = request("score", tokens, 0);
      r.adapter = ServeBench::name(5);
      r.sampling.prompt_logprobs_from = 1;
      const Outcome got = run_alone(*engine, r);
      EXPECT_EQ(got.finish, FinishReason::kLength);
      ASSERT_EQ(got.prompt_logprobs.size(), tokens.size() - 1);

      const auto losses = trainer_losses(bench, tokens, 0, weights->rank_max);
      for (std::size_t i = 0; i < losses.size(); ++i)
        EXPECT_EQ(got.prompt_logprobs[i], -losses[i]) << "token " << i + 1 << " chunk " << chunk;
    }
  }
}

TEST(ServeNumerics, ScoringAGenerationGivesItsLogprobsBack) {
  ServeBench bench(ServeBench::cpu());
  auto engine = bench.engine();
  Random random(2);
  const GenerateRequest r = request("r", random_prompt(random, 30), 25);
  const Outcome got = run_alone(*engine, r);
  GenerateRequest score = request("score", r.prompt, 0);
  score.prompt.insert(score.prompt.end(), got.ids.begin(), got.ids.end());
  score.sampling.prompt_logprobs_from = static_cast<std::int64_t>(r.prompt.size());
  const Outcome scored = run_alone(*engine, score);
  EXPECT_GT(scored.usage.cached_prompt_tokens, 0);  // only what nobody asked about
  EXPECT_EQ(scored.prompt_logprobs, got.logprobs);
}

/// Of sizes that a GPU's own kernels take, with room for prompts of more than 1,024 tokens.
model::ModelConfig gpu_config(std::int64_t head_dim) {
  model::ModelConfig config = tiny_config();
  config.head_dim = head_dim;
  config.heads = head_dim == 64 ? 6 : 8;
  config.kv_heads = 2;
  config.width = 384;
  config.vocab = 320;
  config.mlp_width = 1024;
  config.layers = 2;
  config.context_max = 1400;
  return config;
}

// On a GPU bf16 is Invariant too, where it is asked for: kernels of many and of few rows add up
// alike.
TEST(ServeNumerics, OnAGpuRowsInBf16KeepTheirBitsInAnyChunkAndCompany) {
  if (!test::on_gpu()) GTEST_SKIP() << "bf16 on a CPU promises Replay only";
  for (const std::int64_t head_dim : {64, 128}) {
    const model::ModelConfig config = gpu_config(head_dim);
    ServeBench bench(ServeBench::cpu(), config, 4, DType::kBF16);
    const auto weights = bench.adapter(3, 0.1f);
    std::vector<GenerateRequest> requests;
    Random random(static_cast<std::uint64_t>(head_dim));
    for (const std::int64_t length : {1, 7, 64, 129, 700, 1150}) {
      GenerateRequest r = request(str("prompt of ", length), random_prompt(random, length));
      r.sampling.logprobs = 2;
      if (length == 64 || length == 700) r.adapter = ServeBench::name(3);
      if (length >= 64) r.sampling.prompt_logprobs_from = length / 2;
      requests.push_back(std::move(r));
    }
    const auto make = [&](std::int64_t chunk, bool reuse) {
      ServeOptions o = bench.options();
      o.prefill_chunk_max = chunk;
      o.prefix_cache = reuse;
      o.kv_bytes_max = 512 * kv_layout(config, bench.dtype, o).block_bytes;
      o.max_batch_tokens = chunk == 0 ? 1400 : 2 * chunk + 8;
      auto engine = bench.engine(o);
      EXPECT_TRUE(engine->install_adapter(ServeBench::name(3), weights).ok());
      return engine;
    };
    Outcomes alone;  // one request at a time, each prompt in one piece
    {
      auto engine = make(0, false);
      for (const GenerateRequest& r : requests) alone[r.id.value] = run_alone(*engine, r);
    }
    for (const std::int64_t chunk : {1, 7, 64, 65, 127, 128, 129, 1000, 0}) {
      auto engine = make(chunk, true);
      for (const GenerateRequest& r : requests) ASSERT_TRUE(engine->submit(r).ok());
      const Outcomes got = drain(*engine);
      const std::string where = str("head dim ", head_dim, ", chunks of ", chunk, ", ");
      for (const GenerateRequest& r : requests)
        expect_same(alone.at(r.id.value), got.at(r.id.value), where + r.id.value);
      // What was decoded, read again as a prompt (its beginning from the cache) and gone on with.
      const GenerateRequest& long_one = requests.back();
      const Outcome& first = alone.at(long_one.id.value);
      GenerateRequest again = request("again", long_one.prompt, 7);
      again.prompt.insert(again.prompt.end(), first.ids.begin(), first.ids.begin() + 5);
      const Outcome rest = run_alone(*engine, again);
      EXPECT_GT(rest.usage.cached_prompt_tokens, 0);
      EXPECT_EQ(rest.ids, std::vector<std::int32_t>(first.ids.begin() + 5, first.ids.end()));
      EXPECT_EQ(rest.logprobs, std::vector<float>(first.logprobs.begin() + 5, first.logprobs.end()))
          << where;
    }
  }
}

// Rows of one adapter, of several and of none take different products from 1,024 rows on. Each is a
// sum in an order of its own: they may lie as far apart as the trainer's own two orders do, times
// 3, of which an adapter that is left out, or another's, is many times as much.
TEST(ServeNumerics, OnAGpuLongPromptsOfAnyMixOfAdaptersAreTheTrainersLosses) {
  if (!test::on_gpu()) GTEST_SKIP() << "a CPU has one kind of product";
  model::ModelConfig config = gpu_config(64);
  config.layers = 3;
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    ServeBench bench(ServeBench::cpu(), config, 4, dtype);
    Random random(11);
    const auto tokens = random_prompt(random, 1100);
    const auto adapters = {bench.adapter(3, 0.2f), bench.adapter(4, 0.2f)};
    std::int64_t rank_max = 0;
    std::int32_t slot = 0;
    for (const auto& adapter : adapters) {
      bench.table.set(bench.exec, slot++, adapter);
      rank_max = std::max(rank_max, adapter->rank_max);
    }
    const auto apart = [](std::span<const float> a, std::span<const float> b, float sign) {
      EXPECT_EQ(a.size(), b.size());
      double sum = 0;
      for (std::size_t i = 0; i < a.size(); ++i) sum += std::pow(a[i] - sign * b[i], 2.0);
      return std::sqrt(sum / static_cast<double>(a.size()));
    };
    std::vector<std::vector<float>> losses;  // without an adapter, with the first, the second
    double noise = 0;
    for (const std::int32_t s : {-1, 0, 1}) {
      bench.exec.numerics = kernels::Numerics::kInvariant;
      const auto ordered = trainer_losses(bench, tokens, s, rank_max);
      bench.exec.numerics = kernels::Numerics::kReplay;
      losses.push_back(trainer_losses(bench, tokens, s, rank_max));
      noise = std::max(noise, apart(losses.back(), ordered, 1));
    }
    for (const auto& [a, b] : {std::pair{0, 1}, {0, 2}, {1, 2}})
      EXPECT_GT(apart(losses[a], losses[b], 1), 10 * noise);

    const auto score = [&](std::int64_t chunk, std::span<const int> of, const std::string& where) {
      ServeOptions o = bench.options();
      o.prefill_chunk_max = chunk;
      o.max_batch_tokens = 3 * 1152;
      o.kv_bytes_max = 512 * kv_layout(config, dtype, o).block_bytes;
      auto engine = bench.engine(o);
      std::uint64_t seed = 3;
      for (const auto& adapter : adapters)
        ASSERT_TRUE(engine->install_adapter(ServeBench::name(seed++), adapter).ok());
      for (const int a : of) {
        GenerateRequest r = request(str("of ", a), tokens, 0);
        if (a > 0) r.adapter = ServeBench::name(static_cast<std::uint64_t>(a + 2));
        r.sampling.prompt_logprobs_from = 1;
        ASSERT_TRUE(engine->submit(r).ok());
      }
      const Outcomes got = drain(*engine);
      for (const int a : of)
        EXPECT_LE(
            apart(losses[static_cast<std::size_t>(a)], got.at(str("of ", a)).prompt_logprobs, -1),
            3 * noise)
            << dtype_name(dtype) << ", " << where << ", adapter " << a;
    };
    for (const int a : {0, 1, 2}) score(0, std::array{a}, "alone");
    score(0, std::array{1, 2}, "two adapters");
    score(0, std::array{0, 1, 2}, "all");
    score(300, std::array{1}, "in chunks");
    score(300, std::array{2, 0, 1}, "all in chunks");
  }
}

/// Requests with every kind of sampling, some with common beginnings, some with adapters.
std::vector<GenerateRequest> mixed_requests(std::uint64_t seed, std::size_t count) {
  Random random(seed, 5);
  std::vector<std::vector<std::int32_t>> beginnings;
  for (int i = 0; i < 3; ++i) beginnings.push_back(random_prompt(random, 33));
  std::vector<GenerateRequest> all;
  for (std::size_t i = 0; i < count; ++i) {
    std::vector<std::int32_t> prompt;
    if (random.below(2)) prompt = beginnings[random.below(3)];
    const auto tail = random_prompt(random, 1 + static_cast<std::int64_t>(random.below(20)));
    prompt.insert(prompt.end(), tail.begin(), tail.end());
    GenerateRequest r =
        request(str("request ", i), prompt, 1 + static_cast<std::int64_t>(random.below(60)));
    SamplingParams& p = r.sampling;
    p.logprobs = static_cast<std::int64_t>(random.below(4));
    if (random.below(3)) p.temperature = 0.5f + random.uniform();
    if (random.below(3) == 0) p.top_k = 1 + static_cast<std::int64_t>(random.below(40));
    if (random.below(3) == 0) p.top_p = 0.5f + 0.5f * random.uniform();
    if (random.below(3) == 0) p.min_p = 0.1f * random.uniform();
    if (random.below(3) == 0) p.repetition_penalty = 1.0f + random.uniform();
    if (random.below(4) == 0) p.presence_penalty = random.uniform();
    if (random.below(4) == 0) p.frequency_penalty = random.uniform();
    if (random.below(4) == 0)
      p.prompt_logprobs_from = 1 + static_cast<std::int64_t>(random.below(prompt.size()));
    if (random.below(2)) p.seed = random.next();
    if (random.below(3)) r.adapter = ServeBench::name(random.below(4));
    all.push_back(std::move(r));
  }
  return all;
}

TEST(ServeNumerics, PreemptedSequencesGoOnBitForBit) {
  ServeBench bench(ServeBench::cpu());
  Random random(8);
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 4; ++i) {
    requests.push_back(request(str("r", i), random_prompt(random, 9), 100));
    requests.back().sampling.temperature = 1.0f;
    requests.back().sampling.frequency_penalty = 0.3f;
  }
  Outcomes alone;
  for (const GenerateRequest& r : requests) alone[r.id.value] = run_alone(*bench.engine(), r);
  for (const bool reuse : {false, true}) {
    ServeOptions o = bench.options();
    o.prefix_cache = reuse;
    o.kv_bytes_max = 12 * kv_layout(bench.config, bench.dtype, o).block_bytes;
    auto engine = bench.engine(o);
    for (const GenerateRequest& r : requests) ASSERT_TRUE(engine->submit(r).ok());
    const Outcomes got = drain(*engine);
    EXPECT_GE(engine->stats().preemptions, 2);
    for (const GenerateRequest& r : requests)
      expect_same(alone[r.id.value], got.at(r.id.value), r.id.value);
  }
}

class ServeInvariance : public testing::TestWithParam<std::uint64_t> {};

TEST_P(ServeInvariance, NothingAroundARowChangesItsBits) {
  const std::uint64_t seed = GetParam();
  ServeBench bench(ServeBench::cpu(seed == 1 ? 2 : 1));
  std::vector<std::shared_ptr<const model::AdapterWeights>> adapters;
  for (std::uint64_t a = 0; a < 4; ++a) adapters.push_back(bench.adapter(a));
  const auto requests = mixed_requests(seed, 16);
  const auto install_all = [&](ServeEngine& engine) {
    for (std::uint64_t a = 0; a < 4; ++a)
      ASSERT_TRUE(engine.install_adapter(ServeBench::name(a), adapters[a]).ok());
  };
  // Alone: one request at a time, nothing cached, prefill in one piece.
  Outcomes alone;
  {
    ServeOptions o = bench.options();
    o.prefix_cache = false;
    o.max_batch_tokens = 160;
    auto engine = bench.engine(o);
    install_all(*engine);
    for (const GenerateRequest& r : requests) alone[r.id.value] = run_alone(*engine, r);
  }
  std::int64_t hits = 0;
  for (std::uint64_t variant = 0; variant < 6; ++variant) {
    Random random(seed, 100 + variant);
    ServeOptions o = bench.options();
    const std::array<std::int64_t, 4> chunks{1, 7, 16, 0};
    o.prefill_chunk_max = chunks[variant % 4];
    o.prefix_cache = variant != 1;
    o.block_size = variant % 2 ? 32 : 16;
    o.max_running = 3 + static_cast<std::int64_t>(random.below(7));
    o.max_batch_tokens = o.max_running + 1 + static_cast<std::int64_t>(random.below(60));
    if (variant == 2) o.token_buckets = {1, 2, 4, 8, 16, 32, 64, 128};
    if (variant >= 3)  // room for little more than one sequence: preemption
      o.kv_bytes_max = (160 / o.block_size) * kv_layout(bench.config, bench.dtype, o).block_bytes;
    auto engine = bench.engine(o, variant == 4 ? 2 : 4);  // fewer slots than adapters
    install_all(*engine);
    Outcomes got;
    std::vector<std::size_t> order(requests.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    random.shuffle(order);
    for (const std::size_t i : order) {
      ASSERT_TRUE(engine->submit(requests[i]).ok());
      for (std::uint64_t steps = random.below(4); steps > 0 && engine->has_work(); --steps)
        take(engine->step(), got);
      if (variant == 5 && random.below(3) == 0) {  // a training job takes memory and returns it
        engine->set_kv_limit(128 / o.block_size);
        if (engine->has_work()) take(engine->step(), got);
        engine->set_kv_limit(160 / o.block_size);
      }
    }
    drain(*engine, got);
    for (const GenerateRequest& r : requests)
      expect_same(alone[r.id.value], got[r.id.value],
                  str("seed ", seed, " variant ", variant, " ", r.id));
    const ServeStats stats = engine->stats();
    EXPECT_EQ(stats.kv_blocks_free, stats.kv_blocks_total);
    hits += stats.prefix_hits;
  }
  EXPECT_GT(hits, 0) << "the variants must hit the prefix cache";
}
INSTANTIATE_TEST_SUITE_P(Seeds, ServeInvariance, testing::Range<std::uint64_t>(0, 6));

TEST(ServeNumerics, AnAdapterWithNanEndsItsOwnRequestsOnly) {
  ServeBench bench(ServeBench::cpu());
  auto engine = bench.engine();
  Random random(1);
  const GenerateRequest healthy = request("healthy", random_prompt(random, 20), 10);
  const Outcome alone = run_alone(*engine, healthy);
  const auto shape = model::site_shape(bench.config, model::Site::kDown);
  model::HostAdapterTensor broken{1, model::Site::kDown, 1, 1.0f, {}, {}};
  broken.a.assign(static_cast<std::size_t>(shape.i), std::numeric_limits<float>::quiet_NaN());
  broken.b.assign(static_cast<std::size_t>(shape.n), 1.0f);
  const auto weights =
      model::build_adapter(*bench.backend.ops, bench.exec, *bench.backend.allocator,
                           *bench.backend.ledger, bench.config, bench.dtype, {broken});
  ASSERT_TRUE(weights.ok());
  ASSERT_TRUE(engine->install_adapter(ServeBench::name(9), *weights).ok());
  GenerateRequest sick = request("sick", random_prompt(random, 20), 10);
  sick.adapter = ServeBench::name(9);
  ASSERT_TRUE(engine->submit(sick).ok());
  ASSERT_TRUE(engine->submit(healthy).ok());
  const Outcomes got = drain(*engine);
  EXPECT_EQ(got.at("sick").finish, FinishReason::kError);
  EXPECT_NE(got.at("sick").error.message().find("not finite"), std::string::npos);
  expect_same(alone, got.at("healthy"), "beside NaN");
}

}  // namespace
}  // namespace tandem::worker::serve
