// What a replica is: its layout as the coordinator says it, the bytes it takes, and what its first
// rank tells the others to begin with. Pure functions; any thread.
#pragma once

#include "kernels/device_profile.h"
#include "protocol/base/digest.h"
#include "worker/comm/layout.h"
#include "worker/runtime/gang_wire.h"
#include "worker/runtime/model_host.h"

#include <string>

namespace tandem::worker::runtime {

/// {"tp": N, "pp": N} of StartJob and EstimateRequest. invalid_error: anything else.
Result<comm::Layout> parse_replica(const std::string& json);

/// The dry run of every rank, each beside the engine of its slot, which goes on serving: an
/// EstimateReply's JSON. Errors as memory::estimate_replica.
Result<std::string> estimate_replica(const kernels::DeviceProfile& profile,
                                     const model::ModelConfig& config,
                                     const ModelHostOptions& options, const std::string& json);

/// What all ranks need to begin.
struct ReplicaPlan {
  std::string model_path;  ///< on this host, verified
  Digest base;             ///< root of every prefix key
  comm::Layout layout;
  std::int64_t adapter_bytes = -1;  ///< StartJob's
  [[nodiscard]] ByteVector encode() const;
  static ReplicaPlan decode(std::span<const std::byte> bytes);
};

}  // namespace tandem::worker::runtime
