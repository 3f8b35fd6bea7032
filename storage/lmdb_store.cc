#include "storage/lmdb_store.h"

#include "protocol/base/clock.h"
#include "protocol/base/file_lock.h"
#include "protocol/base/log.h"
#include "protocol/base/units.h"
#include "storage/ahead_writer.h"
#include "storage/file_io.h"
#include "storage/sealed_value.h"

#include <fcntl.h>
#include <lmdb.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <sstream>
#include <system_error>
#include <thread>

namespace tandem::storage {
namespace {

namespace fs = std::filesystem;

constexpr unsigned kReadersMax = 510;
constexpr std::int64_t kLockFileBytes = 64 << 10;
constexpr std::int64_t kSpareBytes =
    4 << 20;  // what must be free beyond the map before a store is made or enlarged
constexpr std::int64_t kEarlyBytesMin = 4 << 20;  ///< less is written in no time
/// Of the map, and at most, what transactions that remove nothing leave free.
constexpr std::int64_t kRemovalShare = 16, kRemovalBytesMax = 4 << 20;
constexpr TimeMs kProbeMs = 120'000;
constexpr const char* kMarkerTable = "_store";
constexpr const char* kMarkerKey = "kind";

/// An LMDB or errno code as a Status about the store in `directory`.
Status lmdb_error(int code, const std::string& directory, const std::string& what) {
  const std::string where = str(directory, ": ", what, ": ");
  switch (code) {
    case MDB_MAP_FULL:
      return internal_error(
          where +
          "the map is full; remove something (tandem registry gc) or open it with a larger one");
    case ENOSPC:
    case EDQUOT:
      return internal_error(
          where + "disk full; nothing of this transaction was kept; free some space and repeat");
    case EIO:
      return internal_error(
          where + "input/output error, or a full disk; nothing of this transaction was kept");
    case MDB_INVALID:
      return refused_error(where + "not a database of ours (foreign or torn file)");
    case MDB_VERSION_MISMATCH:
      return refused_error(where + "written by another version of LMDB");
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_BAD_TXN:
    case MDB_PANIC:
      return corrupt_error(where + mdb_strerror(code) +
                           "; restore a backup (tandem registry restore)");
    case MDB_READERS_FULL:
      return busy_error(
          str(where, "more than ", kReadersMax, " readers at once; retry after 100 ms"));
    default:
      return internal_error(where + mdb_strerror(code));
  }
}

MDB_val to_val(std::string_view text) {
  return {text.size(), const_cast<char*>(text.data())};
}
std::string_view to_view(const MDB_val& val) {
  return {static_cast<const char*>(val.mv_data), val.mv_size};
}

struct EnvCloser {
  void operator()(MDB_env* env) const { mdb_env_close(env); }
};
using EnvPtr = std::unique_ptr<MDB_env, EnvCloser>;

/// One environment with its tables. Shared by the store and its transactions.
struct Environment {
  std::string directory;
  // Destroyed in reverse: the lock is held while anything here is.
  std::optional<FileLock> lock;
  EnvPtr env;
  std::map<std::string, MDB_dbi, std::less<>> dbis;
  std::vector<std::string> tables;
  std::unique_ptr<AheadWriter> ahead;

