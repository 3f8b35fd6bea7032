#include "worker/model/model_config.h"

#include "storage/gguf.h"

#include <algorithm>
#include <array>
#include <set>

namespace tandem::worker::model {

namespace {

using storage::Gguf;

/// Keys under "ARCH." that we read, each relative to the architecture's name; those marked so need
/// not be read because they change nothing here.
const std::set<std::string>& known_keys() {
  static const std::set<std::string> keys{
      "block_count",
      "context_length",
      "embedding_length",
      "feed_forward_length",
      "attention.head_count",
      "attention.head_count_kv",
      "attention.key_length",
      "attention.value_length",
      "attention.layer_norm_rms_epsilon",
      "attention.causal",
      "attention.sliding_window",
      "rope.freq_base",
      "rope.dimension_count",
      "rope.scaling.type",
      "rope.scaling.factor",
      "rope.scaling.attn_factor",
      "rope.scaling.original_context_length",
      "rope.scaling.yarn_beta_fast",
      "rope.scaling.yarn_beta_slow",
      "rope.scale_linear",
      "vocab_size",
      "expert_count",
      "expert_used_count",
      "rope.scaling.finetuned",  // says how the model came to be
      "tensor_data_layout",      // "Meta AI original pth": a note of old converters
  };
  return keys;
}

class Keys {
 public:
  Keys(const Gguf& file, std::string arch) : file_(file), arch_(std::move(arch)) {}

  [[nodiscard]] std::string full(const std::string& key) const { return arch_ + "." + key; }
  [[nodiscard]] bool has(const std::string& key) const { return file_.has(full(key)); }
  Status integer(const std::string& key, std::int64_t& out, bool required = false) const {
    if (!required && !has(key)) return {};
    TANDEM_ASSIGN_OR_RETURN(out, file_.integer(full(key)));
    return {};
  }
  Status number(const std::string& key, double& out, bool required = false) const {
    if (!required && !has(key)) return {};
    TANDEM_ASSIGN_OR_RETURN(out, file_.number(full(key)));
    return {};
  }
  Status refuse(const std::string& key, const std::string& value, const std::string& why) const {
    return refused_error(
        str(file_.path(), ": ", full(key), " = ", value, " is not supported: ", why));
  }
  Status no_others() const {
    for (const std::string& key : file_.keys())
      if (key.starts_with(arch_ + ".") && !known_keys().contains(key.substr(arch_.size() + 1)))
        return refused_error(str(file_.path(), ": unknown setting ", key,
                                 "; it may change what the model computes, so it is not ignored"));
    return {};
  }

