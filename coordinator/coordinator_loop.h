// The one I/O loop around the core: two ROUTERs (workers first, then clients), the registry, the
// clock, finished background work. Carries out each step's effects in order: commit, then sends.
// What a peer has no room for waits in its bounded outbox; a peer that is gone is told to the core.
// One thread calls run().
#pragma once

#include "coordinator/background.h"
#include "coordinator/core.h"
#include "coordinator/registry_store.h"
#include "coordinator/served_files.h"
#include "protocol/base/clock.h"
#include "protocol/transport.h"

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace tandem::coordinator {

inline constexpr TimeMs kTickMs = 50;
inline constexpr int kWorkerMessagesPerTurn = 256, kClientMessagesPerTurn = 32;
inline constexpr std::size_t kOutboxMessagesMax = 8192;  ///< one peer
inline constexpr std::int64_t kOutboxBytesMax = 64 << 20;

/// TANDEM_FAILPOINT=NAME:ACTION[:N]: at the N-th time the loop passes NAME, `kill` ends the process
/// as kill -9 does, `fail` makes the commit fail. For tests. Names: before_commit,
/// after_commit_before_send, after_send.
class Failpoint {
 public:
  /// "" or a malformed text: none.
  explicit Failpoint(const std::string& text);
  /// True when this is the point and the moment, and the action is `fail`. May not return.
  bool hit(const char* name);

 private:
  std::string name_;
  bool kill_ = false;
  int countdown_ = 0;
};

struct LoopParts {
  protocol::ServerEndpoint& clients;
  protocol::ServerEndpoint& workers;
  protocol::Poller& poller;  ///< has both
  storage::Registry& registry;
  ServedFiles& files;
  const Clock& clock;
};

struct LoopCounters {
  std::uint64_t steps = 0, commits = 0, commit_failures = 0, malformed = 0, dropped = 0;
  std::int64_t step_us_max = 0;
};

class CoordinatorLoop {
 public:
  /// Reads the registry. `failpoint`: see above.
  static Result<std::unique_ptr<CoordinatorLoop>> create(const LoopParts& parts, Options options,
                                                         BackgroundOptions background,
                                                         const std::string& failpoint);

  /// Until `stop` is set or a client's shutdown was carried out.
  void run(const std::atomic<bool>& stop);
  [[nodiscard]] const LoopCounters& counters() const { return counters_; }

 private:
  struct Outbox {
    std::deque<protocol::Bytes> frames;
    std::int64_t bytes = 0;
  };

  CoordinatorLoop(const LoopParts& parts, Options options, Snapshot snapshot,
                  BackgroundOptions background, const std::string& failpoint);
  [[nodiscard]] Now now() const;
  bool receive_workers();
  [[nodiscard]] std::uint64_t refused_frames() const;
  bool receive_clients();
  bool take_done();
  void step(const Input& input);
  void carry_out(std::vector<Effect> effects);
  Status commit(const Persist& persist);
  void serve_new_files(const Persist& persist);
  void send_client(const std::string& peer, const protocol::ServerMessage& message);
  void client_gone(const std::string& peer);
  void send_worker(const std::string& peer, const protocol::ControlMessage& message);
  bool send(protocol::ServerEndpoint& endpoint, std::map<std::string, Outbox>& outboxes,
            const std::string& peer, protocol::Bytes frame);
  void flush(protocol::ServerEndpoint& endpoint, std::map<std::string, Outbox>& outboxes,
             bool clients);

  const LoopParts parts_;
  RegistryStore store_;
  Coordinator core_;
  Failpoint failpoint_;
  LoopCounters counters_;
  std::map<std::string, Outbox> client_outbox_, worker_outbox_;
  std::deque<Input> inputs_;    // that carrying out an effect brought about
  std::set<std::string> gone_;  // clients of a ClientGone among them: nothing is sent to these
  bool ending_ = false;
  TimeMs next_tick_ms_ = 0;
  std::mutex done_mutex_;
  std::deque<WorkDone> done_;
  Background background_;  // last: its threads use what stands above
};

}  // namespace tandem::coordinator
