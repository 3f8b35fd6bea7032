// The first rank of a gang: speaks with the coordinator for all of them as an engine does for its
// job, and ends when the job does. One device thread (the caller), one I/O thread, one task thread.
// Any failure of any rank ends all of them; the leader's agent says so and the job starts anew.
#pragma once

#include "worker/runtime/engine.h"
#include "worker/runtime/gang_rank.h"

#include <string>

namespace tandem::worker::runtime {

struct GangLeadOptions {
  WorkerId worker;  ///< whose agent started the gang
  std::string host, device;
  protocol::StartJob start;    ///< with gang and members
  std::string data_directory;  ///< caches and metrics below it
  std::string model_folder;    ///< this slot's own, see JobParts
  std::string agent_lock;      ///< a gang whose agent stays away ends
  std::int64_t drain_timeout_ms = 25000;
};

/// Runs the job to its acknowledged end, or until SIGUSR1 (drains: a checkpoint first), the
/// coordinator's refusal, or the loss of its agent. Returns the process's exit code. Throws
/// DeviceError.
int lead_gang(const GangLeadOptions& options, GangRank& rank, EngineEndpoints endpoints,
              const GangPatience& patience, const Clock& clock);

/// Under which the chunks of a gang's checkpoints are spared until their manifest comes.
std::string checkpoint_pin(const protocol::StartJob& start);

/// SIGUSR1 drains the first rank and is nothing to the others; SIGTERM, SIGINT and SIGHUP are the
/// agent's business. Before MPI starts, on every rank.
void install_rank_signals();
/// Whether SIGUSR1 came.
bool drain_asked();

}  // namespace tandem::worker::runtime
