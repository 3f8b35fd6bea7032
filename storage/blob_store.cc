#include "storage/blob_store.h"

#include "protocol/base/units.h"
#include "storage/file_io.h"
#include "storage/mapped_file.h"
#include "storage/records.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <filesystem>

namespace tandem::storage {
namespace {

namespace fs = std::filesystem;

constexpr const char* kChunks = "chunks";
constexpr const char* kMeta = "chunk_meta";
constexpr std::size_t kGcBatch = 512;

std::string_view to_view(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

Digest digest_of_key(std::string_view key) {
  Digest digest;
  std::memcpy(digest.bytes.data(), key.data(), std::min(key.size(), digest.bytes.size()));
  return digest;
}

}  // namespace

// chunk_meta: u64 created_unix_ms, u64 bytes, u8 place; little-endian.
struct BlobStore::Meta {
  std::int64_t created_unix_ms = 0, bytes = 0;
  bool in_file = false;

  [[nodiscard]] std::string encode() const {
    std::string text(17, '\0');
    std::memcpy(text.data(), &created_unix_ms, 8);
    std::memcpy(text.data() + 8, &bytes, 8);
    text[16] = in_file ? 1 : 0;
    return text;
  }
  static Result<Meta> decode(std::string_view text) {
    if (text.size() != 17)
      return corrupt_error(str("a chunk's description of ", text.size(), " bytes"));
    Meta meta;
    std::memcpy(&meta.created_unix_ms, text.data(), 8);
    std::memcpy(&meta.bytes, text.data() + 8, 8);
    meta.in_file = text[16] != 0;
    return meta;
  }
};

std::vector<std::string> BlobStore::tables() {
  return {kChunks, kMeta};
}

BlobStore::BlobStore(std::unique_ptr<Store> store, std::string files_directory,
                     std::int64_t budget_bytes, const Clock& clock)
    : store_(std::move(store)),
      files_directory_(std::move(files_directory)),
      budget_bytes_(budget_bytes),
      clock_(clock) {}
BlobStore::~BlobStore() = default;

Result<std::unique_ptr<BlobStore>> BlobStore::open(std::unique_ptr<Store> store,
                                                   std::string files_directory,
                                                   std::int64_t budget_bytes, const Clock& clock) {
  std::unique_ptr<BlobStore> blobs(
      new BlobStore(std::move(store), std::move(files_directory), budget_bytes, clock));
  if (!blobs->files_directory_.empty()) {
    TANDEM_RETURN_IF_ERROR(make_directories(blobs->files_directory_));
    TANDEM_RETURN_IF_ERROR(blobs->remove_leftovers());
  }
  TANDEM_ASSIGN_OR_RETURN(const BlobStats stats, blobs->stats());
  blobs->lmdb_bytes_ = stats.bytes - stats.file_bytes;
  return blobs;
}

std::string BlobStore::file_path(const Digest& digest) const {
  const std::string hex = digest.hex();
  return files_directory_ + "/" + hex.substr(0, 2) + "/" + hex;
}

Status BlobStore::remove_leftovers() {
  std::error_code error;
  for (fs::recursive_directory_iterator it(files_directory_, error), end; !error && it != end;
       it.increment(error))
    if (it->is_regular_file(error) &&
        it->path().filename().string().find(".tmp-") != std::string::npos)
      ::unlink(it->path().c_str());
  if (error) return internal_error(str("cannot list ", files_directory_, ": ", error.message()));
  return {};
}

Result<std::optional<BlobStore::Meta>> BlobStore::find_meta(ReadTxn& txn, const Digest& digest) {
  TANDEM_ASSIGN_OR_RETURN(const auto value, txn.get(kMeta, digest_key(digest)));
  if (!value) return std::optional<Meta>();
  TANDEM_ASSIGN_OR_RETURN(const Meta meta, Meta::decode(*value));
  return std::optional<Meta>(meta);
}

Status BlobStore::put_one(WriteTxn& txn, const BlobChunk& chunk) {
  const std::string key = digest_key(chunk.digest);
  TANDEM_ASSIGN_OR_RETURN(auto meta, find_meta(txn, chunk.digest));
  if (meta) {  // there already: only make it young
    meta->created_unix_ms = clock_.unix_ms();
    return txn.put(kMeta, key, meta->encode());
  }
  Meta fresh{clock_.unix_ms(), static_cast<std::int64_t>(chunk.bytes.size()), false};
  fresh.in_file = lmdb_bytes_ + fresh.bytes > budget_bytes_;
  if (fresh.in_file) {
    if (files_directory_.empty())
      return internal_error(str("the blob store holds ", format_bytes(lmdb_bytes_),
                                " and its budget is ", format_bytes(budget_bytes_),
                                "; collect garbage (tandem registry gc) or raise it"));
    const std::string path = file_path(chunk.digest);
    const std::string folder = fs::path(path).parent_path().string();
    TANDEM_RETURN_IF_ERROR(make_directories(folder));
    TANDEM_RETURN_IF_ERROR(require_free_space(folder, fresh.bytes + kMiB));
    const std::array<std::span<const std::byte>, 1> parts{chunk.bytes};
    TANDEM_RETURN_IF_ERROR(write_file_durably(path, parts));
  } else {
    TANDEM_RETURN_IF_ERROR(txn.put(kChunks, key, to_view(chunk.bytes)));
    lmdb_bytes_ += fresh.bytes;
  }
  return txn.put(kMeta, key, fresh.encode());
}

Status BlobStore::put_batch(std::span<const BlobChunk> chunks) {
  const std::int64_t before = lmdb_bytes_;
  Status status = [&]() -> Status {
    TANDEM_ASSIGN_OR_RETURN(const auto txn, store_->begin_write());
    for (const BlobChunk& chunk : chunks) TANDEM_RETURN_IF_ERROR(put_one(*txn, chunk));
    return txn->commit();
  }();
  if (!status.ok()) lmdb_bytes_ = before;
  return status;
}

Status BlobStore::put_chunks(std::span<const BlobChunk> chunks, const std::string& pin) {
  TANDEM_RETURN_IF_ERROR(verify(chunks));
  return put_verified(chunks, pin);
}

Status BlobStore::verify(std::span<const BlobChunk> chunks, int threads) {
  std::vector<std::span<const std::byte>> parts;
  std::size_t bytes = 0;
  for (const BlobChunk& chunk : chunks) {
    if (static_cast<std::int64_t>(chunk.bytes.size()) > kBlobChunkBytesMax)
      return invalid_error(
          str("a chunk of ", chunk.bytes.size(), " bytes; the limit is ", kBlobChunkBytesMax));
    parts.push_back(chunk.bytes);
    bytes += chunk.bytes.size();
  }
  if (threads <= 0) threads = hash_threads(bytes);
  const std::vector<Digest> actual = sha256_each(parts, threads);
  for (std::size_t i = 0; i < chunks.size(); ++i)
    if (actual[i] != chunks[i].digest)
      return invalid_error(str("a chunk named ", chunks[i].digest, " has the digest ", actual[i],
                               "; it was damaged on the way: send it again"));
  return {};
}

Status BlobStore::put_verified(std::span<const BlobChunk> chunks, const std::string& pin) {
  std::vector<Digest> digests;
  for (const BlobChunk& chunk : chunks) digests.push_back(chunk.digest);
  add_pin(pin, digests);
  std::lock_guard lock(write_mutex_);
  while (!chunks.empty()) {
    std::size_t count = 0;
    for (std::int64_t bytes = 0; count < chunks.size(); ++count) {
      bytes += static_cast<std::int64_t>(chunks[count].bytes.size());
      if (count > 0 && bytes > kBlobBatchBytes) break;
    }
    TANDEM_RETURN_IF_ERROR(put_batch(chunks.first(count)));
    chunks = chunks.subspan(count);
  }
  return {};
}

Status BlobStore::put_chunk(const Digest& digest, std::span<const std::byte> bytes,
                            const std::string& pin) {
  const std::array<BlobChunk, 1> one{{{digest, bytes}}};
  return put_chunks(one, pin);
}

Result<bool> BlobStore::has(const Digest& digest) {
  const std::array<Digest, 1> one{digest};
  TANDEM_ASSIGN_OR_RETURN(const auto absent, missing(one));
  return absent.empty();
}

Result<std::vector<Digest>> BlobStore::missing(std::span<const Digest> digests,
                                               const std::string& pin) {
  // Pinned before they are looked up, so that none can go between the look and the pin.
  add_pin(pin, digests);
  TANDEM_ASSIGN_OR_RETURN(const auto txn, store_->begin_read());
  std::vector<Digest> absent;
  for (const Digest& digest : digests) {
    TANDEM_ASSIGN_OR_RETURN(const auto meta, find_meta(*txn, digest));
    if (!meta) absent.push_back(digest);
  }
  return absent;
}

Result<std::vector<std::byte>> BlobStore::get(const Digest& digest) {
  TANDEM_ASSIGN_OR_RETURN(const auto txn, store_->begin_read());
  TANDEM_ASSIGN_OR_RETURN(const auto meta, find_meta(*txn, digest));
  if (!meta) return not_found_error("no chunk " + digest.hex());
  std::shared_ptr<const MappedFile> file;
  std::span<const std::byte> bytes;
  if (meta->in_file) {
    auto mapped =
        meta->bytes == 0 ? MappedFile::of_bytes({}, "") : MappedFile::open(file_path(digest));
    if (!mapped.ok())
      return corrupt_error(
          str("chunk ", digest, ": its file is gone: ", mapped.status().message()));
    file = *mapped;
    bytes = file->bytes();
  } else {
    TANDEM_ASSIGN_OR_RETURN(const auto value, txn->get(kChunks, digest_key(digest)));
    if (!value) return corrupt_error(str("chunk ", digest, " is described but absent"));
    bytes = as_bytes(*value);
  }
  // A file has no checksum of its own; a value in the store has, so its digest is computed only
  // once.
  bool known = false;
  if (!meta->in_file) {
    std::lock_guard lock(mutex_);
    known = verified_.contains(digest);
  }
  if (!known && sha256(bytes) != digest)
    return corrupt_error(str("chunk ", digest, " (", meta->bytes,
                             " bytes) does not match its digest; restore a backup"));
  if (!known && !meta->in_file) {
    std::lock_guard lock(mutex_);
    if (verified_.size() >= kBlobVerifiedMax) verified_.clear();
    verified_.insert(digest);
  }
  return std::vector<std::byte>(bytes.begin(), bytes.end());
}

// -- pins ---------------------------------------------------------------------

void BlobStore::add_pin(const std::string& pin, std::span<const Digest> digests) {
  if (pin.empty()) return;
  std::lock_guard lock(mutex_);
  expire_pins();
  // Nobody says when an upload is over, so most of so many are. One that is not and loses its pins
  // here keeps what is young, and is told of what a collection took when it is committed.
  if (pins_.size() >= kBlobPinsMax && !pins_.contains(pin))
    pins_.erase(std::min_element(pins_.begin(), pins_.end(), [](const auto& a, const auto& b) {
      return a.second.expires_ms < b.second.expires_ms;
    }));
  Pin& entry = pins_[pin];
  entry.digests.insert(digests.begin(), digests.end());
  entry.expires_ms = clock_.now_ms() + kBlobPinMs;
}

void BlobStore::expire_pins() {
  std::erase_if(pins_,
                [&](const auto& entry) { return entry.second.expires_ms <= clock_.now_ms(); });
}

bool BlobStore::is_pinned(const Digest& digest) {
  std::lock_guard lock(mutex_);
  expire_pins();
  for (const auto& [name, pin] : pins_)
    if (pin.digests.contains(digest)) return true;
  return false;
}

// -- garbage, checks, copies --------------------------------------------------

Status BlobStore::remove_batch(std::span<const Digest> victims, BlobGcResult& result) {
  std::vector<Digest> files;
  std::int64_t removed = 0, removed_bytes = 0, lmdb_bytes = 0;
  TANDEM_ASSIGN_OR_RETURN(const auto txn, store_->begin_write());
  for (const Digest& digest : victims) {
    TANDEM_ASSIGN_OR_RETURN(const auto meta, find_meta(*txn, digest));
    // It may have become young or pinned since it was chosen.
    if (!meta || clock_.unix_ms() - meta->created_unix_ms < kBlobSpareMs || is_pinned(digest))
      continue;
    TANDEM_RETURN_IF_ERROR(txn->del(kChunks, digest_key(digest)));
    TANDEM_RETURN_IF_ERROR(txn->del(kMeta, digest_key(digest)));
    ++removed;
    removed_bytes += meta->bytes;
    if (meta->in_file)
      files.push_back(digest);
    else
      lmdb_bytes += meta->bytes;
  }
  TANDEM_RETURN_IF_ERROR(txn->commit());
  for (const Digest& digest : files) ::unlink(file_path(digest).c_str());
  result.removed += removed;
  result.removed_bytes += removed_bytes;
  lmdb_bytes_ -= lmdb_bytes;
  std::lock_guard lock(mutex_);
  for (const Digest& digest : victims) verified_.erase(digest);
  return {};
}

Result<BlobGcResult> BlobStore::gc(const std::unordered_set<Digest>& live) {
  std::lock_guard lock(
      write_mutex_);  // a put must not revive a file between its record's end and its own
  BlobGcResult result;
  std::vector<Digest> victims;
  {
    TANDEM_ASSIGN_OR_RETURN(const auto txn, store_->begin_read());
    const auto cursor = txn->cursor(kMeta);
    for (cursor->seek(""); cursor->valid(); cursor->next()) {
      const Digest digest = digest_of_key(cursor->key());
      TANDEM_ASSIGN_OR_RETURN(const auto value, cursor->value());
      TANDEM_ASSIGN_OR_RETURN(const Meta meta, Meta::decode(value));
      if (live.contains(digest))
        ++result.kept;
      else if (clock_.unix_ms() - meta.created_unix_ms < kBlobSpareMs || is_pinned(digest))
        ++result.spared;
      else
        victims.push_back(digest);
    }
    TANDEM_RETURN_IF_ERROR(cursor->status());
  }
  for (std::size_t at = 0; at < victims.size(); at += kGcBatch)
    TANDEM_RETURN_IF_ERROR(remove_batch(
        std::span(victims).subspan(at, std::min(kGcBatch, victims.size() - at)), result));
  TANDEM_RETURN_IF_ERROR(sweep_orphan_files());
  return result;
}

Status BlobStore::sweep_orphan_files() {
  if (files_directory_.empty()) return {};
  TANDEM_ASSIGN_OR_RETURN(const auto txn, store_->begin_read());
  const auto oldest = fs::file_time_type::clock::now() - std::chrono::milliseconds(kBlobSpareMs);
  std::error_code error;
  for (fs::recursive_directory_iterator it(files_directory_, error), end; !error && it != end;
       it.increment(error)) {
    std::error_code stat_error;
    if (!it->is_regular_file(stat_error) || it->last_write_time(stat_error) > oldest || stat_error)
      continue;
    const auto digest = Digest::parse(it->path().filename().string());
    if (!digest.ok()) continue;  // not ours
    TANDEM_ASSIGN_OR_RETURN(const auto meta, find_meta(*txn, *digest));
    if (!meta || !meta->in_file) ::unlink(it->path().c_str());
  }
  if (error) return internal_error(str("cannot list ", files_directory_, ": ", error.message()));
  return {};
}

Status BlobStore::check(const std::function<void(const std::string&, const std::string&)>& report) {
  std::vector<std::string> keys;
  {
    TANDEM_ASSIGN_OR_RETURN(const auto txn, store_->begin_read());
    const auto cursor = txn->cursor(kMeta);
    for (cursor->seek(""); cursor->valid(); cursor->next()) keys.emplace_back(cursor->key());
    TANDEM_RETURN_IF_ERROR(cursor->status());
    const auto chunks = txn->cursor(kChunks);
    for (chunks->seek(""); chunks->valid(); chunks->next()) {
      TANDEM_ASSIGN_OR_RETURN(const auto meta, txn->get(kMeta, chunks->key()));
      if (!meta) report(digest_of_key(chunks->key()).hex(), "a chunk without a description");
    }
    TANDEM_RETURN_IF_ERROR(chunks->status());
  }
  for (const std::string& key : keys) {
    const Digest digest = digest_of_key(key);
    {
      std::lock_guard lock(mutex_);
      verified_.erase(digest);  // a check looks again
    }
    if (key.size() != digest.bytes.size())
      report(digest.hex(), str("a key of ", key.size(), " bytes"));
    else if (const auto bytes = get(digest);
             !bytes.ok() && bytes.status().code() != StatusCode::kNotFound)
      report(digest.hex(), bytes.status().message());
  }
  return {};
}

Result<BlobStats> BlobStore::stats() {
  TANDEM_ASSIGN_OR_RETURN(const auto txn, store_->begin_read());
  BlobStats stats;
  const auto cursor = txn->cursor(kMeta);
  for (cursor->seek(""); cursor->valid(); cursor->next()) {
    const auto value = cursor->value();
    if (!value.ok()) continue;  // reported where the chunk is used, and by check
    const auto meta = Meta::decode(*value);
    if (!meta.ok()) continue;
    ++stats.chunks;
    stats.bytes += meta->bytes;
    stats.file_chunks += meta->in_file;
    stats.file_bytes += meta->in_file ? meta->bytes : 0;
  }
  TANDEM_RETURN_IF_ERROR(cursor->status());
  return stats;
}

Status BlobStore::backup(const std::string& directory) {
  std::lock_guard lock(write_mutex_);
  TANDEM_RETURN_IF_ERROR(make_directories(directory));
  TANDEM_RETURN_IF_ERROR(store_->backup(directory + "/lmdb"));
  TANDEM_ASSIGN_OR_RETURN(const auto txn, store_->begin_read());
  const auto cursor = txn->cursor(kMeta);
  for (cursor->seek(""); cursor->valid(); cursor->next()) {
    TANDEM_ASSIGN_OR_RETURN(const auto value, cursor->value());
    TANDEM_ASSIGN_OR_RETURN(const Meta meta, Meta::decode(value));
    if (!meta.in_file) continue;
    const std::string hex = digest_of_key(cursor->key()).hex();
    const std::string folder = directory + "/files/" + hex.substr(0, 2);
    TANDEM_RETURN_IF_ERROR(make_directories(folder));
    TANDEM_RETURN_IF_ERROR(
        copy_file_durably(file_path(digest_of_key(cursor->key())), folder + "/" + hex));
    TANDEM_RETURN_IF_ERROR(sync_directory(folder));
  }
  return cursor->status();
}

}  // namespace tandem::storage
