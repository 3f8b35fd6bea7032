#include "worker/runtime/model_folder.h"

#include "protocol/base/processors.h"
#include "storage/file_io.h"
#include "storage/mapped_file.h"
#include "worker/model/merge.h"
#include "worker/text/tokenizer.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>

namespace tandem::worker::runtime {
namespace {

namespace fs = std::filesystem;

/// Of a base folder, with the dtype that the weights have now.
Status copy_texts(const std::string& base, const std::string& folder, DType dtype) {
  TANDEM_ASSIGN_OR_RETURN(const std::string text,
                          storage::read_file(base + "/config.json", model::kConfigBytesMax));
  auto config = nlohmann::ordered_json::parse(text, nullptr, false);
  if (!config.is_object()) return corrupt_error(base + "/config.json is not a JSON object");
  config.erase("dtype");
  config["torch_dtype"] = model::torch_dtype_name(dtype);
  TANDEM_RETURN_IF_ERROR(
      storage::write_file_durably(folder + "/config.json", config.dump(2) + "\n"));
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                           "chat_template.jinja", "generation_config.json"})
    if (const std::string from = str(base, "/", name); fs::exists(from))
      TANDEM_RETURN_IF_ERROR(storage::copy_file_durably(from, str(folder, "/", name)));
  return {};
}

Status write_texts(const model::LoadedModel& base, const std::string& folder, DType dtype) {
  TANDEM_ASSIGN_OR_RETURN(const std::string config, model::hf_config_json(base.config, dtype));
  storage::GgufTokenizer data = *base.tokenizer.gguf;
  data.chat_template = base.chat_template;
  TANDEM_ASSIGN_OR_RETURN(const auto files, text::hf_tokenizer_files(data));
  TANDEM_RETURN_IF_ERROR(storage::write_file_durably(folder + "/config.json", config));
  TANDEM_RETURN_IF_ERROR(
      storage::write_file_durably(folder + "/tokenizer.json", files.tokenizer_json));
  return storage::write_file_durably(folder + "/tokenizer_config.json",
                                     files.tokenizer_config_json);
}

}  // namespace

Status write_model_texts(const model::LoadedModel& base, const std::string& path,
                         const std::string& folder, DType dtype) {
  return base.tokenizer.gguf ? write_texts(base, folder, dtype) : copy_texts(path, folder, dtype);
}

Result<PackedObject> pack_model(const std::string& folder) {
  const int threads = processors();
  PackedObject object;
  storage::Manifest manifest;
  manifest.kind = storage::ManifestKind::kModel;
  auto files = std::make_shared<std::vector<std::shared_ptr<const storage::MappedFile>>>();
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    TANDEM_ASSIGN_OR_RETURN(const auto file, storage::MappedFile::open(entry.path().string()));
    files->push_back(file);
    const auto bytes = static_cast<std::int64_t>(file->bytes().size());
    manifest.tensors.push_back(storage::describe_tensor(entry.path().filename().string(), "u8",
                                                        {bytes}, file->bytes(), threads));
    const auto& chunks = manifest.tensors.back().chunks;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      const std::size_t begin = i * kDigestLeafBytes;
      object.blobs.push_back(
          {chunks[i],
           file->bytes().subspan(
               begin, std::min<std::size_t>(kDigestLeafBytes, file->bytes().size() - begin))});
    }
  }
  if (error) return not_found_error(str("cannot read ", folder, ": ", error.message()));
  TANDEM_ASSIGN_OR_RETURN(object.manifest, storage::encode_manifest(manifest));
  object.digest = storage::manifest_digest(object.manifest);
  object.storage = std::move(files);
  return object;
}

}  // namespace tandem::worker::runtime
