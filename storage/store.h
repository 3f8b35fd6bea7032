// An ordered key-value store with named tables and transactions: what the registry and the blob
// store need of a database, and nothing more. LmdbStore is the real one, MemoryStore the one for
// tests.
//
// Keys are 1 to 480 bytes, compared as unsigned bytes. Every stored value carries its own checksum,
// table and key; a value that does not match them is reported as corrupt, naming table and key, and
// never served.
//
// Threads: a store may be used by any thread. A read transaction belongs to one thread at a time.
// There is one write transaction at a time: begin_write waits for the other to end, and it must be
// committed or destroyed by the thread that began it. Keep transactions short: an open reader keeps
// old pages alive.
#pragma once

#include "protocol/base/result.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::storage {

inline constexpr std::size_t kStoreKeyBytesMax = 480;

/// Walks one table in key order. Key and value are valid until the cursor moves or the transaction
/// writes or ends; after a write to its table a cursor must seek again.
/// A cursor is destroyed before its transaction.
class StoreCursor {
 public:
  virtual ~StoreCursor() = default;
  /// Stands at the first key >= `key` (or at nothing).
  virtual void seek(std::string_view key) = 0;
  virtual void next() = 0;
  /// False at the end, or after an error (see status).
  [[nodiscard]] virtual bool valid() const = 0;
  [[nodiscard]] virtual std::string_view key() const = 0;
  /// The verified value; corrupt when its checksum, table or key does not match.
  [[nodiscard]] virtual Result<std::string_view> value() const = 0;
  /// Why the walk ended, when not because of the table's end.
  [[nodiscard]] virtual Status status() const = 0;
};

class ReadTxn {
 public:
  virtual ~ReadTxn() = default;
  /// The value, or nothing. Valid until the transaction writes or ends. Errors: corrupt, internal.
  [[nodiscard]] virtual Result<std::optional<std::string_view>> get(std::string_view table,
                                                                    std::string_view key) = 0;
  [[nodiscard]] virtual std::unique_ptr<StoreCursor> cursor(std::string_view table) = 0;
};

/// Destroying one that was not committed undoes everything it did.
class WriteTxn : public ReadTxn {
 public:
  /// Inserts or replaces. Errors: invalid (key), internal (full map or disk: the transaction must
  /// be dropped).
  virtual Status put(std::string_view table, std::string_view key, std::string_view value) = 0;
  /// Removes; absent is fine. From here on the transaction may use what others leave free of a map
  /// that is nearly full.
  virtual Status del(std::string_view table, std::string_view key) = 0;
  /// Ok means durable. After an error nothing of this transaction was done.
  virtual Status commit() = 0;
};

struct StoreStats {
  std::int64_t map_bytes = 0;   ///< the most it can hold
  std::int64_t used_bytes = 0;  ///< pages in use, free ones not counted
  std::int64_t entries = 0;
};

class Store {
 public:
  virtual ~Store() = default;
  [[nodiscard]] virtual Result<std::unique_ptr<ReadTxn>> begin_read() = 0;
  [[nodiscard]] virtual Result<std::unique_ptr<WriteTxn>> begin_write() = 0;
  /// A consistent copy in the (new) folder, while others read and write.
  virtual Status backup(const std::string& directory) = 0;
  [[nodiscard]] virtual Result<StoreStats> stats() = 0;
  /// From now on keeps so many bytes behind what is in use ready to be written (ahead_writer.h):
  /// commits into them are faster. Call once; where there is no file, nothing happens.
  virtual void write_ahead(std::int64_t /*bytes*/) {}
  /// The tables this store was opened with.
  [[nodiscard]] virtual const std::vector<std::string>& tables() const = 0;
};

/// Calls `visit(key, value)` for every key with the prefix, in order, until it returns false. A
/// corrupt value ends the walk with its Status.
Status scan_prefix(ReadTxn& txn, std::string_view table, std::string_view prefix,
                   const std::function<bool(std::string_view key, std::string_view value)>& visit);

}  // namespace tandem::storage
