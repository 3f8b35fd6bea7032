// A base with an adapter inside it, as a Hugging Face folder's weights and configuration.
#pragma once

#include "worker/model/adapter.h"
#include "worker/model/model_loader.h"

#include <string>
#include <vector>

namespace tandem::worker::model {

/// "float32", "bfloat16", "float16".
const char* torch_dtype_name(DType dtype);

/// config.json of a config with weights in `dtype`, for models that come from elsewhere (GGUF).
/// refused_error: what Hugging Face's configuration cannot say (rope factors of single
/// frequencies; sliding windows; biases of q, k and v in a Llama model).
Result<std::string> hf_config_json(const ModelConfig& config, DType dtype);

/// Writes `folder`/model.safetensors, durably: every tensor of the base, with W + s B A (in f32) at
/// the adapter's sites, rounded once to `dtype` (f32, bf16 or f16). Holds the result in memory. The
/// adapter was checked against the config (check_adapter). refused_error, nothing written: values
/// that are not finite in `dtype`, as those beyond 65504 in f16 (names the tensor).
Status write_merged_weights(const LoadedModel& base, const std::vector<HostAdapterTensor>& adapter,
                            DType dtype, const std::string& folder);

}  // namespace tandem::worker::model
