// A tiny random Llama behind a serving engine, on the CPU backend or on the meta backend, and the
// plainest possible oracle beside it.
#pragma once

#include "kernels/meta/meta_backend.h"
#include "protocol/base/random.h"
#include "storage/gguf.h"
#include "tests/support/test_device.h"
#include "worker/model/tensor_source.h"
#include "worker/serve/serve_engine.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <string>

namespace tandem::worker::serve {

inline constexpr std::int32_t kTestEos = 256;

inline model::ModelConfig tiny_config() {
  model::ModelConfig c;
  c.family = "llama";
  c.vocab = 300;  // more rows than the tokenizer has tokens, as real models do
  c.width = 64;
  c.layers = 3;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 16;
  c.mlp_width = 96;
  c.context_max = 160;
  c.tied_embedding = false;
  c.eos_ids = {kTestEos};
  return c;
}

/// One token per byte, and an eos.
inline text::Tokenizer byte_tokenizer() {
  storage::GgufTokenizer data;
  data.model = "gpt2";
  data.pre = "gpt-2";
  int next = 256;
  for (int b = 0; b < 256; ++b) {  // GPT-2's printable stand-ins for bytes
    const bool plain = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    const int c = plain ? b : next++;
    data.tokens.push_back(c < 128 ? std::string(1, static_cast<char>(c))
                                  : std::string{static_cast<char>(0xc0 | (c >> 6)),
                                                static_cast<char>(0x80 | (c & 63))});
    data.token_types.push_back(1);
  }
  data.tokens.push_back("<eos>");
  data.token_types.push_back(3);
  data.merges = {};
  data.eos_id = kTestEos;
  return text::Tokenizer::from_gguf(data).value();
}

/// Device, weights and adapters; engines come and go on it.
struct ServeBench {
  explicit ServeBench(kernels::Backend device, model::ModelConfig config_in = tiny_config(),
                      std::int64_t slots = 4, DType dtype_in = DType::kF32)
      : backend(std::move(device)),
        config(std::move(config_in)),
        dtype(dtype_in),
        workspace(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace, "workspace",
                  std::int64_t{1} << 30),
        activations(*backend.allocator, *backend.ledger, kernels::MemoryKind::kActivations,
                    "activations", std::int64_t{1} << 30),
        weights_arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWeights, "weights",
                      std::int64_t{1} << 30),
        adapters_arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kAdapters,
                       "adapter table", std::int64_t{1} << 24),
        exec{workspace, {}, kernels::Numerics::kInvariant},
        comm(comm::make_single_communicator(
            [this](kernels::Exec& e, kernels::Tensor from, kernels::Tensor to) {
              backend.ops->copy(e, from, to);
            })),
        context{*backend.ops, exec, *comm, activations, dtype},
        base(model::BaseWeights::load(*backend.ops, exec, weights_arena, config, dtype,
                                      *model::make_random_source(config, 7))
                 .value()),
        weights(model::make_resident_weights(base)),
        table(*backend.ops, exec, adapters_arena, config, slots) {}

  static kernels::Backend cpu(int threads = 1) { return test::make_test_backend(threads); }

  /// A strong random adapter; `sites` from the seed, so ranks and places differ.
  std::shared_ptr<const model::AdapterWeights> adapter(std::uint64_t seed, float scale = 1.0f) {
    Random random(seed, 77);
    const auto rank = static_cast<std::int64_t>(1 + random.below(6));
    std::vector<model::HostAdapterTensor> tensors;
    for (std::int64_t layer = 0; layer < config.layers; ++layer)
      for (int s = 0; s < model::kSiteCount; ++s) {
        if (random.below(3) == 0 && s > 0) continue;
        const model::SiteShape shape = model::site_shape(config, model::Site{s});
        model::HostAdapterTensor t{layer, model::Site{s}, rank, scale, {}, {}};
        for (std::int64_t i = 0; i < rank * shape.i; ++i) t.a.push_back(0.1f * random.normal());
        for (std::int64_t i = 0; i < rank * shape.n; ++i) t.b.push_back(0.3f * random.normal());
        tensors.push_back(std::move(t));
      }
    return model::build_adapter(*backend.ops, exec, *backend.allocator, *backend.ledger, config,
                                dtype, tensors)
        .value();
  }
  static Digest name(std::uint64_t seed) { return sha256(str("adapter ", seed)); }

  ServeParts parts(std::int64_t slots = -1) {
    return {.allocator = *backend.allocator,
            .ledger = *backend.ledger,
            .context = context,
            .weights = *weights,
            .adapters = &table,
            .slot_begin = 0,
            .slot_count = slots < 0 ? table.slots() : slots,
            .tokenizer = tokenizer,
            .clock = clock};
  }
  ServeOptions options() const {
    ServeOptions o;
    o.kv_bytes_max = 64 * kv_layout(config, dtype, o).block_bytes;
    o.max_batch_tokens = 64;
    o.max_running = 8;
    o.max_waiting = 64;
    o.adapter_rank_max = 16;
    return o;
  }
  std::unique_ptr<ServeEngine> engine(const ServeOptions& o, std::int64_t slots = -1) {
    return ServeEngine::create(parts(slots), o).value();
  }
  std::unique_ptr<ServeEngine> engine() { return engine(options()); }

  kernels::Tensor upload(const std::vector<std::int32_t>& values) {
    const kernels::Tensor tensor =
        activations.alloc({static_cast<std::int64_t>(values.size())}, DType::kI32);
    backend.ops->upload(exec, std::as_bytes(std::span(values)), tensor);
    return tensor;
  }

  kernels::Backend backend;
  const model::ModelConfig config;
  const DType dtype;
  kernels::Arena workspace, activations, weights_arena, adapters_arena;
  kernels::Exec exec;
  std::unique_ptr<comm::Communicator> comm;
  model::Context context;
  std::shared_ptr<const model::BaseWeights> base;
  std::unique_ptr<model::WeightSource> weights;
  model::AdapterTable table;
  std::optional<text::Tokenizer> tokenizer = byte_tokenizer();
  ManualClock clock;
};

