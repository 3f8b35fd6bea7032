#include "tools/bench_training.h"

#include "protocol/base/clock.h"
#include "protocol/base/random.h"
#include "tools/bench_gang.h"
#include "worker/memory/layout_planner.h"

#include <algorithm>

namespace tandem::tools {

protocol::TrainSettings TrainingCase::settings(const worker::comm::Layout& layout) const {
  protocol::TrainSettings settings;
  settings.method = method;
  settings.gradient_accumulation_steps = micro_batches;
  settings.lora_r = rank;
  settings.lora_alpha = 2.0 * static_cast<double>(rank);
  settings.save_steps = 0;
  settings.recompute = recompute;
  return worker::memory::with_layout(settings, layout);
}

std::vector<worker::data::OptimizerStep> random_steps(const TrainingCase& c, std::int64_t vocab) {
  std::vector<worker::data::OptimizerStep> steps;
  Random random(1234);
  for (std::int64_t s = 0; s < c.steps + c.warmup; ++s) {
    worker::data::MicroBatch batch;
    batch.cu_seqlens.push_back(0);
    const std::int64_t total = c.rows * c.length;
    while (static_cast<std::int64_t>(batch.tokens.size()) < total) {
      const std::int64_t left = total - static_cast<std::int64_t>(batch.tokens.size());
      std::int64_t length = c.length;
      if (c.ragged > 0)
        length = c.ragged + static_cast<std::int64_t>(
                                random.below(static_cast<std::uint64_t>(length - c.ragged + 1)));
      for (std::int64_t t = 0; t < std::min(length, left); ++t) {
        batch.tokens.push_back(
            static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(vocab))));
        batch.positions.push_back(static_cast<std::int32_t>(t));
      }
      batch.cu_seqlens.push_back(static_cast<std::int32_t>(batch.tokens.size()));
    }
    batch.labels.assign(batch.tokens.begin() + 1, batch.tokens.end());
    batch.labels.push_back(worker::data::kIgnore);
    batch.trained_tokens = static_cast<std::int64_t>(batch.tokens.size()) - 1;
    worker::data::OptimizerStep step;
    step.micro_batches.assign(static_cast<std::size_t>(c.micro_batches), batch);
    step.trained_tokens = c.micro_batches * batch.trained_tokens;
    steps.push_back(std::move(step));
  }
  return steps;
}

Result<worker::comm::Layout> fastest_layout(const TrainingCase& c,
                                            const kernels::DeviceProfile& profile,
                                            const worker::model::ModelConfig& config, int ranks) {
  namespace memory = worker::memory;
  const bool gpu = profile.type == kernels::DeviceType::kCuda;  // else ranks share the memory
  const worker::train::BatchBounds bounds{c.rows * c.length, c.rows, c.length};
  TANDEM_ASSIGN_OR_RETURN(
      const auto planned,
      memory::plan_layouts(profile, config, c.compute_dtype(), c.settings({}), bounds,
                           {ranks, gpu ? profile.memory_bytes : profile.memory_bytes / ranks},
                           memory::default_cost_model(profile)));
  for (const memory::PlannedLayout& plan : planned)
    if (plan.fits && plan.layout.ranks() == ranks) return plan.layout;
  return refused_error(str("no layout of ", ranks, " ranks fits"));
}

