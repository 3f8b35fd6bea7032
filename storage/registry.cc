#include "storage/registry.h"

#include "protocol/base/clock.h"
#include "protocol/base/log.h"
#include "storage/json_strict.h"
#include "storage/lmdb_store.h"
#include "storage/memory_store.h"

#include <unistd.h>

#include <cstring>
#include <filesystem>

namespace tandem::storage {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSchemaSetting = "schema_version";
constexpr std::int64_t kBackupInfoBytesMax = 64 << 10;
constexpr std::size_t kGcDeletesPerTxn = 1024;

Result<std::uint32_t> parse_version(const std::string& text) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos)
    return corrupt_error("the registry's schema_version is \"" + printable_key(text) + "\"");
  return static_cast<std::uint32_t>(std::stoul(text));
}

Status copy_tree(const std::string& from, const std::string& to) {
  std::error_code error;
  TANDEM_RETURN_IF_ERROR(make_directories(to));
  for (fs::directory_iterator it(from, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (it->is_directory(error))
      TANDEM_RETURN_IF_ERROR(copy_tree(it->path().string(), to + "/" + name));
    else if (it->is_regular_file(error) && name != "lock.mdb" && name != "owner")
      TANDEM_RETURN_IF_ERROR(copy_file_durably(it->path().string(), to + "/" + name));
  }
  if (error) return internal_error(str("cannot list ", from, ": ", error.message()));
  return sync_directory(to);
}

std::int64_t tree_bytes(const std::string& folder) {
  std::error_code error;
  std::int64_t sum = 0;
  for (fs::recursive_directory_iterator it(folder, error), end; !error && it != end;
       it.increment(error))
    if (it->is_regular_file(error)) sum += static_cast<std::int64_t>(it->file_size(error));
  return sum;
}

}  // namespace

Result<ManifestRecord> RegistryTxn::manifest(const Digest& digest) {
  TANDEM_ASSIGN_OR_RETURN(auto record, find<ManifestRecord>(digest_key(digest)));
  if (!record) return not_found_error("no manifest " + digest.hex());
  if (manifest_digest(record->text) != digest)
    return corrupt_error(str("manifest ", digest, " does not match its digest; restore a backup"));
  return std::move(*record);
}

Status RegistryTxn::commit() {
  TANDEM_CHECK(write_ != nullptr, "commit of a read transaction");
  return write_->commit();
}

Registry::Registry(std::unique_ptr<Store> store, std::unique_ptr<BlobStore> blobs,
                   const Clock& clock)
    : store_(std::move(store)), blobs_(std::move(blobs)), clock_(clock) {}

Result<RegistryTxn> Registry::begin_read() {
  TANDEM_ASSIGN_OR_RETURN(auto txn, store_->begin_read());
  return RegistryTxn(std::move(txn), nullptr);
}

Result<RegistryTxn> Registry::begin_write() {
  TANDEM_ASSIGN_OR_RETURN(auto txn, store_->begin_write());
  WriteTxn* write = txn.get();
  return RegistryTxn(std::move(txn), write);
}

Result<std::vector<std::byte>> Registry::blob(const Digest& digest) {
  auto chunk = blobs_->get(digest);
  if (chunk.ok() || chunk.status().code() != StatusCode::kNotFound) return chunk;
  TANDEM_ASSIGN_OR_RETURN(auto txn, begin_read());
  auto manifest = txn.manifest(digest);
  if (!manifest.ok())
    return manifest.status().code() == StatusCode::kNotFound ? chunk.status() : manifest.status();
  const auto bytes = as_bytes(manifest->text);
  return std::vector<std::byte>(bytes.begin(), bytes.end());
}

// -- opening ------------------------------------------------------------------

