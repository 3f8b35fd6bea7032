// The gang of a bench under mpirun: ranks on CPUs talk MPI, ranks on GPUs NCCL (MPI only carries
// NCCL's id to them).
#pragma once

#include "kernels/ops.h"
#include "worker/comm/communicator.h"

namespace tandem::tools {

/// Of this rank among those that mpirun started on this host, which is also its GPU; 0 without
/// mpirun.
int local_rank();
/// As many ranks as mpirun started; 1 without it.
int started_ranks();

struct BenchGang {
  std::unique_ptr<worker::comm::Communicator> host;    ///< over MPI; null for one rank alone
  std::unique_ptr<worker::comm::Communicator> device;  ///< over NCCL, or of one rank
  worker::comm::Communicator& comm() { return device ? *device : *host; }
  /// Moves host memory; not of one rank alone on a GPU.
  worker::comm::Communicator& wire() { return host ? *host : *device; }
};

/// `ranks`: as many as mpirun must have started; 1 needs no mpirun. `gathers`: weights are gathered
/// in the background (ZeRO-3). With GPUs, gives `exec` a queue.
Result<BenchGang> make_bench_gang(int ranks, bool gathers, kernels::Ops& ops, kernels::Exec& exec);

/// Adds the time inside a communicator's calls to `ns`, waiting for others included: on CPUs, where
/// a call ends when its work has, what a step does not hide of its communication. Sub-communicators
/// are not timed. A group of one is left as it is.
std::unique_ptr<worker::comm::Communicator> timed_communicator(
    std::unique_ptr<worker::comm::Communicator> comm, std::int64_t& ns);

}  // namespace tandem::tools
