// Content-addressed chunks of at most 16 MiB: what adapters, checkpoints and data sets are made of.
//
// A chunk is named by the SHA-256 of its bytes and stored once, however often it is put. Up to a
// budget chunks lie in an LMDB environment; beyond it, or for lack of one, in content-addressed
// files beside it (temporary name, write, fsync, rename, fsync of the folder). A put that returned
// is durable. A chunk is verified against its digest when this process first reads it, and against
// its checksum at every read.
//
// Garbage collection removes chunks that nobody needs, except those that an upload pins and those
// younger than an hour. Putting a chunk that is there already makes it young again.
//
// Any thread may call; writers wait for each other.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/base/digest.h"
#include "storage/store.h"

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

namespace tandem::storage {

inline constexpr std::int64_t kBlobChunkBytesMax = 16 << 20;
inline constexpr std::int64_t kBlobSpareMs = 3600 * 1000;  ///< gc spares what is younger
inline constexpr std::int64_t kBlobPinMs = 3600 * 1000;    ///< a pin that is not renewed ends
inline constexpr std::size_t kBlobPinsMax = 1024;          ///< then the quietest one ends
inline constexpr std::int64_t kBlobBatchBytes = 64 << 20;  ///< one commit of put_chunks
inline constexpr std::size_t kBlobVerifiedMax = 1 << 18;   ///< remembered as verified

struct BlobChunk {
  Digest digest;
  std::span<const std::byte> bytes;
};

struct BlobGcResult {
  std::int64_t removed = 0, removed_bytes = 0, kept = 0, spared = 0;
};

struct BlobStats {
  std::int64_t chunks = 0, bytes = 0;  ///< all
  std::int64_t file_chunks = 0, file_bytes = 0;
};

class BlobStore {
 public:
  /// `store` has the tables of tables(). `files_directory` holds what is beyond `budget_bytes`; ""
  /// means that such chunks are refused. Leftovers of interrupted writes are removed.
  static Result<std::unique_ptr<BlobStore>> open(std::unique_ptr<Store> store,
                                                 std::string files_directory,
                                                 std::int64_t budget_bytes, const Clock& clock);
  static std::vector<std::string> tables();
  ~BlobStore();

  /// Durable on return. Errors: invalid (too large, or the bytes do not have this digest), internal
  /// (full). A non-empty `pin` also pins the chunk for that upload.
  Status put_chunk(const Digest& digest, std::span<const std::byte> bytes,
                   const std::string& pin = "");
  /// The same for many small chunks with few commits. On an error some may be there; putting again
  /// is fine.
  Status put_chunks(std::span<const BlobChunk> chunks, const std::string& pin = "");
  /// The two halves of put_chunks, so that the next chunks are verified while these are stored.
  /// What is put must have passed verify since its bytes last changed. `threads` 0: as many as
  /// hash_threads says.
  static Status verify(std::span<const BlobChunk> chunks, int threads = 0);
  Status put_verified(std::span<const BlobChunk> chunks, const std::string& pin = "");

  [[nodiscard]] Result<bool> has(const Digest& digest);
  /// Those that are absent, in order. A non-empty `pin` pins the ones that are there, so that they
  /// are still there when the upload publishes.
  [[nodiscard]] Result<std::vector<Digest>> missing(std::span<const Digest> digests,
                                                    const std::string& pin = "");
  /// A copy of the bytes. Errors: not_found, corrupt.
  [[nodiscard]] Result<std::vector<std::byte>> get(const Digest& digest);

  /// Removes what is not in `live`, not pinned and not young.
  Result<BlobGcResult> gc(const std::unordered_set<Digest>& live);
  /// Reads and verifies every chunk; `report(digest, message)` for each bad one.
  Status check(
      const std::function<void(const std::string& name, const std::string& message)>& report);
  [[nodiscard]] Result<BlobStats> stats();
  /// A consistent copy of everything in the (new) folder: DIR/lmdb and DIR/files.
  Status backup(const std::string& directory);

 private:
  BlobStore(std::unique_ptr<Store> store, std::string files_directory, std::int64_t budget_bytes,
            const Clock& clock);
  struct Meta;
  struct Pin {
    std::set<Digest> digests;
    std::int64_t expires_ms = 0;
  };
  Status put_batch(std::span<const BlobChunk> chunks);
  Status put_one(WriteTxn& txn, const BlobChunk& chunk);
  void add_pin(const std::string& pin, std::span<const Digest> digests);
  void expire_pins();  // with mutex_ held
  bool is_pinned(const Digest& digest);
  Status remove_batch(std::span<const Digest> victims, BlobGcResult& result);
  Status remove_leftovers();
  Result<std::optional<Meta>> find_meta(ReadTxn& txn, const Digest& digest);
  [[nodiscard]] std::string file_path(const Digest& digest) const;
  Status sweep_orphan_files();

  std::unique_ptr<Store> store_;
  const std::string files_directory_;
  const std::int64_t budget_bytes_;
  const Clock& clock_;
  std::mutex write_mutex_;  // puts, gc and backup exclude each other; guards lmdb_bytes_
  std::int64_t lmdb_bytes_ = 0;
  std::mutex mutex_;  // guards what follows; innermost
  std::map<std::string, Pin> pins_;
  std::unordered_set<Digest> verified_;
};

}  // namespace tandem::storage
