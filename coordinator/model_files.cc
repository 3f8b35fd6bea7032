#include "coordinator/model_files.h"

#include "protocol/base/dtype.h"
#include "protocol/base/json_nesting.h"
#include "protocol/base/str.h"
#include "protocol/utf8.h"
#include "storage/gguf.h"
#include "storage/manifest.h"
#include "storage/mapped_file.h"
#include "storage/safetensors.h"
#include "storage/sliding_window.h"

#include <nlohmann/json.hpp>

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

namespace tandem::coordinator {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr std::array<const char*, 4> kFamilies{"llama", "mistral", "qwen2", "qwen3"};
constexpr std::int64_t kConfigBytesMax = 64 << 20;
/// Files of a Hugging Face folder that a worker needs beside the tensors.
constexpr std::array<const char*, 6> kSideFiles{"config.json",         "generation_config.json",
                                                "tokenizer.json",      "tokenizer_config.json",
                                                "chat_template.jinja", "special_tokens_map.json"};

Status check_family(const std::string& family, const std::string& path) {
  std::string all;
  for (const char* known : kFamilies) {
    if (family == known) return {};
    all += str(all.empty() ? "" : ", ", known);
  }
  return refused_error(str(path, ": the model family ", family.empty() ? "(none)" : family,
                           " is not supported; supported are ", all));
}

Result<std::string> real_path(const std::string& path, const std::vector<std::string>& roots) {
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  if (error) return not_found_error(str("no file or folder ", path, ": ", error.message()));
  if (roots.empty()) return real.string();
  for (const std::string& root : roots) {
    const fs::path real_root = fs::weakly_canonical(root, error);
    const auto [end, rest] =
        std::mismatch(real_root.begin(), real_root.end(), real.begin(), real.end());
    if (!error && end == real_root.end()) return real.string();
  }
  return refused_error(str(path, " lies outside the coordinator's model_roots"));
}

Result<ModelFile> describe_file(const std::string& path, const std::string& relative, int threads) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return not_found_error(str("no file ", path));
  TANDEM_ASSIGN_OR_RETURN(const auto mapped, storage::MappedFile::open(path));
  ModelFile file;
  file.path = relative;
  file.bytes = info.st_size;
  file.mtime_ns = info.st_mtim.tv_sec * 1'000'000'000ll + info.st_mtim.tv_nsec;
  file.inode = info.st_ino;
  file.root = content_root(mapped->bytes(), threads);
  return file;
}

Result<std::string> read_text(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return not_found_error(str("no file ", path));
  std::ostringstream text;
  text << in.rdbuf();
  if (static_cast<std::int64_t>(text.str().size()) > kConfigBytesMax)
    return refused_error(
        str(path, " has ", text.str().size(), " bytes, at most ", kConfigBytesMax, " are read"));
  return text.str();
}

/// Identity from settings and tensors; fills digest and manifest.
Status seal(ModelHashed& model, const Json& settings,
            std::vector<storage::ManifestTensor> tensors) {
  storage::Manifest manifest;
  manifest.kind = ManifestKind::kModel;
  manifest.settings_json = settings.dump();
  manifest.tensors = std::move(tensors);
  TANDEM_ASSIGN_OR_RETURN(model.manifest, storage::encode_manifest(manifest));
  model.model.digest = storage::manifest_digest(model.manifest);
  return {};
}

/// A model is taken up to its window, where that is smaller than what its positions allow.
void bound_context(Json& summary, std::int64_t window) {
  if (window > 0 && window < summary["context"].get<std::int64_t>())
    summary["context"] = summary["sliding_window"] = window;
}

std::int64_t elements_of(const storage::ManifestTensor& tensor) {
  std::int64_t elements = 1;
  for (const std::int64_t dim : tensor.shape) elements *= dim;
  return elements;
}

std::string most_common(const std::map<std::string, std::int64_t>& elements) {
  std::string best;
  std::int64_t most = -1;
  for (const auto& [dtype, count] : elements)
    if (count > most) {
      best = dtype;
      most = count;
    }
  return best;
}

Result<ModelHashed> hash_gguf(const std::string& path, int threads) {
  TANDEM_ASSIGN_OR_RETURN(const auto gguf, storage::Gguf::open(path));
  TANDEM_ASSIGN_OR_RETURN(const std::string family, gguf.architecture());
  TANDEM_RETURN_IF_ERROR(check_family(family, path));
  ModelHashed hashed;
  ModelRecord& model = hashed.model;
  Json metadata = Json::object();
  for (const std::string& key : gguf.keys()) {
    // general.* holds names, authors and licences; only the architecture changes an answer.
    if (key.rfind("general.", 0) == 0 && key != "general.architecture") continue;
    if (!protocol::is_utf8(key))
      return corrupt_error(str(path, ": the metadata key ", key, " is not UTF-8"));
    TANDEM_ASSIGN_OR_RETURN(const auto raw, gguf.raw(key));
    metadata[key] = sha256(raw).hex();
  }
  std::vector<storage::ManifestTensor> tensors;
  std::map<std::string, std::int64_t> elements;
  std::int64_t parameters = 0;
  for (const storage::GgufTensor& tensor : gguf.tensors()) {
    const std::string dtype = storage::gguf_type_name(tensor.type);
    elements[dtype] += tensor.numel();
    parameters += tensor.numel();
    tensors.push_back(
        storage::describe_tensor(tensor.name, dtype, tensor.shape, tensor.bytes, threads));
  }
  TANDEM_RETURN_IF_ERROR(
      seal(hashed, {{"format", "gguf"}, {"metadata", metadata}}, std::move(tensors)));
  TANDEM_ASSIGN_OR_RETURN(ModelFile file, describe_file(path, "", threads));
  model.bytes = file.bytes;
  model.files.push_back(std::move(file));
  model.family = family;
  const auto number = [&](const char* key) {
    const auto value = gguf.integer(family + "." + key);
    return value.ok() ? *value : 0;
  };
  Json summary{{"format", "gguf"},
               {"parameters", parameters},
               {"dtype", most_common(elements)},
               {"context", number("context_length")},
               {"layers", number("block_count")},
               {"width", number("embedding_length")},
               {"heads", number("attention.head_count")},
               {"kv_heads", number("attention.head_count_kv")}};
  bound_context(summary, number("attention.sliding_window"));
  model.summary_json = summary.dump();
  return hashed;
}