  [[nodiscard]] MDB_dbi dbi(std::string_view table) const {
    const auto at = dbis.find(table);
    TANDEM_CHECK(at != dbis.end(), directory, " was not opened with the table ", table);
    return at->second;
  }
};

/// Pages in use, as a transaction sees it, and what the map has.
struct MapUse {
  std::int64_t used_bytes = 0, map_bytes = 0, entries = 0;
};
MapUse map_use(const Environment& environment, MDB_txn* txn) {
  MDB_envinfo info{};
  MDB_stat page{};
  mdb_env_info(environment.env.get(), &info);
  mdb_env_stat(environment.env.get(), &page);
  const auto page_bytes = static_cast<std::int64_t>(page.ms_psize);
  MapUse use{2 * page_bytes, static_cast<std::int64_t>(info.me_mapsize), 0};
  for (const auto& [name, dbi] : environment.dbis) {
    MDB_stat stat{};
    mdb_stat(txn, dbi, &stat);
    use.entries += name == kMarkerTable ? 0 : static_cast<std::int64_t>(stat.ms_entries);
    use.used_bytes +=
        page_bytes * static_cast<std::int64_t>(stat.ms_branch_pages + stat.ms_leaf_pages +
                                               stat.ms_overflow_pages);
  }
  return use;
}

class LmdbCursor final : public StoreCursor {
 public:
  LmdbCursor(const Environment& environment, MDB_txn* txn, std::string_view table)
      : environment_(environment), table_(table) {
    code_ = mdb_cursor_open(txn, environment.dbi(table), &cursor_);
    failed_ = code_ != 0;
  }
  ~LmdbCursor() override {
    if (cursor_ != nullptr) mdb_cursor_close(cursor_);
  }
  void seek(std::string_view key) override {
    if (key.empty()) return move(MDB_FIRST);
    key_ = to_val(key);
    move(MDB_SET_RANGE);
  }
  void next() override { move(MDB_NEXT); }
  [[nodiscard]] bool valid() const override { return code_ == 0; }
  [[nodiscard]] std::string_view key() const override { return to_view(key_); }
  [[nodiscard]] Result<std::string_view> value() const override {
    return unseal(table_, to_view(key_), to_view(value_));
  }
  [[nodiscard]] Status status() const override {
    return failed_ ? lmdb_error(code_, environment_.directory, "walk of " + table_) : Status();
  }

 private:
  void move(MDB_cursor_op op) {
    if (failed_) return;
    code_ = mdb_cursor_get(cursor_, &key_, &value_, op);
    failed_ = code_ != 0 && code_ != MDB_NOTFOUND;
  }
  const Environment& environment_;
  std::string table_;
  MDB_cursor* cursor_ = nullptr;
  MDB_val key_{}, value_{};
  int code_ = MDB_NOTFOUND;
  bool failed_ = false;
};

/// Lets the disk begin with what a large commit has written while it writes the rest; by itself the
/// kernel waits for the commit's sync. Which page reaches the disk first matters to LMDB only from
/// that sync to the next.
class EarlyWriteback {
 public:
  explicit EarlyWriteback(int fd)
      : thread_([this, fd] {
          while (!over_) {
            if (::sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE) != 0) return;
            ::usleep(kPauseUs);
          }
        }) {}
  ~EarlyWriteback() {
    over_ = true;
    thread_.join();
  }
  EarlyWriteback(const EarlyWriteback&) = delete;
  EarlyWriteback& operator=(const EarlyWriteback&) = delete;

 private:
  static constexpr useconds_t kPauseUs = 500;
  std::atomic<bool> over_{false};
  std::thread thread_;
};

class LmdbTxn final : public WriteTxn {
 public:
  LmdbTxn(std::shared_ptr<Environment> environment, MDB_txn* txn)
      : environment_(std::move(environment)), txn_(txn) {}
  ~LmdbTxn() override {
    if (txn_ != nullptr) mdb_txn_abort(txn_);
  }

