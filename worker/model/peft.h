// Adapters between PEFT's files (storage) and host tensors, strictly.
#pragma once

#include "storage/peft.h"
#include "worker/model/adapter.h"

#include <memory>
#include <string>
#include <vector>

namespace tandem::worker::model {

/// Layer and site of "model.layers.3.self_attn.q_proj"; nullopt for any other name.
std::optional<std::pair<std::int64_t, Site>> parse_site_path(std::string_view path);

/// Linear layers that target_modules names and that have no tensors, in layers where others do:
/// PEFT leaves them as the base has them, with a warning, for a file that lost some looks alike.
std::vector<std::string> sites_without_tensors(const storage::PeftAdapter& adapter);

/// Every tensor of `sites` as host f32 (from f32, bf16 or f16). invalid_error: a site that the
/// model does not have, shapes that do not fit the base model, an element type that is none of the
/// three, NaN or infinity; each names the site, what it has and what the model needs.
Result<std::vector<HostAdapterTensor>> from_peft(const ModelConfig& config,
                                                 std::span<const storage::AdapterTensors> sites);

/// An adapter ready for storage::write_peft and for the registry: views into `bytes`.
struct PeftImage {
  storage::PeftConfig config;
  std::vector<storage::AdapterTensors> sites;  ///< in the order of the tensors given
  std::vector<std::byte> bytes;
};
/// Rounds every value to `dtype` (f32, bf16 or f16) and describes it in PEFT's terms. Every tensor
/// has the scale that `lora` gives, as trained ones do.
std::unique_ptr<const PeftImage> to_peft(const ModelConfig& config, const LoraConfig& lora,
                                         const std::vector<HostAdapterTensor>& tensors, DType dtype,
                                         const std::string& base_model_name);

}  // namespace tandem::worker::model
