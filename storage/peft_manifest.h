// PEFT folders into the registry and out of it (`tandem adapter import`, `export`): the adapter
// manifest's layout, for those who do not hold a model.
//
// Tensors have PEFT's parameter names ("base_model.model.SITE.lora_A.weight"); settings are
//   {"base_model":HEX,"lora_alpha":N,"r":N,"target_modules":[...],"use_rslora":B}
// with "rank_pattern" and "alpha_pattern" where they are not empty.
#pragma once

#include "storage/blob_store.h"
#include "storage/manifest.h"
#include "storage/peft.h"

#include <functional>
#include <memory>

namespace tandem::storage {

struct AdapterImport {
  std::string manifest;  ///< canonical text, for PublishAdapter
  Digest digest;
  std::vector<BlobChunk> chunks;  ///< views into the adapter's file: put them before publishing
};

/// Describes an adapter for a base model. `adapter` must outlive the result.
Result<AdapterImport> import_adapter(const PeftAdapter& adapter, const Digest& base_model);

/// The configuration in an adapter manifest's settings. Errors: corrupt (no JSON), invalid (a field
/// is missing or of another type).
Result<PeftConfig> lora_config(const std::string& settings_json);

/// Whether an engine that holds `base` (a model's manifest, with Hugging Face's or GGUF's names)
/// can load this adapter: settings as strict as a PEFT folder's, and lora_A [r, in] and lora_B
/// [out, r] in f32, bf16 or f16 of linear layers that it has as [out, in], each as the settings say
/// (check_site). Errors: invalid and refused, naming the setting, or the tensor, what it has and
/// what the base needs.
Status check_adapter_fits(const Manifest& adapter, const Manifest& base);

struct AdapterExport {
  PeftConfig config;
  Digest base_model;
  std::vector<AdapterTensors> sites;  ///< views into buffers
  std::vector<std::shared_ptr<const std::vector<std::byte>>> buffers;
};
/// The reverse; `fetch` gives a chunk's bytes by digest (BlobStore::get), which are verified here
/// once more. Errors: invalid (not an adapter's manifest), corrupt, those of fetch.
Result<AdapterExport> export_adapter(
    std::string_view manifest,
    const std::function<Result<std::vector<std::byte>>(const Digest&)>& fetch);

}  // namespace tandem::storage
