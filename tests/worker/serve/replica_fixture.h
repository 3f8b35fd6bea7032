// A sharded replica for tests: every rank calls run_replica with its communicator, be it a thread's
// or a process's. Rank 0 plays a script of requests and gets what came out.
#pragma once

#include "tests/worker/serve/serve_fixture.h"
#include "worker/comm/layout.h"
#include "worker/memory/estimator.h"

#include <atomic>

namespace tandem::worker::serve {

/// Sizes with nothing equal to another that tp 4 and pp 4 divide; the vocabulary they do not. The
/// tied one norms its heads.
inline model::ModelConfig replica_model(bool tied) {
  model::ModelConfig c = tiny_config();
  c.vocab = 301;
  c.width = 48;
  c.layers = 5;
  c.heads = 8;
  c.kv_heads = 4;
  c.head_dim = 8;
  c.mlp_width = 92;
  c.tied_embedding = c.qk_norm = tied;
  return c;
}

/// Passes everything on, but has no memory to map while `full`.
class FullAllocator final : public kernels::Allocator {
 public:
  FullAllocator(kernels::Allocator& real, const std::atomic<bool>& full)
      : real_(real), full_(full) {}
  Result<void*> reserve(std::int64_t bytes) override { return real_.reserve(bytes); }
  Status map(void* base, std::int64_t from, std::int64_t to) override {
    if (full_) return refused_error("this rank's memory is full");
    return real_.map(base, from, to);
  }
  void unmap(void* base, std::int64_t from, std::int64_t to) override {
    real_.unmap(base, from, to);
  }
  void release(void* base, std::int64_t bytes) override { real_.release(base, bytes); }

 private:
  kernels::Allocator& real_;
  const std::atomic<bool>& full_;
};

/// One rank's engine over its part of the model.
struct ReplicaRank {
  ReplicaRank(comm::Communicator& gang, const comm::Layout& layout, bool tied)
      : rank(gang.rank()), groups(comm::make_groups(gang, layout)) {
    const model::ModelConfig config = replica_model(tied);
    const model::ModelShard shard{
        layout.tp_rank(rank),
        layout.tp,
        {model::stage_at(config.layers, layout.pp, layout.pp_rank(rank))}};
    TANDEM_CHECK(model::check_shard(config, layout.tp, layout.pp).ok());
    const auto source = model::make_random_source(config, 7);
    base = model::BaseWeights::load(*backend.ops, exec, weights_arena, config, DType::kF32, *source,
                                    shard)
               .value();
    weights = model::make_resident_weights(base);
    table.emplace(*backend.ops, exec, adapters_arena, base->config(), 4);
    context.emplace(model::Context{*backend.ops, exec, *groups.tp, activations, DType::kF32});
    link = make_comm_link(*groups.model, context->exec);
    ranks.emplace(ReplicaRanks{*groups.model, *groups.pp, *link});
  }

  /// The same on every rank.
  [[nodiscard]] ServeOptions options() const {
    ServeOptions o;
    o.max_batch_tokens = 40;
    o.max_running = 6;
    o.max_waiting = 64;
    o.adapter_rank_max = 16;
    // 40 blocks on the largest stage.
    const model::Stage first = model::stage_at(base->config().layers, groups.pp->size(), 0);
    o.kv_bytes_max = 40 * kv_layout(base->config(), DType::kF32, o, first).block_bytes;
    return o;
  }

  std::unique_ptr<ServeEngine> engine(bool alone) {
    const ServeOptions o = options();
    ServeParts parts{.allocator = allocator,
                     .ledger = *backend.ledger,
                     .context = *context,
                     .weights = *weights,
                     .adapters = &*table,
                     .slot_begin = 0,
                     .slot_count = 4,
                     .tokenizer = tokenizer,
                     .clock = clock};
    if (!alone) parts.ranks = &*ranks;
    return ServeEngine::create(parts, o).value();
  }

