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
inline constexpr std::size_t kNameBytesMax = 128;
inline constexpr std::size_t kDigestPrefixDigitsMin = 12;
inline constexpr std::size_t kAliasHistoryMax = 64;
inline constexpr std::size_t kJobEventsMax = 2000;  ///< per job; older ones go first
inline constexpr int kCheckpointsKept = 2;
inline constexpr std::int64_t kIdempotencyKeepMs = 7LL * 24 * 3600 * 1000;
inline constexpr std::int64_t kManifestSpareMs =
    3600 * 1000;  ///< gc spares unreferenced ones younger than this

/// Names of models, adapters and aliases: 1 to 128 bytes of letters, digits and "._-/:", beginning
/// with a letter or digit, no "//", ".." or trailing "/"; "@" is reserved for versions, and 12 or
/// more hex digits alone would be a digest. `what` names the object in the message.
Status validate_name(std::string_view name, const std::string& what);

/// What a name in a request stands for.
struct Resolved {
  enum class Kind { kModel, kAdapter, kCheckpoint };
  Kind kind = Kind::kModel;
  std::string name;  ///< as it is called: model, alias or adapter; the digest where it has no name
  std::uint32_t version = 0;  ///< of an adapter; 0 otherwise
  Digest digest;              ///< of the manifest
  Digest base_model;          ///< the model itself for kModel
};

struct PublishAdapter {
  std::string name;
  std::string manifest;  ///< canonical text; settings.base_model must be the digest below
  Digest base_model;
  std::string job;          ///< empty: an import
  std::uint64_t epoch = 0;  ///< with a job: must be the job's current one
  std::string metadata_json;
};

struct Finding {
  std::string where;  ///< "table key"
  std::string message;
};

struct GcResult {
  std::int64_t manifests_removed = 0, results_removed = 0, idempotency_removed = 0;
  BlobGcResult blobs;
};

/// One transaction over all tables. Reads see the state at its begin plus its own writes.
/// Destroying one without commit undoes it.
class RegistryTxn {
 public:
  /// By key (records.h). Errors: not_found ("no model named x"), corrupt.
  template <class Record>
  Result<Record> get(std::string_view key);
  template <class Record>
  Result<std::optional<Record>> find(std::string_view key);
  /// In key order, those with the key prefix, from `after` (exclusive, "" for all), at most
  /// `limit`.
  template <class Record>
  Result<std::vector<Record>> list(std::string_view prefix = "", std::size_t limit = SIZE_MAX,
                                   std::string_view after = "");

  // -- writes; calling one in a read transaction is a bug -----------------------
  template <class Record>
  Status put(const Record& record);
  template <class Record>
  Status remove(std::string_view key);
  Status commit();

  // -- models -------------------------------------------------------------------
  /// Validates name and manifest, refuses a name that an adapter or alias has (conflict) and writes
  /// record and manifest. The same name with the same digest is replaced, with another it is a
  /// conflict.
  Status add_model(const ModelRecord& record, const std::string& manifest);
  /// Refused (conflict) while an adapter or a job that has not ended needs it.
  Status remove_model(std::string_view name);
  Result<ModelRecord> model_by_digest(const Digest& digest);

  // -- adapters and aliases -----------------------------------------------------
  /// Manifest, version and alias together. Repeating the newest version's publish (same job and
  /// digest) answers what the first one did. Errors: conflict (old epoch, name of a model), invalid
  /// (manifest).
  Result<AdapterVersionRecord> publish_adapter(const PublishAdapter& publish);
  /// Newest first.
  Result<std::vector<AdapterVersionRecord>> adapter_versions(std::string_view name);
  /// Points `alias` at name@version (or a name's current version); makes it when there is none.
  Result<AliasRecord> set_alias(const std::string& alias, const std::string& target, bool pinned,
                                const std::string& reason = "set");
  /// Back to what it pointed at before the current version. Pins it, so that a publish does not
  /// undo that.
  Result<AliasRecord> rollback_alias(const std::string& alias);
  /// Refused (conflict) while an alias points at it.
  Status remove_adapter_version(std::string_view name, std::uint32_t version);
  /// The alias only.
  Status remove_alias(std::string_view name);
  /// Model, alias, name@version, JOB@latest, JOB@step-N (of stored checkpoints), or a digest of 12
  /// or more hex digits. Errors: not_found (with the nearest name), invalid (an ambiguous or
  /// malformed reference).
  Result<Resolved> resolve(std::string_view reference);
  /// The nearest known model or alias name, or "".
  std::string nearest(std::string_view name);

