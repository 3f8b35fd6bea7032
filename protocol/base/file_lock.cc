#include "protocol/base/file_lock.h"

#include "protocol/base/str.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string_view>

namespace tandem {
namespace {

constexpr std::int64_t kPollUs = 5000;
/// is_held can only ask by locking, for an instant that a busy machine may stretch.
constexpr TimeMs kAskedMs = 500;

}  // namespace

Result<FileLock> FileLock::acquire(const std::string& path, TimeMs wait_ms) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return internal_error(str("cannot open ", path, ": ", std::strerror(errno)));
  FileLock lock(fd);
  const TimeMs deadline = steady_ns() / 1'000'000 + std::max(wait_ms, kAskedMs);
  while (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
    if (steady_ns() / 1'000'000 >= deadline) {
      char text[32] = {};
      (void)!::pread(fd, text, sizeof text - 1, 0);
      const std::string_view pid(text, std::strcspn(text, "\n"));
      return conflict_error(str(path, " is in use by process ", pid.empty() ? "?" : pid));
    }
    ::usleep(kPollUs);
  }
  // In this order: a file that has its block needs none of a full disk. Who reads it before its end
  // is cut off sees where the number ends.
  const std::string pid = str(::getpid(), "\n");
  const ssize_t written = ::pwrite(fd, pid.data(), pid.size(), 0);
  (void)!::ftruncate(fd, std::max<ssize_t>(written, 0));
  return lock;
}

bool FileLock::is_held(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return false;
  const bool free = ::flock(fd, LOCK_SH | LOCK_NB) == 0;
  ::close(fd);  // drops the lock too
  return !free;
}

pid_t FileLock::holder(const std::string& path) {
  pid_t pid = 0;
  return is_held(path) && std::ifstream(path) >> pid && pid > 1 ? pid : 0;
}

FileLock& FileLock::operator=(FileLock&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

FileLock::~FileLock() {
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace tandem
