// A worker's identity on its host: one directory and three lock files per slot, so that launching
// again fills only the missing slots and a new agent can adopt the engine that an old one left
// running.
//
//   <run>/worker-<device><slot>/supervisor.lock  agent.lock  engine.lock   held (flock) while alive
//                               engine.json      {"pid", "incarnation", "gpu"} of the running
//                               engine
#pragma once

#include "protocol/base/file_lock.h"
#include "protocol/base/ids.h"
#include "protocol/base/result.h"

#include <sys/types.h>

#include <optional>
#include <string>

namespace tandem::worker::runtime {

/// Where one slot keeps its files.
struct SlotPaths {
  std::string directory, supervisor_lock, agent_lock, engine_lock, engine_json;
  /// Creates the directory and `run_dir`, both closed to others (0700).
  static Result<SlotPaths> create(const std::string& run_dir, const std::string& device, int slot);
};

struct EngineInfo {
  pid_t pid = 0;
  Incarnation incarnation = 0;
  std::string gpu = {};  ///< UUID; empty on a CPU
};
/// Written by the engine after it took its lock.
Status write_engine_info(const SlotPaths& paths, const EngineInfo& info);
/// The engine that holds the slot now, if any does.
std::optional<EngineInfo> running_engine(const SlotPaths& paths);
/// Whether process `pid` is the engine of that incarnation; false while it has not said which it
/// is.
bool runs_as(const SlotPaths& paths, pid_t pid, Incarnation incarnation);
/// UUID of the GPU that the slot's first engine found, for those that come after it and for ranks
/// of this slot; empty: a CPU, or no engine has been there.
std::string gpu_of(const SlotPaths& paths);
/// A new supervisor's slot may have another GPU than the file that an earlier one left says.
/// Nothing happens while an engine runs.
void forget_engine(const SlotPaths& paths);

/// This host's name, for WorkerId and hello.
std::string host_name();

/// The number at the end of HOST/cpu3 or HOST/cuda3; invalid_error: there is none.
Result<int> slot_of(const WorkerId& worker);

}  // namespace tandem::worker::runtime
