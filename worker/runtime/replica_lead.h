// The first rank of a replica: speaks with the coordinator for all of them as an engine does for
// its requests, and runs ServeHost over the ranks' engines. One device thread (the caller), one I/O
// thread, one task thread. Any failure of any rank ends all of them; what they were answering goes
// on elsewhere, and the coordinator starts the replica anew.
#pragma once

#include "worker/runtime/gang_lead.h"
#include "worker/runtime/replica_rank.h"

namespace tandem::worker::runtime {

/// Serves until StopJob or SIGUSR1 (both drain), the coordinator's refusal, or the loss of its
/// agent. Returns the process's exit code. Throws DeviceError.
int lead_replica(const GangLeadOptions& options, ReplicaRank& rank, EngineEndpoints endpoints,
                 const Clock& clock);

}  // namespace tandem::worker::runtime
