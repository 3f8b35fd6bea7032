// tandem-rank: one rank of a job, or of a replica that serves, over several workers: on the device
// of the gang's member of that number. Started by mpirun, which the agent of the leader's worker
// starts (worker/runtime/gang_keeper.h); the only program of a pool that loads MPI, so that agents
// and engines never do. The engines of these slots go on serving.
#include "kernels/cpu/openmp_spin.h"
#include "kernels/device_error.h"
#include "protocol/base/file_lock.h"
#include "protocol/base/log.h"
#include "protocol/codec.h"
#include "protocol/dial.h"
#include "protocol/zmq_transport.h"
#include "worker/comm/mpi_communicator.h"
#include "worker/program.h"
#include "worker/runtime/gang_hosts.h"
#include "worker/runtime/gang_keeper.h"
#include "worker/runtime/gang_lead.h"
#include "worker/runtime/replica_lead.h"

#include <sys/prctl.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <string_view>

namespace tandem::worker {
namespace {

using protocol::Settings;

Result<protocol::StartJob> read_start(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  TANDEM_ASSIGN_OR_RETURN(const auto message,
                          protocol::decode_control(std::as_bytes(std::span(bytes))));
  if (const auto* start = std::get_if<protocol::StartJob>(&message)) return *start;
  return corrupt_error(str(path, " holds no StartJob"));
}

Result<std::unique_ptr<protocol::ClientEndpoint>> connect(protocol::ZmqContext& context,
                                                          const Settings& settings,
                                                          const Identity& id, const char* socket) {
  TANDEM_ASSIGN_OR_RETURN(
      const auto options,
      protocol::dial_options(settings, socket, str(id.device, id.slot), "gang"));
  return context.connect(options);
}

/// A rank that is not the first: its own connection for its pieces of checkpoints, and no other.
Result<int> follow(const Settings& settings, const Identity& id, const protocol::StartJob& start,
                   runtime::GangRank& rank) {
  constexpr std::size_t kTasksMax = 16;
  TANDEM_ASSIGN_OR_RETURN(const auto context, protocol::ZmqContext::create());
  TANDEM_ASSIGN_OR_RETURN(auto endpoint, connect(*context, settings, id, "bulk"));
  SystemClock clock;
  runtime::BulkClient bulk(std::move(endpoint), clock);
  runtime::TaskThread tasks(kTasksMax);  // ends before what its tasks use
  struct Cancel {
    runtime::BulkClient& bulk;
    ~Cancel() { bulk.cancel(); }  // a lost gang must not wait for a lost coordinator
  } const cancel{bulk};
  rank.store_with(bulk, tasks, runtime::checkpoint_pin(start));
  runtime::follow(rank);
  return 0;
}

/// A rank whose device failed can only end, and at once: MPI or a kernel that waits for another
/// rank may hold this process for ever, and so may giving back what lies on the device. mpirun ends
/// the others.
class Watched {
 public:
  Watched(const runtime::GangPaths& paths, int rank) : paths_(paths), rank_(rank) {}
  [[noreturn]] void end(const std::string& why) const {
    log_error("the gang ends: ", why);
    paths_.leave_word(str("rank ", rank_, ": ", why));
    std::_Exit(1);
  }
  /// What `work` returns; what it holds on the device must outlive the call.
  template <class Work>
  auto run(const Work& work) const {
    try {
      return work();
    } catch (const kernels::DeviceError& error) {
      end(error.what());
    }
  }

