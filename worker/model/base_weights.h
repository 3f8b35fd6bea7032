// The one copy of a base model's weights on a device, immutable, shared by training and serving.
#pragma once

#include "kernels/ops.h"
#include "worker/model/model_config.h"
#include "worker/model/shard.h"

#include <functional>
#include <memory>
#include <vector>

namespace tandem::worker::model {

/// Names of the linear sites that adapters may attach to, in a block's order; Hugging Face names,
/// as PEFT's target_modules uses them.
enum class Site : int { kQ = 0, kK, kV, kO, kGate, kUp, kDown };
inline constexpr int kSiteCount = 7;
/// "q_proj", ..., "down_proj".
const char* site_name(Site site);
/// "model.layers.3.self_attn.q_proj": the module path in checkpoints and PEFT files.
std::string site_path(std::int64_t layer, Site site);
/// Logical W [n, i] of a site.
struct SiteShape {
  std::int64_t n = 0, i = 0;
};
SiteShape site_shape(const ModelConfig& config, Site site);

/// Names of a checkpoint's tensors.
inline constexpr const char* kEmbeddingName = "model.embed_tokens.weight";
inline constexpr const char* kHeadName = "lm_head.weight";
inline constexpr const char* kFinalNormName = "model.norm.weight";
std::string weight_name(std::int64_t layer, Site site);
std::string bias_name(std::int64_t layer, Site site);
std::string attention_norm_name(std::int64_t layer);
std::string mlp_norm_name(std::int64_t layer);
/// Of every head of q, and of k: [D] each.
std::string q_norm_name(std::int64_t layer);
std::string k_norm_name(std::int64_t layer);

/// A tensor of a checkpoint: name and logical shape [n, i]; i = 0: a vector of n.
struct TensorSpec {
  std::string name;
  std::int64_t n = 0, i = 0;
};
/// Everything that BaseWeights::load reads for a config, in a stable order.
std::vector<TensorSpec> expected_tensors(const ModelConfig& config);

struct BlockWeights {
  kernels::Tensor attention_norm, mlp_norm;  ///< [C] cd
  kernels::PackedWeight qkv;                 ///< [(H + 2K) * D, C]: q, k, v stacked
  kernels::Tensor qkv_bias;                  ///< [(H + 2K) * D] cd or undefined
  kernels::PackedWeight o;                   ///< [C, H * D]
  kernels::PackedWeight gate_up;             ///< [2F, C]: gate, then up
  kernels::PackedWeight down;                ///< [C, F]
  kernels::Tensor qk_norm;                   ///< [2 * D] cd: of q, then of k; or undefined
};

/// Where host bytes come from while a model is built: a Hugging Face folder, a GGUF file, a
/// generator in tests, or zeros for the meta backend.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  /// Converts rows [row, row + rows) of the 2-D (or [n] as n rows of 1) tensor called `name`
  /// (Hugging Face names and layout) to f32. Checked for presence and shape by `has` before
  /// building starts. Any thread, several at once.
  virtual void read_rows(const std::string& name, std::int64_t row, std::int64_t rows,
                         float* out) const = 0;
  /// ok when `name` exists with logical shape [n, i] (i = 0: a vector of n); else the error to
  /// show.
  [[nodiscard]] virtual Status has(const std::string& name, std::int64_t n,
                                   std::int64_t i) const = 0;
  /// False for a dry run's source, whose matrices are never read.
  [[nodiscard]] virtual bool has_values() const { return true; }
};

