// How a worker's processes dial the coordinator: endpoint, limits and, where the settings name a
// key file (any tcp:// endpoint needs one), keys and a routing id that begins with the key's name.
// All slots of a host may share one key: routing ids end in random digits.
#pragma once

#include "protocol/settings.h"
#include "protocol/zmq_transport.h"

namespace tandem::protocol {

/// `socket`: "workers" or "bulk". `local_name` begins the routing id where there is no key.
/// kInvalid: the key file has no secret, or neither it (server line) nor the settings (server_key)
/// know the coordinator's public key; else what read_key_file() says.
Result<ZmqClientOptions> dial_options(const Settings& settings, const std::string& socket,
                                      const std::string& local_name, const std::string& purpose);

}  // namespace tandem::protocol
