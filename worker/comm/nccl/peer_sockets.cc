#include "worker/comm/nccl/peer_sockets.h"

#include "protocol/base/digest.h"
#include "protocol/base/str.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <utility>

namespace tandem::worker::comm {
namespace {

constexpr int kFdsPerMessage = 64;  ///< the kernel takes 253

Status failed(const char* what) {
  return unavailable_error(str(what, " between the processes of a gang: ", std::strerror(errno)));
}

/// An address without a file: it is gone with its socket.
sockaddr_un address_of(const std::string& name, int rank, socklen_t& length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string text = str("tandem-gpu-", sha256(name).hex().substr(0, 32), "-", rank);
  std::memcpy(address.sun_path + 1, text.data(), text.size());
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return address;
}

Result<OwnedFd> make_socket(TimeMs timeout_ms) {
  OwnedFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (fd.get() < 0) return failed("a socket");
  timeval limit{};
  limit.tv_sec = static_cast<time_t>(timeout_ms / 1000 + 1);
  (void)::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  (void)::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  return fd;
}

Status send_all(int fd, const void* bytes, std::size_t size) {
  const ssize_t sent = ::send(fd, bytes, size, MSG_NOSIGNAL);
  if (sent != static_cast<ssize_t>(size)) return failed("sending");
  return {};
}
Status receive_all(int fd, void* bytes, std::size_t size) {
  const ssize_t got = ::recv(fd, bytes, size, MSG_WAITALL);
  if (got != static_cast<ssize_t>(size)) return failed("receiving");
  return {};
}

struct Header {
  std::int64_t offset, bytes, fds;
};
/// A byte that carries at most so many descriptors.
struct FdMessage {
  explicit FdMessage(int fds) {
    header.msg_iov = &data;
    header.msg_iovlen = 1;
    header.msg_control = control.data();
    header.msg_controllen = CMSG_SPACE(sizeof(int) * static_cast<std::size_t>(fds));
  }
  FdMessage(const FdMessage&) = delete;
  FdMessage& operator=(const FdMessage&) = delete;

  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int) * kFdsPerMessage)> control{};
  msghdr header{};
};

Status send_fds(int socket, const OwnedFd* fds, int count) {
  FdMessage message(count);
  cmsghdr* part = CMSG_FIRSTHDR(&message.header);
  part->cmsg_level = SOL_SOCKET;
  part->cmsg_type = SCM_RIGHTS;
  part->cmsg_len = CMSG_LEN(sizeof(int) * static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    const int fd = fds[i].get();
    std::memcpy(CMSG_DATA(part) + sizeof(int) * static_cast<std::size_t>(i), &fd, sizeof fd);
  }
  if (::sendmsg(socket, &message.header, MSG_NOSIGNAL) != 1) return failed("sending descriptors");
  return {};
}

Status receive_fds(int socket, int count, std::vector<OwnedFd>& to) {
  FdMessage message(kFdsPerMessage);
  if (::recvmsg(socket, &message.header, MSG_CMSG_CLOEXEC) != 1)
    return failed("receiving descriptors");
  int got = 0;
  for (cmsghdr* part = CMSG_FIRSTHDR(&message.header); part != nullptr;
       part = CMSG_NXTHDR(&message.header, part))
    if (part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS)
      for (std::size_t i = 0; CMSG_LEN(sizeof(int) * (i + 1)) <= part->cmsg_len; ++i, ++got) {
        int fd = -1;
        std::memcpy(&fd, CMSG_DATA(part) + sizeof(int) * i, sizeof fd);
        to.emplace_back(fd);
      }
  if (got != count)
    return unavailable_error(str(got, " descriptors of ", count,
                                 " came: this process may open no more files (ulimit -n)"));
  return {};
}

/// The process at the other end runs as this one's user.
Status check_user(int fd) {
  ucred other{};
  socklen_t size = sizeof other;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &other, &size) != 0) return failed("credentials");
  if (other.uid != ::geteuid())
    return unavailable_error(
        str("a process of user ", other.uid, " joins a gang of user ", ::geteuid()));
  return {};
}

}  // namespace

OwnedFd::~OwnedFd() {
  if (fd_ >= 0) ::close(fd_);
}
OwnedFd& OwnedFd::operator=(OwnedFd&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Result<std::vector<OwnedFd>> PeerSockets::connect(const std::string& name, int rank, int size,
                                                  TimeMs timeout_ms,
                                                  const std::function<void()>& all_listen) {
  socklen_t length = 0;
  auto listening = make_socket(timeout_ms);
  Status bound = listening.status();
  if (bound.ok()) {
    const sockaddr_un mine = address_of(name, rank, length);
    if (::bind(listening->get(), reinterpret_cast<const sockaddr*>(&mine), length) != 0 ||
        ::listen(listening->get(), size) != 0)
      bound = failed("listening");
  }
  all_listen();  // whatever became of it: the others are there as well
  TANDEM_RETURN_IF_ERROR(bound);
  std::vector<OwnedFd> peers(static_cast<std::size_t>(size));
  for (int other = 0; other < rank; ++other) {
    TANDEM_ASSIGN_OR_RETURN(OwnedFd fd, make_socket(timeout_ms));
    const sockaddr_un theirs = address_of(name, other, length);
    if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&theirs), length) != 0)
      return failed("connecting");
    TANDEM_RETURN_IF_ERROR(check_user(fd.get()));
    TANDEM_RETURN_IF_ERROR(send_all(fd.get(), &rank, sizeof rank));
    peers[static_cast<std::size_t>(other)] = std::move(fd);
  }
  for (int count = rank + 1; count < size; ++count) {
    OwnedFd fd(::accept4(listening->get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (fd.get() < 0) return failed("accepting");
    TANDEM_RETURN_IF_ERROR(check_user(fd.get()));
    int other = -1;
    TANDEM_RETURN_IF_ERROR(receive_all(fd.get(), &other, sizeof other));
    if (other <= rank || other >= size || peers[static_cast<std::size_t>(other)].get() >= 0)
      return unavailable_error(str("a process says that it is rank ", other, " of ", size));
    peers[static_cast<std::size_t>(other)] = std::move(fd);
  }
  return peers;
}

Result<std::vector<PeerMessage>> PeerSockets::exchange(const PeerMessage& mine) const {
  const auto count = static_cast<std::int64_t>(mine.fds.size());
  for (const OwnedFd& peer : peers_) {
    if (peer.get() < 0) continue;
    const Header header{mine.offset, mine.bytes, count};
    TANDEM_RETURN_IF_ERROR(send_all(peer.get(), &header, sizeof header));
    for (std::int64_t at = 0; at < count; at += kFdsPerMessage)
      TANDEM_RETURN_IF_ERROR(
          send_fds(peer.get(), mine.fds.data() + at,
                   static_cast<int>(std::min<std::int64_t>(count - at, kFdsPerMessage))));
  }
  std::vector<PeerMessage> all(peers_.size());
  for (std::size_t r = 0; r < peers_.size(); ++r) {
    if (peers_[r].get() < 0) continue;
    Header header{};
    TANDEM_RETURN_IF_ERROR(receive_all(peers_[r].get(), &header, sizeof header));
    all[r].offset = header.offset;
    all[r].bytes = header.bytes;
    for (std::int64_t at = 0; at < header.fds; at += kFdsPerMessage)
      TANDEM_RETURN_IF_ERROR(receive_fds(
          peers_[r].get(),
          static_cast<int>(std::min<std::int64_t>(header.fds - at, kFdsPerMessage)), all[r].fds));
  }
  return all;
}

}  // namespace tandem::worker::comm
