#include "protocol/descriptor_limit.h"

#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

namespace tandem::protocol {
namespace {

std::atomic<std::uint64_t> g_turned_away{0};

std::int64_t descriptor_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return 1024;
  return static_cast<std::int64_t>(limit.rlim_cur);
}

/// As accept4(2), but ECONNABORTED where only reserved descriptors are left, and never EMFILE,
/// which libzmq takes for a bug: ENFILE, which it expects.
int accept_within_limit(int listener, sockaddr* address, socklen_t* bytes, int flags) {
  const auto fd = static_cast<int>(::syscall(SYS_accept4, listener, address, bytes, flags));
  if (fd < 0) {
    if (errno == EMFILE) errno = ENFILE;
    return fd;
  }
  // The kernel gives the lowest number that is free.
  if (fd < descriptor_limit() - kReservedDescriptors) return fd;
  ::close(fd);
  ++g_turned_away;
  errno = ECONNABORTED;
  return -1;
}

}  // namespace

std::int64_t raise_descriptor_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    (void)::setrlimit(RLIMIT_NOFILE, &limit);
  }
  return descriptor_limit();
}

std::uint64_t connections_turned_away() {
  return g_turned_away;
}

}  // namespace tandem::protocol

/// In place of the C library's, for libzmq too: a program's own functions come before those of its
/// shared libraries.
extern "C" int accept4(int listener, sockaddr* address, socklen_t* bytes, int flags) {
  return tandem::protocol::accept_within_limit(listener, address, bytes, flags);
}
