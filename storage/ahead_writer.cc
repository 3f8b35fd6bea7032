#include "storage/ahead_writer.h"

#include "protocol/base/clock.h"
#include "protocol/base/log.h"
#include "protocol/base/units.h"
#include "storage/file_io.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <utility>
#include <vector>

namespace tandem::storage {
namespace {

constexpr std::int64_t kStillNs = 200'000'000;       ///< no commit for so long
constexpr std::int64_t kPatienceNs = 5'000'000'000;  ///< or commits all the time
constexpr std::int64_t kPieceBytes = 256 << 10;      ///< how long a writer may wait
constexpr std::int64_t kSyncBytes = 4 << 20;
constexpr std::int64_t kSpareBytesMin = std::int64_t{1} << 30;  ///< left to others

}  // namespace

AheadWriter::AheadWriter(Options options, WithWritersOut with_writers_out)
    : options_(std::move(options)), with_writers_out_(std::move(with_writers_out)) {
  moved_ns_ = first_moved_ns_ = steady_ns();
  fd_ = ::open(options_.path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd_ < 0)
    log_warn("cannot open ", options_.path, ": ", std::strerror(errno));
  else
    thread_ = std::thread([this] { loop(); });
}

AheadWriter::~AheadWriter() {
  {
    std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  if (fd_ >= 0) ::close(fd_);
}

void AheadWriter::moved() {
  std::lock_guard lock(mutex_);
  moved_ns_ = steady_ns();
  if (!moved_) first_moved_ns_ = moved_ns_;
  if (!std::exchange(moved_, true)) changed_.notify_all();
}

bool AheadWriter::wait_for_quiet() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return ending_ || moved_; });
  while (!ending_) {
    const std::int64_t wait =
        std::min(moved_ns_ + kStillNs, first_moved_ns_ + kPatienceNs) - steady_ns();
    if (wait <= 0) break;
    changed_.wait_for(lock, std::chrono::nanoseconds(wait));
  }
  moved_ = false;
  return !ending_;
}

void AheadWriter::loop() {
  std::int64_t unsynced = 0;
  const auto sync = [&] { return std::exchange(unsynced, 0) == 0 || ::fdatasync(fd_) == 0; };
  while (wait_for_quiet()) {
    while (true) {
      const Result<bool> more = write_piece();
      if (!more.ok()) log_debug(options_.path, ": nothing more ahead: ", more.status().message());
      if (!more.ok() || !*more) break;
      unsynced += kPieceBytes;
      if (unsynced >= kSyncBytes && !sync()) break;
      std::lock_guard lock(mutex_);
      if (moved_ || ending_) break;  // not beside a commit
    }
    (void)sync();
  }
}

Result<bool> AheadWriter::write_piece() {
  const std::string folder = std::filesystem::path(options_.path).parent_path().string();
  TANDEM_RETURN_IF_ERROR(require_free_space(folder, kSpareBytesMin));
  bool more = false;
  const Status status = with_writers_out_([&](std::int64_t end) -> Status {
    written_ = std::max(written_, end);
    const std::int64_t wanted = std::min(end + options_.ahead_bytes, options_.bytes_max);
    const std::int64_t count = std::min(wanted - written_, kPieceBytes);
    if (count <= 0) return {};
    TANDEM_RETURN_IF_ERROR(write_zeros(written_, count));
    written_ += count;
    more = true;
    return {};
  });
  if (!status.ok()) return status;
  return more;
}

Status AheadWriter::write_zeros(std::int64_t begin, std::int64_t count) const {
  static const std::vector<char> zeros(kPieceBytes, 0);
  for (std::int64_t at = 0; at < count;) {
    const ssize_t n = ::pwrite(fd_, zeros.data(), static_cast<std::size_t>(count - at), begin + at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return internal_error(str("cannot write: ", std::strerror(n < 0 ? errno : ENOSPC)));
    at += n;
  }
  return {};
}

}  // namespace tandem::storage