  Result<std::optional<std::string_view>> get(std::string_view table,
                                              std::string_view key) override {
    if (key.empty() || key.size() > kStoreKeyBytesMax) return std::optional<std::string_view>();
    MDB_val k = to_val(key), v{};
    const int code = mdb_get(txn_, environment_->dbi(table), &k, &v);
    if (code == MDB_NOTFOUND) return std::optional<std::string_view>();
    if (code != 0) return fail(code, "read");
    TANDEM_ASSIGN_OR_RETURN(const std::string_view value, unseal(table, key, to_view(v)));
    return std::optional<std::string_view>(value);
  }
  std::unique_ptr<StoreCursor> cursor(std::string_view table) override {
    return std::make_unique<LmdbCursor>(*environment_, txn_, table);
  }
  Status put(std::string_view table, std::string_view key, std::string_view value) override {
    if (key.empty() || key.size() > kStoreKeyBytesMax)
      return invalid_error(
          str("a key of ", key.size(), " bytes; 1 to ", kStoreKeyBytesMax, " are allowed"));
    TANDEM_RETURN_IF_ERROR(failure_);
    MDB_val k = to_val(key), v{sealed_bytes(key, value.size()), nullptr};
    if (!removes_ && !leaves_room(static_cast<std::int64_t>(v.mv_size)))
      return fail(MDB_MAP_FULL, "write");
    const int code = mdb_put(txn_, environment_->dbi(table), &k, &v, MDB_RESERVE);
    if (code != 0) return fail(code, "write");
    seal_into(static_cast<char*>(v.mv_data), table, key, value);
    bytes_ += static_cast<std::int64_t>(v.mv_size);
    return {};
  }
  Status del(std::string_view table, std::string_view key) override {
    TANDEM_RETURN_IF_ERROR(failure_);
    MDB_val k = to_val(key);
    const int code = mdb_del(txn_, environment_->dbi(table), &k, nullptr);
    removes_ = removes_ || code == 0;
    return code == 0 || code == MDB_NOTFOUND ? Status() : fail(code, "delete");
  }
  Status commit() override {
    TANDEM_CHECK(txn_ != nullptr, "a transaction is committed once");
    MDB_txn* txn = std::exchange(txn_, nullptr);
    if (!failure_.ok()) {
      mdb_txn_abort(txn);
      return failure_;
    }
    std::optional<EarlyWriteback> early;
    if (int fd = -1; bytes_ >= kEarlyBytesMin && mdb_env_get_fd(environment_->env.get(), &fd) == 0)
      try {
        early.emplace(fd);
      } catch (const std::system_error&) {  // no thread to be had: it takes longer
      }
    const int code = mdb_txn_commit(txn);
    early.reset();
    if (code != 0) return lmdb_error(code, environment_->directory, "commit");
    if (environment_->ahead) environment_->ahead->moved();
    return {};
  }

 private:
  /// Removing copies pages, and says in others what was removed: a transaction that only adds
  /// leaves room for that, or nothing could be removed from a map that is full.
  [[nodiscard]] bool leaves_room(std::int64_t bytes) const {
    const MapUse use = map_use(*environment_, txn_);
    const std::int64_t room = std::min(use.map_bytes / kRemovalShare, kRemovalBytesMax);
    return use.used_bytes + bytes + room <= use.map_bytes;
  }
  /// Keeps the first failure: LMDB forbids going on with the transaction.
  Status fail(int code, const char* what) {
    failure_ = lmdb_error(code, environment_->directory, what);
    return failure_;
  }
  std::shared_ptr<Environment> environment_;
  MDB_txn* txn_;
  std::int64_t bytes_ = 0;  ///< of values put
  bool removes_ = false;
  Status failure_;
};

class LmdbStore final : public Store {
 public:
  explicit LmdbStore(std::shared_ptr<Environment> environment)
      : environment_(std::move(environment)) {}

