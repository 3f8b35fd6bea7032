#include "worker/memory/estimator.h"

#include "protocol/base/clock.h"
#include "worker/memory/dry_engine.h"
#include "worker/model/shard.h"
#include "worker/train/ranks.h"
#include "worker/train/train_session.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <numeric>

namespace tandem::worker::memory {

namespace {

/// A micro-batch at the bounds: documents of the longest length, every token trained.
data::MicroBatch batch_at(const train::BatchBounds& bounds) {
  data::MicroBatch batch;
  const auto tokens = static_cast<std::size_t>(bounds.micro_batch_tokens);
  batch.tokens.assign(tokens, 0);
  batch.labels.assign(tokens, 0);
  batch.positions.assign(tokens, 0);
  batch.trained_tokens = bounds.micro_batch_tokens;
  // As few documents as hold the tokens, the rest empty: what lies where changes no shape.
  for (std::int64_t i = 0; i <= bounds.micro_batch_sequences; ++i)
    batch.cu_seqlens.push_back(
        static_cast<std::int32_t>(std::min(i * bounds.sequence_tokens, bounds.micro_batch_tokens)));
  batch.cu_seqlens.back() = static_cast<std::int32_t>(bounds.micro_batch_tokens);
  return batch;
}

Status check_bounds(const train::BatchBounds& bounds) {
  if (bounds.micro_batch_tokens < 1 || bounds.micro_batch_sequences < 1 ||
      bounds.sequence_tokens < 1 || bounds.sequence_tokens > bounds.micro_batch_tokens)
    return invalid_error(str("micro-batch of ", bounds.micro_batch_tokens, " tokens in ",
                             bounds.micro_batch_sequences, " documents of up to ",
                             bounds.sequence_tokens, " tokens: impossible bounds"));
  return {};
}

/// An optimizer step: micro-batches that are under way together count for memory.
data::OptimizerStep step_of(const data::MicroBatch& batch, const protocol::TrainSettings& settings,
                            const TrainingPlan& plan) {
  const std::int64_t count = plan.layout.ranks() == 1 ? 1 : settings.gradient_accumulation_steps;
  data::OptimizerStep step;
  step.micro_batches.assign(static_cast<std::size_t>(count), batch);
  step.trained_tokens = count * batch.trained_tokens;
  return step;
}

/// What the runtime does when a job ends: a snapshot serves while the adapter as published is
/// loaded and probed.
void publish(DryEngine& engine, train::TrainSession& session, DType dtype) {
  const auto snapshot = session.snapshot_adapter();
  auto reloaded =
      model::build_adapter(engine.context.ops, engine.exec(), engine.allocator(), engine.ledger(),
                           engine.base->config(), dtype, session.flat_adapter(dtype));
  session.probe(std::vector<std::int32_t>(train::kProbeTokens, 0), std::move(reloaded));
}

}  // namespace

std::string Estimate::to_json() const {
  nlohmann::ordered_json json;
  for (int kind = 0; kind < kernels::kMemoryKindCount; ++kind)
    json[kernels::memory_kind_name(kernels::MemoryKind{kind})] =
        peak_bytes[static_cast<std::size_t>(kind)];
  json["peak_total"] = peak_total;
  return json.dump();
}

Estimate read_ledger(const kernels::MemoryLedger& ledger) {
  Estimate estimate;
  for (int kind = 0; kind < kernels::kMemoryKindCount; ++kind)
    estimate.peak_bytes[static_cast<std::size_t>(kind)] = ledger.peak(kernels::MemoryKind{kind});
  estimate.peak_total = ledger.peak_total();
  return estimate;
}

train::BatchBounds worst_case_bounds(const protocol::TrainSettings& settings) {
  const std::int64_t tokens = settings.per_device_train_batch_size * settings.max_length;
  // A document has two tokens at least: one to see, one to learn.
  const std::int64_t documents = settings.packing ? std::max<std::int64_t>(1, tokens / 2)
                                                  : settings.per_device_train_batch_size;
  return {tokens, documents, settings.max_length};
}

Result<Estimate> estimate_training(const kernels::DeviceProfile& profile,
                                   const model::ModelConfig& config, DType dtype,
                                   const protocol::TrainSettings& settings,
                                   const train::BatchBounds& bounds, const TrainingPlan& plan) {
  TANDEM_RETURN_IF_ERROR(check_bounds(bounds));
  const model::Holding holding = model::holding_beside(settings.method == "full", plan.layout.zero);
  TANDEM_ASSIGN_OR_RETURN(const auto engine,
                          DryEngine::create(profile, config, dtype, plan.adapter_slots,
                                            {plan.layout, plan.rank, holding}));
  const data::MicroBatch batch = batch_at(bounds);
  std::vector<data::MicroBatch> eval;
  if (plan.eval) eval.push_back(batch);
  train::SessionOptions options;
  options.settings = settings;
  TANDEM_ASSIGN_OR_RETURN(
      const auto session,
      train::TrainSession::create(
          {engine->allocator(), engine->ledger(), engine->context, *engine->weights,
           *engine->adapters, 0, &engine->ranks, engine->source.get()},
          options, train::make_fixed_batches({step_of(batch, settings, plan)}, std::move(eval))));
  while (!session->finished()) {
    TANDEM_ASSIGN_OR_RETURN(const train::SliceEvent event, session->run_slice());
    static_cast<void>(event);
  }
  if (plan.publish && plan.layout.ranks() == 1) {
    if (settings.method == "lora")
      publish(*engine, *session, dtype);
    else
      session->probe_published(std::vector<std::int32_t>(train::kProbeTokens, 0), *engine->source);
  }
  return read_ledger(engine->ledger());
}

Result<std::vector<Estimate>> estimate_gang(const kernels::DeviceProfile& profile,
                                            const model::ModelConfig& config, DType dtype,
                                            const protocol::TrainSettings& settings,
                                            const train::BatchBounds& bounds) {
  const comm::Layout layout = train::layout_of(settings);
  const bool full = settings.method == "full";  // a LoRA of a gang is published without its device
  if (const Status cut = model::check_shard(config, layout.tp, layout.pp); !cut.ok()) {
    int tp = layout.tp;
    while (tp > 1 && !model::check_shard(config, tp, 1).ok()) --tp;
    const auto pp = std::min<std::int64_t>(layout.pp, config.layers);
    return refused_error(str(cut.message(), "; the nearest layout that works: dp ", layout.dp,
                             ", tp ", tp, ", pp ", pp));
  }
  std::vector<Estimate> ranks;
  for (int rank = 0; rank < layout.ranks(); ++rank) {
    TANDEM_ASSIGN_OR_RETURN(ranks.emplace_back(),
                            estimate_training(profile, config, dtype, settings, bounds,
                                              TrainingPlan{1, true, full, layout, rank}));
  }
  return ranks;
}

Result<Estimate> estimate_serving(const kernels::DeviceProfile& profile,
                                  const model::ModelConfig& config, DType dtype,
                                  const serve::ServeOptions& options, std::int64_t adapter_slots,
                                  const comm::Layout& layout, int rank) {
  TANDEM_ASSIGN_OR_RETURN(const auto engine,
                          DryEngine::create(profile, config, dtype, adapter_slots, {layout, rank}));
  const ManualClock clock;
  const comm::Groups& groups = engine->ranks.groups;
  const auto link = serve::make_comm_link(*groups.model, engine->context);
  const serve::ReplicaRanks ranks{*groups.model, *groups.pp, *link};
  TANDEM_ASSIGN_OR_RETURN(
      const auto serving,
      serve::ServeEngine::create({engine->allocator(), engine->ledger(), engine->context,
                                  *engine->weights, engine->adapters.get(), 0, adapter_slots,
                                  std::nullopt, clock, layout.ranks() > 1 ? &ranks : nullptr},
                                 options));
  serving->reserve_worst_case();
  return read_ledger(engine->ledger());
}

}  // namespace tandem::worker::memory
