#include "tools/bench_gang.h"

#include "protocol/base/str.h"
#include "worker/comm/mpi_communicator.h"
#include "worker/comm/nccl_communicator.h"

#include <cstdlib>

namespace tandem::tools {

int local_rank() {
  const char* rank = std::getenv("OMPI_COMM_WORLD_LOCAL_RANK");
  return rank == nullptr ? 0 : std::atoi(rank);
}

int started_ranks() {
  const char* ranks = std::getenv("OMPI_COMM_WORLD_SIZE");
  return ranks == nullptr ? 1 : std::atoi(ranks);
}

Result<BenchGang> make_bench_gang(int ranks, bool gathers, kernels::Ops& ops, kernels::Exec& exec) {
  BenchGang gang;
  if (ranks == 1) {
    gang.device = worker::comm::make_single_communicator(
        [&ops](kernels::Exec& e, kernels::Tensor from, kernels::Tensor to) {
          ops.copy(e, from, to);
        });
    return gang;
  }
  TANDEM_ASSIGN_OR_RETURN(gang.host, worker::comm::make_mpi_communicator());
  if (gang.host->size() != ranks)
    return invalid_error(
        str("the layout has ", ranks, " ranks; mpirun started ", gang.host->size()));
  if (ops.profile().type != kernels::DeviceType::kCuda) return gang;
  worker::comm::NcclOptions options;
  options.rank = gang.host->rank();
  options.size = ranks;
  options.device = local_rank();
  if (gathers) options.multiprocessors_max = worker::comm::kGatherMultiprocessors;
  if (options.rank == 0) {
    TANDEM_ASSIGN_OR_RETURN(options.id, worker::comm::make_nccl_id());
  }
  gang.host->broadcast(
      exec, {options.id.data(), DType::kU8, {static_cast<std::int64_t>(options.id.size())}}, 0);
  TANDEM_ASSIGN_OR_RETURN(gang.device, worker::comm::make_nccl_communicator(options));
  exec.stream = ops.make_stream(false);
  return gang;
}

}  // namespace tandem::tools
