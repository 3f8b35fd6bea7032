// A file descriptor that another thread makes readable, for poll loops (Linux eventfd).
#pragma once

#include "protocol/base/check.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

namespace tandem::protocol {

class Wakeup {
 public:
  Wakeup() : fd_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    TANDEM_CHECK(fd_ >= 0, "eventfd failed: out of file descriptors? errno", errno);
  }
  ~Wakeup() { ::close(fd_); }
  Wakeup(const Wakeup&) = delete;
  Wakeup& operator=(const Wakeup&) = delete;

  [[nodiscard]] int fd() const { return fd_; }
  /// Makes the descriptor readable. Any thread.
  void signal() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(fd_, &one, sizeof one);
  }
  /// Makes it unreadable again; true when it was signalled. The waiting thread.
  bool drain() {
    std::uint64_t value = 0;
    return ::read(fd_, &value, sizeof value) == sizeof value;
  }

 private:
  const int fd_;
};

}  // namespace tandem::protocol