Status Registry::prepare_schema(const std::vector<Migration>& migrations,
                                const std::function<Status()>& backup) {
  const auto current = static_cast<std::uint32_t>(migrations.size()) + 1;
  TANDEM_ASSIGN_OR_RETURN(auto read, begin_read());
  TANDEM_ASSIGN_OR_RETURN(const auto stored, read.find<SettingRecord>(kSchemaSetting));
  std::uint32_t version = current;
  if (stored) {
    TANDEM_ASSIGN_OR_RETURN(version, parse_version(stored->value));
  } else {
    TANDEM_ASSIGN_OR_RETURN(const StoreStats stats, store_->stats());
    if (stats.entries != 0)
      return corrupt_error("the registry holds records but no schema_version; restore a backup");
  }
  if (version > current)
    return refused_error(
        str("the registry has schema ", version, ", this program understands up to ", current,
            "; use the newer tandem, or restore the backup made before it migrated"));
  if (stored && version == current) return {};
  if (version < current && backup) TANDEM_RETURN_IF_ERROR(backup());

  TANDEM_ASSIGN_OR_RETURN(auto txn, begin_write());
  for (; version < current; ++version) {
    const Status status = migrations[version - 1](*txn.write_);
    if (!status.ok())
      return {status.code(), str("migration of the registry from schema ", version,
                                 " failed, nothing was changed: ", status.message())};
  }
  TANDEM_RETURN_IF_ERROR(txn.put(SettingRecord{kSchemaSetting, std::to_string(current)}));
  return txn.commit();
}

Result<std::unique_ptr<Registry>> Registry::create(std::unique_ptr<Store> store,
                                                   std::unique_ptr<BlobStore> blobs,
                                                   const Clock& clock,
                                                   const std::vector<Migration>& migrations,
                                                   const std::function<Status()>& backup) {
  std::unique_ptr<Registry> registry(new Registry(std::move(store), std::move(blobs), clock));
  TANDEM_RETURN_IF_ERROR(registry->prepare_schema(migrations, backup));
  return registry;
}

Result<std::unique_ptr<Registry>> Registry::open(const RegistryOptions& options,
                                                 const Clock& clock) {
  const std::string& directory = options.directory;
  LmdbOptions records{directory + "/registry",    "registry", registry_tables(),
                      options.registry_map_bytes, true,       options.probe};
  TANDEM_ASSIGN_OR_RETURN(auto store, open_lmdb_store(records));
  LmdbOptions chunks{directory + "/blobs",   "blobs", BlobStore::tables(),
                     options.blob_map_bytes, false,   options.probe};
  TANDEM_ASSIGN_OR_RETURN(auto blob_env, open_lmdb_store(chunks));
  Store *raw = store.get(), *raw_blobs = blob_env.get();
  TANDEM_ASSIGN_OR_RETURN(auto blobs, BlobStore::open(std::move(blob_env), directory + "/objects",
                                                      options.blob_budget_bytes, clock));
  auto backup = [&]() -> Status {
    const std::string to = str(directory, "/backups/before-migration-", clock.unix_ms());
    log_info("migrating the registry; a copy of what was there lies in ", to);
    TANDEM_RETURN_IF_ERROR(make_directories(directory + "/backups"));
    return raw->backup(to);
  };
  static_assert(kRegistrySchemaVersion == 2, "a newer schema needs its migration here");
  const Migration nothing_to_change = [](WriteTxn&) { return Status(); };
  TANDEM_ASSIGN_OR_RETURN(auto registry, create(std::move(store), std::move(blobs), clock,
                                                {nothing_to_change}, backup));
  if (options.write_ahead) {
    raw->write_ahead(kRegistryAheadBytes);
    raw_blobs->write_ahead(kBlobAheadBytes);
  }
  return registry;
}

std::unique_ptr<Registry> Registry::in_memory(const Clock& clock) {
  auto blobs =
      BlobStore::open(std::make_unique<MemoryStore>(BlobStore::tables()), "", INT64_MAX, clock);
  return create(std::make_unique<MemoryStore>(registry_tables()), std::move(blobs).value(), clock)
      .value();
}

// -- garbage ------------------------------------------------------------------

