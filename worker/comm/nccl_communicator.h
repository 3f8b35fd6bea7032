// The GPUs of a gang, as a Communicator over NCCL: one process and one GPU a rank. It lies in a
// module of its own beside the program (libtandem_nccl.so), opened when a gang of GPUs is made, so
// that nothing else needs CUDA or NCCL.
//
// Collectives are put on Exec::stream, which must be a queue that Ops::make_stream gave, and return
// at once; barrier() alone waits for the device. Sums are NCCL's: the same bits on every rank and
// in every run of one gang on one machine, 16-bit elements rounded after each addition. Scratch is
// NCCL's own. GPUs that reach each other's memory do by themselves, in rank order and in f32, what
// NCCL would be slower at: what is shared (Communicator::share) is moved by their copy engines, and
// all_reduce of up to 8 MiB, or where it is recorded, is one kernel for each 4 MiB
// (nccl/peer_collectives.h). TANDEM_GPU_PEERS=off in the environment of all ranks leaves everything
// to NCCL, and then nothing can be recorded.
//
// A group within one host has all of that though the gang spans several; between hosts NCCL takes
// what it finds (InfiniBand, sockets; NCCL_* in the agents' environment say which).
//
// A rank that dies is not noticed here: NCCL reports nothing within a host. Whoever watches the
// processes ends the gang. What NCCL itself reports to a call, and a start or a barrier that takes
// longer than timeout_ms, is a DeviceError. Collectives fail behind the caller's back, too, or
// never end because a member hangs: then the caller may wait for its device for ever, and a thread
// of this one's says so (NcclOptions::on_failure).
#pragma once

#include "protocol/base/clock.h"
#include "protocol/base/result.h"
#include "worker/comm/communicator.h"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace tandem::worker::comm {

/// Names one gang: rank 0 makes it, every rank gets it by another way. Whoever has it can join: a
/// secret.
using NcclId = std::array<std::byte, 128>;
/// unavailable_error: no module, no NCCL or no driver.
Result<NcclId> make_nccl_id();

struct NcclOptions {
  NcclId id{};
  int rank = 0, size = 1;
  /// Of each rank, where it runs: equal numbers can reach each other's memory. Empty: all can.
  std::vector<std::uint64_t> hosts{};
  int device = 0;  ///< of this process, as CUDA counts
  /// Multiprocessors that a collective may take; 0: as many as NCCL likes. For gangs that gather in
  /// the background: kGatherMultiprocessors.
  int multiprocessors_max = 0;
  /// Of the start, of barrier() and of what the watching thread waits for, times TANDEM_TIME_SCALE.
  TimeMs timeout_ms = 120'000;
  /// Where given, read at each wait instead: the gang's longest steps are known only as it runs.
  std::shared_ptr<const std::atomic<TimeMs>> current_timeout_ms{};
  /// Where given, called once, on a thread of its own: a collective has failed, or what was put on
  /// its queue is not done in time. The message names the collective and the rank. Nothing of this
  /// process's device can be relied on from then on, its destruction included: end the process. A
  /// watched queue may be recorded within Communicator::issue_recorded() alone.
  std::function<void(const std::string&)> on_failure{};
};
/// Called by all ranks at once. The thread that calls it is the one that communicates.
Result<std::unique_ptr<Communicator>> make_nccl_communicator(const NcclOptions& options);

}  // namespace tandem::worker::comm