/// All that came for one request.
struct Outcome {
  std::vector<std::int32_t> ids;
  std::vector<float> logprobs;
  std::vector<TokenLogprob> top;
  std::vector<float> prompt_logprobs;
  std::string text;
  std::vector<std::string> deltas;
  FinishReason finish = FinishReason::kNone;
  std::string matched_stop;
  Status error;
  Usage usage;
  std::int64_t first_index = -1;

  void add(const SequenceOutput& out) {
    EXPECT_EQ(finish, FinishReason::kNone) << "output after the end of " << out.id;
    if (first_index < 0) first_index = out.index;
    if (!out.token_ids.empty()) {
      EXPECT_EQ(out.index, first_index + static_cast<std::int64_t>(ids.size()));
    }
    ids.insert(ids.end(), out.token_ids.begin(), out.token_ids.end());
    for (const TokenLogprobs& l : out.logprobs) {
      logprobs.push_back(l.logprob);
      top.insert(top.end(), l.top.begin(), l.top.end());
    }
    if (!out.prompt_logprobs.empty()) prompt_logprobs = out.prompt_logprobs;
    text += out.text;
    if (!out.text.empty()) deltas.push_back(out.text);
    finish = out.finish;
    matched_stop = out.matched_stop;
    error = out.error;
    usage = out.usage;
  }
};
using Outcomes = std::map<std::string, Outcome>;

inline void take(const StepOutput& out, Outcomes& outcomes) {
  for (const SequenceOutput& o : out.outputs) outcomes[o.id.value].add(o);
}
/// Steps until nothing is left to do.
inline void drain(ServeEngine& engine, Outcomes& outcomes, int steps_max = 5000) {
  for (int i = 0; i < steps_max && engine.has_work(); ++i) take(engine.step(), outcomes);
  EXPECT_FALSE(engine.has_work());
}
inline Outcomes drain(ServeEngine& engine) {
  Outcomes outcomes;
  drain(engine, outcomes);
  return outcomes;
}
inline Outcome run_alone(ServeEngine& engine, const GenerateRequest& request) {
  const Status status = engine.submit(request);
  EXPECT_TRUE(status.ok()) << status.to_string();
  return drain(engine)[request.id.value];
}

inline GenerateRequest request(const std::string& id, std::vector<std::int32_t> prompt,
                               std::int64_t max_tokens = 12) {
  GenerateRequest r;
  r.id = RequestId(id);
  r.prompt = std::move(prompt);
  r.sampling.max_tokens = max_tokens;
  r.sampling.temperature = 0.0f;
  r.sampling.logprobs = 0;
  r.sampling.ignore_eos = true;
  return r;
}
inline std::vector<std::int32_t> random_prompt(Random& random, std::int64_t length) {
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < length; ++i)
    ids.push_back(static_cast<std::int32_t>(random.below(256)));
  return ids;
}

/// [tokens, width] in the bench's activations, which the caller resets: one packed forward with the
/// adapter in `slot` (-1: none).
inline kernels::Tensor packed_hidden(ServeBench& bench, const model::Transformer& transformer,
                                     const std::vector<std::int32_t>& tokens, std::int32_t slot,
                                     std::int64_t rank_max) {
  const auto t = static_cast<std::int64_t>(tokens.size());
  std::vector<std::int32_t> positions(tokens.size());
  std::iota(positions.begin(), positions.end(), 0);
  model::TokenBatch batch;
  batch.ids = bench.upload(tokens);
  batch.positions = bench.upload(positions);
  batch.seq_offsets = bench.upload({0, static_cast<std::int32_t>(t)});
  batch.seq_len_max = t;
  batch.adapters = {bench.upload({0, static_cast<std::int32_t>(t)}),
                    bench.upload({slot}),
                    1,
                    slot < 0 ? 0 : rank_max,
                    0.0f,
                    0};
  const kernels::Tensor hidden = bench.activations.alloc({t, bench.config.width}, bench.dtype);
  transformer.forward(bench.context, batch, {}, hidden, nullptr, model::Recompute::kNone);
  return hidden;
}

/// Logits of every row of `tokens` by the training-style packed forward: [T, V] f32.
inline std::vector<float> packed_logits(ServeBench& bench, const std::vector<std::int32_t>& tokens,
                                        std::int32_t slot, std::int64_t rank_max) {
  const auto t = static_cast<std::int64_t>(tokens.size());
  const kernels::ArenaScope scope(bench.activations);
  const model::Transformer transformer(*bench.weights, &bench.table, {0, bench.config.layers});
  const kernels::Tensor hidden = packed_hidden(bench, transformer, tokens, slot, rank_max);
  const kernels::Tensor logits = bench.activations.alloc({t, bench.config.vocab}, DType::kF32);
  transformer.logits(bench.context, hidden, logits);
  std::vector<float> host(static_cast<std::size_t>(t * bench.config.vocab));
  bench.backend.ops->download(bench.exec, logits, std::as_writable_bytes(std::span(host)));
  return host;
}

}  // namespace tandem::worker::serve
