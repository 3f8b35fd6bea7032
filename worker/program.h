// What the worker's programs (tandem-worker in its roles, tandem-rank) make of a command line and
// settings. Pure but for the environment and the machine; at start only.
#pragma once

#include "kernels/cpu/cpu_backend.h"
#include "protocol/settings.h"
#include "worker/runtime/model_host.h"

#include <string>
#include <vector>

namespace tandem::worker {

/// Which slot of its host this process works for.
struct Identity {
  int slot = 0, local_workers = 1;
  std::string device = "cpu";
  /// UUID of the slot's GPU, once an engine has opened it: numbers are dealt anew when a GPU is
  /// lost, and the slot would then open its neighbour's.
  std::string gpu = {};
};

/// From --slot, else from what a launcher left in the environment. `roles`: the other words that
/// may stand on the command line.
Result<Identity> identity(const protocol::CommandLine& line, const protocol::Settings& settings,
                          const std::vector<std::string>& roles);

/// Threads: as set, else this slot's share of the cores, and no more than it may use
/// (processors()).
Result<kernels::CpuOptions> cpu_options(const protocol::Settings& settings, const Identity& id);

/// The device of that slot: a GPU by its UUID or else its number, or the slot's share of the
/// processors.
Result<kernels::Backend> open_device(const protocol::Settings& settings, const Identity& id);

/// Compute dtype, numerics and memory on this device.
Result<runtime::ModelHostOptions> model_options(const protocol::Settings& settings,
                                                const kernels::DeviceProfile& profile,
                                                const Identity& id);

}  // namespace tandem::worker
