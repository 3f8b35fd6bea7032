// A file's bytes, mapped read-only and kept alive by whoever still looks at them.
//
// Any thread may read. A file that is cut short by somebody else while it is mapped ends the
// process with SIGBUS: the folders that hold models belong to the user, who replaces files by
// renaming.
#pragma once

#include "protocol/base/result.h"

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace tandem::storage {

class MappedFile {
 public:
  /// Maps a regular file. Errors: not_found, invalid (not a regular file, empty), internal (I/O).
  static Result<std::shared_ptr<const MappedFile>> open(const std::string& path);
  /// Bytes in memory behind the same interface; `name` stands for the path in messages.
  static std::shared_ptr<const MappedFile> of_bytes(std::vector<std::byte> bytes, std::string name);

  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  MappedFile() = default;
  std::string path_;
  std::vector<std::byte> owned_;
  std::span<const std::byte> bytes_;
  bool mapped_ = false;
};

}  // namespace tandem::storage
