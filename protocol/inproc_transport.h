// A network inside one process, for tests: endpoints with bounded queues, and a seeded hand that
// loses, repeats, reorders and delays messages. The same seed, clock and calls give the same run.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/transport.h"

#include <cstdint>
#include <memory>
#include <string>

namespace tandem::protocol {

/// What the network does to messages, each with its probability in [0, 1], drawn per message.
/// Loss is silent, as on a breaking connection: send() says ok.
struct InprocFaults {
  std::uint64_t seed = 0;
  float drop = 0, repeat = 0, reorder = 0, delay = 0;
  TimeMs delay_ms_max = 0;  ///< a delayed message waits 1..this on the network's clock
};

/// Messages delivered, lost and so on, over all endpoints.
struct InprocCounters {
  std::uint64_t sent = 0, dropped = 0, repeated = 0, reordered = 0, delayed = 0;
};

/// Owns the wires; endpoints and pollers must not outlive it. Any thread; an endpoint is one
/// thread's. Receive with a time-out above 0 waits in real time, so with a ManualClock use 0.
class InprocNetwork {
 public:
  static constexpr std::size_t kQueueMessagesMax = 1024;  ///< per direction of one connection

  explicit InprocNetwork(const Clock& clock, InprocFaults faults = {});
  ~InprocNetwork();
  InprocNetwork(const InprocNetwork&) = delete;
  InprocNetwork& operator=(const InprocNetwork&) = delete;

  /// kConflict when the name is taken by a living endpoint. Clients that connected before (or whose
  /// server went away) are connected to it at once.
  Result<std::unique_ptr<ServerEndpoint>> listen(const std::string& address,
                                                 std::size_t queue_max = kQueueMessagesMax);
  /// Works with no server there yet, as a DEALER does: send() is then kUnavailable. An existing
  /// connection of the same `peer` is taken over. `user_id` is what the server sees in Envelope.
  std::unique_ptr<ClientEndpoint> connect(const std::string& address, const std::string& peer,
                                          const std::string& user_id = "");
  std::unique_ptr<Poller> make_poller();

  /// From now on; the draw's position goes on.
  void set_faults(const InprocFaults& faults);
  /// Cuts the connection of `peer` (everything in flight is lost) until heal(peer).
  void cut(const std::string& address, const std::string& peer);
  void heal(const std::string& address, const std::string& peer);
  [[nodiscard]] InprocCounters counters() const;

  struct Hub;

 private:
  std::shared_ptr<Hub> hub_;
};

}  // namespace tandem::protocol
