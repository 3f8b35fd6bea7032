// What model code needs to run, passed explicitly. Model code never asks which device it runs on.
#pragma once

#include "kernels/ops.h"
#include "worker/comm/communicator.h"

namespace tandem::worker::model {

struct StreamRoom;

/// One device thread owns it. `activations` holds what lives from forward to backward (training) or
/// for one iteration (serving); callers open ArenaScopes around a step.
struct Context {
  kernels::Ops& ops;
  kernels::Exec& exec;
  comm::Communicator& comm;
  kernels::Arena& activations;
  DType compute_dtype;
  /// Of a session with sequence parallelism on a GPU (stream_rows.h); else null.
  const StreamRoom* room = nullptr;
};

}  // namespace tandem::worker::model
