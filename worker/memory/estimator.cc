#include "worker/memory/estimator.h"

#include "protocol/base/clock.h"
#include "protocol/base/units.h"
#include "worker/memory/dry_engine.h"
#include "worker/model/shard.h"
#include "worker/train/ranks.h"
#include "worker/train/train_session.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <tuple>
#include <utility>

namespace tandem::worker::memory {

namespace {

/// Of an H100: what the driver counts for a process that has opened the CUDA backend.
constexpr std::int64_t kCudaContextBytes = 544 * kMiB;
/// Room for the channels of one NCCL communicator of ranks on NVLink, and for what copy engines and
/// sums take beside it (82 MiB). Measured on two GPUs, with 58: 345 MB beside the context with one
/// (dp 2, tp 2), 408 MB with ZeRO 3, 813 MB with two (pp 2).
constexpr std::int64_t kNcclBytes = 448 * kMiB;

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

data::OptimizerStep step_of(const data::MicroBatch& batch, std::int64_t micro_batches) {
  data::OptimizerStep step;
  step.micro_batches.assign(static_cast<std::size_t>(micro_batches), batch);
  step.trained_tokens = micro_batches * batch.trained_tokens;
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

/// Collects a trace: costs of ops add up between two calls.
class Recorder {
 public:
  Recorder(const CostModel& model, DType dtype) : model_(model), dtype_(dtype) {}
  DryWatchers watchers() {
    return {[this](const kernels::OpCost& cost) { seconds_ += model_.seconds(cost, dtype_); },
            [this](const comm::CommCall& call) { next().call = call; }};
  }
  /// What came before is not part of the step.
  void begin() {
    trace_.clear();
    seconds_ = 0.0;
  }
  void end() {
    (void)next();
    step_ = std::move(trace_);
  }
  StepTrace take() { return std::move(step_); }

 private:
  /// Made in place: moving an event without a call, g++ 12 warns about the call under a sanitizer.
  TraceEvent& next() {
    TraceEvent& event = trace_.emplace_back();
    event.seconds = std::exchange(seconds_, 0.0);
    return event;
  }
  const CostModel& model_;
  const DType dtype_;
  double seconds_ = 0.0;
  StepTrace trace_, step_;
};

Result<Estimate> dry_run(const kernels::DeviceProfile& profile, const model::ModelConfig& config,
                         DType dtype, const protocol::TrainSettings& settings,
                         const train::BatchBounds& bounds, const TrainingPlan& plan,
                         std::int64_t micro_batches, Recorder* recorder) {
  TANDEM_RETURN_IF_ERROR(check_bounds(bounds));
  const model::Holding holding = model::holding_beside(settings.full(), plan.layout.zero);
  TANDEM_ASSIGN_OR_RETURN(
      const auto engine,
      DryEngine::create(profile, config, dtype, plan.adapter_slots,
                        {plan.layout, plan.rank, holding},
                        recorder != nullptr ? recorder->watchers() : DryWatchers{}));
  const data::MicroBatch batch = batch_at(bounds);
  std::vector<data::MicroBatch> eval;
  // They are dealt to the data-parallel ranks: with fewer, some would take no loss.
  if (plan.eval) eval.assign(static_cast<std::size_t>(plan.layout.dp), batch);
  train::SessionOptions options;
  options.settings = settings;
  TANDEM_ASSIGN_OR_RETURN(
      const auto session,
      train::TrainSession::create(
          {engine->allocator(), engine->ledger(), engine->context, *engine->weights,
           *engine->adapters, 0, &engine->ranks, engine->source.get()},
          options, train::make_fixed_batches({step_of(batch, micro_batches)}, std::move(eval))));
  if (recorder != nullptr) recorder->begin();
  while (!session->finished()) {
    TANDEM_ASSIGN_OR_RETURN(const train::SliceEvent event, session->run_slice());
    if (recorder == nullptr) continue;
    if (std::holds_alternative<train::EvalDone>(event)) recorder->begin();  // the base's
    if (std::holds_alternative<train::StepDone>(event)) recorder->end();
  }
  if (plan.publish && plan.layout.ranks() == 1) {
    if (settings.full())
      session->probe_published(std::vector<std::int32_t>(train::kProbeTokens, 0), *engine->source);
    else
      publish(*engine, *session, dtype);
  }
  return read_ledger(engine->ledger());
}

/// As near in ranks as can be, fewer rather than more, and of these the one that cuts as asked.
std::string nearest_replica(const model::ModelConfig& config, const comm::Layout& asked) {
  comm::Layout best;
  const auto distance = [&](const comm::Layout& layout) {
    return std::tuple(std::abs(layout.ranks() - asked.ranks()), layout.ranks(),
                      std::abs(layout.tp - asked.tp));
  };
  const int ranks_max = 2 * asked.ranks();
  for (int tp = 1; tp <= ranks_max; ++tp)
    for (int pp = 1; tp * pp <= ranks_max; ++pp) {
      const comm::Layout layout{1, tp, pp, 0};
      if (layout.ranks() < 2 || !model::check_shard(config, tp, pp).ok()) continue;
      if (best.ranks() < 2 || distance(layout) < distance(best)) best = layout;
    }
  if (best.ranks() < 2) return "; no layout of several ranks works";
  return str("; the nearest layout that the model allows: tp ", best.tp, ", pp ", best.pp);
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

BesideLedger beside_ledger(const kernels::DeviceProfile& profile, const comm::Layout& layout,
                           const Estimate& rank) {
  if (profile.type == kernels::DeviceType::kCpu)
    return {rank.of(kernels::MemoryKind::kOptimizer), 0, 0};
  return {0, kCudaContextBytes, kNcclBytes * layout.groups()};
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
  // Micro-batches that are under way together count for memory.
  const std::int64_t count = plan.layout.ranks() == 1 ? 1 : settings.gradient_accumulation_steps;
  return dry_run(profile, config, dtype, settings, bounds, plan, count, nullptr);
}

Result<DryStep> trace_training(const kernels::DeviceProfile& profile,
                               const model::ModelConfig& config, DType dtype,
                               const protocol::TrainSettings& settings,
                               const train::BatchBounds& bounds, const TrainingPlan& plan,
                               const CostModel& model) {
  Recorder recorder(model, dtype);
  TANDEM_ASSIGN_OR_RETURN(const auto estimate,
                          dry_run(profile, config, dtype, settings, bounds, plan,
                                  settings.gradient_accumulation_steps, &recorder));
  return DryStep{estimate, recorder.take()};
}

Result<std::vector<Estimate>> estimate_gang(const kernels::DeviceProfile& profile,
                                            const model::ModelConfig& config, DType dtype,
                                            const protocol::TrainSettings& settings,
                                            const train::BatchBounds& bounds, bool evaluates) {
  const comm::Layout layout = train::layout_of(settings);
  const bool full = settings.method == "full";  // a LoRA of a gang is published without its device
  const Status cut = model::check_shard(config, layout.tp, layout.pp, layout.virtual_pp);
  if (!cut.ok()) {
    int tp = layout.tp;
    while (tp > 1 && !model::check_shard(config, tp, 1).ok()) --tp;
    const auto pp = std::min<std::int64_t>(layout.pp, config.layers);
    const auto chunks = std::min<std::int64_t>(layout.virtual_pp, config.layers / pp);
    return refused_error(str(cut.message(), "; the nearest layout that the model allows: dp ",
                             layout.dp, ", tp ", tp, ", pp ", pp,
                             chunks > 1 ? str(", virtual_pipeline_size ", chunks) : std::string()));
  }
  std::vector<Estimate> ranks;
  for (int rank = 0; rank < layout.ranks(); ++rank) {
    TANDEM_ASSIGN_OR_RETURN(ranks.emplace_back(),
                            estimate_training(profile, config, dtype, settings, bounds,
                                              TrainingPlan{1, evaluates, full, layout, rank}));
  }
  return ranks;
}

Result<Estimate> estimate_serving(const kernels::DeviceProfile& profile,
                                  const model::ModelConfig& config, DType dtype,
                                  const serve::ServeOptions& options, std::int64_t adapter_slots,
                                  const comm::Layout& gang, int rank) {
  comm::Layout layout = gang;
  layout.balance = comm::StageBalance::kBlocks;
  TANDEM_ASSIGN_OR_RETURN(const auto engine,
                          DryEngine::create(profile, config, dtype, adapter_slots, {layout, rank}));
  const ManualClock clock;
  const comm::Groups& groups = engine->ranks.groups;
  const auto link = serve::make_comm_link(*groups.model, engine->exec());
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

Result<std::vector<Estimate>> estimate_replica(const kernels::DeviceProfile& profile,
                                               const model::ModelConfig& config, DType dtype,
                                               const serve::ServeOptions& options,
                                               std::int64_t adapter_slots,
                                               const comm::Layout& layout) {
  if (const Status cut = model::check_shard(config, layout.tp, layout.pp); !cut.ok())
    return refused_error(str(cut.message(), nearest_replica(config, layout)));
  std::vector<Estimate> ranks;
  for (int rank = 0; rank < layout.ranks(); ++rank) {
    TANDEM_ASSIGN_OR_RETURN(ranks.emplace_back(), estimate_serving(profile, config, dtype, options,
                                                                   adapter_slots, layout, rank));
  }
  return ranks;
}

}  // namespace tandem::worker::memory
