// The registry: models, adapters, aliases, jobs and all else that must outlive a process, over a
// Store (small records) and a BlobStore (bytes). Only the coordinator opens it.
//
// Order of things: bytes are durable in the blob store first, then one transaction here makes them
// visible. What commit() acknowledged is on the disk; what it did not acknowledge is not there at
// all.
//
// Threads: any, but one RegistryTxn per thread at a time, and short ones (see store.h).
#pragma once

#include "protocol/codec/record_codec.h"
#include "storage/blob_store.h"
#include "storage/file_io.h"
#include "storage/manifest.h"
#include "storage/records.h"
#include "storage/sealed_value.h"
#include "storage/store.h"

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tandem::storage {

/// 2: models whose files lie in the blob store. A program of 1 would collect their chunks.
inline constexpr std::uint32_t kRegistrySchemaVersion = 2;
inline constexpr std::int64_t kManifestSpareMs =
    3600 * 1000;  ///< gc spares unreferenced ones younger than this

struct Finding {
  std::string where;  ///< "table key"
  std::string message;
};

struct GcResult {
  std::int64_t manifests_removed = 0, results_removed = 0;
  BlobGcResult blobs;
};

/// One transaction over all tables. Reads see the state at its begin plus its own writes.
/// Destroying one without commit undoes it. What may stand in a record, and what may follow it, is
/// the coordinator's business; here only that bytes are what was written.
class RegistryTxn {
 public:
  /// By key (records.h). Errors: corrupt.
  template <class Record>
  Result<std::optional<Record>> find(std::string_view key);
  /// Those with the key prefix, in key order. Errors: corrupt.
  template <class Record>
  Result<std::vector<Record>> list(std::string_view prefix = "");
  /// Held against its digest. Errors: not_found, corrupt.
  Result<ManifestRecord> manifest(const Digest& digest);

  // -- writes; calling one in a read transaction is a bug -----------------------
  template <class Record>
  Status put(const Record& record);
  template <class Record>
  Status remove(std::string_view key);
  Status commit();

  /// The transaction below: for walks over a table.
  ReadTxn& raw() { return *read_; }

 private:
  friend class Registry;
  RegistryTxn(std::unique_ptr<ReadTxn> read, WriteTxn* write)
      : read_(std::move(read)), write_(write) {}

  std::unique_ptr<ReadTxn> read_;
  WriteTxn* write_;  // the same object, or nullptr in a read transaction
};

/// Takes a store from one schema version to the next, inside one transaction.
using Migration = std::function<Status(WriteTxn&)>;

/// A publish writes some 100 KB of records, and the bytes of an adapter.
inline constexpr std::int64_t kRegistryAheadBytes = 2 << 20, kBlobAheadBytes = 32 << 20;

struct RegistryOptions {
  std::string directory;  ///< DIR/registry, DIR/blobs, DIR/objects, DIR/backups
  std::int64_t registry_map_bytes = 256 << 20;  ///< preallocated on disk
  std::int64_t blob_map_bytes = 64LL << 30;     ///< address space only
  std::int64_t blob_budget_bytes = 8LL << 30;   ///< chunks beyond it lie in files
  bool probe = true;                            ///< see LmdbOptions
  /// Keep the next kRegistryAheadBytes and kBlobAheadBytes ready, see Store::write_ahead.
  bool write_ahead = false;
};

class Registry {
 public:
  /// Opens or makes the registry of a data directory, migrating an older schema after a backup.
  /// Errors: those of open_lmdb_store, refused (a newer schema).
  static Result<std::unique_ptr<Registry>> open(const RegistryOptions& options, const Clock& clock);
  /// Over any stores: for tests, and for Registry::open. `migrations[i]` goes from version i+1 to
  /// i+2; `backup` is called before the first one.
  static Result<std::unique_ptr<Registry>> create(std::unique_ptr<Store> store,
                                                  std::unique_ptr<BlobStore> blobs,
                                                  const Clock& clock,
                                                  const std::vector<Migration>& migrations = {},
                                                  const std::function<Status()>& backup = {});
  /// Registry and blobs in memory.
  static std::unique_ptr<Registry> in_memory(const Clock& clock);

  [[nodiscard]] Result<RegistryTxn> begin_read();
  [[nodiscard]] Result<RegistryTxn> begin_write();
  BlobStore& blobs() { return *blobs_; }
  Store& store() { return *store_; }

  /// A chunk's bytes, or a manifest's text: whatever has this digest.
  Result<std::vector<std::byte>> blob(const Digest& digest);

  /// Verifies every value, key, digest and reference; `deep` reads every blob too. An empty list is
  /// good.
  Result<std::vector<Finding>> check(bool deep = true);
  /// Removes expired results and manifests that nothing refers to, then their chunks.
  Result<GcResult> gc();
  /// A consistent copy in a new folder while the registry is in use. backup.json is written last: a
  /// folder without it is not a backup.
  Status backup(const std::string& directory);
  /// Puts a backup into an empty (or new) data directory and checks it, every blob too. Nothing may
  /// have it open. Errors: corrupt (what was restored is damaged; it stays there).
  static Status restore(const std::string& backup_directory, const std::string& data_directory);

 private:
  Registry(std::unique_ptr<Store> store, std::unique_ptr<BlobStore> blobs, const Clock& clock);
  Status prepare_schema(const std::vector<Migration>& migrations,
                        const std::function<Status()>& backup);

  std::unique_ptr<Store> store_;
  std::unique_ptr<BlobStore> blobs_;
  const Clock& clock_;
  std::mutex maintenance_;  // gc and backup exclude each other
};

// -- bodies of the templates ---

/// Decodes a record and holds it against the key it was found under.
template <class Record>
Result<Record> decode_at(std::string_view key, std::string_view value) {
  auto record = protocol::decode_record<Record>(as_bytes(value));
  if (!record.ok()) return record;
  if (RecordTraits<Record>::key(*record) != key)
    return corrupt_error(
        str("table ", RecordTraits<Record>::kTable, ": a record lies under another's key"));
  return record;
}

template <class Record>
Result<std::optional<Record>> RegistryTxn::find(std::string_view key) {
  if (key.empty() || key.size() > kStoreKeyBytesMax) return std::optional<Record>();
  TANDEM_ASSIGN_OR_RETURN(const auto value, read_->get(RecordTraits<Record>::kTable, key));
  if (!value) return std::optional<Record>();
  TANDEM_ASSIGN_OR_RETURN(Record record, decode_at<Record>(key, *value));
  return std::optional<Record>(std::move(record));
}

template <class Record>
Result<std::vector<Record>> RegistryTxn::list(std::string_view prefix) {
  std::vector<Record> records;
  const auto cursor = read_->cursor(RecordTraits<Record>::kTable);
  for (cursor->seek(prefix); cursor->valid() && cursor->key().starts_with(prefix); cursor->next()) {
    TANDEM_ASSIGN_OR_RETURN(const std::string_view value, cursor->value());
    TANDEM_ASSIGN_OR_RETURN(Record record, decode_at<Record>(cursor->key(), value));
    records.push_back(std::move(record));
  }
  TANDEM_RETURN_IF_ERROR(cursor->status());
  return records;
}

template <class Record>
Status RegistryTxn::put(const Record& record) {
  TANDEM_CHECK(write_ != nullptr, "put in a read transaction");
  return write_->put(RecordTraits<Record>::kTable, RecordTraits<Record>::key(record),
                     protocol::encode_record(record));
}

template <class Record>
Status RegistryTxn::remove(std::string_view key) {
  TANDEM_CHECK(write_ != nullptr, "remove in a read transaction");
  return write_->del(RecordTraits<Record>::kTable, key);
}

}  // namespace tandem::storage
