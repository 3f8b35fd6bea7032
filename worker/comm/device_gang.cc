#include "worker/comm/device_gang.h"

#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

namespace tandem::worker::comm {
namespace {

/// What rank 0 tells the others.
struct Invitation {
  NcclId id{};
  std::int64_t valid = 0;
};

/// Equal for processes of one boot and one network namespace: by its sockets GPUs' memory is
/// shared. Containers that have the same name, or one on each of two machines, are told apart.
std::uint64_t where_this_runs() {
  std::ifstream boot("/proc/sys/kernel/random/boot_id");
  std::string id;
  if (!std::getline(boot, id)) std::getline(std::ifstream("/proc/sys/kernel/hostname"), id);
  std::error_code error;
  id += std::filesystem::read_symlink("/proc/self/ns/net", error).string();
  return std::hash<std::string>()(id);
}

}  // namespace

Result<std::unique_ptr<Communicator>> join_devices(Communicator& host, kernels::Ops& ops,
                                                   kernels::Exec& exec, NcclOptions options) {
  if (ops.profile().type == kernels::DeviceType::kCpu) return std::unique_ptr<Communicator>();
  if (host.size() == 1)
    return make_single_communicator([&ops](kernels::Exec& e, kernels::Tensor from,
                                           kernels::Tensor to) { ops.copy(e, from, to); });
  options.rank = host.rank();
  options.size = host.size();
  std::uint64_t here = where_this_runs();
  options.hosts.resize(static_cast<std::size_t>(host.size()));
  host.all_gather(exec, {&here, DType::kU8, {sizeof here}},
                  {options.hosts.data(),
                   DType::kU8,
                   {static_cast<std::int64_t>(options.hosts.size() * sizeof here)}});
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
