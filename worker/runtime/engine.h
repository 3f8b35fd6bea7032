// The disposable heart of a worker: one base model on one device, requests and at most one training
// job on it. One device thread (the caller of run), one I/O thread, one task thread. Any device
// failure ends the process; the agent starts another, which is given its work again.
#pragma once

#include "kernels/ops.h"
#include "protocol/base/clock.h"
#include "protocol/transport.h"
#include "worker/runtime/device_turns.h"
#include "worker/runtime/model_host.h"
#include "worker/runtime/slot.h"

#include <functional>
#include <memory>
#include <string>

namespace tandem::worker::runtime {

struct EngineOptions {
  WorkerId worker;
  std::string host, device, device_name;
  int slot = 0;
  std::string gpu;  ///< UUID; empty on a CPU
  ModelHostOptions model;
  DeviceTurnsOptions turns;
  /// Of a GPU: training leaves so many multiprocessors to steps that run beside it.
  int spare_multiprocessors = 0;
  /// Rows of a serving step while a job trains; 0: model.batch_tokens_max.
  std::int64_t batch_tokens_beside = 0;
  std::int64_t drain_timeout_ms = 25000;
  std::int64_t hung_after_ms =
      120000;                  ///< a device thread that is silent longer gets no more heartbeats
  std::string data_directory;  ///< caches and metrics below it
};

struct EngineEndpoints {
  std::unique_ptr<protocol::ClientEndpoint> control, bulk;
};

/// Takes the slot's engine lock, serves until SIGTERM (drains), SIGINT after it (ends at once), the
/// coordinator's refusal, or the loss of its agent. Returns the process's exit code. A DeviceError
/// ends the process: what failed on a device may fail for ever after, and the agent starts another
/// engine.
int run_engine(const EngineOptions& options, const SlotPaths& paths, kernels::Backend& backend,
               EngineEndpoints endpoints, const Clock& clock);

}  // namespace tandem::worker::runtime