namespace {

/// Every manifest that something refers to.
Result<std::unordered_set<Digest>> referenced_manifests(RegistryTxn& txn) {
  std::unordered_set<Digest> live;
  TANDEM_ASSIGN_OR_RETURN(const auto models, txn.list<ModelRecord>());
  for (const auto& r : models) live.insert(r.digest);
  TANDEM_ASSIGN_OR_RETURN(const auto adapters, txn.list<AdapterVersionRecord>());
  for (const auto& r : adapters) live.insert(r.digest);
  TANDEM_ASSIGN_OR_RETURN(const auto checkpoints, txn.list<CheckpointRecord>());
  for (const auto& r : checkpoints) live.insert(r.manifest);
  TANDEM_ASSIGN_OR_RETURN(const auto datasets, txn.list<DatasetRecord>());
  for (const auto& r : datasets) live.insert(r.digest);
  TANDEM_ASSIGN_OR_RETURN(const auto jobs, txn.list<JobRecord>());
  for (const auto& r : jobs)
    if (!job_has_ended(r.state)) live.insert(r.dataset);  // a job in flight keeps what it reads
  return live;
}

/// Keys of the records for which `is_garbage` holds, at most one transaction's worth.
template <class Record, class Predicate>
Result<std::vector<std::string>> garbage_keys(RegistryTxn& txn, const Predicate& is_garbage) {
  std::vector<std::string> keys;
  Status bad;
  TANDEM_RETURN_IF_ERROR(scan_prefix(txn.raw(), RecordTraits<Record>::kTable, "",
                                     [&](std::string_view key, std::string_view value) {
                                       auto record = decode_at<Record>(key, value);
                                       if (!record.ok()) {
                                         bad = record.status();
                                         return false;
                                       }
                                       if (is_garbage(*record)) keys.emplace_back(key);
                                       return keys.size() < kGcDeletesPerTxn;
                                     }));
  TANDEM_RETURN_IF_ERROR(bad);
  return keys;
}

template <class Record>
Result<std::int64_t> remove_keys(RegistryTxn& txn, const std::vector<std::string>& keys) {
  for (const std::string& key : keys) TANDEM_RETURN_IF_ERROR(txn.remove<Record>(key));
  return static_cast<std::int64_t>(keys.size());
}

}  // namespace

Result<GcResult> Registry::gc() {
  std::lock_guard lock(maintenance_);
  GcResult result;
  const std::int64_t now = clock_.unix_ms();
  // In rounds, so that no transaction is long: each removes at most kGcDeletesPerTxn of each kind.
  for (bool again = true; again;) {
    TANDEM_ASSIGN_OR_RETURN(auto txn, begin_write());
    TANDEM_ASSIGN_OR_RETURN(const auto live, referenced_manifests(txn));
    TANDEM_ASSIGN_OR_RETURN(
        const auto manifests, garbage_keys<ManifestRecord>(txn, [&](const ManifestRecord& r) {
          return !live.contains(r.digest) && now - r.created_unix_ms >= kManifestSpareMs;
        }));
    TANDEM_ASSIGN_OR_RETURN(const auto results,
                            garbage_keys<ResultRecord>(txn, [&](const ResultRecord& r) {
                              return r.expires_unix_ms != 0 && r.expires_unix_ms <= now;
                            }));
    TANDEM_ASSIGN_OR_RETURN(const auto a, remove_keys<ManifestRecord>(txn, manifests));
    TANDEM_ASSIGN_OR_RETURN(const auto b, remove_keys<ResultRecord>(txn, results));
    TANDEM_RETURN_IF_ERROR(txn.commit());
    result.manifests_removed += a;
    result.results_removed += b;
    again = std::max(manifests.size(), results.size()) == kGcDeletesPerTxn;
  }
  std::unordered_set<Digest> chunks;
  {
    TANDEM_ASSIGN_OR_RETURN(auto txn, begin_read());
    // A manifest that cannot be read must stop the collection: its chunks would look unused.
    Status bad;
    TANDEM_RETURN_IF_ERROR(scan_prefix(
        txn.raw(), RecordTraits<ManifestRecord>::kTable, "",
        [&](std::string_view key, std::string_view value) {
          const auto record = decode_at<ManifestRecord>(key, value);
          const auto named = !record.ok() ? Result<std::vector<Digest>>(record.status())
                             : record->kind == ManifestKind::kModel ? std::vector<Digest>()
                                                                    : manifest_chunks(record->text);
          bad = named.status();
          if (named.ok()) chunks.insert(named->begin(), named->end());
          return named.ok();
        }));
    TANDEM_RETURN_IF_ERROR(bad);
    TANDEM_ASSIGN_OR_RETURN(const auto models, txn.list<ModelRecord>());
    for (const ModelRecord& model : models)
      for (const ModelFile& file : model.files)
        chunks.insert(file.chunks.begin(), file.chunks.end());
  }
  TANDEM_ASSIGN_OR_RETURN(result.blobs, blobs_->gc(chunks));
  return result;
}

