#include "tests/support/rank_job.h"

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "protocol/base/random.h"
#include "tests/support/background_communicator.h"
#include "tests/support/exact_backend.h"
#include "worker/model/tensor_source.h"
#include "worker/model/weight_door.h"
#include "worker/train/ranks.h"
#include "worker/train/state_pieces.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <thread>

namespace tandem::test {
namespace {

using namespace worker;
using kernels::MemoryKind;

constexpr std::int64_t kArenaBytes = std::int64_t{1} << 36;
constexpr std::int64_t kMicroBatches = 4;

data::MicroBatch random_batch(Random& random, std::int64_t vocab) {
  data::MicroBatch batch;
  batch.cu_seqlens.push_back(0);
  for (int d = 0; d < 2; ++d) {
    const auto length = static_cast<std::int64_t>(4 + random.below(12));
    for (std::int64_t t = 0; t < length; ++t) {
      batch.tokens.push_back(
          static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(vocab))));
      batch.positions.push_back(static_cast<std::int32_t>(t));
      // Different numbers of trained tokens in every micro-batch; something to learn.
      const bool trained = t >= 1 && t + 1 < length && random.below(4) != 0;
      batch.labels.push_back(trained ? (batch.tokens.back() * 7 + 3) % static_cast<int>(vocab)
                                     : data::kIgnore);
      batch.trained_tokens += trained;
    }
    batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
  }
  return batch;
}

/// Every third step has a micro-batch less, so that ranks have unequal shares.
std::unique_ptr<train::BatchSource> make_batches(const RankJob& job, std::int64_t vocab) {
  std::vector<data::OptimizerStep> steps;
  for (std::int64_t s = 0; s < job.steps; ++s) {
    Random random(static_cast<std::uint64_t>(5 + s % 3));  // again and again the same three
    data::OptimizerStep step;
    const std::int64_t count = kMicroBatches - (s % 3 == 1 && !job.uniform ? 1 : 0);
    for (std::int64_t m = 0; m < count; ++m) {
      step.micro_batches.push_back(job.uniform && m > 0 ? step.micro_batches.front()
                                                        : random_batch(random, vocab));
      step.trained_tokens += step.micro_batches.back().trained_tokens;
    }
    steps.push_back(std::move(step));
  }
  Random random(4);
  std::vector<data::MicroBatch> eval;
  for (int b = 0; job.eval && b < 3; ++b)
    eval.push_back(job.uniform ? steps.front().micro_batches.front() : random_batch(random, vocab));
  return train::make_fixed_batches(std::move(steps), std::move(eval));
}

kernels::Backend make_backend(const RankJob& job) {
  if (job.exact) return make_exact_backend();
  if (job.gpu >= 0) return kernels::make_cuda_backend({job.gpu, 0}).value();
  return kernels::make_cpu_backend({1, 0});
}

/// One rank's engine.
struct RankEngine {
  RankEngine(comm::Communicator& gang, const RankJob& job)
      : backend(make_backend(job)), ranks(train::make_ranks(gang, job.layout)) {
    if (job.background != nullptr)
      ranks.groups.tp = background_communicator(std::move(ranks.groups.tp), *job.background);
    ranks.stream_part_bytes = job.stream_part_bytes;
    if (job.gpu >= 0) exec.stream = backend.ops->make_stream(false);
    const model::ModelConfig config = rank_job_model(job);
    const DType dtype = job.exact ? DType::kF64 : job.dtype;
    TANDEM_CHECK(
        model::check_shard(config, job.layout.tp, job.layout.pp, job.layout.virtual_pp).ok());
    source = model::make_random_source(config, 7);
    context.emplace(model::Context{*backend.ops, exec, *ranks.groups.tp, activation_arena, dtype});
    auto held =
        model::hold_weights(*context, *ranks.groups.dp, weight_arena, config, *source,
                            ranks.shard(config), model::holding_beside(job.full, job.layout.zero));
    TANDEM_CHECK(held.ok(), held.status().to_string());
    weights = std::move(held->door);
    adapters.emplace(*backend.ops, exec, table_arena, held->base->config(), 1);
  }

  kernels::Backend backend;
  kernels::Arena weight_arena{*backend.allocator, *backend.ledger, MemoryKind::kWeights,
                              "weights",          kArenaBytes,     kernels::Sharing::kPeers};
  kernels::Arena table_arena{*backend.allocator, *backend.ledger, MemoryKind::kAdapters, "slots",
                             kArenaBytes};
  kernels::Arena activation_arena{*backend.allocator, *backend.ledger, MemoryKind::kActivations,
                                  "activations", kArenaBytes};
  kernels::Arena workspace{*backend.allocator, *backend.ledger, MemoryKind::kWorkspace, "workspace",
                           kArenaBytes};
  kernels::Exec exec{workspace, {}, kernels::Numerics::kInvariant};
  train::Ranks ranks;
  std::unique_ptr<model::TensorSource> source;
  std::unique_ptr<model::WeightSource> weights;
  std::optional<model::AdapterTable> adapters;
  std::optional<model::Context> context;
};

}  // namespace

protocol::TrainSettings rank_job_settings(const RankJob& job) {
  protocol::TrainSettings settings;
  settings.gradient_accumulation_steps = kMicroBatches;
  settings.method = job.full ? "full" : "lora";
  settings.lora_r = 3;
  settings.lora_alpha = 6.0;
  settings.lora_dropout = job.lora_dropout;
  settings.learning_rate = (job.full ? 4e-3 : 2e-2) * job.learning_rate_scale;
  settings.weight_decay = 0.1;
  settings.warmup_steps = 2;
  settings.max_grad_norm = job.max_grad_norm;
  settings.save_steps = 0;
  settings.recompute = job.recompute;
  return settings;
}