  Result<std::unique_ptr<ReadTxn>> begin_read() override {
    MDB_txn* txn = nullptr;
    const int code = mdb_txn_begin(environment_->env.get(), nullptr, MDB_RDONLY, &txn);
    if (code != 0) return lmdb_error(code, environment_->directory, "begin to read");
    return std::unique_ptr<ReadTxn>(std::make_unique<LmdbTxn>(environment_, txn));
  }
  Result<std::unique_ptr<WriteTxn>> begin_write() override {
    MDB_txn* txn = nullptr;
    const int code = mdb_txn_begin(environment_->env.get(), nullptr, 0, &txn);
    if (code != 0) return lmdb_error(code, environment_->directory, "begin to write");
    return std::unique_ptr<WriteTxn>(std::make_unique<LmdbTxn>(environment_, txn));
  }
  Status backup(const std::string& directory) override {
    std::error_code ignored;
    if (fs::exists(directory, ignored)) return conflict_error(directory + " exists already");
    TANDEM_RETURN_IF_ERROR(make_directories(directory));
    TANDEM_ASSIGN_OR_RETURN(const StoreStats now, stats());
    TANDEM_RETURN_IF_ERROR(require_free_space(directory, now.used_bytes + kSpareBytes));
    const int code = mdb_env_copy2(environment_->env.get(), directory.c_str(), MDB_CP_COMPACT);
    if (code != 0) return lmdb_error(code, environment_->directory, "copy to " + directory);
    const int fd = ::open((directory + "/data.mdb").c_str(), O_RDONLY | O_CLOEXEC);
    const bool synced = fd >= 0 && ::fsync(fd) == 0;
    if (fd >= 0) ::close(fd);
    if (!synced) return internal_error(str("cannot sync ", directory, ": ", std::strerror(errno)));
    return sync_directory(directory);
  }
  Result<StoreStats> stats() override {
    TANDEM_ASSIGN_OR_RETURN(const auto txn, begin_read());
    MDB_txn* raw = nullptr;
    if (const int code = mdb_txn_begin(environment_->env.get(), nullptr, MDB_RDONLY, &raw);
        code != 0)
      return lmdb_error(code, environment_->directory, "begin to read");
    const MapUse use = map_use(*environment_, raw);
    mdb_txn_abort(raw);
    return StoreStats{use.map_bytes, use.used_bytes, use.entries};
  }
  void write_ahead(std::int64_t bytes) override {
    MDB_env* env = environment_->env.get();
    MDB_envinfo info{};
    mdb_env_info(env, &info);
    // Pages behind the last committed one are nobody's while no transaction writes.
    const auto with_writers_out = [env, &directory =
                                            environment_->directory](const auto& write) -> Status {
      MDB_txn* txn = nullptr;
      if (const int code = mdb_txn_begin(env, nullptr, 0, &txn); code != 0)
        return lmdb_error(code, directory, "begin");
      MDB_envinfo now{};
      MDB_stat stat{};
      mdb_env_info(env, &now);
      mdb_env_stat(env, &stat);
      const Status status =
          write(static_cast<std::int64_t>(now.me_last_pgno + 1) * std::int64_t{stat.ms_psize});
      mdb_txn_abort(txn);
      return status;
    };
    environment_->ahead = std::make_unique<AheadWriter>(
        AheadWriter::Options{environment_->directory + "/data.mdb", bytes,
                             static_cast<std::int64_t>(info.me_mapsize)},
        with_writers_out);
  }
  const std::vector<std::string>& tables() const override { return environment_->tables; }

 private:
  std::shared_ptr<Environment> environment_;
};

// -- opening ------------------------------------------------------------------

/// Takes the folder's lock for this process.
Result<FileLock> take_lock(const std::string& directory) {
  auto lock = FileLock::acquire(directory + "/owner");
  if (!lock.ok() && lock.status().code() == StatusCode::kConflict)
    return conflict_error(str(
        lock.status().message(),
        "; one coordinator owns a registry: stop that one first, or choose another --data-dir"));
  return lock;
}

/// Gives a file its full size on the disk, so that neither a commit nor a mapped page can lack
/// space.
Status allocate(const std::string& path, std::int64_t bytes) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return internal_error(str("cannot open ", path, ": ", std::strerror(errno)));
  const int code = ::posix_fallocate(fd, 0, bytes);
  const bool synced = ::fsync(fd) == 0;
  ::close(fd);
  if (code == ENOSPC || code == EDQUOT)
    return internal_error(str("disk full: ", path, " needs ", format_bytes(bytes)));
  if (code != 0 || !synced)
    return internal_error(str("cannot allocate ", path, ": ", std::strerror(code)));
  return {};
}

Result<EnvPtr> open_env(const std::string& directory, std::int64_t map_bytes, unsigned tables,
                        unsigned flags) {
  MDB_env* raw = nullptr;
  if (const int code = mdb_env_create(&raw); code != 0)
    return lmdb_error(code, directory, "create");
  EnvPtr env(raw);
  mdb_env_set_maxdbs(raw, tables + 1);
  mdb_env_set_maxreaders(raw, kReadersMax);
  mdb_env_set_mapsize(raw, static_cast<std::size_t>(map_bytes));
  if (const int code = mdb_env_open(raw, directory.c_str(), MDB_NOTLS | flags, 0600); code != 0)
    return lmdb_error(code, directory, "open");
  return env;
}

