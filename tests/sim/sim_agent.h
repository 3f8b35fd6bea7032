// An agent as a state machine, faithful to control.capnp: holds its lease, starts the gang that its
// worker leads, kills it when told to, and says when it ended without a word. Its engine is another
// object (sim_engine.h).
#pragma once

#include "tests/sim/sim_engine.h"

#include <memory>
#include <optional>
#include <vector>

namespace tandem::sim {

class SimAgent {
 public:
  SimAgent(Network& network, SimCoordinator& coordinator, int slot);

  /// kill -9; another agent adopts the gang after `down_ms`.
  void crash(TimeMs down_ms);
  /// A rank dies, and with it its gang.
  void kill_gang();
  /// The gang's first rank hangs or is cut off for so long.
  void freeze_gang(TimeMs ms);
  [[nodiscard]] std::uint64_t gangs() const { return gangs_.size(); }
  /// Started for replicas; and the one that lives now, or an empty id.
  [[nodiscard]] std::uint64_t replicas() const { return replicas_; }
  [[nodiscard]] JobId living() const { return running() ? claim_.job : JobId(); }

 private:
  void start();
  void tick();
  void hear(const protocol::ControlMessage& message);
  void on_start(const protocol::StartJob& start);
  void end_gang(const Status& why);
  [[nodiscard]] bool running() const { return !gangs_.empty() && gangs_.back()->alive(); }
  [[nodiscard]] std::vector<protocol::RunningJob> claims() const;

  Network& network_;
  SimCoordinator& coordinator_;
  const int slot_;
  const WorkerId worker_;
  Incarnation incarnation_ = 0;
  std::string peer_;
  bool alive_ = false, greeted_ = false;
  TimeMs heard_ms_ = 0, hello_ms_ = -1000, beat_ms_ = -1000, report_ms_ = -10'000;
  std::uint64_t seq_ = 0;
  std::vector<std::unique_ptr<SimEngine>> gangs_;  ///< the last may live; events hold the others
  protocol::RunningJob claim_;                     ///< of the last
  std::uint64_t replicas_ = 0;
  bool watched_ = false;                     ///< its end was not seen yet
  std::optional<protocol::JobEnded> ended_;  ///< until it is acknowledged
};

}  // namespace tandem::sim
