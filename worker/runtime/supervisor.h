// What the user's mpirun starts: a single-threaded parent that keeps one agent alive and nothing
// else. It never initialises MPI or CUDA, so nothing in it can hang or be poisoned.
#pragma once

#include "worker/runtime/slot.h"

#include <string>
#include <vector>

namespace tandem::worker::runtime {

/// An agent's exit code that means "asked to end": the supervisor ends too.
inline constexpr int kExitAsked = 0;
/// An agent's or engine's exit code that restarting cannot cure (wrong settings, slot in use).
inline constexpr int kExitUsage = 2;

struct SupervisorOptions {
  std::string executable;              ///< this binary
  std::vector<std::string> arguments;  ///< for the agent: "--agent" and what the user gave
  SlotPaths paths;
};

/// Forks and execs the agent, waits, starts it again when it dies (at once after a long life, with
/// a growing pause when it dies young). SIGTERM and SIGINT are passed on; the agent drains, and its
/// clean end is ours. Adopts orphans of a dead agent (PR_SET_CHILD_SUBREAPER) so that an engine
/// survives its agent. Returns the process's exit code.
int run_supervisor(const SupervisorOptions& options);

}  // namespace tandem::worker::runtime