  // -- data sets ----------------------------------------------------------------
  Status add_dataset(const DatasetRecord& record, const std::string& manifest);
  /// By name, digest or digest prefix.
  Result<DatasetRecord> resolve_dataset(std::string_view reference);

  // -- jobs ---------------------------------------------------------------------
  /// Writes a new job. With a key that was used before by the same tenant: the job made then (same
  /// request digest), or a conflict. The bool says whether it is new.
  Result<std::pair<JobRecord, bool>> submit_job(const JobRecord& job, const Digest& request);
  /// Appends with the next seq, which it returns; drops the oldest over kJobEventsMax.
  Result<std::uint64_t> append_event(JobEventRecord event);
  /// Records the checkpoint and its manifest; forgets all but the `keep` newest. Errors: conflict
  /// (old epoch).
  Status put_checkpoint(const CheckpointRecord& record, const std::string& manifest,
                        int keep = kCheckpointsKept);
  Result<std::optional<CheckpointRecord>> latest_checkpoint(std::string_view job);
  /// Job, events, checkpoints. Refused while it has not ended.
  Status remove_job(std::string_view job);

  // -- manifests, settings, idempotency -----------------------------------------
  Result<ManifestRecord> manifest(const Digest& digest);
  Result<std::optional<std::string>> setting(std::string_view name);
  Status set_setting(const std::string& name, const std::string& value);
  /// The stored answer for a repeated call, nothing for a new one, conflict for the key of another
  /// request.
  Result<std::optional<std::string>> recall(const std::string& tenant, const std::string& key,
                                            const Digest& request);
  Status remember(const std::string& tenant, const std::string& key, const Digest& request,
                  const std::string& result);

  /// For tests and migrations: the transaction below.
  ReadTxn& raw() { return *read_; }

 private:
  friend class Registry;
  RegistryTxn(std::unique_ptr<ReadTxn> read, WriteTxn* write, BlobStore* blobs, const Clock* clock);
  Result<Manifest> check_manifest(const std::string& text, ManifestKind kind);
  Status put_manifest(const std::string& text, ManifestKind kind, const Digest& base_model);
  Status check_epoch(const std::string& job, std::uint64_t epoch);
  Status move_alias(AliasRecord& alias, const AdapterVersionRecord& to, const std::string& reason);
  Result<AdapterVersionRecord> adapter_version(std::string_view reference);
  Result<Resolved> resolve_digest(std::string_view prefix);
  Result<Resolved> resolve_checkpoint(std::string_view job, std::string_view which);
  Status refuse_taken_name(const std::string& name, bool for_model);
  [[nodiscard]] Status not_found(const char* noun, std::string_view key);

  std::unique_ptr<ReadTxn> read_;
  WriteTxn* write_;  // the same object, or nullptr in a read transaction
  BlobStore* blobs_;
  const Clock* clock_;
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
  /// Removes expired results, old idempotency keys, manifests that nothing refers to, then their
  /// chunks.
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
Result<Record> RegistryTxn::get(std::string_view key) {
  TANDEM_ASSIGN_OR_RETURN(auto record, find<Record>(key));
  if (!record) return not_found(RecordTraits<Record>::kNoun, key);
  return std::move(*record);
}

template <class Record>
Result<std::vector<Record>> RegistryTxn::list(std::string_view prefix, std::size_t limit,
                                              std::string_view after) {
  std::vector<Record> records;
  const auto cursor = read_->cursor(RecordTraits<Record>::kTable);
  for (cursor->seek(after > prefix ? after : prefix); cursor->valid() && records.size() < limit;
       cursor->next()) {
    if (!cursor->key().starts_with(prefix)) break;
    if (!after.empty() && cursor->key() == after) continue;
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
