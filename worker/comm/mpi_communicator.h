// The gang of this process's mpirun, as a Communicator over host memory. The only user of MPI.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/base/result.h"
#include "worker/comm/communicator.h"

#include <atomic>
#include <memory>

namespace tandem::worker::comm {

struct MpiOptions {
  /// A collective that takes longer raises DeviceError (times TANDEM_TIME_SCALE): a member is gone
  /// or hangs, and the gang must be killed.
  TimeMs timeout_ms = 120'000;
  /// Where given, read at each wait instead: the gang's longest steps are known only as it runs.
  std::shared_ptr<const std::atomic<TimeMs>> current_timeout_ms{};
};

/// Initialises MPI (once per process; the calling thread is the one that communicates) and returns
/// the gang of all ranks. All traffic is non-blocking point-to-point messages that are polled
/// against the deadline, because a message from a dead rank never comes (Open MPI 4.1 reports
/// nothing). The destructor finalizes MPI unless a collective failed: then the process can only
/// exit. unavailable_error: MPI does not start.
Result<std::unique_ptr<Communicator>> make_mpi_communicator(const MpiOptions& options = {});

}  // namespace tandem::worker::comm
