// Model files that the bulk socket may read out, by content root: those of registered models. On
// disk, only while they are what was hashed; of models that jobs published, from the blob store.
// Any thread.
#pragma once

#include "coordinator/records.h"
#include "protocol/base/result.h"
#include "storage/blob_store.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace tandem::coordinator {

class ServedFiles {
 public:
  /// `blobs` outlives it; null: no model lies in a blob store.
  explicit ServedFiles(storage::BlobStore* blobs = nullptr) : blobs_(blobs) {}
  void add(const ModelRecord& model);
  void remove(const std::string& model_name);

  struct Piece {
    std::vector<std::byte> bytes;
    std::int64_t total_bytes = 0;
  };
  /// At most kBlobChunkBytesMax from `offset`; of a file in the blob store, up to its next chunk.
  /// Where several models have a file of these bytes, from any that can still be read.
  /// Errors: not_found (no registered file has this root), corrupt (the file changed since it was
  /// added), invalid (offset), internal (I/O).
  Result<Piece> read(const Digest& root, std::int64_t offset, std::int64_t bytes) const;

 private:
  struct File {
    std::string model, path;
    ModelFile described;
  };
  [[nodiscard]] Result<Piece> read_file(const File& file, std::int64_t offset,
                                        std::int64_t bytes) const;
  [[nodiscard]] Result<Piece> read_chunk(const File& file, std::int64_t offset,
                                         std::int64_t bytes) const;
  void forget(const std::string& model_name);  ///< with mutex_ held
  storage::BlobStore* const blobs_;
  mutable std::mutex mutex_;
  std::multimap<Digest, File> files_;
};

}  // namespace tandem::coordinator
