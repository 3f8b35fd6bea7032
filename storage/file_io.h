// Durable files: what is reported as written is on the disk, whole, under its name.
#pragma once

#include "protocol/base/result.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace tandem::storage {

/// Reads a whole regular file of at most `bytes_max` bytes. Errors: not_found, refused (too large),
/// internal.
Result<std::string> read_file(const std::string& path, std::int64_t bytes_max);

/// Writes the parts one after another to a temporary name in the same folder, fsync, rename, fsync
/// of the folder. After a crash the old file or the new one is there, never a mix. Errors name the
/// path and the bytes wanted; a full disk is internal ("disk full").
Status write_file_durably(const std::string& path,
                          std::span<const std::span<const std::byte>> parts);
Status write_file_durably(const std::string& path, std::string_view text);

/// Makes a rename or a creation in `directory` survive a power cut.
Status sync_directory(const std::string& directory);

/// mkdir -p with mode 0700.
Status make_directories(const std::string& path);

/// Copies one file (not atomically) and fsyncs it; `to` must not exist.
Status copy_file_durably(const std::string& from, const std::string& to);

/// Refuses (internal, naming the folder and both numbers) when the file system that holds
/// `directory` has less than `bytes` free for us.
Status require_free_space(const std::string& directory, std::int64_t bytes);

/// Refuses a network file system: memory maps and locks on it are not trustworthy. `magic` is
/// statfs::f_type.
Status refuse_network_file_system(long magic, const std::string& path);
/// The same for the file system that holds `path`.
Status refuse_network_file_system(const std::string& path);

/// Bytes of a string, without a copy.
inline std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

}  // namespace tandem::storage
