#include "worker/model/merge.h"

#include "storage/json_strict.h"
#include "storage/peft.h"
#include "storage/safetensors.h"

#include <algorithm>
#include <charconv>
#include <map>

namespace tandem::worker::model {
namespace {

using storage::Json;

/// The shortest decimal that is this float: 1e-05, not 9.99999974e-06.
double shortest(float value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  double exact = 0.0;
  std::from_chars(text, end, exact);
  return exact;
}

Result<Json> rope_json(const RopeScaling& rope) {
  if (!rope.factors.empty())
    return refused_error(
        "this model scales single rope frequencies, which config.json cannot say; merge into the "
        "model's Hugging Face folder instead");
  switch (rope.kind) {
    case RopeScaling::Kind::kDefault:
      return Json();
    case RopeScaling::Kind::kLinear:
      return Json{{"rope_type", "linear"}, {"factor", rope.factor}};
    case RopeScaling::Kind::kLlama3:
      return Json{{"rope_type", "llama3"},
                  {"factor", rope.factor},
                  {"low_freq_factor", rope.low_freq_factor},
                  {"high_freq_factor", rope.high_freq_factor},
                  {"original_max_position_embeddings", rope.original_max_position_embeddings}};
    case RopeScaling::Kind::kYarn:
      break;
  }
  Json json{{"rope_type", "yarn"},
            {"factor", rope.factor},
            {"beta_fast", rope.beta_fast},
            {"beta_slow", rope.beta_slow},
            {"truncate", rope.truncate},
            {"original_max_position_embeddings", rope.original_max_position_embeddings}};
  if (rope.attention_factor) json["attention_factor"] = *rope.attention_factor;
  return json;
}

/// w [n, i] += s B A, the sum over the rank first.
void add_adapter(const HostAdapterTensor& adapter, std::int64_t n, std::int64_t i,
                 std::vector<float>& w) {
  std::vector<float> row(static_cast<std::size_t>(i));
  for (std::int64_t out = 0; out < n; ++out) {
    std::fill(row.begin(), row.end(), 0.0f);
    for (std::int64_t r = 0; r < adapter.rank; ++r) {
      const float b = adapter.b[static_cast<std::size_t>(out * adapter.rank + r)];
      const float* a = adapter.a.data() + r * i;
      for (std::int64_t c = 0; c < i; ++c) row[static_cast<std::size_t>(c)] += b * a[c];
    }
    float* to = w.data() + out * i;
    for (std::int64_t c = 0; c < i; ++c) to[c] += adapter.scale * row[static_cast<std::size_t>(c)];
  }
}

std::vector<std::byte> stored(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * static_cast<std::size_t>(dtype_bytes(dtype)));
  store_floats(values, dtype, bytes.data());
  return bytes;
}

}  // namespace

const char* torch_dtype_name(DType dtype) {
  return dtype == DType::kF32 ? "float32" : dtype == DType::kF16 ? "float16" : "bfloat16";
}

Result<std::string> hf_config_json(const ModelConfig& config, DType dtype) {
  const std::string architecture = hf_architecture(config.family);
  if (architecture.empty() || config.qkv_bias != (config.family == "qwen2") ||
      config.qk_norm != (config.family == "qwen3"))
    return refused_error(str("a model of family ", config.family,
                             config.qkv_bias ? " with" : " without", " biases of q, k and v and",
                             config.qk_norm ? " with" : " without",
                             " norms of q and k has no config.json of ours"));
  if (config.window != 0) return refused_error("sliding windows have no config.json of ours");
  TANDEM_ASSIGN_OR_RETURN(const Json rope, rope_json(config.rope_scaling));
  Json json{{"architectures", {architecture}},
            {"model_type", config.family},
            {"vocab_size", config.vocab},
            {"hidden_size", config.width},
            {"num_hidden_layers", config.layers},
            {"num_attention_heads", config.heads},
            {"num_key_value_heads", config.kv_heads},
            {"intermediate_size", config.mlp_width},
            {"max_position_embeddings", config.context_max},
            {"rms_norm_eps", shortest(config.norm_eps)},
            {"rope_theta", config.rope_theta},
            {"tie_word_embeddings", config.tied_embedding},
            {"hidden_act", "silu"},
            {"torch_dtype", torch_dtype_name(dtype)}};
  if (config.head_dim * config.heads != config.width || config.qk_norm)
    json["head_dim"] = config.head_dim;
  // Where it is not said, Mistral has a window of 4096. Ours is the end of the context already.
  if (config.family == "mistral") json["sliding_window"] = nullptr;
  if (!rope.is_null()) json["rope_scaling"] = rope;
  if (config.bos_id >= 0) json["bos_token_id"] = config.bos_id;
  if (!config.eos_ids.empty()) json["eos_token_id"] = config.eos_ids;
  return json.dump(2) + "\n";
}

Status write_merged_weights(const LoadedModel& base, const std::vector<HostAdapterTensor>& adapter,
                            DType dtype, const std::string& folder) {
  TANDEM_CHECK(is_stored_float(dtype), dtype_name(dtype));
  std::map<std::string, const HostAdapterTensor*> sites;
  for (const HostAdapterTensor& tensor : adapter)
    sites[site_path(tensor.layer, tensor.site) + ".weight"] = &tensor;
  const std::vector<TensorSpec> specs = expected_tensors(base.config);
  for (const TensorSpec& spec : specs)
    TANDEM_RETURN_IF_ERROR(base.source->has(spec.name, spec.n, spec.i));
  std::vector<std::vector<std::byte>> bytes;
  std::vector<storage::TensorInfo> tensors;
  for (const TensorSpec& spec : specs) {
    std::vector<float> values(static_cast<std::size_t>(spec.n * std::max<std::int64_t>(1, spec.i)));
    base.source->read_rows(spec.name, 0, spec.n, values.data());
    if (const auto site = sites.find(spec.name); site != sites.end())
      add_adapter(*site->second, spec.n, spec.i, values);
    bytes.push_back(stored(values, dtype));
    if (const auto bad = storage::count_not_finite(bytes.back(), dtype); bad > 0)
      return refused_error(str("tensor ", spec.name, ": ", bad, " of ", values.size(),
                               " merged values are not finite in ", dtype_name(dtype),
                               dtype == DType::kF16 ? ", which ends at 65504; merge with --dtype "
                                                      "bf16 instead"
                                                    : ""));
    storage::TensorInfo info;
    info.name = spec.name;
    info.dtype = dtype;
    info.shape =
        spec.i == 0 ? std::vector<std::int64_t>{spec.n} : std::vector<std::int64_t>{spec.n, spec.i};
    info.bytes = bytes.back();
    tensors.push_back(std::move(info));
  }
  return storage::write_safetensors(folder + "/model.safetensors", tensors, {{"format", "pt"}});
}

}  // namespace tandem::worker::model
