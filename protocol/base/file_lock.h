// Whether the process that a file tells of lives: the kernel drops its lock with it, however it
// dies.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/base/result.h"

#include <sys/types.h>

#include <string>
#include <utility>

namespace tandem {

/// An flock, and its holder's pid in the file, until the object or the process is gone. Move-only.
class FileLock {
 public:
  /// Locks the file, which is made if it is not there. Somebody else's lock is waited for,
  /// `wait_ms` or as long as one who only asks may have it, whichever is longer; then
  /// conflict_error, with the holder's pid. A disk too full for the pid is no error: the holder is
  /// not known then.
  static Result<FileLock> acquire(const std::string& path, TimeMs wait_ms = 0);
  /// True when some process holds the lock now. Those who ask do not see each other.
  static bool is_held(const std::string& path);
  /// The process that holds the lock; 0: none does, or it is not known.
  static pid_t holder(const std::string& path);
  /// For a child that is to hold it as well (close-on-exec here).
  [[nodiscard]] int descriptor() const { return fd_; }
  FileLock(FileLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileLock& operator=(FileLock&& other) noexcept;
  ~FileLock();

 private:
  explicit FileLock(int fd) : fd_(fd) {}
  int fd_ = -1;
};

}  // namespace tandem
