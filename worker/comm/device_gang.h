// A gang has two communicators. One is over host memory: words, plans, agreement and errors go by
// it. The other is over the memory that ops work on. Where the ranks' devices are CPUs they are one
// and the same; ranks on GPUs join their devices by NCCL, whose id (a secret) goes by the first.
#pragma once

#include "kernels/ops.h"
#include "worker/comm/communicator.h"
#include "worker/comm/nccl_communicator.h"

#include <memory>

namespace tandem::worker::comm {

/// Called by all ranks of `host` at once, each with its own device behind `ops`: their communicator
/// over the devices; null where `host` is it. `options` says what NCCL is to know beside rank, size
/// and id. `exec` is what the host communicator's calls are made with. unavailable_error: NCCL does
/// not start, on all ranks that know of it.
Result<std::unique_ptr<Communicator>> join_devices(Communicator& host, kernels::Ops& ops,
                                                   kernels::Exec& exec, NcclOptions options);

}  // namespace tandem::worker::comm
