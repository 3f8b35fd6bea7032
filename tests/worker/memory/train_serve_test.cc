// One forward path: what the trainer computes for a sequence, the server computes bit for bit.
#include "protocol/base/clock.h"
#include "protocol/base/random.h"
#include "tests/support/engine_fixture.h"
#include "worker/serve/serve_engine.h"
#include "worker/train/device_batch.h"
#include "worker/train/train_session.h"

#include <gtest/gtest.h>

namespace tandem::worker {
namespace {

constexpr std::int64_t kRank = 6;
const std::vector<std::int64_t> kLengths{70, 3, 33, 16, 120};

/// Random documents with every next token as label.
data::MicroBatch documents(std::int64_t vocab) {
  Random random(21);
  data::MicroBatch batch;
  batch.cu_seqlens.push_back(0);
  for (std::int64_t length : kLengths) {
    const std::size_t begin = batch.tokens.size();
    for (std::int64_t t = 0; t < length; ++t) {
      batch.tokens.push_back(
          static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(vocab))));
      batch.positions.push_back(static_cast<std::int32_t>(t));
    }
    batch.labels.insert(batch.labels.end(),
                        batch.tokens.begin() + static_cast<std::ptrdiff_t>(begin) + 1,
                        batch.tokens.end());
    batch.labels.push_back(data::kIgnore);
    batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
    batch.trained_tokens += length - 1;
  }
  return batch;
}

/// Log-probabilities of all labels on the training path: packed attention, all tensors kept for a
/// backward pass, chunked head.
std::vector<float> trainer_logprobs(test::Engine& engine, const data::MicroBatch& batch,
                                    std::int64_t slot) {
  const model::Transformer transformer(*engine.weights, &engine.adapters,
                                       {0, engine.base->config().layers});
  train::BatchBounds bounds;
  bounds.include(batch);
  kernels::ArenaScope scope(engine.activation_arena);
  const auto device = train::upload_batch(engine.context, batch, bounds, slot, kRank);
  const std::int64_t rows = device.tokens.tokens();
  const auto hidden =
      engine.activation_arena.alloc({rows, engine.base->config().width}, DType::kF32);
  const auto dhidden = engine.activation_arena.alloc(hidden.shape, DType::kF32);
  const auto loss = engine.activation_arena.alloc({rows}, DType::kF32);
  model::Saved saved;
  transformer.forward(engine.context, device.tokens, {}, hidden, &saved, model::Recompute::kNone);
  transformer.loss(engine.context, hidden, device.labels, 1.0f, loss, {}, dhidden);
  std::vector<float> logprobs;
  for (float row : engine.download(loss)) logprobs.push_back(-row);
  return logprobs;
}

/// The same from the server: each document a prompt that is only scored.
std::vector<std::vector<float>> server_logprobs(
    test::Engine& engine, const data::MicroBatch& batch, const Digest& adapter,
    std::shared_ptr<const model::AdapterWeights> weights, const serve::ServeOptions& options) {
  const ManualClock clock;
  auto serving =
      serve::ServeEngine::create({*engine.backend.allocator, *engine.backend.ledger, engine.context,
                                  *engine.weights, &engine.adapters, 1, 1, std::nullopt, clock},
                                 options)
          .value();
  TANDEM_CHECK(serving->install_adapter(adapter, std::move(weights)).ok());
  for (std::size_t d = 0; d + 1 < batch.cu_seqlens.size(); ++d) {
    serve::GenerateRequest request;
    request.id = RequestId(std::to_string(d));
    request.adapter = adapter;
    request.prompt.assign(batch.tokens.begin() + batch.cu_seqlens[d],
                          batch.tokens.begin() + batch.cu_seqlens[d + 1]);
    request.sampling.max_tokens = 0;
    request.sampling.prompt_logprobs_from = 1;
    const Status status = serving->submit(std::move(request));
    TANDEM_CHECK(status.ok(), status.to_string());
  }
  std::vector<std::vector<float>> logprobs(kLengths.size());
  while (serving->has_work())
    for (const auto& output : serving->step().outputs)
      if (!output.prompt_logprobs.empty())
        logprobs[std::stoul(output.id.value)] = output.prompt_logprobs;
  return logprobs;
}

TEST(TrainerAndServer, GiveTheSameLogprobsOfThePublishedAdapterBitForBit) {
  model::ModelConfig config = test::tiny_config();
  auto engine = test::cpu_engine(config, DType::kF32);
  const data::MicroBatch batch = documents(config.vocab);
  train::SessionOptions options;
  options.settings.lora_r = kRank;
  options.settings.learning_rate = 2e-2;
  options.settings.warmup_ratio = 0.0;
  auto session = train::TrainSession::create(
                     engine->session_parts(0), options,
                     train::make_fixed_batches({{{batch}, batch.trained_tokens}}, {}, 3))
                     .value();
  while (!session->finished()) ASSERT_TRUE(session->run_slice().ok());

  const std::vector<float> trained = trainer_logprobs(*engine, batch, 0);
  const auto published =
      model::build_adapter(*engine->backend.ops, engine->exec, *engine->backend.allocator,
                           *engine->backend.ledger, config, DType::kF32,
                           session->host_adapter(DType::kF32))
          .value();
  const Digest digest = sha256("the published adapter");
  for (std::int64_t batch_tokens : {512, 40}) {  // one prefill, and chunks of many batches
    serve::ServeOptions serve;
    serve.kv_bytes_max = 1 << 22;
    serve.max_batch_tokens = batch_tokens;
    serve.max_running = 4;
    const auto served = server_logprobs(*engine, batch, digest, published, serve);
    for (std::size_t d = 0; d < kLengths.size(); ++d) {
      ASSERT_EQ(static_cast<std::int64_t>(served[d].size()), kLengths[d] - 1);
      for (std::size_t t = 0; t < served[d].size(); ++t)
        EXPECT_EQ(served[d][t], trained[static_cast<std::size_t>(batch.cu_seqlens[d]) + t])
            << "document " << d << " token " << t + 1 << " at " << batch_tokens;
    }
  }
  // The adapter does something: without it the numbers are others.
  EXPECT_NE(trainer_logprobs(*engine, batch, -1)[0], trained[0]);
}

}  // namespace
}  // namespace tandem::worker
