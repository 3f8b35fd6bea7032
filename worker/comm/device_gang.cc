#include "worker/comm/device_gang.h"

namespace tandem::worker::comm {
namespace {

/// What rank 0 tells the others.
struct Invitation {
  NcclId id{};
  std::int64_t valid = 0;
};

}  // namespace

Result<std::unique_ptr<Communicator>> join_devices(Communicator& host, kernels::Ops& ops,
                                                   kernels::Exec& exec, NcclOptions options) {
  if (ops.profile().type == kernels::DeviceType::kCpu) return std::unique_ptr<Communicator>();
  if (host.size() == 1)
    return make_single_communicator([&ops](kernels::Exec& e, kernels::Tensor from,
                                           kernels::Tensor to) { ops.copy(e, from, to); });
  options.rank = host.rank();
  options.size = host.size();
  Status made;
  Invitation invitation;
  if (options.rank == 0) {
    auto id = make_nccl_id();
    made = id.status();
    if (id.ok()) invitation = {*id, 1};
  }
  host.broadcast(exec, {&invitation, DType::kU8, {sizeof invitation}}, 0);
  TANDEM_RETURN_IF_ERROR(made);
  if (invitation.valid == 0) return unavailable_error("rank 0 could not start NCCL");
  options.id = invitation.id;
  return make_nccl_communicator(options);
}

}  // namespace tandem::worker::comm