/// A file cut short would end the process with SIGBUS at the first missing page.
Status check_length(MDB_env* env, const std::string& directory) {
  MDB_envinfo info{};
  MDB_stat stat{};
  mdb_env_info(env, &info);
  mdb_env_stat(env, &stat);
  std::error_code error;
  const auto actual = static_cast<std::uint64_t>(fs::file_size(directory + "/data.mdb", error));
  const std::uint64_t expected =
      (static_cast<std::uint64_t>(info.me_last_pgno) + 1) * stat.ms_psize;
  if (error || actual < expected)
    return corrupt_error(str(directory, "/data.mdb is truncated: ", expected, " bytes expected, ",
                             actual, " there; restore a backup (tandem registry restore)"));
  return {};
}

/// The list of free pages: LMDB aborts the process, or reuses a page that is in use, when it is
/// damaged. Each record is a transaction id and a list: its length, then page numbers in falling
/// order.
bool free_list_is_sound(MDB_env* env, MDB_txn* txn) {
  constexpr MDB_dbi kFreeTable = 0;  // LMDB's own, below the named ones
  MDB_envinfo info{};
  mdb_env_info(env, &info);
  MDB_cursor* cursor = nullptr;
  if (mdb_cursor_open(txn, kFreeTable, &cursor) != 0) return false;
  MDB_val k{}, v{};
  int code = 0;
  while ((code = mdb_cursor_get(cursor, &k, &v, MDB_NEXT)) == 0) {
    if (k.mv_size != sizeof(std::size_t) || v.mv_size < sizeof(std::size_t)) return false;
    std::vector<std::size_t> list(v.mv_size / sizeof(std::size_t));
    std::memcpy(list.data(), v.mv_data, list.size() * sizeof(std::size_t));
    if (list[0] >= list.size()) return false;
    for (std::size_t i = 1; i <= list[0]; ++i)
      if (list[i] < 2 || list[i] > info.me_last_pgno || (i > 1 && list[i] >= list[i - 1]))
        return false;
  }
  return code == MDB_NOTFOUND;
}

/// Where this process sees a file: a damaged length or page number makes LMDB hand out pointers
/// beyond it.
struct MappedRange {
  std::uintptr_t begin = 0, end = 0;
  [[nodiscard]] bool holds(const MDB_val& v) const {
    const auto at = reinterpret_cast<std::uintptr_t>(v.mv_data);
    return at >= begin && at <= end && v.mv_size <= end - at;
  }
};

MappedRange find_mapping(const std::string& path) {
  MappedRange range;
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return range;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::istringstream fields(line);
    std::string addresses, mode, offset, device;
    std::uint64_t inode = 0;
    fields >> addresses >> mode >> offset >> device >> inode;
    if (inode != info.st_ino || std::stoull(offset, nullptr, 16) != 0) continue;
    range.begin = std::stoull(addresses, nullptr, 16);
    range.end = range.begin + static_cast<std::uintptr_t>(info.st_size);
  }
  return range;
}

/// Walks every tree page. Runs in a child process, whose death is the finding.
int probe(const std::string& directory, std::int64_t map_bytes, unsigned tables) {
  auto env = open_env(directory, map_bytes, tables, MDB_RDONLY | MDB_NOLOCK);
  if (!env.ok() || !check_length(env->get(), directory).ok()) return 2;
  MDB_txn* txn = nullptr;
  MDB_dbi main = 0;
  MDB_cursor* names = nullptr;
  if (mdb_txn_begin(env->get(), nullptr, MDB_RDONLY, &txn) != 0 ||
      mdb_dbi_open(txn, nullptr, 0, &main) != 0 || mdb_cursor_open(txn, main, &names) != 0)
    return 2;
  if (!free_list_is_sound(env->get(), txn)) return 2;
  const MappedRange file = find_mapping(directory + "/data.mdb");
  MDB_val name{}, value{};
  int code = 0;
  while ((code = mdb_cursor_get(names, &name, &value, MDB_NEXT)) == 0) {
    if (!file.holds(name) || !file.holds(value)) return 2;
    MDB_dbi dbi = 0;
    MDB_cursor* cursor = nullptr;
    if (mdb_dbi_open(txn, std::string(to_view(name)).c_str(), 0, &dbi) != 0 ||
        mdb_cursor_open(txn, dbi, &cursor) != 0)
      return 2;
    MDB_stat stat{};
    mdb_stat(txn, dbi, &stat);
    std::size_t entries = 0;
    std::string previous;
    MDB_val k{}, v{};
    while ((code = mdb_cursor_get(cursor, &k, &v, MDB_NEXT)) == 0) {
      if (!file.holds(k) || !file.holds(v)) return 2;
      if (++entries > stat.ms_entries || (entries > 1 && to_view(k) <= previous)) return 2;
      previous = to_view(k);
    }
    if (code != MDB_NOTFOUND || entries != stat.ms_entries) return 2;
  }
  return code == MDB_NOTFOUND ? 0 : 2;
}

