// LoRA adapters in Hugging Face PEFT's folder format (adapter_config.json,
// adapter_model.safetensors), in and out, exactly: every tensor's bits survive a round trip.
//
// A site is the name of a linear layer in the Hugging Face model without ".weight":
// "model.layers.3.self_attn.q_proj". The layer computes y = W x + scale * B (A x).
//
// Whatever changes the mathematics and is not supported is refused with the field's name and value
// (use_dora, modules_to_save, bias, fan_in_fan_out, megatron_config, ...); fields that only steer
// training (lora_dropout, init_lora_weights, ...) are accepted.
#pragma once

#include "protocol/job_spec.h"
#include "storage/safetensors.h"

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace tandem::storage {

inline constexpr std::int64_t kAdapterConfigBytesMax = 1 << 20;
using protocol::kLoraRankMax;  ///< larger ones are refused

/// adapter_config.json, as far as it changes the mathematics.
struct PeftConfig {
  std::int64_t r = 8;
  double lora_alpha = 8;
  double lora_dropout = 0;
  bool use_rslora = false;
  std::vector<std::string> target_modules;  ///< names; empty where a pattern or all-linear is given
  std::string target_pattern;  ///< a regular expression, matched against whole site names
  bool all_linear = false;     ///< target_modules "all-linear"
  std::map<std::string, std::int64_t> rank_pattern;
  std::map<std::string, double> alpha_pattern;
  std::string base_model_name_or_path;
  std::string task_type = "CAUSAL_LM";

  /// lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, after the patterns: a pattern key
  /// applies to a site that it matches as a regular expression, whole or after a ".", as in PEFT's
  /// get_pattern_key.
  [[nodiscard]] double scale(const std::string& site, std::int64_t rank) const;
  [[nodiscard]] std::int64_t rank(const std::string& site) const;
};

/// One adapted layer. a is [r, in], b is [out, r], both row-major; bytes may be unaligned.
struct AdapterTensors {
  std::string site;
  TensorInfo a, b;
  double scale = 1;
};

struct PeftAdapter {
  PeftConfig config;
  std::vector<AdapterTensors> sites;  ///< sorted by site
  Safetensors file;                   ///< keeps the tensors' bytes alive
};

/// Reads config text alone. Errors: invalid or refused, naming the field.
Result<PeftConfig> parse_peft_config(std::string_view json, const std::string& what);

/// Whether a layer's tensors (their bytes are not read) are a LoRA as the configuration says: both
/// halves, of types, shapes and a rank that are served, named by target_modules. `what` begins
/// errors: invalid, and refused for a rank over kLoraRankMax.
Status check_site(const AdapterTensors& site, const PeftConfig& config, const std::string& what);

/// How many values of a tensor (f32, bf16 or f16) are infinite or no numbers.
std::int64_t count_not_finite(std::span<const std::byte> values, DType dtype);

/// Reads a folder. Errors: not_found, those of the parsers, invalid (a tensor that is neither
/// lora_A nor lora_B of a site, a missing half, shapes that do not fit each other or the rank,
/// values that are not finite).
Result<PeftAdapter> read_peft(const std::string& folder);

/// Writes both files durably into `folder` (made when missing). Sites' tensors are written under
/// PEFT's names. Where they are not in all of the base's `base_layers` (0: not known), the
/// configuration names just them: PEFT makes a LoRA of its own wherever it names one. Errors:
/// invalid, internal (disk).
Status write_peft(const std::string& folder, const PeftConfig& config,
                  std::span<const AdapterTensors> sites, std::int64_t base_layers = 0);

}  // namespace tandem::storage
