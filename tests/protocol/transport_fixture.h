// The same test network over each transport: in-process, ipc in a private directory, tcp with keys.
#pragma once

#include "protocol/transport.h"

#include <memory>
#include <optional>
#include <string>

namespace tandem::protocol {

Bytes bytes_of(const std::string& text);
std::string text_of(const Bytes& bytes);

/// Each waits a bounded, scaled time.
bool wait_connected(ClientEndpoint& client);
bool wait_disconnected(ClientEndpoint& client);
std::optional<Envelope> receive_one(ServerEndpoint& server);
std::optional<Envelope> receive_one(ClientEndpoint& client);

/// A directory of mode 0700 under the system's temporary one, removed at the end.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

/// Addresses are short names; a name listened to again has the same address again. Endpoints die
/// before the network.
class TestNetwork {
 public:
  virtual ~TestNetwork() = default;
  virtual std::unique_ptr<ServerEndpoint> listen(const std::string& name, int queue = 256) = 0;
  virtual Status try_listen(const std::string& name) = 0;
  virtual std::unique_ptr<ClientEndpoint> connect(const std::string& name,
                                                  const std::string& peer) = 0;
  virtual std::unique_ptr<Poller> poller() = 0;
};

/// kind: "inproc", "ipc" or "tcp".
std::unique_ptr<TestNetwork> make_test_network(const std::string& kind);

}  // namespace tandem::protocol
