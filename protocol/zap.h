// CURVE key pairs, and the ZAP handler (ZeroMQ RFC 27) that decides which keys may connect.
#pragma once

#include "protocol/base/result.h"
#include "protocol/key_file.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace tandem::protocol {

Result<CurveKeyPair> generate_curve_keys();

/// The keys that one listening socket accepts.
struct AllowedKeys {
  std::shared_ptr<KeyRing> ring;
  std::vector<KeyRole> roles;  ///< empty: all

  /// The key file of this public key, when it may connect; kNotFound or kRefused when not.
  [[nodiscard]] Result<KeyFile> check(const std::string& public_key) const;
};

struct ZapCounters {
  std::uint64_t accepted = 0, refused = 0;
};

/// Answers the context's authentication requests on a thread of its own: the peer's key must be
/// among those of the socket's domain; its user id is then its public key in Z85. Must be destroyed
/// before the context.
class ZapHandler {
 public:
  /// `zmq_context` is the libzmq context. One handler per context: kConflict for a second.
  static Result<std::unique_ptr<ZapHandler>> start(void* zmq_context);
  ~ZapHandler();
  ZapHandler(const ZapHandler&) = delete;
  ZapHandler& operator=(const ZapHandler&) = delete;

  /// Any thread.
  void add_domain(const std::string& domain, AllowedKeys keys);
  [[nodiscard]] ZapCounters counters() const;

 private:
  struct State;
  explicit ZapHandler(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace tandem::protocol
