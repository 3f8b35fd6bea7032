// What a decoder-only transformer of the Llama family is, read from a Hugging Face config.json or
// GGUF metadata. A key that changes the mathematics and that we do not know refuses the model.
#pragma once

#include "kernels/op_args.h"
#include "protocol/base/result.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tandem::storage {
class Gguf;
}

namespace tandem::worker::model {

/// Positions: how inverse frequencies are derived (Hugging Face names).
struct RopeScaling {
  enum class Kind { kDefault, kLinear, kLlama3, kYarn } kind = Kind::kDefault;
  double factor = 1.0;
  double low_freq_factor = 1.0, high_freq_factor = 4.0;  // llama3
  std::int64_t original_max_position_embeddings = 0;     // llama3, yarn
  double beta_fast = 32.0, beta_slow = 1.0;              // yarn
  std::optional<double> attention_factor;                // yarn; absent: 0.1 ln(factor) + 1
  bool truncate = true;                                  // yarn: whole-dimension ramp limits
  /// [D/2] divisors of the inverse frequencies; empty: all 1. How GGUF files carry llama3 scaling.
  std::vector<float> factors;
};

struct ModelConfig {
  std::string family;  ///< "llama", "mistral", "qwen2", "qwen3"
  std::int64_t vocab = 0, width = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0,
               mlp_width = 0;
  /// max_position_embeddings, or the sliding window where that is smaller: a sequence no longer
  /// than the window is seen whole by each of its tokens, so no window is computed.
  std::int64_t context_max = 0;
  float norm_eps = 1e-5f;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  bool tied_embedding = false;
  bool qkv_bias = false;
  bool qk_norm = false;     ///< every head of q and k is normed before it is rotated
  std::int64_t window = 0;  ///< sliding window; 0: none
  std::int32_t bos_id = -1;
  std::vector<std::int32_t> eos_ids;  ///< generation ends on any of them

  /// Parses config.json's text. invalid_error: malformed; refused_error: names the unsupported
  /// architecture or key with its value.
  static Result<ModelConfig> from_hf_json(const std::string& json_text);
  /// From GGUF metadata and the presence of tensors (output.weight absent: tied). Errors as above.
  static Result<ModelConfig> from_gguf(const storage::Gguf& file);
  /// invalid_error names the first field that is out of range or contradicts another.
  [[nodiscard]] Status validate() const;
  /// One stable JSON text of all fields: part of the model's manifest.
  [[nodiscard]] std::string canonical_json() const;
};

/// The name under "architectures" of config.json of a family; empty: not one of ours.
std::string hf_architecture(const std::string& family);

/// Inverse frequencies [D/2] and the attention factor for a config. Formulas: Su et al. 2021
/// (default), Hugging Face modeling_rope_utils (linear, llama3), Peng et al. 2023 (yarn).
struct RopeTable {
  std::vector<float> inv_freq;
  float attention_factor = 1.0f;
};
RopeTable make_rope_table(const ModelConfig& config);

}  // namespace tandem::worker::model