 private:
  const runtime::GangPaths& paths_;
  const int rank_;
};

/// `leader` is the slot whose agent started the gang; each rank has the device of its own member.
Result<Identity> identity_of_rank(const Settings& settings, const Identity& leader,
                                  const protocol::StartJob& start, int rank) {
  if (rank >= static_cast<int>(start.members.size()))
    return corrupt_error(str("rank ", rank, " of a gang of ", start.members.size(), " workers"));
  Identity mine = leader;
  TANDEM_ASSIGN_OR_RETURN(mine.slot,
                          runtime::slot_of(start.members[static_cast<std::size_t>(rank)]));
  if (mine.device != "cuda") return mine;
  TANDEM_ASSIGN_OR_RETURN(const auto paths,
                          runtime::SlotPaths::create(settings.run_dir(), mine.device, mine.slot));
  mine.gpu = runtime::gpu_of(paths);
  return mine;
}

Result<int> run(const Settings& settings, const Identity& id) {
  TANDEM_ASSIGN_OR_RETURN(const auto slot,
                          runtime::SlotPaths::create(settings.run_dir(), id.device, id.slot));
  const runtime::GangPaths paths(slot);
  TANDEM_ASSIGN_OR_RETURN(const protocol::StartJob start, read_start(paths.start));
  TANDEM_ASSIGN_OR_RETURN(const std::int64_t timeout_s, settings.get_int("gang_timeout_s"));
  TANDEM_ASSIGN_OR_RETURN(const std::int64_t drain_s, settings.get_int("drain_timeout_s"));
  runtime::install_rank_signals();
  runtime::GangPatience patience(timeout_s * 1000);
  comm::MpiOptions mpi;
  mpi.current_timeout_ms = patience.timeout_ms();
  TANDEM_ASSIGN_OR_RETURN(const auto gang, comm::make_mpi_communicator(mpi));
  set_log_component(str("rank ", gang->rank(), "/", id.device, id.slot));
  TANDEM_ASSIGN_OR_RETURN(const auto lock, FileLock::acquire(paths.rank_lock(gang->rank())));
  TANDEM_ASSIGN_OR_RETURN(const Identity mine, identity_of_rank(settings, id, start, gang->rank()));
  const Watched watched(paths, gang->rank());
  auto opened = watched.run([&] { return open_device(settings, mine); });
  if (!opened.ok()) watched.end(opened.status().to_string());
  kernels::Backend& backend = *opened;
  const auto& profile = backend.ops->profile();
  TANDEM_ASSIGN_OR_RETURN(const auto options, model_options(settings, profile, mine));
  log_info(start.job, " epoch ", start.epoch, ": rank ", gang->rank(), " of ", gang->size(), " on ",
           mine.device, mine.slot, " (", profile.name, ", ", profile.threads, " threads), ",
           dtype_name(options.dtype));
  const runtime::GangLeadOptions lead{
      WorkerId(str(runtime::host_name(), "/", id.device, id.slot)),
      runtime::host_name(),
      id.device,
      start,
      settings.data_dir(),
      str(settings.data_dir(), "/cache/models/.publish-", id.device, id.slot),
      slot.agent_lock,
      drain_s * 1000};
  SystemClock clock;
  TANDEM_ASSIGN_OR_RETURN(const auto context, protocol::ZmqContext::create());
  const auto endpoints = [&]() -> Result<runtime::EngineEndpoints> {
    runtime::EngineEndpoints made;
    TANDEM_ASSIGN_OR_RETURN(made.control, connect(*context, settings, id, "workers"));
    TANDEM_ASSIGN_OR_RETURN(made.bulk, connect(*context, settings, id, "bulk"));
    return made;
  };
  const runtime::GangRank::Options on_device{
      options.dtype, options.numerics, options.memory_bytes_max, mine.slot,
      [&watched](const std::string& why) { watched.end(why); }};
  if (!start.serve_json.empty()) {
    std::optional<runtime::ReplicaRank> rank;
    return watched.run([&]() -> Result<int> {
      rank.emplace(backend, on_device, options, *gang, patience, clock);
      if (gang->rank() != 0) return runtime::follow(*rank), 0;
      TANDEM_ASSIGN_OR_RETURN(auto made, endpoints());
      return runtime::lead_replica(lead, *rank, std::move(made), clock);
    });
  }
  std::optional<runtime::GangRank> rank;
  return watched.run([&]() -> Result<int> {
    rank.emplace(backend, on_device, *gang, patience);
    if (gang->rank() != 0) return follow(settings, id, start, *rank);
    TANDEM_ASSIGN_OR_RETURN(auto made, endpoints());
    return runtime::lead_gang(lead, *rank, std::move(made), patience, clock);
  });
}

/// The command line's words, or this host's own where the gang has several (gang_hosts.h).
std::vector<std::string> rank_words(int argc, char** argv) {
  std::vector<std::string> words(argv, argv + argc);
  const char* file = std::getenv(runtime::kRankArgumentsVariable);
  if (argc > 1 || file == nullptr) return words;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) words.push_back(line);
  return words;
}

Result<int> start(int argc, char** argv) {
  const std::vector<std::string> words = rank_words(argc, argv);
  std::vector<const char*> pointers;
  for (const std::string& word : words) pointers.push_back(word.c_str());
  TANDEM_ASSIGN_OR_RETURN(
      auto line, protocol::split_command_line(static_cast<int>(pointers.size()), pointers.data()));
  if (line.has("--version")) {
    std::cout << "tandem-rank " << TANDEM_VERSION << "\n";
    return 0;
  }
  TANDEM_ASSIGN_OR_RETURN(auto settings, Settings::load(line.flags, line.config_file));
  set_log_level(settings.log_level());
  TANDEM_ASSIGN_OR_RETURN(auto id, identity(line, settings, {"--gang"}));
  try {
    return run(settings, id);
  } catch (const kernels::DeviceError& error) {
    log_error("the gang ends: ", error.what());
    std::_Exit(1);  // MPI may hold this process for ever; mpirun ends the others
  }
}

}  // namespace
}  // namespace tandem::worker

int main(int argc, char** argv) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // no rank outlives its mpirun
  if (::getppid() == 1) return 1;
  if (argc > 2 && std::string_view(argv[1]) == "--launch")  // mpirun's way to another host
    return tandem::worker::runtime::ask_for_daemon(argv[2], {argv + 3, argv + argc});
  tandem::start_with_environment({tandem::kMallocLargeBuffers, tandem::kernels::cpu::kOpenmpSpin},
                                 argv);
  const auto code = tandem::worker::start(argc, argv);
  if (code.ok()) return *code;
  tandem::log_error(code.status().to_string());
  return tandem::exit_code(code.status().code());
}