class BaseWeights {
 public:
  /// Builds and packs everything that `shard` holds of the model into `arena` (kind kWeights).
  /// Every tensor is checked before the first byte is read: not_found_error / invalid_error name
  /// it. `with_blocks` false: only embedding, head and norm (blocks come through another door).
  /// Throws DeviceError when memory is out.
  static Result<std::shared_ptr<const BaseWeights>> load(kernels::Ops& ops, kernels::Exec& exec,
                                                         kernels::Arena& arena,
                                                         const ModelConfig& config, DType dtype,
                                                         const TensorSource& source,
                                                         const ModelShard& shard = {},
                                                         bool with_blocks = true);
  /// Checked alike, but no tensor is read or made: for whoever asks about the model's sizes alone.
  static Result<std::shared_ptr<const BaseWeights>> sizes_alone(const ModelConfig& config,
                                                                DType dtype,
                                                                const TensorSource& source,
                                                                const ModelShard& shard);
  /// Sizes as this rank's ops see them (local_config).
  [[nodiscard]] const ModelConfig& config() const { return config_; }
  /// The model as its checkpoint has it, and this rank's part.
  [[nodiscard]] const ModelConfig& whole_config() const { return whole_config_; }
  [[nodiscard]] const ModelShard& shard() const { return shard_; }
  [[nodiscard]] bool embeds() const { return shard_.embeds(whole_config_); }
  [[nodiscard]] bool has_head() const { return shard_.has_head(whole_config_); }
  [[nodiscard]] DType dtype() const { return dtype_; }
  [[nodiscard]] const kernels::PackedWeight& embedding() const { return embedding_; }  ///< [V, C]
  [[nodiscard]] const kernels::PackedWeight& lm_head() const {
    return config_.tied_embedding ? embedding_ : lm_head_;
  }
  [[nodiscard]] const kernels::Tensor& final_norm() const { return final_norm_; }
  [[nodiscard]] const kernels::Tensor& inv_freq() const { return inv_freq_; }  ///< [D/2] f32
  [[nodiscard]] float rope_attention_factor() const { return rope_attention_factor_; }
  [[nodiscard]] const BlockWeights& block(std::int64_t layer) const {
    return blocks_.at(static_cast<std::size_t>(layer));
  }

 private:
  static Result<std::shared_ptr<BaseWeights>> describe(const ModelConfig& config, DType dtype,
                                                       const TensorSource& source,
                                                       const ModelShard& shard);
  ModelConfig config_, whole_config_;
  ModelShard shard_;
  DType dtype_ = DType::kF32;
  kernels::PackedWeight embedding_, lm_head_;
  kernels::Tensor final_norm_, inv_freq_;
  float rope_attention_factor_ = 1.0f;
  std::vector<BlockWeights> blocks_;
};

/// The door through which a block's weights come: resident (here), gathered (ZeRO-3) or streamed
/// (offload) later. acquire/release bracket every use of a block in a phase.
enum class Phase : int { kForward, kBackward };
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual const BlockWeights& acquire(std::int64_t layer, Phase phase) = 0;
  virtual void release(std::int64_t layer, Phase phase) = 0;
  [[nodiscard]] virtual const BaseWeights& base() const = 0;
  /// A point of a pass that is no block's begin but where others may use the device all the same.
  virtual void yield() {}
  /// The host is about to wait for what was issued: where others may use the device meanwhile,
  /// returns when it is done.
  virtual void settle() {}
};
std::unique_ptr<WeightSource> make_resident_weights(std::shared_ptr<const BaseWeights> base);

/// Where gradients of weights go (f32, accumulated); shapes as in BlockWeights.
struct BlockGrads {
  kernels::Tensor attention_norm, mlp_norm, qkv, qkv_bias, o, gate_up, down, qk_norm;
  bool fresh = false;  ///< they hold nothing yet: backward writes them instead of adding
};
struct EndGrads {
  kernels::Tensor embedding, head;  ///< undefined on a stage without it; one and the same when tied
  kernels::Tensor final_norm;
};
enum class End : int { kHead, kEmbedding };

/// Told when a block's gradients of one micro-batch are complete, in backward order, so that
/// reductions can start; and, in full fine-tuning, asked where they go. The single-rank body of
/// LoRA does nothing.
class GradSink {
 public:
  virtual ~GradSink() = default;
  /// Before a block's backward; null: its weights are frozen.
  virtual const BlockGrads* acquire(std::int64_t) { return nullptr; }
  virtual void ready(std::int64_t layer) = 0;
  /// Around what a micro-batch adds to an end's gradient: kHead in the loss, kEmbedding at the end
  /// of backward. Between, the other end's view may be undefined.
  virtual void acquire_end(End) {}
  virtual void ready_end(End) {}
  /// Of embedding, head and final norm; null: frozen. Complete when backward returns.
  virtual const EndGrads* ends() { return nullptr; }
};

}  // namespace tandem::worker::model
