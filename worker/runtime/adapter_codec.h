// Adapters and checkpoints between the engine's host tensors and the registry's manifests and
// blobs. One naming for both directions: PEFT's parameter names in adapters, TrainState's names in
// checkpoints. Pure functions; any thread.
#pragma once

#include "protocol/base/digest.h"
#include "storage/manifest.h"
#include "storage/peft.h"
#include "worker/model/adapter_layout.h"
#include "worker/runtime/bulk_client.h"
#include "worker/train/train_session.h"

#include <nlohmann/json_fwd.hpp>

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace tandem::worker::runtime {

/// How a manifest's chunks are had: BulkClient::get in a worker, the blob store in a coordinator's
/// process.
using FetchBlobs =
    std::function<Result<std::vector<std::vector<std::byte>>>(std::span<const Digest>)>;

/// A manifest with the bytes it names, ready for BulkClient::put.
struct PackedObject {
  std::string manifest;                 ///< canonical text
  Digest digest;                        ///< its identity
  std::vector<BlobView> blobs;          ///< into what was packed
  std::shared_ptr<const void> storage;  ///< keeps that alive

  /// Reads the chunks from this object itself; valid while it lives.
  [[nodiscard]] FetchBlobs fetch() const;
};

/// `config` gives r, lora_alpha, use_rslora, patterns and target_modules. Nothing is copied.
/// `on_blob` gets each chunk as soon as it has its name, and whether it is the last.
using OnBlob = std::function<void(const BlobView&, bool last)>;
Result<PackedObject> pack_adapter(const Digest& base_model, const storage::PeftConfig& config,
                                  std::shared_ptr<const model::FlatAdapter> adapter,
                                  const OnBlob& on_blob = {});
/// `config` null: of a full fine-tune.
Result<PackedObject> pack_checkpoint(const Digest& base_model, const storage::PeftConfig* config,
                                     std::shared_ptr<const train::TrainState> state);

/// A PEFT folder's adapter, bit for bit in the dtypes it has. The adapter outlives what comes back.
Result<PackedObject> pack_peft(const Digest& base_model, const storage::PeftAdapter& adapter);

/// Adapter tensors of an adapter's or a checkpoint's manifest, checked against the model:
/// corrupt_error or conflict_error names the tensor, the expected and the actual shape, or the
/// other base's digest.
Result<std::vector<model::HostAdapterTensor>> unpack_adapter(const std::string& manifest,
                                                             const Digest& base_model,
                                                             const model::ModelConfig& model,
                                                             const FetchBlobs& fetch);
Result<train::TrainState> unpack_checkpoint(const std::string& manifest, const Digest& base_model,
                                            const FetchBlobs& fetch);

/// A checkpoint's settings but for its state. `config` null: of a full fine-tune.
nlohmann::json checkpoint_settings(const Digest& base_model, const storage::PeftConfig* config);
/// conflict_error: the settings are of another base.
Status check_base(const nlohmann::json& settings, const Digest& base_model);

/// The mathematics of a manifest's "settings" as PEFT's configuration (export, scales).
Result<storage::PeftConfig> manifest_lora(const storage::Manifest& manifest);

/// PEFT's configuration of a training run.
storage::PeftConfig peft_config(const model::LoraConfig& lora);

}  // namespace tandem::worker::runtime
