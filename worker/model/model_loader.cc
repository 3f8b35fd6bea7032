#include "worker/model/model_loader.h"

#include "protocol/base/sampling_limits.h"
#include "storage/file_io.h"
#include "storage/json_strict.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

namespace tandem::worker::model {

namespace {

namespace fs = std::filesystem;
using storage::Json;

/// What lies at the path, opened once.
struct Opened {
  ModelConfig config;
  std::optional<storage::Gguf> gguf;  ///< else a folder
};

bool is_gguf(const std::string& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

/// The text of a file of the folder; "" when there is none and it is optional.
Result<std::string> read_text(const std::string& folder, const char* name, std::int64_t bytes_max,
                              bool required) {
  const std::string path = str(folder, "/", name);
  std::error_code error;
  if (!required && !fs::exists(path, error)) return std::string();
  auto text = storage::read_file(path, bytes_max);
  if (text.status().code() == StatusCode::kNotFound)
    return not_found_error(str("model folder ", folder, " has no ", name));
  return text;
}

Result<Json> read_json(const std::string& folder, const char* name) {
  TANDEM_ASSIGN_OR_RETURN(const std::string text, read_text(folder, name, kConfigBytesMax, false));
  if (text.empty()) return Json::object();
  TANDEM_ASSIGN_OR_RETURN(Json json, storage::parse_json_strict(text, str(folder, "/", name)));
  if (!json.is_object()) return corrupt_error(str(folder, "/", name, " is not a JSON object"));
  return json;
}

Status wrong_default(const std::string& folder, const char* key, const Json& value,
                     const std::string& want) {
  return invalid_error(str(folder, "/generation_config.json: ", key, " is ",
                           value.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 80),
                           ", not ", want));
}

/// generation_config.json may name more ends of generation than config.json does.
Status add_eos(const std::string& folder, const Json& value, ModelConfig& config) {
  if (value.is_null()) return {};
  for (const Json& id : value.is_array() ? value : Json::array({value})) {
    const std::int64_t number = id.is_number_integer() ? id.get<std::int64_t>() : INT64_MAX;
    if (number < INT32_MIN || number > INT32_MAX)
      return wrong_default(folder, "eos_token_id", value, "an id of 32 bits or a list of them");
    const auto eos = static_cast<std::int32_t>(number);
    if (std::find(config.eos_ids.begin(), config.eos_ids.end(), eos) == config.eos_ids.end())
      config.eos_ids.push_back(eos);
  }
  return {};
}

Result<Opened> open_model(const std::string& path) {
  std::error_code error;
  if (!fs::exists(path, error))
    return not_found_error(str("no model at ", path, ": no such file or folder"));
  Opened opened;
  if (is_gguf(path)) {
    TANDEM_ASSIGN_OR_RETURN(opened.gguf, storage::Gguf::open(path));
    TANDEM_ASSIGN_OR_RETURN(opened.config, ModelConfig::from_gguf(*opened.gguf));
    return opened;
  }
  TANDEM_ASSIGN_OR_RETURN(const std::string text,
                          read_text(path, "config.json", kConfigBytesMax, true));
  TANDEM_ASSIGN_OR_RETURN(opened.config, ModelConfig::from_hf_json(text));
  TANDEM_ASSIGN_OR_RETURN(const Json generation, read_json(path, "generation_config.json"));
  if (generation.contains("eos_token_id"))
    TANDEM_RETURN_IF_ERROR(add_eos(path, generation["eos_token_id"], opened.config));
  return opened;
}

/// GenerationDefaults::not_applied: what transformers' generate() would do with these, unless they
/// have the value beside them, null, or nothing in them.
std::vector<std::string> find_not_applied(const Json& generation) {
  static const std::map<std::string, Json> kOff{
      {"num_beams", 1},          {"num_beam_groups", 1},
      {"penalty_alpha", 0},      {"typical_p", 1},
      {"epsilon_cutoff", 0},     {"eta_cutoff", 0},
      {"top_h", Json()},         {"no_repeat_ngram_size", 0},
      {"guidance_scale", 1},     {"encoder_no_repeat_ngram_size", 0},
      {"min_length", 0},         {"encoder_repetition_penalty", 1},
      {"min_new_tokens", 0},     {"exponential_decay_length_penalty", Json()},
      {"bad_words_ids", Json()}, {"suppress_tokens", Json()},
      {"sequence_bias", Json()}, {"begin_suppress_tokens", Json()},
      {"stop_strings", Json()},  {"forced_bos_token_id", Json()},
      {"dola_layers", Json()},   {"forced_eos_token_id", Json()}};
  std::vector<std::string> found;
  for (const auto& [name, off] : kOff) {
    const Json value = generation.value(name, Json());
    if (value == off || value.is_null() || (value.is_structured() && value.empty())) continue;
    found.push_back(str(name, " ", value.dump()));
  }
  return found;
}

/// A null is as good as no key; anything else of another kind would be a default that nobody gets.
Result<GenerationDefaults> read_generation(const std::string& folder) {
  TANDEM_ASSIGN_OR_RETURN(const Json json, read_json(folder, "generation_config.json"));
  GenerationDefaults defaults;
  const auto find = [&](const char* key) {
    const auto it = json.find(key);
    return it == json.end() || it->is_null() ? nullptr : &*it;
  };
  for (const auto& [key, out] : {std::pair{"temperature", &defaults.temperature},
                                 {"top_p", &defaults.top_p},
                                 {"min_p", &defaults.min_p},
                                 {"repetition_penalty", &defaults.repetition_penalty}})
    if (const Json* value = find(key)) {
      if (!value->is_number()) return wrong_default(folder, key, *value, "a number");
      *out = value->get<double>();
    }
  // As of a request's own values; else each request that leaves one unset would be refused.
  const auto outside = [](const std::optional<double>& value, double low, double high) {
    return value && !(*value >= low && *value <= high);
  };
  if (outside(defaults.temperature, 0, kTemperatureMax))
    return wrong_default(folder, "temperature", *find("temperature"),
                         str("from 0 to ", kTemperatureMax));
  if (outside(defaults.top_p, 0, 1) || defaults.top_p == 0.0)
    return wrong_default(folder, "top_p", *find("top_p"), "above 0 and at most 1");
  if (outside(defaults.min_p, 0, 1))
    return wrong_default(folder, "min_p", *find("min_p"), "from 0 to 1");
  if (outside(defaults.repetition_penalty, 0, kRepetitionPenaltyMax) ||
      defaults.repetition_penalty == 0.0)
    return wrong_default(folder, "repetition_penalty", *find("repetition_penalty"),
                         str("above 0 and at most ", kRepetitionPenaltyMax));
  for (const auto& [key, out] :
       {std::pair{"top_k", &defaults.top_k}, {"max_new_tokens", &defaults.max_new_tokens}})
    if (const Json* value = find(key)) {
      if (!value->is_number_integer()) return wrong_default(folder, key, *value, "an integer");
      *out = value->get<std::int64_t>();
    }
  if (defaults.top_k && *defaults.top_k < 0)
    return wrong_default(folder, "top_k", *find("top_k"), "0 or more");
  if (defaults.max_new_tokens && *defaults.max_new_tokens < 1)
    return wrong_default(folder, "max_new_tokens", *find("max_new_tokens"), "1 or more");
  if (const Json* value = find("do_sample")) {
    if (!value->is_boolean()) return wrong_default(folder, "do_sample", *value, "true or false");
    defaults.do_sample = value->get<bool>();
  }
  defaults.not_applied = find_not_applied(json);
  return defaults;
}

/// chat_template.jinja, else tokenizer_config.json's chat_template: a text, or a list of named ones
/// of which "default" counts.
Result<std::string> read_chat_template(const std::string& folder) {
  TANDEM_ASSIGN_OR_RETURN(const std::string file,
                          read_text(folder, "chat_template.jinja", kConfigBytesMax, false));
  if (!file.empty()) return file;
  TANDEM_ASSIGN_OR_RETURN(const Json json, read_json(folder, "tokenizer_config.json"));
  const auto it = json.find("chat_template");
  if (it == json.end() || it->is_null()) return std::string();
  if (it->is_string()) return it->get<std::string>();
  if (it->is_array())
    for (const Json& entry : *it)
      if (entry.is_object() && entry.value("name", "") == "default" && entry.contains("template") &&
          entry["template"].is_string())
        return entry["template"].get<std::string>();
  return refused_error(str(folder,
                           "/tokenizer_config.json: chat_template is neither a text nor a "
                           "list with a template named default"));
}

Result<std::vector<ModelFile>> list_files(const std::string& path,
                                          const std::vector<std::string>& weight_paths) {
  std::vector<ModelFile> files;
  std::error_code error;
  const auto add = [&](const std::string& full, std::string relative) -> Status {
    const auto bytes = fs::file_size(full, error);
    if (error) return internal_error(str("cannot read the size of ", full, ": ", error.message()));
    files.push_back({std::move(relative), static_cast<std::int64_t>(bytes)});
    return {};
  };
  if (is_gguf(path)) {
    TANDEM_RETURN_IF_ERROR(add(path, ""));
    return files;
  }
  for (const std::string& weights : weight_paths)
    TANDEM_RETURN_IF_ERROR(add(weights, fs::path(weights).filename().string()));
  for (const char* name :
       {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "model.safetensors.index.json"})
    if (const std::string full = str(path, "/", name); fs::exists(full, error))
      TANDEM_RETURN_IF_ERROR(add(full, name));
  std::sort(files.begin(), files.end(),
            [](const ModelFile& a, const ModelFile& b) { return a.path < b.path; });
  return files;
}

Status check_tensors(const ModelConfig& config, const TensorSource& source) {
  for (const TensorSpec& spec : expected_tensors(config))
    TANDEM_RETURN_IF_ERROR(source.has(spec.name, spec.n, spec.i));
  return {};
}

/// Tensors that old converters wrote and that follow from the configuration.
bool is_derived(const std::string& name) {
  for (const char* ending : {".rotary_emb.inv_freq", ".rotary_emb.cos_cached",
                             ".rotary_emb.sin_cached", ".attn_rot_embd"})
    if (name.ends_with(ending)) return true;
  return name == "rope_freqs.weight";
}

/// A bias, a further norm or a further layer would be left out of every product without a word.
/// `names`: those of the file, and what they stand for.
Status check_no_others(const ModelConfig& config,
                       const std::vector<std::pair<std::string, std::string>>& names) {
  std::set<std::string> expected;
  for (const TensorSpec& spec : expected_tensors(config)) expected.insert(spec.name);
  if (config.tied_embedding) expected.insert(kHeadName);  // a copy of the embedding
  for (const auto& [name, meaning] : names)
    if (!expected.contains(meaning) && !is_derived(name))
      return refused_error(str("tensor ", name, " is not part of a ", config.family, " model with ",
                               config.layers,
                               " layers, as its configuration describes it; it may "
                               "change what the model computes, so it is not ignored"));
  return {};
}

/// Of a tied embedding a file may hold a second copy, which is not loaded. One that differs is a
/// head of its own, whatever the configuration says: transformers then unties the two.
Status check_tied_head(const ModelConfig& config, const TensorSource& source, bool same_bytes) {
  TANDEM_RETURN_IF_ERROR(source.has(kHeadName, config.vocab, config.width));
  if (same_bytes) return {};
  constexpr std::int64_t kRows = 256;
  std::vector<float> embedding(static_cast<std::size_t>(kRows * config.width)), head(embedding);
  for (std::int64_t row = 0; row < config.vocab; row += kRows) {
    const std::int64_t rows = std::min(kRows, config.vocab - row);
    source.read_rows(kEmbeddingName, row, rows, embedding.data());
    source.read_rows(kHeadName, row, rows, head.data());
    const auto end = embedding.begin() + rows * config.width;
    const auto differs = std::mismatch(embedding.begin(), end, head.begin()).first;
    if (differs != end)
      return refused_error(str("tensor ", kHeadName, " differs from ", kEmbeddingName,
                               " (first in row ",
                               row + (differs - embedding.begin()) / config.width,
                               "), though the configuration says tie_word_embeddings: true; say "
                               "false to use it, or remove it from the file"));
  }
  return {};
}

Result<std::string> settings_json(const LoadedModel& model) {
  Json settings;
  settings["config"] = Json::parse(model.config.canonical_json());
  settings["chat_template"] = sha256(model.chat_template).hex();
  if (const auto& gguf = model.tokenizer.gguf) {
    const Json tokenizer{{"model", gguf->model},
                         {"pre", gguf->pre},
                         {"tokens", gguf->tokens},
                         {"types", gguf->token_types},
                         {"merges", gguf->merges}};
    settings["tokenizer"] =
        sha256(tokenizer.dump(-1, ' ', false, Json::error_handler_t::replace)).hex();
  } else {
    settings["tokenizer"] =
        sha256(model.tokenizer.tokenizer_json + '\0' + model.tokenizer.tokenizer_config_json).hex();
  }
  return storage::canonical_json(settings);
}

/// All but weights and files.
Result<LoadedModel> read_texts(const std::string& path, const Opened& opened) {
  LoadedModel model;
  model.config = opened.config;
  if (opened.gguf) {
    TANDEM_ASSIGN_OR_RETURN(model.tokenizer.gguf, opened.gguf->tokenizer());
    model.chat_template = model.tokenizer.gguf->chat_template;
    return model;
  }
  TANDEM_ASSIGN_OR_RETURN(model.tokenizer.tokenizer_json,
                          read_text(path, "tokenizer.json", kTokenizerBytesMax, true));
  TANDEM_ASSIGN_OR_RETURN(model.tokenizer.tokenizer_config_json,
                          read_text(path, "tokenizer_config.json", kConfigBytesMax, false));
  TANDEM_ASSIGN_OR_RETURN(model.chat_template, read_chat_template(path));
  TANDEM_ASSIGN_OR_RETURN(model.generation, read_generation(path));
  return model;
}

}  // namespace

Result<LoadedModel> load_model_texts(const std::string& path) {
  TANDEM_ASSIGN_OR_RETURN(const Opened opened, open_model(path));
  return read_texts(path, opened);
}

Result<LoadedModel> load_model(const std::string& path) {
  TANDEM_ASSIGN_OR_RETURN(const Opened opened, open_model(path));
  TANDEM_ASSIGN_OR_RETURN(LoadedModel model, read_texts(path, opened));
  std::vector<std::string> weight_paths;
  std::vector<std::pair<std::string, std::string>> names;
  bool second_head = false, same_bytes = false;
  if (opened.gguf) {
    for (const storage::GgufTensor& tensor : opened.gguf->tensors())
      names.emplace_back(tensor.name, storage::gguf_to_hf_name(tensor.name).value_or(""));
    TANDEM_ASSIGN_OR_RETURN(model.source, make_gguf_source(*opened.gguf, model.config));
  } else {
    TANDEM_ASSIGN_OR_RETURN(storage::Safetensors weights, storage::Safetensors::open_folder(path));
    weight_paths = weights.paths();
    for (const storage::TensorInfo& tensor : weights.tensors())
      names.emplace_back(tensor.name, tensor.name);
    const storage::TensorInfo* head = weights.find(kHeadName);
    const storage::TensorInfo* embedding = weights.find(kEmbeddingName);
    second_head = head != nullptr && model.config.tied_embedding;
    same_bytes = head != nullptr && embedding != nullptr && head->dtype == embedding->dtype &&
                 std::ranges::equal(head->bytes, embedding->bytes);
    model.source = make_safetensors_source(std::move(weights));
  }
  TANDEM_RETURN_IF_ERROR(check_tensors(model.config, *model.source));
  TANDEM_RETURN_IF_ERROR(check_no_others(model.config, names));
  if (second_head) TANDEM_RETURN_IF_ERROR(check_tied_head(model.config, *model.source, same_bytes));
  TANDEM_ASSIGN_OR_RETURN(model.files, list_files(path, weight_paths));
  return model;
}

Result<ModelConfig> read_model_config(const std::string& path) {
  TANDEM_ASSIGN_OR_RETURN(Opened opened, open_model(path));
  return std::move(opened.config);
}

Result<storage::Manifest> describe_model(const std::string& path, int threads) {
  TANDEM_ASSIGN_OR_RETURN(const LoadedModel model, load_model(path));
  storage::Manifest manifest;
  manifest.kind = storage::ManifestKind::kModel;
  TANDEM_ASSIGN_OR_RETURN(manifest.settings_json, settings_json(model));
  if (is_gguf(path)) {
    TANDEM_ASSIGN_OR_RETURN(const storage::Gguf file, storage::Gguf::open(path));
    for (const storage::GgufTensor& tensor : file.tensors())
      manifest.tensors.push_back(storage::describe_tensor(
          tensor.name, storage::gguf_type_name(tensor.type), tensor.shape, tensor.bytes, threads));
    return manifest;
  }
  TANDEM_ASSIGN_OR_RETURN(const storage::Safetensors weights,
                          storage::Safetensors::open_folder(path));
  for (const storage::TensorInfo& tensor : weights.tensors())
    manifest.tensors.push_back(storage::describe_tensor(tensor.name, dtype_name(tensor.dtype),
                                                        tensor.shape, tensor.bytes, threads));
  return manifest;
}

}  // namespace tandem::worker::model
