// What an endpoint's text means and whether it may be used, before any socket is made.
#pragma once

#include "protocol/base/result.h"

#include <string>

namespace tandem::protocol {

struct EndpointAddress {
  enum class Kind { kIpc, kTcp };
  Kind kind = Kind::kIpc;
  std::string path;  ///< ipc: absolute path of the socket
  std::string host;  ///< tcp
  int port = 0;      ///< tcp; 0: any
};

/// kInvalid with what is wrong: neither ipc:///PATH nor tcp://HOST:PORT, or a path that is longer
/// than a Unix socket's may be (107 bytes).
Result<EndpointAddress> parse_endpoint(const std::string& endpoint);

/// An ipc socket's directory must be ours and closed to others (mode 0700). Made when it is missing
/// and `create` is set; kNotFound when it is missing otherwise.
Status check_ipc_directory(const std::string& socket_path, bool create);

/// True when a process listens on this Unix socket now.
bool unix_socket_alive(const std::string& socket_path);

}  // namespace tandem::protocol
