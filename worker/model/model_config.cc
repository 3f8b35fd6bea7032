#include "worker/model/model_config.h"

#include "storage/json_strict.h"
#include "storage/sliding_window.h"

#include <algorithm>
#include <set>

namespace tandem::worker::model {

namespace {

using storage::Json;

const char* rope_kind_name(RopeScaling::Kind kind) {
  switch (kind) {
    case RopeScaling::Kind::kDefault:
      return "default";
    case RopeScaling::Kind::kLinear:
      return "linear";
    case RopeScaling::Kind::kLlama3:
      return "llama3";
    case RopeScaling::Kind::kYarn:
      return "yarn";
  }
  return "?";
}

// Keys that config.json files carry and that change nothing in the mathematics of a forward pass:
// bookkeeping, generation defaults, initialisation, training-only or output-format switches.
const std::set<std::string>& harmless_keys() {
  static const std::set<std::string> keys{
      "architectures",
      "attention_probs_dropout_prob",
      "auto_map",
      "bad_words_ids",
      "begin_suppress_tokens",
      "chunk_size_feed_forward",
      "cross_attention_hidden_size",
      "decoder_start_token_id",
      "diversity_penalty",
      "do_sample",
      "dtype",
      "early_stopping",
      "encoder_no_repeat_ngram_size",
      "exponential_decay_length_penalty",
      "finetuning_task",
      "forced_bos_token_id",
      "forced_eos_token_id",
      "id2label",
      "initializer_range",
      "is_decoder",
      "is_llama_config",
      "label2id",
      "length_penalty",
      "max_length",
      "max_window_layers",
      "min_length",
      "model_type",
      "no_repeat_ngram_size",
      "num_beam_groups",
      "num_beams",
      "num_return_sequences",
      "output_attentions",
      "output_hidden_states",
      "output_scores",
      "pad_token_id",
      "prefix",
      "problem_type",
      "pruned_heads",
      "remove_invalid_values",
      "repetition_penalty",
      "return_dict",
      "return_dict_in_generate",
      "sep_token_id",
      "suppress_tokens",
      "task_specific_params",
      "temperature",
      "tie_encoder_decoder",
      "tokenizer_class",
      "top_k",
      "top_p",
      "torch_dtype",
      "torchscript",
      "transformers.js_config",
      "transformers_version",
      "typical_p",
      "unsloth_fixed",
      "unsloth_version",
      "use_bfloat16",
      "use_cache",
  };
  return keys;
}

/// Reads fields of one JSON object and remembers which it was asked for: what is left over is
/// unknown.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  /// Whether the file says anything of it, null included.
  [[nodiscard]] bool says(const std::string& key) const { return object_.contains(key); }
  /// The value, or null when the key is absent or null.
  const Json* find(const std::string& key) {
    seen_.insert(key);
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  Status integer(const std::string& key, std::int64_t& out, bool required = false) {
    const Json* value = find(key);
    if (value == nullptr) return required ? missing(key) : Status();
    if (!value->is_number_integer()) return wrong(key, *value, "an integer");
    out = value->get<std::int64_t>();
    return {};
  }
  Status number(const std::string& key, double& out, bool required = false) {
    const Json* value = find(key);
    if (value == nullptr) return required ? missing(key) : Status();
    if (!value->is_number()) return wrong(key, *value, "a number");
    out = value->get<double>();
    return {};
  }
  Status boolean(const std::string& key, bool& out) {
    const Json* value = find(key);
    if (value == nullptr) return {};
    if (!value->is_boolean()) return wrong(key, *value, "true or false");
    out = value->get<bool>();
    return {};
  }
  /// Refuses any value but `only`; absent is fine.
  Status must_be(const std::string& key, const Json& only) {
    const Json* value = find(key);
    if (value == nullptr || *value == only) return {};
    return refused_error(
        str(where_, ": ", key, " is ", value->dump(), "; only ", only.dump(), " is supported"));
  }
  /// Refuses every key that was not asked for and is not harmless.
  Status no_others(const std::set<std::string>& harmless) const {
    for (const auto& [key, value] : object_.items())
      if (!seen_.contains(key) && !harmless.contains(key) && !key.starts_with("_"))
        return refused_error(str(where_, ": unknown setting ", key, " = ", value.dump(),
                                 "; it may change what the model computes, so it is not ignored"));
    return {};
  }
  [[nodiscard]] Status missing(const std::string& key) const {
    return invalid_error(str(where_, ": ", key, " is missing"));
  }
  [[nodiscard]] Status wrong(const std::string& key, const Json& value, const char* want) const {
    return invalid_error(str(where_, ": ", key, " is ", value.dump(), ", not ", want));
  }

 private:
  const Json& object_;
  const std::string where_;
  std::set<std::string> seen_;
};

Status read_rope_kind(Fields& fields, const char* key, RopeScaling& rope) {
  const Json* type = fields.find("rope_type");
  if (const Json* old = fields.find("type"); type == nullptr) type = old;
  if (type == nullptr || *type == "default") return {};
  // Dynamic NTK turns as the default does up to max_position_embeddings, and no sequence here is
  // longer (Hugging Face modeling_rope_utils._compute_dynamic_ntk_parameters).
  if (*type == "dynamic") {
    double factor = 1.0;
    return fields.number("factor", factor, true);
  }
  if (*type == "linear")
    rope.kind = RopeScaling::Kind::kLinear;
  else if (*type == "llama3")
    rope.kind = RopeScaling::Kind::kLlama3;
  else if (*type == "yarn")
    rope.kind = RopeScaling::Kind::kYarn;
  else
    return refused_error(str("config.json: ", key, ": rope_type ", type->dump(),
                             " is not supported (default, dynamic, linear, llama3, yarn are)"));
  return fields.number("factor", rope.factor, true);
}

/// `object` is rope_scaling (older files) or rope_parameters (which holds rope_theta as well).
Status read_rope(const Json& object, const char* key, ModelConfig& config) {
  if (!object.is_object())
    return invalid_error(str("config.json: ", key, " is ", object.dump(), ", not an object"));
  Fields fields(object, str("config.json: ", key));
  RopeScaling& rope = config.rope_scaling;
  TANDEM_RETURN_IF_ERROR(read_rope_kind(fields, key, rope));
  TANDEM_RETURN_IF_ERROR(fields.number("rope_theta", config.rope_theta));
  TANDEM_RETURN_IF_ERROR(fields.must_be("partial_rotary_factor", 1.0));
  const bool llama3 = rope.kind == RopeScaling::Kind::kLlama3;
  const bool yarn = rope.kind == RopeScaling::Kind::kYarn;
  if (llama3) {
    TANDEM_RETURN_IF_ERROR(fields.number("low_freq_factor", rope.low_freq_factor, true));
    TANDEM_RETURN_IF_ERROR(fields.number("high_freq_factor", rope.high_freq_factor, true));
  }
  if (yarn) {
    TANDEM_RETURN_IF_ERROR(fields.number("beta_fast", rope.beta_fast));
    TANDEM_RETURN_IF_ERROR(fields.number("beta_slow", rope.beta_slow));
    TANDEM_RETURN_IF_ERROR(fields.boolean("truncate", rope.truncate));
    if (const Json* value = fields.find("attention_factor")) {
      if (!value->is_number()) return fields.wrong("attention_factor", *value, "a number");
      rope.attention_factor = value->get<double>();
    }
  }
  if (llama3 || yarn) {
    rope.original_max_position_embeddings = config.context_max;
    TANDEM_RETURN_IF_ERROR(fields.integer("original_max_position_embeddings",
                                          rope.original_max_position_embeddings, llama3));
  }
  return fields.no_others({});
}

/// A model_type and the name under "architectures" that it stands for.
struct Family {
  const char* name;
  const char* architecture;
};
constexpr Family kFamilies[] = {{"llama", "LlamaForCausalLM"},
                                {"mistral", "MistralForCausalLM"},
                                {"qwen2", "Qwen2ForCausalLM"},
                                {"qwen3", "Qwen3ForCausalLM"}};

/// The one name of "architectures"; of a file without that key, what its model_type stands for.
Result<std::string> read_architecture(Fields& fields) {
  const Json* names = fields.find("architectures");
  const Json* type = fields.find("model_type");
  if (names == nullptr && type != nullptr)
    for (const Family& family : kFamilies)
      if (*type == family.name) return std::string(family.architecture);
  if (names == nullptr || !names->is_array() || names->size() != 1 || !(*names)[0].is_string())
    return invalid_error("config.json: architectures must hold one name");
  return (*names)[0].get<std::string>();
}

Status read_family(Fields& fields, ModelConfig& config) {
  TANDEM_ASSIGN_OR_RETURN(const std::string name, read_architecture(fields));
  std::string known;
  for (const Family& family : kFamilies) {
    if (name == family.architecture) config.family = family.name;
    known += str(known.empty() ? "" : ", ", family.architecture);
  }
  if (config.family.empty())
    return refused_error(
        str("config.json: architecture ", name, " is not supported (", known, " are)"));
  config.qkv_bias = config.family == "qwen2";
  config.qk_norm = config.family == "qwen3";
  return {};
}

/// What transformers takes where a file does not say; of `kv_heads`, 0: as many as heads.
struct Defaults {
  std::int64_t kv_heads, head_dim, context_max;
};
Defaults defaults_of(const ModelConfig& config) {
  const std::int64_t head_dim = config.width / config.heads;
  if (config.family == "llama") return {0, head_dim, 2048};
  if (config.family == "mistral") return {8, head_dim, 131072};
  if (config.family == "qwen3") return {32, 128, 32768};
  return {0, head_dim, 32768};
}

Status read_sizes(Fields& fields, ModelConfig& config) {
  TANDEM_RETURN_IF_ERROR(fields.integer("vocab_size", config.vocab, true));
  TANDEM_RETURN_IF_ERROR(fields.integer("hidden_size", config.width, true));
  TANDEM_RETURN_IF_ERROR(fields.integer("intermediate_size", config.mlp_width, true));
  TANDEM_RETURN_IF_ERROR(fields.integer("num_hidden_layers", config.layers, true));
  TANDEM_RETURN_IF_ERROR(fields.integer("num_attention_heads", config.heads, true));
  if (config.heads <= 0)
    return invalid_error(str("config.json: num_attention_heads is ", config.heads));
  const Defaults defaults = defaults_of(config);
  config.kv_heads = fields.says("num_key_value_heads") || defaults.kv_heads == 0
                        ? config.heads
                        : defaults.kv_heads;
  TANDEM_RETURN_IF_ERROR(fields.integer("num_key_value_heads", config.kv_heads));
  config.head_dim = defaults.head_dim;
  TANDEM_RETURN_IF_ERROR(fields.integer("head_dim", config.head_dim));
  config.context_max = defaults.context_max;
  TANDEM_RETURN_IF_ERROR(fields.integer("max_position_embeddings", config.context_max));
  double eps = 1e-6;
  TANDEM_RETURN_IF_ERROR(fields.number("rms_norm_eps", eps));
  config.norm_eps = static_cast<float>(eps);
  return fields.boolean("tie_word_embeddings", config.tied_embedding);
}

/// What bounds a sequence by storage/sliding_window.h, and that every setting is one it knows.
Status read_window(Fields& fields, const Json& json, const ModelConfig& config,
                   std::int64_t& window) {
  if (config.family == "llama") {
    TANDEM_RETURN_IF_ERROR(fields.must_be("use_sliding_window", false));
    if (const Json* value = fields.find("sliding_window"))
      return refused_error(str("config.json: sliding_window ", value->dump(), " is not supported"));
  }
  bool asked = false;
  if (config.family == "mistral")
    TANDEM_RETURN_IF_ERROR(fields.must_be("use_sliding_window", true));
  TANDEM_RETURN_IF_ERROR(fields.boolean("use_sliding_window", asked));
  std::int64_t size = 0, first = 0;
  TANDEM_RETURN_IF_ERROR(fields.integer("sliding_window", size));
  TANDEM_RETURN_IF_ERROR(fields.integer("max_window_layers", first));
  const storage::SlidingWindow found = storage::sliding_window(json, config.family, config.layers);
  if (found.used && found.size < 1)
    return invalid_error(str("config.json: sliding_window is ", found.size));
  if (const Json* types = fields.find("layer_types"))
    for (const Json& type : *types) {
      if (type == "full_attention" || (found.used && type == "sliding_attention")) continue;
      return refused_error(str("config.json: layer_types holds ", type.dump(),
                               found.used ? "; only \"full_attention\" and \"sliding_attention\" "
                                            "are supported"
                                          : "; without a sliding window only \"full_attention\" "
                                            "is supported"));
    }
  window = found.bound();
  return {};
}

/// Settings that exist in these families and of which we compute only one value.
Status check_fixed(Fields& fields, const ModelConfig& config) {
  TANDEM_RETURN_IF_ERROR(fields.must_be("hidden_act", "silu"));
  // Qwen2 always has the bias; a file that says otherwise is another model.
  TANDEM_RETURN_IF_ERROR(fields.must_be("attention_bias", config.qkv_bias));
  TANDEM_RETURN_IF_ERROR(fields.must_be("mlp_bias", false));
  TANDEM_RETURN_IF_ERROR(fields.must_be("attention_dropout", 0.0));
  TANDEM_RETURN_IF_ERROR(fields.must_be("partial_rotary_factor", 1.0));
  TANDEM_RETURN_IF_ERROR(fields.must_be("pretraining_tp", 1));
  TANDEM_RETURN_IF_ERROR(fields.must_be("rope_interleaved", false));
  TANDEM_RETURN_IF_ERROR(fields.must_be("is_encoder_decoder", false));
  TANDEM_RETURN_IF_ERROR(fields.must_be("add_cross_attention", false));
  if (const Json* value = fields.find("quantization_config"))
    return refused_error(str("config.json: quantization_config ", value->dump().substr(0, 200),
                             " is not supported; use the unquantized model or a GGUF file"));
  return {};
}

Status read_special_tokens(Fields& fields, ModelConfig& config) {
  std::int64_t bos = -1;
  TANDEM_RETURN_IF_ERROR(fields.integer("bos_token_id", bos));
  if (bos < INT32_MIN || bos > INT32_MAX)
    return fields.wrong("bos_token_id", Json(bos), "an id of 32 bits");
  config.bos_id = static_cast<std::int32_t>(bos);
  const Json* eos = fields.find("eos_token_id");
  if (eos == nullptr) return {};
  for (const Json& id : eos->is_array() ? *eos : Json::array({*eos})) {
    const std::int64_t value = id.is_number_integer() ? id.get<std::int64_t>() : INT64_MAX;
    if (value < INT32_MIN || value > INT32_MAX)
      return fields.wrong("eos_token_id", *eos, "an id of 32 bits or a list of them");
    config.eos_ids.push_back(static_cast<std::int32_t>(value));
  }
  return {};
}

}  // namespace

Result<ModelConfig> ModelConfig::from_hf_json(const std::string& json_text) {
  TANDEM_ASSIGN_OR_RETURN(const Json json, storage::parse_json_strict(json_text, "config.json"));
  if (!json.is_object()) return invalid_error("config.json: not a JSON object");
  Fields fields(json, "config.json");
  ModelConfig config;
  TANDEM_RETURN_IF_ERROR(read_family(fields, config));
  TANDEM_RETURN_IF_ERROR(read_sizes(fields, config));
  TANDEM_RETURN_IF_ERROR(check_fixed(fields, config));
  TANDEM_RETURN_IF_ERROR(read_special_tokens(fields, config));
  TANDEM_RETURN_IF_ERROR(fields.number("rope_theta", config.rope_theta));
  if (const Json* rope = fields.find("rope_scaling"))
    TANDEM_RETURN_IF_ERROR(read_rope(*rope, "rope_scaling", config));
  if (const Json* rope = fields.find("rope_parameters"))
    TANDEM_RETURN_IF_ERROR(read_rope(*rope, "rope_parameters", config));
  std::int64_t window = 0;
  TANDEM_RETURN_IF_ERROR(read_window(fields, json, config, window));
  TANDEM_RETURN_IF_ERROR(fields.no_others(harmless_keys()));
  TANDEM_RETURN_IF_ERROR(config.validate());
  // Last: what rope scaling takes from max_position_embeddings, it takes from the file's.
  if (window > 0) config.context_max = std::min(config.context_max, window);
  return config;
}

std::string hf_architecture(const std::string& family) {
  for (const Family& known : kFamilies)
    if (family == known.name) return known.architecture;
  return "";
}

Status ModelConfig::validate() const {
  const auto positive = [](const char* name, std::int64_t value) {
    constexpr std::int64_t kMax = std::int64_t{1} << 24;  // products of two stay far inside int64
    return value >= 1 && value <= kMax
               ? Status()
               : invalid_error(str("model: ", name, " is ", value, "; it must be 1..", kMax));
  };
  TANDEM_RETURN_IF_ERROR(positive("vocab_size", vocab));
  TANDEM_RETURN_IF_ERROR(positive("hidden_size", width));
  TANDEM_RETURN_IF_ERROR(positive("num_hidden_layers", layers));
  TANDEM_RETURN_IF_ERROR(positive("num_attention_heads", heads));
  TANDEM_RETURN_IF_ERROR(positive("num_key_value_heads", kv_heads));
  TANDEM_RETURN_IF_ERROR(positive("head_dim", head_dim));
  TANDEM_RETURN_IF_ERROR(positive("intermediate_size", mlp_width));
  TANDEM_RETURN_IF_ERROR(positive("max_position_embeddings", context_max));
  if (heads % kv_heads != 0)
    return invalid_error(
        str("model: ", heads, " query heads are no multiple of ", kv_heads, " key-value heads"));
  if (head_dim % 2 != 0)
    return invalid_error(str("model: head_dim ", head_dim, " is odd; rope needs pairs"));
  if (qk_norm && head_dim > kernels::kQkNormDimMax)
    return refused_error(str("model: head_dim ", head_dim,
                             " is not supported with norms of q and k; ", kernels::kQkNormDimMax,
                             " is the largest"));
  if (!(rope_theta > 0.0) || !(norm_eps >= 0.0f) || !(rope_scaling.factor > 0.0))
    return invalid_error(str("model: rope_theta ", rope_theta, ", rms_norm_eps ", norm_eps,
                             ", rope factor ", rope_scaling.factor, ": one is out of range"));
  const bool scaled = rope_scaling.kind == RopeScaling::Kind::kLlama3 ||
                      rope_scaling.kind == RopeScaling::Kind::kYarn;
  if (scaled && rope_scaling.original_max_position_embeddings < 1)
    return invalid_error("model: rope scaling needs original_max_position_embeddings");
  if (!rope_scaling.factors.empty() &&
      static_cast<std::int64_t>(rope_scaling.factors.size()) != head_dim / 2)
    return invalid_error(
        str("model: ", rope_scaling.factors.size(), " rope factors for head_dim ", head_dim));
  return {};
}

std::string ModelConfig::canonical_json() const {
  Json rope{{"kind", rope_kind_name(rope_scaling.kind)},
            {"factor", rope_scaling.factor},
            {"low_freq_factor", rope_scaling.low_freq_factor},
            {"high_freq_factor", rope_scaling.high_freq_factor},
            {"original_max_position_embeddings", rope_scaling.original_max_position_embeddings},
            {"beta_fast", rope_scaling.beta_fast},
            {"beta_slow", rope_scaling.beta_slow},
            {"truncate", rope_scaling.truncate},
            {"factors", rope_scaling.factors}};
  if (rope_scaling.attention_factor) rope["attention_factor"] = *rope_scaling.attention_factor;
  Json json{{"family", family},
            {"vocab", vocab},
            {"width", width},
            {"layers", layers},
            {"heads", heads},
            {"kv_heads", kv_heads},
            {"head_dim", head_dim},
            {"mlp_width", mlp_width},
            {"context_max", context_max},
            {"norm_eps", norm_eps},
            {"rope_theta", rope_theta},
            {"rope_scaling", rope},
            {"tied_embedding", tied_embedding},
            {"qkv_bias", qkv_bias},
            {"window", window},
            {"bos_id", bos_id},
            {"eos_ids", eos_ids}};
  if (qk_norm) json["qk_norm"] = true;  // said where it is: models without it keep their identity
  return storage::canonical_json(json).value();
}

}  // namespace tandem::worker::model