  const int rank;
  kernels::Backend backend = test::make_test_backend(1);
  kernels::Arena workspace{*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                           "workspace", std::int64_t{1} << 30};
  kernels::Arena activations{*backend.allocator, *backend.ledger, kernels::MemoryKind::kActivations,
                             "activations", std::int64_t{1} << 30};
  kernels::Arena weights_arena{*backend.allocator, *backend.ledger, kernels::MemoryKind::kWeights,
                               "weights", std::int64_t{1} << 30};
  kernels::Arena adapters_arena{*backend.allocator, *backend.ledger, kernels::MemoryKind::kAdapters,
                                "table", std::int64_t{1} << 24};
  kernels::Exec exec{workspace, {}, kernels::Numerics::kInvariant};
  std::atomic<bool> full = false;
  FullAllocator allocator{*backend.allocator, full};
  comm::Groups groups;
  std::shared_ptr<const model::BaseWeights> base;
  std::unique_ptr<model::WeightSource> weights;
  std::optional<model::AdapterTable> table;
  std::optional<model::Context> context;
  std::unique_ptr<CallLink> link;
  std::optional<ReplicaRanks> ranks;
  std::optional<text::Tokenizer> tokenizer = byte_tokenizer();
  ManualClock clock;
};

/// An adapter of the whole model: random sites, so that some stages may have none of it.
inline std::vector<model::HostAdapterTensor> replica_adapter(std::uint64_t seed, bool tied) {
  const model::ModelConfig config = replica_model(tied);
  Random random(seed, 77);
  const auto rank = static_cast<std::int64_t>(1 + random.below(6));
  std::vector<model::HostAdapterTensor> tensors;
  for (std::int64_t layer = 0; layer < (seed % 2 == 0 ? 1 : config.layers); ++layer)
    for (int s = 0; s < model::kSiteCount; ++s) {
      const model::SiteShape shape = model::site_shape(config, model::Site{s});
      model::HostAdapterTensor t{layer, model::Site{s}, rank, 1.0f, {}, {}};
      for (std::int64_t i = 0; i < rank * shape.i; ++i) t.a.push_back(0.1f * random.normal());
      for (std::int64_t i = 0; i < rank * shape.n; ++i) t.b.push_back(0.3f * random.normal());
      tensors.push_back(std::move(t));
    }
  return tensors;
}

/// Greedy and seeded, with and without adapters, scored prompts, banned tokens, penalties, shared
/// prefixes, cancellation, less KV half way, and an adapter that comes late.
inline Outcomes play(ServeEngine& engine, ManualClock& clock, bool tied) {
  Random random(42);
  Outcomes outcomes;
  const auto shared = random_prompt(random, 33);
  const auto name = [](std::uint64_t seed) { return sha256(str("adapter ", seed)); };
  const auto submit = [&](GenerateRequest r) {
    const Status status = engine.submit(std::move(r));
    EXPECT_TRUE(status.ok()) << status.to_string();
  };
  EXPECT_TRUE(engine.install_adapter(name(1), replica_adapter(1, tied)).ok());
  EXPECT_TRUE(engine.install_adapter(name(2), replica_adapter(2, tied)).ok());
  auto bad = replica_adapter(1, tied);
  bad.front().a.pop_back();
  EXPECT_EQ(engine.install_adapter(name(9), bad).code(), StatusCode::kInvalid);
  for (int i = 0; i < 10; ++i) {
    auto prompt = i % 3 == 0 ? shared : random_prompt(random, 5 + 7 * i);
    prompt.push_back(i);
    GenerateRequest r = request(str("r", i), std::move(prompt), 16);
    if (i % 4 == 1) r.adapter = name(1);
    if (i % 4 == 2) r.adapter = name(2);
    if (i % 4 == 3) r.adapter = name(3);  // comes later
    if (i % 5 == 2) {
      r.sampling.temperature = 0.8f;
      r.sampling.seed = 5;
      r.sampling.top_p = 0.9f;
      r.sampling.repetition_penalty = 1.2f;
      r.sampling.logprobs = 3;
    }
    if (i == 4) {
      r.sampling.ignore_eos = false;
      r.sampling.min_tokens = 9;
      r.sampling.stop_token_ids = {1, 2, 3, 4, 5, 6, 7};
    }
    if (i == 5) r.sampling.prompt_logprobs_from = 2;
    submit(std::move(r));
  }
  for (int step = 0; step < 12; ++step) {
    clock.advance(3);
    take(engine.step(), outcomes);
  }
  engine.cancel(RequestId("r7"));
  engine.set_token_budget(20);
  engine.set_kv_limit(16);
  EXPECT_EQ(engine.missing_adapters(), std::vector<Digest>{name(3)});
  EXPECT_TRUE(engine.install_adapter(name(3), replica_adapter(3, tied)).ok());
  drain(engine, outcomes);
  engine.set_kv_limit(1000);
  GenerateRequest late = request("late", shared, 8);
  late.adapter = name(8);  // never comes
  submit(std::move(late));
  clock.advance(scaled_ms(60'000));
  drain(engine, outcomes);
  return outcomes;
}

/// Rank 0's outcomes; nothing on the others. Each rank holds the bytes that the estimate says.
inline Outcomes run_replica(comm::Communicator& gang, const comm::Layout& layout, bool tied) {
  ReplicaRank rank(gang, layout, tied);
  const auto engine = rank.engine(false);
  const auto want = memory::estimate_serving(rank.backend.ops->profile(), replica_model(tied),
                                             DType::kF32, rank.options(), 4, layout, gang.rank());
  EXPECT_TRUE(want.ok()) << want.status().to_string();
  const auto check = [&] {
    EXPECT_EQ(memory::read_ledger(*rank.backend.ledger).to_json(), want->to_json())
        << "rank " << gang.rank();
  };
  if (gang.rank() != 0) {
    engine->follow();  // reserves
    check();
    while (engine->follow()) {
    }
    return {};
  }
  engine->reserve_worst_case();
  check();
  Outcomes outcomes = play(*engine, rank.clock, tied);
  engine->keep_alive();
  engine->end();
  return outcomes;
}

/// Tokens, texts, ends and messages are the same; log-probabilities differ by what another order of
/// sums does in f32.
inline void expect_same(const Outcomes& got, const Outcomes& want) {
  ASSERT_EQ(got.size(), want.size());
  for (const auto& [id, outcome] : want) {
    SCOPED_TRACE(id);
    const Outcome& other = got.at(id);
    EXPECT_EQ(other.ids, outcome.ids);
    EXPECT_EQ(other.text, outcome.text);
    EXPECT_EQ(other.finish, outcome.finish);
    EXPECT_EQ(other.error.to_string(), outcome.error.to_string());
    EXPECT_EQ(other.usage.completion_tokens, outcome.usage.completion_tokens);
    ASSERT_EQ(other.logprobs.size(), outcome.logprobs.size());
    for (std::size_t i = 0; i < outcome.logprobs.size(); ++i)
      EXPECT_NEAR(other.logprobs[i], outcome.logprobs[i], 1e-4);
    ASSERT_EQ(other.prompt_logprobs.size(), outcome.prompt_logprobs.size());
    for (std::size_t i = 0; i < outcome.prompt_logprobs.size(); ++i)
      EXPECT_NEAR(other.prompt_logprobs[i], outcome.prompt_logprobs[i], 1e-4);
  }
}

/// The same script on one rank that is no replica.
inline Outcomes run_alone(bool tied) {
  auto single = std::move(comm::make_thread_communicators(1).front());
  ReplicaRank rank(*single, {}, tied);
  const auto engine = rank.engine(true);
  return play(*engine, rank.clock, tied);
}

}  // namespace tandem::worker::serve
