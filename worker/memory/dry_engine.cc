#include "worker/memory/dry_engine.h"

#include "worker/model/tensor_source.h"

namespace tandem::worker::memory {

namespace {

/// Address space of each arena: more than any device has memory.
constexpr std::int64_t kArenaBytes = std::int64_t{1} << 44;

}  // namespace

DryEngine::DryEngine(const kernels::DeviceProfile& profile, DType dtype, const DryRank& place,
                     DryWatchers watchers)
    : backend_(kernels::make_meta_backend(profile, std::move(watchers.ops))),
      weight_arena_(*backend_.allocator, *backend_.ledger, kernels::MemoryKind::kWeights, "weights",
                    kArenaBytes),
      table_arena_(*backend_.allocator, *backend_.ledger, kernels::MemoryKind::kAdapters, "slots",
                   kArenaBytes),
      activation_arena_(*backend_.allocator, *backend_.ledger, kernels::MemoryKind::kActivations,
                        "activations", kArenaBytes),
      workspace_(*backend_.allocator, *backend_.ledger, kernels::MemoryKind::kWorkspace,
                 "workspace", kArenaBytes),
      exec_{workspace_},
      comm_(comm::make_meta_communicator(place.rank, place.layout.ranks(),
                                         profile.type != kernels::DeviceType::kCuda,
                                         std::move(watchers.comm))),
      ranks(train::make_ranks(*comm_, place.layout)),
      context{*backend_.ops, exec_, *ranks.groups.tp, activation_arena_, dtype} {}

Result<std::unique_ptr<DryEngine>> DryEngine::create(const kernels::DeviceProfile& profile,
                                                     const model::ModelConfig& config, DType dtype,
                                                     std::int64_t adapter_slots,
                                                     const DryRank& place, DryWatchers watchers) {
  TANDEM_RETURN_IF_ERROR(place.layout.validate());
  TANDEM_RETURN_IF_ERROR(
      model::check_shard(config, place.layout.tp, place.layout.pp, place.layout.virtual_pp));
  std::unique_ptr<DryEngine> engine(new DryEngine(profile, dtype, place, std::move(watchers)));
  engine->source = model::make_zero_source();
  TANDEM_ASSIGN_OR_RETURN(
      auto held,
      model::hold_weights(engine->context, *engine->ranks.groups.dp, engine->weight_arena_, config,
                          *engine->source, engine->ranks.shard(config), place.holding));
  engine->base = std::move(held.base);
  engine->weights = std::move(held.door);
  engine->adapters = std::make_unique<model::AdapterTable>(*engine->backend_.ops, engine->exec_,
                                                           engine->table_arena_,
                                                           engine->base->config(), adapter_slots);
  return engine;
}

}  // namespace tandem::worker::memory