double product_rate(worker::model::Context& ctx, kernels::Backend& backend) {
  // Large enough for the device at hand.
  const bool gpu = backend.ops->profile().type == kernels::DeviceType::kCuda;
  const std::int64_t t = gpu ? 8192 : 4096, i = gpu ? 8192 : 1536, n = i;
  kernels::Arena arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWeights, "rate",
                       std::int64_t{1} << 28);
  const auto weight = ctx.ops.pack_weight(ctx.exec, arena, ctx.compute_dtype, n, i,
                                          [i](std::int64_t row, std::int64_t rows, float* out) {
                                            Random random(static_cast<std::uint64_t>(row));
                                            for (std::int64_t e = 0; e < rows * i; ++e)
                                              out[e] = random.uniform() - 0.5f;
                                          });
  kernels::ArenaScope scope(ctx.activations);
  const auto x = ctx.activations.alloc({t, i}, ctx.compute_dtype);
  const auto y = ctx.activations.alloc({t, n}, ctx.compute_dtype);
  const auto numbers = ctx.activations.alloc({t, i}, DType::kF32);
  std::vector<float> host(static_cast<std::size_t>(t * i));
  Random random(5);
  for (float& value : host) value = random.uniform() - 0.5f;
  ctx.ops.upload(ctx.exec, std::as_bytes(std::span(host)), numbers);
  ctx.ops.copy(ctx.exec, numbers, x);
  double best = 0.0;
  for (int trial = 0; trial < 5; ++trial) {
    ctx.ops.synchronize(ctx.exec);
    const std::int64_t begin = steady_ns();
    ctx.ops.linear_forward(ctx.exec, {x, &weight, {}, {}, nullptr, y, {}});
    ctx.ops.synchronize(ctx.exec);
    best = std::max(best, 2.0 * static_cast<double>(t * i * n) /
                              static_cast<double>(steady_ns() - begin) * 1e9);
  }
  return best;
}

Result<std::unique_ptr<TrainingRig>> TrainingRig::create(
    kernels::Backend& backend, kernels::Exec& exec, worker::comm::Communicator& comm,
    const worker::comm::Layout& layout, const worker::model::LoadedModel& loaded,
    const TrainingCase& c, CommunicationNs* inside) {
  namespace model = worker::model;
  const std::int64_t reserve = std::int64_t{1} << 38;  // address space
  const auto arena = [&](kernels::MemoryKind kind, const char* name,
                         kernels::Sharing sharing = kernels::Sharing::kNone) {
    return std::make_unique<kernels::Arena>(*backend.allocator, *backend.ledger, kind, name,
                                            reserve, sharing);
  };
  TANDEM_RETURN_IF_ERROR(
      model::check_shard(loaded.config, layout.tp, layout.pp, layout.virtual_pp));
  std::unique_ptr<TrainingRig> rig(new TrainingRig);
  rig->weight_arena_ = arena(kernels::MemoryKind::kWeights, "weights", kernels::Sharing::kPeers);
  rig->table_arena_ = arena(kernels::MemoryKind::kAdapters, "slots");
  rig->activations_ = arena(kernels::MemoryKind::kActivations, "activations");
  rig->ranks_ = worker::train::make_ranks(comm, layout);
  if (inside != nullptr) {
    auto& groups = rig->ranks_.groups;
    groups.tp = timed_communicator(std::move(groups.tp), inside->tp);
    groups.dp = timed_communicator(std::move(groups.dp), inside->dp);
    groups.pp = timed_communicator(std::move(groups.pp), inside->pp);
  }
  const DType dtype = c.compute_dtype();
  rig->context_.reset(
      new model::Context{*backend.ops, exec, *rig->ranks_.groups.tp, *rig->activations_, dtype});
  TANDEM_ASSIGN_OR_RETURN(
      rig->held_,
      model::hold_weights(*rig->context_, *rig->ranks_.groups.dp, *rig->weight_arena_,
                          loaded.config, *loaded.source, rig->ranks_.shard(loaded.config),
                          model::holding_beside(c.method == "full", layout.zero)));
  rig->adapters_ = std::make_unique<model::AdapterTable>(*backend.ops, exec, *rig->table_arena_,
                                                         rig->held_.base->config(), 1);
  worker::train::SessionOptions options;
  options.settings = c.settings(layout);
  auto batches = worker::train::make_fixed_batches(random_steps(c, loaded.config.vocab), {});
  worker::memory::TrainingPlan plan;
  plan.layout = layout;
  plan.rank = comm.rank();
  TANDEM_ASSIGN_OR_RETURN(rig->estimate_, worker::memory::estimate_training(
                                              backend.ops->profile(), loaded.config, dtype,
                                              options.settings, batches->bounds(), plan));
  TANDEM_ASSIGN_OR_RETURN(
      rig->session_, worker::train::TrainSession::create(
                         {*backend.allocator, *backend.ledger, *rig->context_, *rig->held_.door,
                          *rig->adapters_, 0, &rig->ranks_, loaded.source.get()},
                         options, std::move(batches)));
  return rig;
}

}  // namespace tandem::tools
