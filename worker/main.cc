// tandem-worker: what mpirun starts (supervisor), and the two processes it becomes (--agent,
// --engine). Builds the parts and hands them to each other; the only place that names a device
// backend.
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/openmp_spin.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/device_error.h"
#include "kernels/fault_injection.h"
#include "protocol/base/log.h"
#include "protocol/base/units.h"
#include "protocol/dial.h"
#include "protocol/settings.h"
#include "protocol/zmq_transport.h"
#include "worker/program.h"
#include "worker/runtime/agent.h"
#include "worker/runtime/engine.h"
#include "worker/runtime/supervisor.h"

#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <filesystem>
#include <iostream>

namespace tandem::worker {
namespace {

using protocol::Settings;

constexpr const char* kUsage =
    "Usage: mpirun --enable-recovery [-np N] tandem-worker [options]\n"
    "Starts one worker per rank; without mpirun, one worker. Launching again fills only missing "
    "slots.\n\n"
    "  --slot N                    CPU slot or GPU of this host [TANDEM_WORKER_SLOT, else the\n"
    "                              rank there]; its cores and memory are shared by\n"
    "                              TANDEM_WORKER_LOCAL_SIZE workers [the ranks there]\n"
    "  --config FILE               settings file\n"
    "  --version, --help\n\nSettings (also TANDEM_NAME, or a line of the settings file):\n";

class Program {
 public:
  Program(protocol::CommandLine line, Settings settings, Identity id, runtime::SlotPaths paths)
      : line_(std::move(line)),
        settings_(std::move(settings)),
        id_(std::move(id)),
        paths_(std::move(paths)) {
    char path[PATH_MAX] = {};
    if (::readlink("/proc/self/exe", path, sizeof path - 1) > 0) executable_ = path;
    worker_ = WorkerId(str(runtime::host_name(), "/", id_.device, id_.slot));
  }

  Result<int> run() {
    const bool agent = line_.has("--agent"), engine = line_.has("--engine");
    const std::string role = agent ? "agent" : engine ? "engine" : "supervisor";
    set_log_component(str(role, "/", id_.device, id_.slot));
    set_log_level(settings_.log_level());
    if (role == "supervisor")
      return runtime::run_supervisor({executable_, child_arguments("--agent"), paths_});
    // A host of workers has a data_dir of its own, which no coordinator has furnished.
    std::error_code error;
    std::filesystem::create_directories(settings_.log_dir(), error);
    if (!set_log_file(str(settings_.log_dir(), "/", role, "-", id_.device, id_.slot, ".log")))
      return internal_error(str("cannot write logs in ", settings_.log_dir()));
    TANDEM_ASSIGN_OR_RETURN(context_, protocol::ZmqContext::create());
    return agent ? run_agent() : run_engine();
  }

 private:
  std::vector<std::string> child_arguments(const char* role) const {
    std::vector<std::string> arguments = line_.to_arguments();
    arguments.insert(arguments.begin(), {role, "--slot", str(id_.slot)});
    // Decided once: a slot does not change its device because a driver fails later.
    arguments.insert(arguments.end(), {"--device", id_.device});
    return arguments;
  }

  Result<std::unique_ptr<protocol::ClientEndpoint>> connect(const std::string& socket,
                                                            const std::string& purpose) {
    TANDEM_ASSIGN_OR_RETURN(
        const auto options,
        protocol::dial_options(settings_, socket, str(id_.device, id_.slot), purpose));
    return context_->connect(options);
  }

  /// What the agent tells of the device, which it never opens.
  Result<kernels::CudaDevice> describe_device() const {
    if (id_.device == "cuda") return kernels::probe_cuda_device(id_.slot);
    TANDEM_ASSIGN_OR_RETURN(const auto options, cpu_options(settings_, id_));
    const auto profile = kernels::cpu_profile(options);
    return kernels::CudaDevice{profile.name, "", profile.memory_bytes, 0};
  }

  /// TANDEM_TEST_FAULT_FILE: for tests; a slot's faults are those of this name and its number.
  Result<kernels::Backend> open_engine_device(const Identity& id) const {
    TANDEM_ASSIGN_OR_RETURN(kernels::Backend backend, open_device(settings_, id));
    const char* faults = std::getenv("TANDEM_TEST_FAULT_FILE");
    if (faults == nullptr) return backend;
    return kernels::with_faults(std::move(backend), str(faults, id_.slot));
  }

  Result<int> run_agent() {
    TANDEM_ASSIGN_OR_RETURN(const std::int64_t drain_s, settings_.get_int("drain_timeout_s"));
    TANDEM_ASSIGN_OR_RETURN(const auto device, describe_device());
    TANDEM_ASSIGN_OR_RETURN(auto endpoint, connect("workers", "agent"));
    runtime::AgentOptions options{.executable = executable_,
                                  .engine_arguments = child_arguments("--engine"),
                                  .worker = worker_,
                                  .host = runtime::host_name(),
                                  .device = id_.device,
                                  .device_name = device.name,
                                  .program = TANDEM_VERSION,
                                  .slot = id_.slot,
                                  .memory_bytes = device.memory_bytes,
                                  .drain_timeout_ms = drain_s * 1000,
                                  .gang = {}};
    TANDEM_ASSIGN_OR_RETURN(options.gang, gang_options());
    return runtime::run_agent(options, paths_, std::move(endpoint), clock_);
  }

