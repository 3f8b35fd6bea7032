#include "worker/memory/dry_engine.h"

#include "worker/model/tensor_source.h"

namespace tandem::worker::memory {

namespace {

/// Address space of each arena: more than any device has memory.
constexpr std::int64_t kArenaBytes = std::int64_t{1} << 44;

}  // namespace

DryEngine::DryEngine(const kernels::DeviceProfile& profile, DType dtype)
    : backend_(kernels::make_meta_backend(profile)),
      weight_arena_(*backend_.allocator, *backend_.ledger, kernels::MemoryKind::kWeights, "weights",
                    kArenaBytes),
      table_arena_(*backend_.allocator, *backend_.ledger, kernels::MemoryKind::kAdapters, "slots",
                   kArenaBytes),
      activation_arena_(*backend_.allocator, *backend_.ledger, kernels::MemoryKind::kActivations,
                        "activations", kArenaBytes),
      workspace_(*backend_.allocator, *backend_.ledger, kernels::MemoryKind::kWorkspace,
                 "workspace", kArenaBytes),
      exec_{workspace_},
      comm_(comm::make_single_communicator(
          [this](kernels::Exec& exec, kernels::Tensor from, kernels::Tensor to) {
            backend_.ops->copy(exec, from, to);
          })),
      context{*backend_.ops, exec_, *comm_, activation_arena_, dtype} {}

Result<std::unique_ptr<DryEngine>> DryEngine::create(const kernels::DeviceProfile& profile,
                                                     const model::ModelConfig& config, DType dtype,
                                                     std::int64_t adapter_slots) {
  std::unique_ptr<DryEngine> engine(new DryEngine(profile, dtype));
  TANDEM_ASSIGN_OR_RETURN(
      engine->base,
      model::BaseWeights::load(*engine->backend_.ops, engine->exec_, engine->weight_arena_, config,
                               dtype, *model::make_zero_source()));
  engine->weights = model::make_resident_weights(engine->base);
  engine->adapters = std::make_unique<model::AdapterTable>(
      *engine->backend_.ops, engine->exec_, engine->table_arena_, config, adapter_slots);
  return engine;
}

}  // namespace tandem::worker::memory
