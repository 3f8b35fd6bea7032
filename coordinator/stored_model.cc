#include "coordinator/stored_model.h"

#include "coordinator/model_files.h"
#include "protocol/base/dtype.h"
#include "storage/manifest.h"
#include "storage/safetensors.h"

#include <algorithm>

namespace tandem::coordinator {
namespace {

constexpr std::int64_t kConfigBytesMax = 1 << 20;
const std::string kWeightsEnding = ".safetensors";

/// A file's bytes from front to back; one chunk in memory.
class ChunkReader {
 public:
  ChunkReader(const storage::ManifestTensor& file, storage::BlobStore& blobs)
      : file_(file), blobs_(blobs) {}

  /// The next `count` bytes, handed over in runs.
  template <class Take>
  Status read(std::int64_t count, const Take& take) {
    while (count > 0) {
      if (at_ == chunk_.size()) {
        if (next_ == file_.chunks.size())
          return corrupt_error(str("file ", file_.name, " ends too early"));
        TANDEM_ASSIGN_OR_RETURN(chunk_, blobs_.get(file_.chunks[next_]));
        // Files are read out in steps of whole leaves.
        const std::int64_t begin = static_cast<std::int64_t>(next_++) * kDigestLeafBytes;
        if (const auto size = static_cast<std::int64_t>(chunk_.size());
            size != std::min(kDigestLeafBytes, file_.bytes - begin))
          return corrupt_error(
              str("file ", file_.name, ": the chunk at byte ", begin, " has ", size, " bytes"));
        at_ = 0;
      }
      const std::size_t run = std::min(static_cast<std::size_t>(count), chunk_.size() - at_);
      take(std::span<const std::byte>(chunk_).subspan(at_, run));
      at_ += run;
      count -= static_cast<std::int64_t>(run);
    }
    return {};
  }
  Status append(std::int64_t count, std::vector<std::byte>& to) {
    return read(count, [&](std::span<const std::byte> run) {
      to.insert(to.end(), run.begin(), run.end());
    });
  }

 private:
  const storage::ManifestTensor& file_;
  storage::BlobStore& blobs_;
  std::vector<std::byte> chunk_;
  std::size_t at_ = 0, next_ = 0;
};

/// The tensor's leaves, from a reader that stands at its first byte.
Result<storage::ManifestTensor> describe(const storage::SafetensorsHead::Placed& placed,
                                         ChunkReader& reader) {
  storage::ManifestTensor tensor;
  tensor.name = placed.info.name;
  tensor.dtype = dtype_name(placed.info.dtype);
  tensor.shape = placed.info.shape;
  tensor.bytes = placed.end - placed.begin;
  Hasher root;
  for (std::int64_t at = 0; at < tensor.bytes; at += kDigestLeafBytes) {
    Hasher leaf;
    TANDEM_RETURN_IF_ERROR(reader.read(std::min(kDigestLeafBytes, tensor.bytes - at),
                                       [&](std::span<const std::byte> run) { leaf.update(run); }));
    tensor.chunks.push_back(leaf.finish());
    root.update(std::as_bytes(std::span(tensor.chunks.back().bytes)));
  }
  tensor.root = root.finish();
  return tensor;
}

Status read_weights(const storage::ManifestTensor& file, storage::BlobStore& blobs,
                    std::vector<storage::ManifestTensor>& tensors) {
  ChunkReader reader(file, blobs);
  std::vector<std::byte> head;
  TANDEM_RETURN_IF_ERROR(reader.append(std::min<std::int64_t>(8, file.bytes), head));
  TANDEM_ASSIGN_OR_RETURN(const std::int64_t head_bytes,
                          storage::SafetensorsHead::size(head, file.bytes, file.name));
  TANDEM_RETURN_IF_ERROR(reader.append(head_bytes - 8, head));
  TANDEM_ASSIGN_OR_RETURN(const auto parsed,
                          storage::SafetensorsHead::parse(head, file.bytes, file.name));
  for (const auto& placed : parsed.tensors) {
    TANDEM_ASSIGN_OR_RETURN(tensors.emplace_back(), describe(placed, reader));
  }
  return {};
}

Status check_file(const storage::ManifestTensor& file) {
  if (file.dtype == "u8" && file.shape == std::vector{file.bytes} && file.bytes > 0 &&
      file.name.find('/') == std::string::npos && file.name.front() != '.')
    return {};
  return invalid_error(str("the published model's ", file.name,
                           " is not a file of a folder: u8, one dimension, a plain name"));
}

}  // namespace

Result<ModelHashed> describe_stored_model(const std::string& files_manifest,
                                          storage::BlobStore& blobs) {
  TANDEM_ASSIGN_OR_RETURN(const auto manifest, storage::parse_manifest(files_manifest));
  if (manifest.kind != ManifestKind::kModel)
    return invalid_error(str("a manifest of kind model is needed here, not ",
                             storage::manifest_kind_name(manifest.kind)));
  FolderContents folder;
  folder.where = "the published model";
  const auto sides = folder_side_files();
  for (const storage::ManifestTensor& file : manifest.tensors) {
    TANDEM_RETURN_IF_ERROR(check_file(file));
    const bool weights = file.name.ends_with(kWeightsEnding);
    const bool side = std::any_of(sides.begin(), sides.end(),
                                  [&](const char* name) { return file.name == name; });
    if (!weights && !side)
      return invalid_error(
          str("the published model holds ", file.name, ", which belongs to no model folder"));
    (weights ? folder.weights : folder.sides)
        .push_back({file.name, file.bytes, 0, 0, file.root, file.chunks});
    if (weights) TANDEM_RETURN_IF_ERROR(read_weights(file, blobs, folder.tensors));
    if (weights) continue;
    const bool config = file.name == "config.json";
    if (config && file.bytes > kConfigBytesMax)
      return refused_error(str("config.json of ", file.bytes, " bytes; at most ", kConfigBytesMax));
    ChunkReader reader(file, blobs);
    TANDEM_RETURN_IF_ERROR(reader.read(file.bytes, [&](std::span<const std::byte> run) {
      if (config) folder.config.append(reinterpret_cast<const char*>(run.data()), run.size());
    }));
  }
  if (folder.config.empty() || folder.weights.empty())
    return invalid_error("the published model lacks config.json or weights");
  return describe_folder(std::move(folder));
}

}  // namespace tandem::coordinator
