#include "protocol/endpoint_address.h"

#include "protocol/base/str.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>

namespace tandem::protocol {
namespace {

constexpr std::size_t kSocketPathBytesMax = sizeof(sockaddr_un::sun_path) - 1;
constexpr int kPortMax = 65535;

Result<int> parse_port(const std::string& text, const std::string& endpoint) {
  if (text == "*") return 0;
  int port = 0;
  for (const char c : text) {
    if (std::isdigit(static_cast<unsigned char>(c)) == 0 || port > kPortMax) {
      port = kPortMax + 1;
      break;
    }
    port = port * 10 + (c - '0');
  }
  if (text.empty() || port > kPortMax)
    return invalid_error(
        str("endpoint ", endpoint, ": the port must be in 0..", kPortMax, ", not \"", text, "\""));
  return port;
}

}  // namespace

Result<EndpointAddress> parse_endpoint(const std::string& endpoint) {
  EndpointAddress address;
  if (endpoint.rfind("ipc://", 0) == 0) {
    address.path = endpoint.substr(6);
    if (address.path.empty() || address.path[0] != '/')
      return invalid_error(
          str("endpoint ", endpoint, ": ipc needs an absolute path (ipc:///DIR/NAME)"));
    if (address.path.size() > kSocketPathBytesMax)
      return invalid_error(str("endpoint ", endpoint, ": a socket's path has at most ",
                               kSocketPathBytesMax, " bytes, not ", address.path.size(),
                               ": use a shorter data directory"));
    return address;
  }
  const std::size_t colon = endpoint.rfind(':');
  if (endpoint.rfind("tcp://", 0) == 0 && colon > 6) {
    address.kind = EndpointAddress::Kind::kTcp;
    address.host = endpoint.substr(6, colon - 6);
    TANDEM_ASSIGN_OR_RETURN(address.port, parse_port(endpoint.substr(colon + 1), endpoint));
    return address;
  }
  return invalid_error(
      str("endpoint \"", endpoint, "\": must be ipc:///DIR/NAME or tcp://HOST:PORT"));
}

Status check_ipc_directory(const std::string& socket_path, bool create) {
  const std::string directory = std::filesystem::path(socket_path).parent_path().string();
  if (create && ::mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST)
    return internal_error(str("directory ", directory, ": cannot be made: ", std::strerror(errno)));
  struct stat info {};
  if (::stat(directory.c_str(), &info) != 0)
    return errno == ENOENT
               ? not_found_error(str("directory ", directory, ": there is none"))
               : internal_error(str("directory ", directory, ": ", std::strerror(errno)));
  if (!S_ISDIR(info.st_mode)) return invalid_error(str(directory, " is not a directory"));
  if (info.st_uid != ::geteuid() && ::geteuid() != 0)
    return refused_error(str("directory ", directory, ": it belongs to user ", info.st_uid,
                             ", not to this one (", ::geteuid(), ")"));
  if ((info.st_mode & 077) != 0)
    return refused_error(str("directory ", directory, ": others may enter it (mode ", std::oct,
                             info.st_mode & 0777,
                             "), and an ipc socket asks for no key: chmod 700 it"));
  return {};
}

bool unix_socket_alive(const std::string& socket_path) {
  sockaddr_un name{};
  if (socket_path.size() > kSocketPathBytesMax) return false;
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path, socket_path.data(), socket_path.size());
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  const int rc = ::connect(fd, reinterpret_cast<const sockaddr*>(&name), sizeof name);
  const bool alive = rc == 0 || errno == EAGAIN || errno == EINPROGRESS;
  ::close(fd);
  return alive;
}

}  // namespace tandem::protocol
