// CURVE keys, key files, and the ZAP handler (ZeroMQ RFC 27) that decides who may connect.
//
// A key file is text, mode 0600, one field per line, and names one peer:
//   tandem-key 1
//   name alice
//   role client            (client, worker or admin: what the coordinator lets it do)
//   public <40 characters of Z85>
//   secret <40 characters of Z85>      (only in its owner's file, never in the coordinator's)
// The coordinator keeps a directory of them, NAME.key, without secrets. The handler looks at it
// again when the directory's or a file's modification time changes, so adding or removing a file
// takes effect for the next connection; a connection that stands is told at its next message by
// KeyRing::find() (the transport refuses it).
#pragma once

#include "protocol/base/result.h"

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace tandem::protocol {

inline constexpr std::size_t kKeyFilesMax = 4096;  ///< in one directory
inline constexpr std::int64_t kKeyFileBytesMax = 4096;

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
};

Result<CurveKeyPair> generate_curve_keys();
/// kRefused: readable or writable by others, or not a plain file; kInvalid: a bad line (its
/// number).
Result<KeyFile> read_key_file(const std::string& path);
/// Atomic (temporary file, rename), mode 0600. kConflict when `path` exists and `replace` is false.
Status write_key_file(const std::string& path, const KeyFile& key, bool replace = false);

/// The keys of one directory, read again when it changes. Files that cannot be used are skipped
/// with a warning (once per change). Any thread.
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
  void refresh();

  const std::string directory_;
  std::mutex mutex_;
  std::string seen_;  ///< names, times and sizes when last read
  std::map<std::string, KeyFile> by_public_key_;
};

struct ZapCounters {
  std::uint64_t accepted = 0, refused = 0;
};

/// Answers the context's authentication requests on a thread of its own. A domain (one per
/// listening socket) has its own key ring. Must be destroyed before the context.
class ZapHandler {
 public:
  /// `zmq_context` is the libzmq context. One handler per context: kConflict for a second.
  static Result<std::unique_ptr<ZapHandler>> start(void* zmq_context);
  ~ZapHandler();
  ZapHandler(const ZapHandler&) = delete;
  ZapHandler& operator=(const ZapHandler&) = delete;

  void add_domain(const std::string& domain, std::shared_ptr<KeyRing> keys);
  [[nodiscard]] ZapCounters counters() const;

 private:
  struct State;
  explicit ZapHandler(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace tandem::protocol
