// Private to worker/comm: what the loader calls in the NCCL module.
#pragma once

#include "worker/comm/nccl_communicator.h"

namespace tandem::worker::comm {

struct NcclModule {
  const char* version;
  Result<NcclId> (*make_id)();
  Result<std::unique_ptr<Communicator>> (*make)(const NcclOptions& options);
};

inline constexpr const char* kNcclModuleFile = "libtandem_nccl.so";
inline constexpr const char* kNcclModuleEntry = "tandem_nccl_module";

}  // namespace tandem::worker::comm
