// bench_collectives: times of the gang's collectives by size, as one JSON object from rank 0. Run
// as: mpirun -np N bench_collectives [--device cuda] [--bytes-max B]. CPUs talk MPI, GPUs NCCL.
#include "protocol/base/clock.h"
#include "tools/bench_device.h"
#include "tools/bench_gang.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <functional>
#include <iostream>

namespace {

using namespace tandem;
using Json = nlohmann::ordered_json;

struct Gang {
  worker::comm::Communicator& comm;
  kernels::Ops& ops;
  kernels::Exec& exec;
  kernels::Arena& arena;
};

/// Seconds of the slowest rank, median over trials.
double time_of(Gang& gang, const std::function<void()>& run) {
  constexpr int kTrials = 9;
  std::vector<double> seconds;
  for (int trial = 0; trial < kTrials; ++trial) {
    gang.comm.barrier(gang.exec);
    const std::int64_t begin = steady_ns();
    run();
    gang.comm.barrier(gang.exec);
    seconds.push_back(static_cast<double>(steady_ns() - begin) * 1e-9);
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

/// One size: each collective's time and the bandwidth that its algorithm needs of a link ("bus").
Json measure(Gang& gang, std::int64_t bytes) {
  kernels::ArenaScope scope(gang.arena);
  const int n = gang.comm.size();
  const std::int64_t part = bytes / 4 / n, elements = part * n;
  const kernels::Tensor x = gang.arena.alloc({elements}, DType::kF32);
  const kernels::Tensor mine = gang.arena.alloc({part}, DType::kF32);
  gang.ops.fill_zero(gang.exec, x);
  gang.ops.fill_zero(gang.exec, mine);
  const double share = static_cast<double>(n - 1) / n * static_cast<double>(elements) * 4.0;
  const auto entry = [](double seconds, double link_bytes) {
    return Json{{"microseconds", seconds * 1e6}, {"bus_gb_per_s", link_bytes / seconds * 1e-9}};
  };
  Json sizes{{"bytes", elements * 4}};
  sizes["all_reduce"] =
      entry(time_of(gang, [&] { gang.comm.all_reduce_sum(gang.exec, x); }), 2.0 * share);
  sizes["all_gather"] =
      entry(time_of(gang, [&] { gang.comm.all_gather(gang.exec, mine, x); }), share);
  sizes["reduce_scatter"] =
      entry(time_of(gang, [&] { gang.comm.reduce_scatter_sum(gang.exec, x, mine); }), share);
  const int next = (gang.comm.rank() + 1) % n, before = (gang.comm.rank() + n - 1) % n;
  const kernels::Tensor y = gang.arena.alloc({elements}, DType::kF32);
  if (n > 1)
    sizes["exchange"] =
        entry(time_of(gang, [&] { gang.comm.exchange(gang.exec, x, next, y, before); }),
              static_cast<double>(elements) * 4.0);
  return sizes;
}

Status run(const std::string& device, std::int64_t bytes_max) {
  TANDEM_ASSIGN_OR_RETURN(kernels::Backend backend,
                          tools::open_bench_device(device, 1, tools::local_rank()));
  constexpr std::int64_t kReserve = std::int64_t{1} << 36;
  kernels::Arena arena(*backend.allocator, *backend.ledger, kernels::MemoryKind::kActivations,
                       "tensors", kReserve);
  kernels::Arena workspace(*backend.allocator, *backend.ledger, kernels::MemoryKind::kWorkspace,
                           "workspace", kReserve);
  kernels::Exec exec{workspace};
  TANDEM_ASSIGN_OR_RETURN(
      auto made, tools::make_bench_gang(tools::started_ranks(), false, *backend.ops, exec));
  worker::comm::Communicator& comm = made.comm();
  Gang gang{comm, *backend.ops, exec, arena};
  Json sizes = Json::array();
  for (std::int64_t bytes = 4096; bytes <= bytes_max; bytes *= 8)
    sizes.push_back(measure(gang, bytes));
  if (comm.rank() == 0)
    std::cout << Json{{"bench", "collectives"},
                      {"device", backend.ops->profile().name},
                      {"transport", device == "cuda" ? "nccl" : "mpi"},
                      {"ranks", comm.size()},
                      {"sizes", sizes}}
                     .dump(2)
              << std::endl;
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  std::int64_t bytes_max = 64 << 20;
  std::string device = "cpu";
  CLI::App app("Collectives of a gang, as JSON; run under mpirun");
  app.add_option("--device", device)->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--bytes-max", bytes_max)->check(CLI::Range(4096, 1 << 30));
  CLI11_PARSE(app, argc, argv);
  const Status status = run(device, bytes_max);
  if (status.ok()) return 0;
  std::cerr << "bench_collectives: " << status.to_string() << std::endl;
  return exit_code(status.code());
}
