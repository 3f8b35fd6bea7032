// One CLI invocation's connection to the platform, and how it talks to the person or script that
// called it, signals included. Every verb gets a Session; nothing here exits the process.
#pragma once

#include "protocol/base/result.h"
#include "protocol/client/client.h"
#include "protocol/settings.h"

#include <nlohmann/json.hpp>

#include <functional>
#include <memory>
#include <string>

namespace tandem::tools {

using Json = nlohmann::ordered_json;

/// While one lives, SIGINT (with `ending` also SIGTERM and SIGHUP) does not end the program:
/// whoever waits for the coordinator gets kCancelled, and interrupted() says why. The second signal
/// ends it as ever. One at a time.
class Interruptible {
 public:
  explicit Interruptible(bool ending);
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;
  [[nodiscard]] static bool interrupted();

 private:
  const bool ending_;
};

class Session {
 public:
  Session(protocol::Settings settings, bool json) : settings_(std::move(settings)), json_(json) {}

  [[nodiscard]] const protocol::Settings& settings() const { return settings_; }
  [[nodiscard]] bool json() const { return json_; }
  /// Prints a verb's one JSON value. One that fails afterwards has told why in it: its error is
  /// then not a second value.
  void print_json(const Json& value);
  [[nodiscard]] bool printed_json() const { return printed_json_; }

  /// The connected client; kUnavailable names the endpoint and says how to start a platform.
  Result<protocol::client::Client*> client();
  /// A method of the table in protocol/schema/client.capnp. Mutating ones get an idempotency key.
  Result<Json> call(const std::string& method, const Json& params);
  /// A streaming method; `on_event` returns false to stop listening.
  Status stream(const std::string& method, const Json& params,
                const std::function<bool(const Json&)>& on_event);
  Result<protocol::client::BulkTransfer*> bulk();
  /// The answer of adapter.manifest, its text there however large it is.
  Result<Json> manifest(const std::string& adapter);
  /// Makes a file's bytes durable at the coordinator; returns {"digest", "bytes", "chunks",
  /// "upload"}.
  Result<Json> upload_file(const std::string& path);

 private:
  protocol::Settings settings_;
  const bool json_;
  bool printed_json_ = false;
  std::unique_ptr<protocol::client::Client> client_;
};

}  // namespace tandem::tools