  /// Ranks get this slot's share of the machine, whatever mpirun says of them. A GPU is the rank's
  /// whole, as it is the engine's; what both take is counted before a gang is placed.
  Result<runtime::GangOptions> gang_options() const {
    TANDEM_ASSIGN_OR_RETURN(const auto cpu, cpu_options(settings_, id_));
    runtime::GangOptions options;
    options.rank_program = executable_.substr(0, executable_.rfind('/')) + "/tandem-rank";
    options.rank_arguments = child_arguments("--gang");
    options.rank_arguments.insert(options.rank_arguments.end(), {"--threads", str(cpu.threads)});
    if (id_.device == "cpu") {
      TANDEM_ASSIGN_OR_RETURN(const auto model,
                              model_options(settings_, kernels::cpu_profile(cpu), id_));
      options.rank_arguments.insert(options.rank_arguments.end(),
                                    {"--memory-bytes-max", str(model.memory_bytes_max)});
    }
    options.log = str(settings_.log_dir(), "/gang-", id_.device, id_.slot, ".log");
    return options;
  }

  /// How requests and a job take turns.
  Status share_device(runtime::EngineOptions& options) const {
    constexpr std::int64_t kIntervalMs = 22, kTokensBeside = 256, kRowsBeside = 64;
    const bool cuda = id_.device == "cuda";
    const auto either = [&](const char* name, std::int64_t on_gpu) -> Result<std::int64_t> {
      if (settings_.get(name) == "auto") return cuda ? on_gpu : 0;
      return settings_.get_int(name);
    };
    TANDEM_ASSIGN_OR_RETURN(const std::int64_t interval_ms,
                            either("serve_interval_ms", kIntervalMs));
    TANDEM_ASSIGN_OR_RETURN(options.batch_tokens_beside,
                            either("batch_tokens_beside", kTokensBeside));
    TANDEM_ASSIGN_OR_RETURN(const std::int64_t spare, settings_.get_int("serve_multiprocessors"));
    options.turns.train_share_min = settings_.get_share("train_share_min");
    options.turns.step_interval_ns = interval_ms * 1'000'000;
    options.turns.beside_rows_max = spare > 0 ? kRowsBeside : 0;
    options.spare_multiprocessors = static_cast<int>(spare);
    return {};
  }

  Result<int> run_engine() {
    TANDEM_ASSIGN_OR_RETURN(const std::int64_t drain_s, settings_.get_int("drain_timeout_s"));
    Identity id = id_;
    id.gpu = runtime::gpu_of(paths_);
    if (id.device == "cuda" && id.gpu.empty()) {
      TANDEM_ASSIGN_OR_RETURN(id.gpu, kernels::cuda_uuid(id.slot));
    }
    TANDEM_ASSIGN_OR_RETURN(kernels::Backend backend, open_engine_device(id));
    const auto& profile = backend.ops->profile();
    runtime::EngineOptions options;
    options.worker = worker_;
    options.host = runtime::host_name();
    options.device = id_.device;
    options.device_name = profile.name;
    options.slot = id_.slot;
    options.gpu = id.gpu;
    TANDEM_ASSIGN_OR_RETURN(options.model, model_options(settings_, profile, id_));
    TANDEM_RETURN_IF_ERROR(share_device(options));
    options.drain_timeout_ms = drain_s * 1000;
    options.data_directory = settings_.data_dir();
    log_info("engine starts: ", profile.name, ", ", profile.threads, " threads, ",
             dtype_name(options.model.dtype), ", at most ",
             format_bytes(options.model.memory_bytes_max), ", KV cache ",
             format_bytes(options.model.kv_bytes_max), ", ", options.model.adapter_slots,
             " adapter slots");
    runtime::EngineEndpoints endpoints;
    TANDEM_ASSIGN_OR_RETURN(endpoints.control, connect("workers", "engine"));
    TANDEM_ASSIGN_OR_RETURN(endpoints.bulk, connect("bulk", "engine"));
    return runtime::run_engine(options, paths_, backend, std::move(endpoints), clock_);
  }

  const protocol::CommandLine line_;
  const Settings settings_;
  const Identity id_;
  const runtime::SlotPaths paths_;
  std::string executable_;
  WorkerId worker_;
  SystemClock clock_;
  std::unique_ptr<protocol::ZmqContext> context_;
};

Result<int> start(int argc, char** argv) {
  TANDEM_ASSIGN_OR_RETURN(auto line, protocol::split_command_line(argc, argv));
  if (line.has("--help") || line.has("-h")) {
    std::cout << kUsage << protocol::settings_help();
    return 0;
  }
  if (line.has("--version")) {
    std::cout << "tandem-worker " << TANDEM_VERSION << "\n";
    return 0;
  }
  TANDEM_ASSIGN_OR_RETURN(auto settings, Settings::load(line.flags, line.config_file));
  TANDEM_ASSIGN_OR_RETURN(auto id, identity(line, settings, {"--agent", "--engine"}));
  TANDEM_ASSIGN_OR_RETURN(auto paths,
                          runtime::SlotPaths::create(settings.run_dir(), id.device, id.slot));
  return Program(std::move(line), std::move(settings), std::move(id), std::move(paths)).run();
}

}  // namespace
}  // namespace tandem::worker

int main(int argc, char** argv) {
  tandem::start_with_environment({tandem::kMallocLargeBuffers, tandem::kernels::cpu::kOpenmpSpin},
                                 argv);
  const auto code = tandem::worker::start(argc, argv);
  if (code.ok()) return *code;
  tandem::log_error(code.status().to_string());
  std::cerr << "tandem-worker: " << code.status().message() << "\n";
  return tandem::exit_code(code.status().code());
}