 private:
  const Gguf& file_;
  const std::string arch_;
};

Status read_sizes(const Gguf& file, const Keys& keys, ModelConfig& config) {
  TANDEM_RETURN_IF_ERROR(keys.integer("block_count", config.layers, true));
  TANDEM_RETURN_IF_ERROR(keys.integer("embedding_length", config.width, true));
  TANDEM_RETURN_IF_ERROR(keys.integer("feed_forward_length", config.mlp_width, true));
  TANDEM_RETURN_IF_ERROR(keys.integer("context_length", config.context_max, true));
  TANDEM_RETURN_IF_ERROR(keys.integer("attention.head_count", config.heads, true));
  if (config.heads < 1)
    return invalid_error(str(file.path(), ": ", config.heads, " attention heads"));
  config.kv_heads = config.heads;
  TANDEM_RETURN_IF_ERROR(keys.integer("attention.head_count_kv", config.kv_heads));
  config.head_dim = config.width / config.heads;
  TANDEM_RETURN_IF_ERROR(keys.integer("attention.key_length", config.head_dim));
  std::int64_t value_length = config.head_dim, rope_dims = config.head_dim, experts = 0;
  TANDEM_RETURN_IF_ERROR(keys.integer("attention.value_length", value_length));
  TANDEM_RETURN_IF_ERROR(keys.integer("rope.dimension_count", rope_dims));
  TANDEM_RETURN_IF_ERROR(keys.integer("expert_count", experts));
  if (value_length != config.head_dim)
    return keys.refuse("attention.value_length", str(value_length),
                       "keys and values must be equal");
  if (rope_dims != config.head_dim)
    return keys.refuse("rope.dimension_count", str(rope_dims), "rope must turn the whole head");
  if (experts != 0) return keys.refuse("expert_count", str(experts), "no mixtures of experts");
  if (keys.has("attention.causal")) {
    TANDEM_ASSIGN_OR_RETURN(const bool causal, file.boolean(keys.full("attention.causal")));
    if (!causal)
      return keys.refuse("attention.causal", "false", "each token sees those before it alone");
  }
  double eps = 1e-5;
  TANDEM_RETURN_IF_ERROR(keys.number("attention.layer_norm_rms_epsilon", eps, true));
  config.norm_eps = static_cast<float>(eps);
  return {};
}

Status read_rope(const Gguf& file, const Keys& keys, ModelConfig& config) {
  RopeScaling& rope = config.rope_scaling;
  TANDEM_RETURN_IF_ERROR(keys.number("rope.freq_base", config.rope_theta));
  std::string type = "none";
  if (keys.has("rope.scaling.type")) {
    TANDEM_ASSIGN_OR_RETURN(type, file.text(keys.full("rope.scaling.type")));
  } else if (keys.has("rope.scale_linear")) {
    type = "linear";
    TANDEM_RETURN_IF_ERROR(keys.number("rope.scale_linear", rope.factor));
  }
  if (type == "linear" || type == "yarn") {
    rope.kind = type == "linear" ? RopeScaling::Kind::kLinear : RopeScaling::Kind::kYarn;
    TANDEM_RETURN_IF_ERROR(
        keys.number("rope.scaling.factor", rope.factor, !keys.has("rope.scale_linear")));
  } else if (type != "none") {
    return keys.refuse("rope.scaling.type", type, "none, linear and yarn are");
  }
  if (type == "yarn") {
    rope.original_max_position_embeddings = config.context_max;
    TANDEM_RETURN_IF_ERROR(keys.integer("rope.scaling.original_context_length",
                                        rope.original_max_position_embeddings));
    TANDEM_RETURN_IF_ERROR(keys.number("rope.scaling.yarn_beta_fast", rope.beta_fast));
    TANDEM_RETURN_IF_ERROR(keys.number("rope.scaling.yarn_beta_slow", rope.beta_slow));
  }
  if (keys.has("rope.scaling.attn_factor")) {
    double factor = 1.0;
    TANDEM_RETURN_IF_ERROR(keys.number("rope.scaling.attn_factor", factor));
    if (factor != 1.0) return keys.refuse("rope.scaling.attn_factor", str(factor), "only 1 is");
  }
  if (const storage::GgufTensor* factors = file.find("rope_freqs.weight")) {
    if (factors->numel() != config.head_dim / 2)
      return invalid_error(str(file.path(), ": rope_freqs.weight has ", factors->numel(),
                               " values for head_dim ", config.head_dim));
    rope.factors.resize(static_cast<std::size_t>(factors->numel()));
    TANDEM_RETURN_IF_ERROR(
        storage::dequantize(factors->type, factors->bytes, std::span<float>(rope.factors)));
  }
  return {};
}

Status read_vocabulary(const Gguf& file, const Keys& keys, ModelConfig& config) {
  const storage::GgufTensor* embedding = file.find("token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2)
    return invalid_error(str(file.path(), ": no matrix token_embd.weight"));
  config.vocab = embedding->shape[0];
  std::int64_t declared = config.vocab;
  TANDEM_RETURN_IF_ERROR(keys.integer("vocab_size", declared));
  if (declared != config.vocab)
    return invalid_error(str(file.path(), ": vocab_size ", declared, " but token_embd.weight has ",
                             config.vocab, " rows"));
  config.tied_embedding = file.find("output.weight") == nullptr;
  if (file.has("tokenizer.ggml.bos_token_id")) {
    TANDEM_ASSIGN_OR_RETURN(const std::int64_t id, file.integer("tokenizer.ggml.bos_token_id"));
    config.bos_id = static_cast<std::int32_t>(id);
  }
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    if (!file.has(key)) continue;
    TANDEM_ASSIGN_OR_RETURN(const std::int64_t id, file.integer(key));
    if (config.eos_ids.empty() || config.eos_ids[0] != id)
      config.eos_ids.push_back(static_cast<std::int32_t>(id));
  }
  return {};
}

}  // namespace

Result<ModelConfig> ModelConfig::from_gguf(const storage::Gguf& file) {
  TANDEM_ASSIGN_OR_RETURN(const std::string arch, file.architecture());
  ModelConfig config;
  config.family = arch;
  config.qkv_bias = arch == "qwen2";
  config.qk_norm = arch == "qwen3";
  if (arch != "llama" && arch != "qwen2" && arch != "qwen3")
    return refused_error(
        str(file.path(), ": architecture ", arch, " is not supported (llama, qwen2, qwen3 are)"));
  const Keys keys(file, arch);
  TANDEM_RETURN_IF_ERROR(keys.no_others());
  TANDEM_RETURN_IF_ERROR(read_sizes(file, keys, config));
  TANDEM_RETURN_IF_ERROR(read_rope(file, keys, config));
  TANDEM_RETURN_IF_ERROR(read_vocabulary(file, keys, config));
  // Llama files with bias tensors exist (attention_bias of other converters).
  if (arch == "llama" && file.find("blk.0.attn_q.bias") != nullptr)
    return refused_error(str(file.path(),
                             ": tensor blk.0.attn_q.bias in a llama model is not "
                             "supported: it would be ignored"));
  TANDEM_RETURN_IF_ERROR(config.validate());
  std::int64_t window = 0;
  TANDEM_RETURN_IF_ERROR(keys.integer("attention.sliding_window", window));
  if (window < 0) return keys.refuse("attention.sliding_window", str(window), "it is negative");
  if (window > 0) config.context_max = std::min(config.context_max, window);
  return config;
}

}  // namespace tandem::worker::model
