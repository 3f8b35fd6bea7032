#include "tools/cli/model_files.h"

#include "protocol/base/random.h"
#include "storage/file_io.h"
#include "worker/runtime/model_files.h"

#include <filesystem>

namespace tandem::tools {
namespace {

namespace fs = std::filesystem;

/// Of a folder's files those with tensors, and a GGUF file.
bool is_weights(const Json& file) {
  const std::string path = file.value("path", "");
  return path.empty() || path.ends_with(".safetensors");
}

/// Of model.show's files those of one part.
Json files_of(const Json& model, ModelFiles::Part part) {
  Json files = Json::array();
  for (const Json& file : model.value("files", Json::array()))
    if (part == ModelFiles::Part::kAll || !is_weights(file)) files.push_back(file);
  return files;
}

Result<protocol::ModelRef> reference(const Json& model) {
  protocol::ModelRef ref;
  ref.name = model.value("name", "");
  for (const Json& file : model["files"]) {
    TANDEM_ASSIGN_OR_RETURN(const Digest root, Digest::parse(file.value("digest", "")));
    ref.files.emplace_back(file.value("path", ""), root);
  }
  return ref;
}

}  // namespace

Result<std::unique_ptr<const ModelFiles>> ModelFiles::find(Session& session, const Json& model,
                                                           Part part) {
  Json wanted = model;
  wanted["files"] = files_of(model, part);
  std::unique_ptr<ModelFiles> found(new ModelFiles);
  found->path_ = model.value("path", "");
  if (!found->path_.empty()) {  // else it lies in the registry
    TANDEM_ASSIGN_OR_RETURN(const auto ref, reference(wanted));
    TANDEM_ASSIGN_OR_RETURN(const bool here, worker::runtime::model_is_at(ref, found->path_));
    if (here) return std::unique_ptr<const ModelFiles>(std::move(found));
  }
  found->temporary_ = true;
  found->path_ = (fs::temp_directory_path() / random_id("tandem-base-", 12)).string();
  TANDEM_RETURN_IF_ERROR(fetch_model(session, wanted, found->path_));
  return std::unique_ptr<const ModelFiles>(std::move(found));
}

ModelFiles::~ModelFiles() {
  std::error_code error;
  if (temporary_) fs::remove_all(path_, error);
}

Status fetch_model(Session& session, const Json& model, const std::string& directory) {
  const std::string name = model.value("name", "");
  const Json files = model.value("files", Json::array());
  std::int64_t bytes = 0;
  for (const auto& file : files) {
    bytes += file.value("bytes", std::int64_t{0});
    if (const std::string path = file.value("path", "");
        path.empty() || path.find('/') != std::string::npos)
      return refused_error(path.empty()
                               ? str("model ", name, " is one GGUF file, ", model.value("path", ""),
                                     ", not a folder; copy that file")
                               : str("model ", name, " names a file outside its folder: ", path));
  }
  TANDEM_ASSIGN_OR_RETURN(protocol::client::BulkTransfer* const bulk, session.bulk());
  TANDEM_RETURN_IF_ERROR(storage::make_directories(directory));
  TANDEM_RETURN_IF_ERROR(storage::require_free_space(directory, bytes));
  for (const auto& file : files) {
    TANDEM_ASSIGN_OR_RETURN(const Digest root, Digest::parse(file.value("digest", "")));
    TANDEM_RETURN_IF_ERROR(bulk->get_content(root, directory + "/" + file.value("path", "")));
  }
  return {};
}

Status require_empty(const std::string& directory) {
  std::error_code error;
  if (fs::exists(directory, error) && !fs::is_empty(directory, error))
    return conflict_error(directory + " is not an empty folder; nothing was written");
  return {};
}

}  // namespace tandem::tools
