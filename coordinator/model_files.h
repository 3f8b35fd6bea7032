// What the coordinator learns of a base model from its files: format, family, sizes, the manifest
// that is its identity, and each file's content root, by which workers fetch it. Reads every byte;
// belongs on a background thread.
#pragma once

#include "coordinator/effects.h"
#include "protocol/base/result.h"
#include "storage/manifest.h"

#include <span>
#include <string>
#include <vector>

namespace tandem::coordinator {

/// `roots`: directories that the real path must lie in; empty: any. `threads` hash. Errors:
/// not_found, refused (outside the roots; a format, family or element type that is not supported),
/// corrupt (names the file).
Result<ModelHashed> hash_model(const HashModel& request, const std::vector<std::string>& roots,
                               int threads);

/// A Hugging Face folder of which the files were read already, wherever they lie.
struct FolderContents {
  std::string where;   ///< for messages
  std::string config;  ///< text of config.json
  std::vector<ModelFile> sides, weights;
  std::vector<storage::ManifestTensor> tensors;
};
/// Identity and record of it but for name and path. Errors: refused (the family), corrupt.
Result<ModelHashed> describe_folder(FolderContents folder);
/// Files of a folder that a worker needs beside the tensors, config.json first.
std::span<const char* const> folder_side_files();

}  // namespace tandem::coordinator