train::BatchBounds rank_job_bounds(const RankJob& job) {
  return make_batches(job, rank_job_model(job).vocab)->bounds();
}

model::ModelConfig rank_job_model(const RankJob& job) {
  model::ModelConfig config;
  config.family = job.qk_norm ? "qwen3" : job.bias ? "qwen2" : "llama";
  config.vocab = 97;
  config.width = 36;
  config.layers = 8;
  config.heads = 8;
  config.kv_heads = 4;
  config.head_dim = 6;
  config.mlp_width = 52;
  config.context_max = 64;
  config.tied_embedding = job.tied;
  config.qkv_bias = job.bias && !job.qk_norm;
  config.qk_norm = job.qk_norm;
  return config;
}

RankResult run_rank(comm::Communicator& gang, const RankJob& job) {
  RankEngine engine(gang, job);
  train::SessionParts parts{*engine.backend.allocator, *engine.backend.ledger, *engine.context,
                            *engine.weights,           *engine.adapters,       0};
  parts.ranks = &engine.ranks;
  parts.source = engine.source.get();
  train::SessionOptions options;
  options.settings = rank_job_settings(job);
  options.eval_base_first = false;
  auto session =
      train::TrainSession::create(parts, options, make_batches(job, rank_job_model(job).vocab));
  TANDEM_CHECK(session.ok(), session.status().to_string());
  if (job.resume != nullptr) {
    const Status status = (*session)->import_state(*job.resume);
    TANDEM_CHECK(status.ok(), status.to_string());
  }
  RankResult result;
  while (!(*session)->finished() && (job.stop_after == 0 || (*session)->step() < job.stop_after)) {
    const auto event = (*session)->run_slice();
    TANDEM_CHECK(event.ok(), event.status().to_string());
    if (const auto* done = std::get_if<train::StepDone>(&event.value())) {
      result.losses.push_back(done->loss);
      result.norms.push_back(done->grad_norm);
    }
    if (const auto* done = std::get_if<train::EvalDone>(&event.value())) {
      result.eval_losses.push_back(done->loss);
      result.eval_losses.push_back(done->accuracy);
    }
  }
  result.state = (*session)->export_state();
  if (job.publish)
    (void)(*session)->probe_published(std::vector<std::int32_t>(train::kProbeTokens, 0),
                                      *engine.source);
  for (int kind = 0; kind < kernels::kMemoryKindCount; ++kind)
    result.peak_bytes.push_back(engine.backend.ledger->peak(MemoryKind{kind}));
  result.peak_bytes.push_back(engine.backend.ledger->peak_total());
  return result;
}

const std::vector<comm::Layout>& tested_layouts() {
  static const std::vector<comm::Layout> layouts{
      {2, 1, 1, 0},          {4, 1, 1, 0},    {1, 2, 1, 0},    {1, 4, 1, 0},
      {1, 1, 2, 0},          {1, 1, 4, 0},    {2, 1, 1, 1},    {2, 1, 1, 2},
      {2, 1, 1, 3},          {1, 2, 2, 0},    {2, 2, 1, 0},    {2, 2, 1, 3},
      {3, 1, 1, 3},          {2, 1, 2, 1},    {2, 2, 2, 2},    {1, 1, 2, 0, 2},
      {1, 1, 4, 0, 2},       {1, 2, 2, 0, 2}, {2, 1, 2, 3, 2}, {1, 2, 1, 0, 1, false},
      {1, 2, 2, 0, 1, false}};
  return layouts;
}

std::string layout_name(const comm::Layout& l) {
  return str("dp", l.dp, "_tp", l.tp, "_pp", l.pp, "_zero", l.zero,
             l.virtual_pp > 1 ? str("_virtual", l.virtual_pp) : std::string(),
             l.tp > 1 && !l.sequence_parallel ? "_whole_streams" : "");
}

RankResult as_one_rank(RankJob job) {
  job.layout = {};
  return run_as_threads(job)[0];
}

std::vector<RankResult> run_as_threads(const RankJob& job) {
  auto gang = comm::make_thread_communicators(job.layout.ranks());
  std::vector<RankResult> results(gang.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < gang.size(); ++r)
    threads.emplace_back([&, r] { results[r] = run_rank(*gang[r], job); });
  for (std::thread& thread : threads) thread.join();
  return results;
}

train::TrainState merged_state(const std::vector<RankResult>& ranks) {
  std::vector<train::TrainState> states;
  for (const RankResult& rank : ranks) states.push_back(rank.state);
  auto merged = train::merge_states(states);
  TANDEM_CHECK(merged.ok(), merged.status().to_string());
  return *std::move(merged);
}

double state_error(const train::TrainState& a, const train::TrainState& b,
                   const std::string& suffix) {
  TANDEM_CHECK_EQ(a.tensors.size(), b.tensors.size());
  double worst = 0.0;
  std::size_t compared = 0;
  for (const train::StateTensor& want : b.tensors) {
    if (!want.name.ends_with(suffix)) continue;
    const auto got = std::find_if(a.tensors.begin(), a.tensors.end(),
                                  [&](const auto& t) { return t.name == want.name; });
    TANDEM_CHECK(got != a.tensors.end() && got->values.size() == want.values.size(), want.name);
    double difference = 0.0, norm = 0.0;
    for (std::size_t e = 0; e < want.values.size(); ++e) {
      const double d = static_cast<double>(got->values[e]) - static_cast<double>(want.values[e]);
      difference += d * d;
      norm += static_cast<double>(want.values[e]) * static_cast<double>(want.values[e]);
    }
    if (difference > 0.0) worst = std::max(worst, std::sqrt(difference / norm));
    ++compared;
  }
  TANDEM_CHECK(compared > 0, "no tensor ends with ", suffix);
  return worst;
}

}  // namespace tandem::test