Result<ModelHashed> hash_folder(const std::string& folder, int threads) {
  FolderContents contents;
  contents.where = folder;
  TANDEM_ASSIGN_OR_RETURN(contents.config, read_text(folder + "/config.json"));
  TANDEM_ASSIGN_OR_RETURN(const auto tensors_in, storage::Safetensors::open_folder(folder));
  for (const char* name : kSideFiles) {
    if (!fs::exists(folder + "/" + name)) continue;
    TANDEM_ASSIGN_OR_RETURN(ModelFile file, describe_file(folder + "/" + name, name, threads));
    contents.sides.push_back(std::move(file));
  }
  std::vector<std::string> paths = tensors_in.paths();
  if (fs::exists(folder + "/model.safetensors.index.json"))
    paths.push_back(folder + "/model.safetensors.index.json");
  for (const std::string& path : paths) {
    TANDEM_ASSIGN_OR_RETURN(ModelFile file,
                            describe_file(path, fs::path(path).filename().string(), threads));
    contents.weights.push_back(std::move(file));
  }
  for (const storage::TensorInfo& tensor : tensors_in.tensors())
    contents.tensors.push_back(storage::describe_tensor(tensor.name, dtype_name(tensor.dtype),
                                                        tensor.shape, tensor.bytes, threads));
  return describe_folder(std::move(contents));
}

}  // namespace

std::span<const char* const> folder_side_files() {
  return kSideFiles;
}

Result<ModelHashed> describe_folder(FolderContents folder) {
  if (json_nests_too_deep(folder.config))
    return corrupt_error(
        str(folder.where, "/config.json nests deeper than ", kJsonNestingMax, " levels"));
  Json config = Json::parse(folder.config, nullptr, false);
  if (!config.is_object())
    return corrupt_error(str(folder.where, "/config.json is not a JSON object"));
  const Json type = config.value("model_type", Json());
  const std::string family = type.is_string() ? type.get<std::string>() : "";
  TANDEM_RETURN_IF_ERROR(check_family(family, folder.where + "/config.json"));
  for (const char* not_mathematics :
       {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})
    config.erase(not_mathematics);
  ModelHashed hashed;
  ModelRecord& model = hashed.model;
  Json sides = Json::object();
  for (auto* files : {&folder.sides, &folder.weights})
    for (ModelFile& file : *files) {
      if (files == &folder.sides && file.path != "config.json") sides[file.path] = file.root.hex();
      model.bytes += file.bytes;
      model.files.push_back(std::move(file));
    }
  std::map<std::string, std::int64_t> elements;
  std::int64_t parameters = 0;
  for (const storage::ManifestTensor& tensor : folder.tensors) {
    elements[tensor.dtype] += elements_of(tensor);
    parameters += elements_of(tensor);
  }
  TANDEM_RETURN_IF_ERROR(seal(hashed,
                              {{"format", "huggingface"}, {"config", config}, {"files", sides}},
                              std::move(folder.tensors)));
  model.family = family;
  const auto number = [&](const char* key) {
    const auto value = config.find(key);
    return value != config.end() && value->is_number_integer() ? value->get<std::int64_t>() : 0;
  };
  Json summary{{"format", "huggingface"},
               {"parameters", parameters},
               {"dtype", most_common(elements)},
               {"context", number("max_position_embeddings")},
               {"layers", number("num_hidden_layers")},
               {"width", number("hidden_size")},
               {"heads", number("num_attention_heads")},
               {"kv_heads", number("num_key_value_heads")}};
  bound_context(summary,
                storage::sliding_window(config, family, number("num_hidden_layers")).bound());
  model.summary_json = summary.dump();
  return hashed;
}

Result<ModelHashed> hash_model(const HashModel& request, const std::vector<std::string>& roots,
                               int threads) {
  TANDEM_ASSIGN_OR_RETURN(const std::string path, real_path(request.path, roots));
  auto hashed = fs::is_directory(path) ? hash_folder(path, threads) : hash_gguf(path, threads);
  if (!hashed.ok()) return hashed;
  hashed->model.name = request.name;
  hashed->model.path = path;
  hashed->model.shared = request.shared;
  return hashed;
}

}  // namespace tandem::coordinator
