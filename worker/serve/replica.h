// One replica of a base over several ranks: tensor-parallel ranks hold slices of every block and of
// the vocabulary, pipeline stages hold ranges of blocks. Each rank has a ServeEngine over its part.
// Rank 0 leads: it is asked, and sends the others every call that it makes (engine_call.h); they
// follow. A step of several stages runs them one after another.
#pragma once

#include "protocol/base/status.h"
#include "worker/comm/communicator.h"

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

namespace tandem::worker::serve {

/// How the leader's calls reach the followers. One device thread; errors are DeviceErrors.
class CallLink {
 public:
  virtual ~CallLink() = default;
  virtual void send(std::span<const std::byte> frame) = 0;  ///< the leader, to all others
  virtual std::vector<std::byte> receive() = 0;             ///< a follower, waits
  /// All ranks at once: ok when all say so, else the first error, with its rank where not all have
  /// the same. The same everywhere.
  virtual Status agree(const Status& mine) = 0;
};

/// What an engine knows of the other ranks; everything outlives it. The tensor-parallel ranks are
/// those of its Context.
struct ReplicaRanks {
  comm::Communicator& model;  ///< all ranks of the replica; 0 leads
  comm::Communicator& pp;     ///< the stages of this rank, in order; of size 1: one stage
  CallLink& calls;
};

/// Over the communicator of the replica's ranks that moves host memory. A follower waits in a
/// collective: the leader sends at least an empty frame before the communicator's time-out.
std::unique_ptr<CallLink> make_comm_link(comm::Communicator& host, kernels::Exec& exec);

}  // namespace tandem::worker::serve
