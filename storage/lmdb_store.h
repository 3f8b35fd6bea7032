// The store on disk: one LMDB environment in a folder. lmdb_store.cc is the only file that knows
// lmdb.
//
// Default (full) sync: a commit that returned is on the disk. The folder is locked for one process;
// a second one gets a conflict that names the first one's pid. A network file system is refused,
// free space is checked before anything is mapped (LMDB dies of SIGBUS on a full disk), with
// `preallocate` the data file gets its full size at once so that a disk filled by others cannot
// stop a commit, and dead readers are cleared at open.
#pragma once

#include "storage/store.h"

namespace tandem::storage {

struct LmdbOptions {
  std::string directory;               ///< made when missing, mode 0700
  std::string kind;                    ///< "registry", "blobs": a file of another kind is refused
  std::vector<std::string> tables;     ///< every table that will be used
  std::int64_t map_bytes = 256 << 20;  ///< grows to the file's size when that is larger
  bool preallocate = false;
  /// Walk the whole file in a child process first, so that damaged tree pages crash the child and
  /// not us.
  bool probe = true;
};

/// Errors: conflict (locked by a pid), refused (network file system, another program's file),
/// corrupt (torn, truncated or damaged file; message says to restore a backup), internal (disk
/// full, I/O).
Result<std::unique_ptr<Store>> open_lmdb_store(const LmdbOptions& options);

}  // namespace tandem::storage
