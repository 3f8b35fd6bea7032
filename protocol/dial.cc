#include "protocol/dial.h"

#include "protocol/key_file.h"

namespace tandem::protocol {

Result<ZmqClientOptions> dial_options(const Settings& settings, const std::string& socket,
                                      const std::string& local_name, const std::string& purpose) {
  ZmqClientOptions options;
  options.endpoint = settings.endpoint(socket);
  if (socket == "bulk") options.limits = SocketLimits::bulk();
  if (socket == "workers") options.limits = SocketLimits::workers();
  std::string name = local_name;
  const std::string& path = settings.get("key_file");
  if (!path.empty() && options.endpoint.rfind("tcp://", 0) == 0) {
    TANDEM_ASSIGN_OR_RETURN(const KeyFile key, read_key_file(path));
    options.server_public_key =
        key.server_key.empty() ? settings.get("server_key") : key.server_key;
    if (key.secret_key.empty() || options.server_public_key.empty())
      return invalid_error(str("key file ", path,
                               ": a worker needs its secret line, and the coordinator's public "
                               "key as its server line or as the setting server_key"));
    options.keys = CurveKeyPair{key.public_key, key.secret_key};
    name = key.name;
  }
  options.routing_id = make_routing_id(name, purpose);
  return options;
}

}  // namespace tandem::protocol
