// Holds a worker's lease with the coordinator and keeps one engine alive: starts it, watches it,
// starts another when it ends, adopts one that an earlier agent left running. Starts and ends the
// gang that this worker leads (gang_keeper.h). The agent never loads
// a model and never touches the device, so it survives everything that can go wrong with one.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/base/ids.h"
#include "protocol/transport.h"
#include "worker/runtime/gang_keeper.h"
#include "worker/runtime/slot.h"

#include <memory>
#include <string>
#include <vector>

namespace tandem::worker::runtime {

struct AgentOptions {
  std::string executable;                     ///< this binary
  std::vector<std::string> engine_arguments;  ///< "--engine" and what the user gave
  WorkerId worker;
  std::string host, device, device_name, program;  ///< program: its version
  int slot = 0;
  std::int64_t memory_bytes = 0;
  std::int64_t drain_timeout_ms = 25000;
  GangOptions gang;
};

/// Runs until asked to end (SIGTERM) or told to hand over (SIGUSR1: a new agent takes the slot; the
/// engine stays). Asked to restart, it ends the engine and executes options.executable in its
/// place, which starts the next one. Returns the process's exit code, see supervisor.h.
int run_agent(const AgentOptions& options, const SlotPaths& paths,
              std::unique_ptr<protocol::ClientEndpoint> coordinator, const Clock& clock);

}  // namespace tandem::worker::runtime
