// tandem adapter merge: a base with one adapter inside it, as a folder of its own.
#include "protocol/base/units.h"
#include "storage/file_io.h"
#include "tools/cli/commands.h"
#include "tools/cli/model_files.h"
#include "tools/cli/output.h"
#include "worker/model/merge.h"
#include "worker/runtime/adapter_codec.h"
#include "worker/runtime/model_folder.h"

#include <filesystem>
#include <iostream>

namespace tandem::tools {

namespace fs = std::filesystem;
namespace model = worker::model;

Status run_adapter_merge(Session& session, const std::string& name, const std::string& directory,
                         const std::string& dtype_text) {
  const DType dtype = *parse_dtype(dtype_text);
  TANDEM_RETURN_IF_ERROR(require_empty(directory));
  TANDEM_ASSIGN_OR_RETURN(const Json shown, session.call("adapter.show", {{"adapter", name}}));
  TANDEM_ASSIGN_OR_RETURN(const Json base_shown,
                          session.call("model.show", {{"model", field(shown, "model")}}));
  TANDEM_ASSIGN_OR_RETURN(const auto files,
                          ModelFiles::find(session, base_shown, ModelFiles::Part::kAll));
  TANDEM_ASSIGN_OR_RETURN(const Digest base_digest, Digest::parse(field(base_shown, "digest")));
  TANDEM_ASSIGN_OR_RETURN(const model::LoadedModel base, model::load_model(files->path()));
  TANDEM_ASSIGN_OR_RETURN(protocol::client::BulkTransfer* const bulk, session.bulk());
  const auto fetch = [&](auto digests) -> Result<std::vector<std::vector<std::byte>>> {
    std::vector<std::vector<std::byte>> blobs;
    for (const Digest& digest : digests) {
      TANDEM_ASSIGN_OR_RETURN(auto bytes, bulk->get(digest));
      blobs.push_back(std::move(bytes));
    }
    return blobs;
  };
  TANDEM_ASSIGN_OR_RETURN(const auto adapter,
                          worker::runtime::unpack_adapter(shown.value("manifest", ""), base_digest,
                                                          base.config, fetch));
  TANDEM_RETURN_IF_ERROR(storage::make_directories(directory));
  TANDEM_RETURN_IF_ERROR(worker::runtime::write_model_texts(base, files->path(), directory, dtype));
  TANDEM_RETURN_IF_ERROR(model::write_merged_weights(base, adapter, dtype, directory));
  const auto bytes = static_cast<std::int64_t>(fs::file_size(directory + "/model.safetensors"));
  const Json result{{"adapter", name},
                    {"digest", field(shown, "digest")},
                    {"base", field(base_shown, "name")},
                    {"directory", directory},
                    {"dtype", dtype_name(dtype)},
                    {"bytes", bytes}};
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << "merged " << name << " into " << field(base_shown, "name") << ": "
              << format_bytes(bytes) << " of " << dtype_name(dtype) << " in " << directory << "\n";
  return {};
}

}  // namespace tandem::tools
