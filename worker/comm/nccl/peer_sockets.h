// Private to libtandem_nccl.so: sockets between the processes of one host that each drive a GPU of
// a gang. By them go what the driver's handles of memory are to the other processes: file
// descriptors, which nothing else carries. One thread.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/base/result.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace tandem::worker::comm {

/// A descriptor that is closed with its owner.
class OwnedFd {
 public:
  explicit OwnedFd(int fd = -1) : fd_(fd) {}
  ~OwnedFd();
  OwnedFd(OwnedFd&& other) noexcept : fd_(other.release()) {}
  OwnedFd& operator=(OwnedFd&& other) noexcept;
  [[nodiscard]] int get() const { return fd_; }
  int release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }

 private:
  int fd_;
};

/// What one process tells each of the others.
struct PeerMessage {
  std::int64_t offset = 0, bytes = 0;
  std::vector<OwnedFd> fds;
};

class PeerSockets {
 public:
  /// Called by all `size` processes at once, with the same `name` (a secret: who knows it can
  /// join, if it runs as the same user). `all_listen` returns when every process has called it.
  /// unavailable_error: another process does not answer within `timeout_ms`, or is another user's.
  static Result<std::vector<OwnedFd>> connect(const std::string& name, int rank, int size,
                                              TimeMs timeout_ms,
                                              const std::function<void()>& all_listen);
  explicit PeerSockets(std::vector<OwnedFd> peers) : peers_(std::move(peers)) {}

  /// Sends `mine` to every other process and returns what each of them has sent, by rank; all of
  /// them call it. The descriptors stay the caller's.
  Result<std::vector<PeerMessage>> exchange(const PeerMessage& mine) const;

 private:
  std::vector<OwnedFd> peers_;  ///< by rank; none for this one
};

}  // namespace tandem::worker::comm
