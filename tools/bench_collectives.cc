// bench_collectives: times of the gang's collectives by size, as one JSON object from rank 0. Run
// as: mpirun -np N bench_collectives [--device cuda] [--bytes-max B]. CPUs talk MPI, GPUs NCCL, and
// by themselves where that is faster (TANDEM_GPU_PEERS=off: nothing). Beside single collectives,
// with all that it takes to begin and to wait: what one of many sums costs that follow each other
// on the device, as in a decode step, alone and with the norm behind it.
#include "protocol/base/clock.h"
#include "tools/bench_arguments.h"
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

/// Microseconds of one of many that the device runs one after another: the slowest rank's, median
/// over trials. Recorded where sums may be; else issued, which is slower than the shortest.
double queued(Gang& gang, std::uint64_t key, const std::function<void()>& issue) {
  constexpr int kCount = 64;
  const auto all = [&] {
    gang.comm.issue_recorded(gang.exec, [&] {
      const auto body = [&] {
        for (int i = 0; i < kCount; ++i) issue();
      };
      gang.comm.records() ? gang.ops.replay(gang.exec, key, body) : body();
    });
    gang.ops.synchronize(gang.exec);
  };
  for (int warm_up = 0; warm_up < 3; ++warm_up) all();
  return time_of(gang, all) / kCount * 1e6;
}

/// Sums of `rows` rows of a stream as wide as Llama-3-70B's, in bf16.
Json measure_rows(Gang& gang, std::int64_t rows) {
  constexpr std::int64_t kWidth = 8192;
  kernels::ArenaScope scope(gang.arena);
  const kernels::Shape shape{rows, kWidth};
  const kernels::Tensor x = gang.arena.alloc(shape, DType::kBF16);
  const kernels::Tensor delta = gang.arena.alloc(shape, DType::kBF16);
  const kernels::Tensor y = gang.arena.alloc(shape, DType::kBF16);
  const kernels::Tensor weight = gang.arena.alloc({kWidth}, DType::kBF16);
  for (const kernels::Tensor& t : {x, delta, weight}) gang.ops.fill_zero(gang.exec, t);
  const kernels::AddRmsNormArgs norm{x, delta, weight, 1e-5f, y, {}};
  const auto key = static_cast<std::uint64_t>(rows) * 4;
  Json out{{"rows", rows}, {"bytes", x.bytes()}};
  out["sum_us"] = queued(gang, key, [&] { gang.comm.all_reduce_sum(gang.exec, x); });
  out["norm_us"] = queued(gang, key + 1, [&] { gang.ops.add_rms_norm_forward(gang.exec, norm); });
  out["sum_then_norm_us"] = queued(gang, key + 2, [&] {
    gang.comm.all_reduce_sum(gang.exec, x);
    gang.ops.add_rms_norm_forward(gang.exec, norm);
  });
  out["sum_and_norm_us"] = queued(gang, key + 3, [&] {
    if (gang.comm.sum_and_norm(gang.exec, norm)) return;
    gang.comm.all_reduce_sum(gang.exec, x);
    gang.ops.add_rms_norm_forward(gang.exec, norm);
  });
  return out;
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
  Json rows = Json::array();
  for (const std::int64_t count : {1, 4, 8, 16, 32, 64, 128, 256})
    if (comm.size() > 1 && device == "cuda") rows.push_back(measure_rows(gang, count));
  if (comm.rank() == 0)
    std::cout << Json{{"bench", "collectives"},
                      {"device", backend.ops->profile().name},
                      {"transport", device == "cuda" ? "nccl" : "mpi"},
                      {"ranks", comm.size()},
                      {"records", comm.records()},
                      {"sizes", sizes},
                      {"rows", rows}}
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
  if (const auto code = tandem::tools::parse_bench(app, argc, argv)) return *code;
  const Status status = run(device, bytes_max);
  if (status.ok()) return 0;
  std::cerr << "bench_collectives: " << status.to_string() << std::endl;
  return exit_code(status.code());
}