Status probe_in_child(const std::string& directory, std::int64_t map_bytes, unsigned tables) {
  const pid_t child = ::fork();
  if (child < 0) return internal_error(str("cannot fork: ", std::strerror(errno)));
  if (child == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // it holds the folder's lock as well
    const rlimit none{0, 0};
    ::setrlimit(RLIMIT_CORE, &none);
    for (int signal : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE}) ::signal(signal, SIG_DFL);
    ::alarm(static_cast<unsigned>(scaled_ms(kProbeMs) / 1000));
    ::_exit(probe(directory, map_bytes, tables));
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return {};
  return corrupt_error(str(directory, "/data.mdb is damaged (",
                           WIFSIGNALED(status)
                               ? str("reading it ends with signal ", WTERMSIG(status))
                               : "its pages contradict each other",
                           "); restore a backup (tandem registry restore)"));
}

/// Makes a complete new data file beside, then renames it into place: a crash leaves none or a
/// whole one.
Status create_data_file(const LmdbOptions& options) {
  const std::string fresh = options.directory + "/new";  // the lock is ours: only a crash left one
  std::error_code ignored;
  fs::remove_all(fresh, ignored);
  TANDEM_RETURN_IF_ERROR(make_directories(fresh));
  Status status = [&]() -> Status {
    TANDEM_ASSIGN_OR_RETURN(EnvPtr env,
                            open_env(fresh, std::max<std::int64_t>(options.map_bytes, kMiB), 1, 0));
    MDB_txn* txn = nullptr;
    if (const int code = mdb_txn_begin(env.get(), nullptr, 0, &txn); code != 0)
      return lmdb_error(code, fresh, "begin");
    MDB_dbi dbi = 0;
    const std::string sealed = seal(kMarkerTable, kMarkerKey, options.kind);
    MDB_val key = to_val(kMarkerKey), value = to_val(sealed);
    int code = mdb_dbi_open(txn, kMarkerTable, MDB_CREATE, &dbi);
    if (code == 0) code = mdb_put(txn, dbi, &key, &value, 0);
    if (code != 0) {
      mdb_txn_abort(txn);
      return lmdb_error(code, fresh, "create");
    }
    code = mdb_txn_commit(txn);
    return code == 0 ? Status() : lmdb_error(code, fresh, "create");
  }();
  if (status.ok() && options.preallocate) status = allocate(fresh + "/data.mdb", options.map_bytes);
  if (status.ok() &&
      ::rename((fresh + "/data.mdb").c_str(), (options.directory + "/data.mdb").c_str()) != 0)
    status = internal_error(str("cannot rename ", fresh, "/data.mdb: ", std::strerror(errno)));
  fs::remove_all(fresh, ignored);
  TANDEM_RETURN_IF_ERROR(status);
  return sync_directory(options.directory);
}

