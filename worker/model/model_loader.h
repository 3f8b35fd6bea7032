// Opens a base model on disk: a Hugging Face folder or one GGUF file. Everything is checked here,
// before a byte of device memory is taken; weights are read later, through `source`.
#pragma once

#include "storage/gguf.h"
#include "storage/manifest.h"
#include "worker/model/model_config.h"
#include "worker/model/tensor_source.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tandem::worker::model {

/// Limits of one text file of a model folder.
inline constexpr std::int64_t kConfigBytesMax = 1 << 20;
inline constexpr std::int64_t kTokenizerBytesMax = 256 << 20;

/// What text::Tokenizer needs: either the texts of a Hugging Face folder or a GGUF file's data.
struct TokenizerFiles {
  std::string tokenizer_json;         ///< tokenizer.json
  std::string tokenizer_config_json;  ///< tokenizer_config.json; "" when the folder has none
  std::optional<storage::GgufTokenizer> gguf;
};

/// generation_config.json: what a request gets that leaves it unset; absent: it says nothing.
struct GenerationDefaults {
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  std::optional<std::int64_t> top_k, max_new_tokens;
  std::optional<bool> do_sample;  ///< false: greedy
  /// Settings that would change what is generated and that nobody applies, each with its value.
  std::vector<std::string> not_applied;
};

/// A file that the model consists of.
struct ModelFile {
  std::string path;  ///< relative to the folder; "" for a single GGUF file
  std::int64_t bytes = 0;
};

struct LoadedModel {
  ModelConfig config;  ///< eos_ids include those of generation_config.json
  std::unique_ptr<TensorSource> source;
  TokenizerFiles tokenizer;
  std::string chat_template;  ///< Jinja; "" when the model has none
  GenerationDefaults generation;
  std::vector<ModelFile> files;  ///< sorted by path
};

/// not_found_error: no such path, or a part that a model must have is missing (named).
/// invalid / refused / corrupt errors are those of the configuration and the file formats.
Result<LoadedModel> load_model(const std::string& path);

/// The same without a look at weights, which need not be there: `source` is null, `files` empty.
Result<LoadedModel> load_model_texts(const std::string& path);

/// The configuration alone, as load_model reads it.
Result<ModelConfig> read_model_config(const std::string& path);

/// The model's identity: a manifest of kind model with every tensor's root, and as settings the
/// canonical configuration and the digests of tokenizer and chat template. Reads all weights, with
/// up to `threads` threads. Errors as load_model.
Result<storage::Manifest> describe_model(const std::string& path, int threads);

}  // namespace tandem::worker::model
