// A registered model's files, for verbs that read them themselves.
#pragma once

#include "tools/cli/session.h"

#include <memory>
#include <string>

namespace tandem::tools {

/// Where a model's files are on this host: at the path it was added with, each held against what
/// the registry recorded; else fetched by digest into a temporary folder, which goes with this.
class ModelFiles {
 public:
  enum class Part {
    kTexts,  ///< configuration, tokenizer and chat template; a GGUF file is taken as it is
    kAll
  };
  /// `model`: model.show's answer. Errors: corrupt (a file changed since the model was added),
  /// refused (a GGUF file that is not on this host), those of the transfer and the disk.
  static Result<std::unique_ptr<const ModelFiles>> find(Session& session, const Json& model,
                                                        Part part);
  ~ModelFiles();
  ModelFiles(const ModelFiles&) = delete;
  ModelFiles& operator=(const ModelFiles&) = delete;

  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  ModelFiles() = default;
  std::string path_;
  bool temporary_ = false;
};

/// The files of a model (model.show's answer) into a folder, each verified by its digest.
Status fetch_model(Session& session, const Json& model, const std::string& directory);

/// conflict_error where something lies in the folder already: what a verb writes has one of its
/// own.
Status require_empty(const std::string& directory);

}  // namespace tandem::tools
