// One call of a ServeEngine, as the leading rank of a sharded replica tells the others of it. Every
// rank makes the same calls in the same order at the same time (the leader's), and an engine
// depends on nothing else: so all of them schedule the same batches. Between processes of one build
// only.
#pragma once

#include "protocol/base/clock.h"
#include "worker/model/adapter.h"
#include "worker/serve/request.h"

#include <cstddef>
#include <span>
#include <vector>

namespace tandem::worker::serve {

struct EngineCall {
  enum class Kind : std::int32_t {
    kSubmit = 0,      ///< request
    kCancel,          ///< id
    kFailAll,         ///< status
    kInstallAdapter,  ///< adapter, tensors (whole)
    kFailAdapter,     ///< adapter, status
    kDropAdapter,     ///< adapter
    kSetTokenBudget,  ///< number
    kSetKvLimit,      ///< number
    kReserveWorstCase,
    kStep,
    kEnd  ///< no call comes any more
  };
  Kind kind = Kind::kStep;
  TimeMs now = 0;  ///< what the leader's clock said
  GenerateRequest request{};
  RequestId id{};
  Digest adapter{};
  Status status{};
  std::int64_t number = 0;
  std::vector<model::HostAdapterTensor> tensors{};
};

/// Appends the call.
void encode(const EngineCall& call, std::vector<std::byte>& to);
/// Takes the first call off the front. A frame that ends early is a bug.
EngineCall decode(std::span<const std::byte>& from);

}  // namespace tandem::worker::serve
