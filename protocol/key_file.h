// Key files: who may connect, as files. Text, mode 0600, one field per line:
//   tandem-key 1
//   name alice
//   role client            (client, worker or admin: what the coordinator lets it do)
//   public <40 characters of Z85>
//   secret <40 characters of Z85>      (only in its owner's file, never in the coordinator's)
//   server <40 characters of Z85>      (its owner's file: the coordinator's public key)
// The coordinator keeps a directory of them, NAME.key, without secrets. Adding or removing a file
// takes effect at once, for connections that stand as well: the transport asks for every message.
#pragma once

#include "protocol/base/result.h"

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace tandem::protocol {

inline constexpr std::size_t kKeyFilesMax = 4096;  ///< in one directory
inline constexpr std::int64_t kKeyFileBytesMax = 4096;
inline constexpr std::size_t kKeyNameBytesMax = 64;
inline constexpr int kKeyLookMs = 100;  ///< a revoked key works at most so long

/// Both halves in Z85, 40 characters each. The secret is never logged.
struct CurveKeyPair {
  std::string public_key, secret_key;
};

enum class KeyRole : std::uint8_t { kClient = 0, kWorker = 1, kAdmin = 2 };
const char* key_role_name(KeyRole role);
Result<KeyRole> parse_key_role(const std::string& name);

struct KeyFile {
  std::string name;  ///< 1..64 of letters, digits and . _ -
  KeyRole role = KeyRole::kClient;
  std::string public_key;
  std::string secret_key;  ///< "" in the coordinator's directory
  std::string server_key;  ///< the coordinator's public key, in the owner's file
};

/// kRefused: readable or writable by others, or not a plain file; kInvalid: a bad line (its
/// number); kUnavailable: no descriptors.
Result<KeyFile> read_key_file(const std::string& path);
/// Atomic (temporary file, rename), mode 0600. kConflict when `path` exists and `replace` is false.
Status write_key_file(const std::string& path, const KeyFile& key, bool replace = false);

/// The keys of one directory, read again when it changes. Files that cannot be used are skipped
/// with a warning (once per change); without descriptors to look, what is known holds. Any thread.
class KeyRing {
 public:
  explicit KeyRing(std::string directory);
  /// The key with this public half (Z85), or kNotFound.
  Result<KeyFile> find(const std::string& public_key);
  /// The key of this name, or kNotFound.
  Result<KeyFile> find_name(const std::string& name);
  /// All keys by name.
  std::vector<KeyFile> list();

 private:
  void refresh();  // with mutex_ held

  const std::string directory_;
  std::mutex mutex_;
  std::int64_t looked_ns_ = 0;
  std::string seen_;  // names, times and sizes when last read
  std::map<std::string, KeyFile> by_public_key_;
};

}  // namespace tandem::protocol
