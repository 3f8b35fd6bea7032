// Low-rank adapters on the device: what training writes and serving reads, through one table of
// slots.
#pragma once

#include "kernels/allocator.h"
#include "worker/model/base_weights.h"

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tandem::worker::model {

/// LoRA settings with PEFT's names and meanings.
struct LoraConfig {
  std::int64_t r = 16;
  double lora_alpha = 32.0;
  double lora_dropout = 0.0;
  bool use_rslora = false;
  std::vector<Site> target_modules;  ///< sorted, distinct, never empty
  [[nodiscard]] float scale() const;
  /// Resolves names ("q_proj", "all-linear", ...) against a model; an unknown name is invalid_error
  /// that lists what exists.
  static Result<std::vector<Site>> resolve_targets(const ModelConfig& config,
                                                   const std::vector<std::string>& names);
};

/// One site's pair. a [r, I], b [n, r], both cd (serving) and, while training, an f32 master behind
/// it.
struct AdapterPair {
  kernels::Tensor a, b;  ///< cd, what forward reads
  float scale = 0.0f;
  std::int32_t rank = 0;
};

/// A complete frozen adapter on the device: pairs[layer][site], absent where it has none. Immutable
/// after building; shared by slots and by whoever still serves it. Its arena (or snapshot buffer)
/// lives with it.
struct AdapterWeights {
  std::vector<std::array<std::optional<AdapterPair>, kSiteCount>> pairs;  ///< [layers]
  std::int64_t rank_max = 0;
  std::int64_t bytes = 0;
  std::shared_ptr<void> storage;  ///< keeps the device bytes alive
};

/// Host-side tensors of an adapter, as PEFT stores them: for import, export, publish and load.
struct HostAdapterTensor {
  std::int64_t layer = 0;
  Site site = Site::kQ;
  std::int64_t rank = 0;
  float scale = 0.0f;
  std::vector<float> a, b;  ///< [r, I], [n, r]
};

/// Puts host tensors on the device in memory of their own (kind kAdapters, in `ledger` until the
/// last holder lets go). invalid_error: no tensors, a layer or site that the model lacks, a site
/// twice, sizes that do not fit rank and site, a rank over kernels' int32. Throws DeviceError when
/// memory is out.
Result<std::shared_ptr<const AdapterWeights>> build_adapter(
    kernels::Ops& ops, kernels::Exec& exec, kernels::Allocator& allocator,
    kernels::MemoryLedger& ledger, const ModelConfig& config, DType dtype,
    const std::vector<HostAdapterTensor>& tensors);

/// AdapterWeights::bytes of what it would build. Of tensors whose sites the model has.
std::int64_t adapter_bytes(const ModelConfig& config, DType dtype,
                           const std::vector<HostAdapterTensor>& tensors);

/// Checks what build_adapter checks, without a device.
Status check_adapter(const ModelConfig& config, const std::vector<HostAdapterTensor>& tensors);

/// What a rank of a sharded model holds of an adapter: its blocks (numbered as before) and its
/// slices, for build_adapter with the rank's local_config. `config` is the whole model's.
std::vector<HostAdapterTensor> shard_adapter(const ModelConfig& config, const ModelShard& shard,
                                             const std::vector<HostAdapterTensor>& tensors);

/// Device slots of adapters: per (layer, site) one array of LoraEntry that ops read. Training and
/// serving hold slots of the same table. One device thread.
class AdapterTable {
 public:
  /// Entry arrays for `slots` adapters, allocated once in `arena` (kind kAdapters): one block, so
  /// that changing a slot is one upload.
  AdapterTable(kernels::Ops& ops, kernels::Exec& exec, kernels::Arena& arena,
               const ModelConfig& config, std::int64_t slots);
  /// Makes rows with this slot use `weights` from the next op on. The table keeps it alive.
  void set(kernels::Exec& exec, std::int64_t slot, std::shared_ptr<const AdapterWeights> weights);
  /// Same for a trainable adapter: entries carry gradient pointers (da, db f32), see train.
  struct TrainablePair {
    AdapterPair pair;
    kernels::Tensor da, db;
  };
  void set_trainable(
      kernels::Exec& exec, std::int64_t slot,
      const std::vector<std::array<std::optional<TrainablePair>, kSiteCount>>& pairs);
  void clear(kernels::Exec& exec, std::int64_t slot);
  [[nodiscard]] std::int64_t slots() const { return slots_; }
  /// The sites of a fused linear, ready for LinearArgs: {q,k,v}, {o}, {gate,up} or {down} of a
  /// layer.
  enum class Fused : int { kQkv, kO, kGateUp, kDown };
  [[nodiscard]] const std::vector<kernels::LoraSite>& sites(std::int64_t layer, Fused fused) const;

 private:
  [[nodiscard]] kernels::LoraEntry& entry(std::int64_t layer, Site site, std::int64_t slot);
  void erase(std::int64_t slot);
  void upload(kernels::Exec& exec);

  kernels::Ops& ops_;
  const ModelConfig config_;
  const std::int64_t slots_;
  kernels::Tensor table_;                    ///< u8, [layers][sites][slots] LoraEntry
  std::vector<kernels::LoraEntry> entries_;  ///< host copy of table_
  std::vector<std::array<std::vector<kernels::LoraSite>, 4>> sites_;  ///< [layers][Fused]
  std::vector<std::shared_ptr<const AdapterWeights>> held_;           ///< [slots]
};

}  // namespace tandem::worker::model
