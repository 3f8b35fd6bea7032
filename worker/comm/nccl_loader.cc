#include "kernels/module.h"
#include "worker/comm/nccl_module.h"

#include <cstring>

namespace tandem::worker::comm {
namespace {

Result<const NcclModule*> module() {
  static const Result<const NcclModule*> loaded =
      kernels::open_module<NcclModule>(kNcclModuleFile, kNcclModuleEntry, "NCCL between GPUs");
  return loaded;
}

}  // namespace

Result<NcclId> make_nccl_id() {
  TANDEM_ASSIGN_OR_RETURN(const NcclModule* loaded, module());
  return loaded->make_id();
}

Result<std::unique_ptr<Communicator>> make_nccl_communicator(const NcclOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(const NcclModule* loaded, module());
  return loaded->make(options);
}

}  // namespace tandem::worker::comm