// -- copies -------------------------------------------------------------------

Status Registry::backup(const std::string& directory) {
  std::lock_guard lock(maintenance_);  // no chunk that the copied records need goes meanwhile
  std::error_code ignored;
  if (fs::exists(directory, ignored))
    return conflict_error(directory + " exists already; name a new folder");
  TANDEM_RETURN_IF_ERROR(make_directories(directory));
  // Records first: every chunk they need was durable before them and so is in the later copy.
  TANDEM_RETURN_IF_ERROR(store_->backup(directory + "/registry"));
  TANDEM_RETURN_IF_ERROR(blobs_->backup(directory + "/blobs"));
  TANDEM_ASSIGN_OR_RETURN(const std::string info,
                          canonical_json({{"created_unix_ms", clock_.unix_ms()},
                                          {"format", "tandem-registry-backup"},
                                          {"schema_version", kRegistrySchemaVersion}}));
  return write_file_durably(directory + "/backup.json", info);
}

Status Registry::restore(const std::string& from, const std::string& to) {
  TANDEM_ASSIGN_OR_RETURN(const std::string text,
                          read_file(from + "/backup.json", kBackupInfoBytesMax));
  TANDEM_ASSIGN_OR_RETURN(const Json info, parse_json_strict(text, from + "/backup.json"));
  if (!info.is_object() || info.value("format", Json()) != Json("tandem-registry-backup"))
    return refused_error(from + " is not a backup of a registry");
  std::error_code ignored;
  for (const char* part : {"registry", "blobs", "objects"})
    if (fs::exists(to + "/" + part, ignored))
      return conflict_error(
          str(to, "/", part, " exists; restore into an empty data directory and then swap them"));
  TANDEM_RETURN_IF_ERROR(make_directories(to));
  TANDEM_RETURN_IF_ERROR(require_free_space(to, tree_bytes(from)));
  // The registry's own folder last: without it the directory counts as empty and restore can be
  // repeated.
  TANDEM_RETURN_IF_ERROR(copy_tree(from + "/blobs/lmdb", to + "/blobs"));
  if (fs::exists(from + "/blobs/files", ignored))
    TANDEM_RETURN_IF_ERROR(copy_tree(from + "/blobs/files", to + "/objects"));
  TANDEM_RETURN_IF_ERROR(copy_tree(from + "/registry", to + "/registry"));
  TANDEM_RETURN_IF_ERROR(sync_directory(to));
  SystemClock clock;
  RegistryOptions options;
  options.directory = to;
  TANDEM_ASSIGN_OR_RETURN(const auto registry, open(options, clock));
  TANDEM_ASSIGN_OR_RETURN(const auto findings, registry->check());
  if (findings.empty()) return {};
  return corrupt_error(str("what was restored from ", from, " to ", to, " has ", findings.size(),
                           " problems; the first: ", findings.front().where, ": ",
                           findings.front().message,
                           "; tandem registry check --offline lists them"));
}

}  // namespace tandem::storage