Status open_tables(Environment& environment, const LmdbOptions& options) {
  MDB_txn* txn = nullptr;
  MDB_env* env = environment.env.get();
  if (const int code = mdb_txn_begin(env, nullptr, 0, &txn); code != 0)
    return lmdb_error(code, options.directory, "begin");
  LmdbTxn guard(std::shared_ptr<Environment>(&environment, [](Environment*) {}), txn);
  MDB_dbi marker = 0;
  const int code = mdb_dbi_open(txn, kMarkerTable, 0, &marker);
  if (code == MDB_NOTFOUND)
    return refused_error(str(options.directory, "/data.mdb belongs to another program"));
  if (code != 0) return lmdb_error(code, options.directory, "open");
  environment.dbis[kMarkerTable] = marker;
  TANDEM_ASSIGN_OR_RETURN(const auto kind, guard.get(kMarkerTable, kMarkerKey));
  if (!kind || *kind != options.kind)
    return refused_error(str(options.directory, "/data.mdb holds \"", kind.value_or(""),
                             "\", not \"", options.kind, "\""));
  for (const std::string& table : options.tables) {
    MDB_dbi dbi = 0;
    if (const int open_code = mdb_dbi_open(txn, table.c_str(), MDB_CREATE, &dbi); open_code != 0)
      return lmdb_error(open_code, options.directory, "open the table " + table);
    environment.dbis[table] = dbi;
  }
  return guard.commit();
}

/// Bytes the data file has now; 0 when there is none.
Result<std::int64_t> data_file_bytes(const std::string& directory) {
  struct stat info {};
  if (::stat((directory + "/data.mdb").c_str(), &info) != 0) {
    if (errno == ENOENT) return std::int64_t{0};
    return internal_error(str("cannot look at ", directory, "/data.mdb: ", std::strerror(errno)));
  }
  if (info.st_size == 0)
    return corrupt_error(directory +
                         "/data.mdb is empty; restore a backup, or remove it to begin anew");
  return static_cast<std::int64_t>(info.st_size);
}

}  // namespace

Result<std::unique_ptr<Store>> open_lmdb_store(const LmdbOptions& options) {
  const std::string& directory = options.directory;
  TANDEM_RETURN_IF_ERROR(make_directories(directory));
  TANDEM_RETURN_IF_ERROR(refuse_network_file_system(directory));
  auto environment = std::make_shared<Environment>();
  environment->directory = directory;
  environment->tables = options.tables;
  TANDEM_ASSIGN_OR_RETURN(environment->lock, take_lock(directory));

  TANDEM_ASSIGN_OR_RETURN(const std::int64_t existing, data_file_bytes(directory));
  const std::int64_t missing =
      options.preallocate ? std::max<std::int64_t>(0, options.map_bytes - existing) : 0;
  // What is complete opens on a full disk too: it can be read, and garbage can be collected.
  if (existing == 0 || missing > 0)
    TANDEM_RETURN_IF_ERROR(require_free_space(directory, missing + kSpareBytes));
  TANDEM_RETURN_IF_ERROR(allocate(directory + "/lock.mdb", kLockFileBytes));
  if (existing == 0) TANDEM_RETURN_IF_ERROR(create_data_file(options));
  const std::int64_t map_bytes = std::max(options.map_bytes, round_up(existing, 1 << 16));
  const auto tables =
      static_cast<unsigned>(options.tables.size()) + 16;  // a newer binary's tables too
  if (existing != 0 && options.probe)
    TANDEM_RETURN_IF_ERROR(probe_in_child(directory, map_bytes, tables));
  // Only now may it grow: a torn file must not be padded into a longer one first.
  if (existing != 0 && missing > 0)
    TANDEM_RETURN_IF_ERROR(allocate(directory + "/data.mdb", options.map_bytes));

  TANDEM_ASSIGN_OR_RETURN(environment->env, open_env(directory, map_bytes, tables, 0));
  TANDEM_RETURN_IF_ERROR(check_length(environment->env.get(), directory));
  int dead = 0;
  mdb_reader_check(environment->env.get(), &dead);
  if (dead > 0) log_warn(directory, ": cleared ", dead, " readers whose process is gone");
  TANDEM_RETURN_IF_ERROR(open_tables(*environment, options));
  return std::unique_ptr<Store>(std::make_unique<LmdbStore>(std::move(environment)));
}

}  // namespace tandem::storage
