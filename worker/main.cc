// tandem-worker: what mpirun starts (supervisor), and the two processes it becomes (--agent,
// --engine). Builds the parts and hands them to each other; the only place that names a device
// backend.
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/openmp_spin.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/device_error.h"
#include "protocol/base/log.h"
#include "protocol/base/units.h"
#include "protocol/dial.h"
#include "protocol/settings.h"
#include "protocol/zmq_transport.h"
#include "worker/runtime/agent.h"
#include "worker/runtime/engine.h"
#include "worker/runtime/supervisor.h"

#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <thread>

namespace tandem::worker {
namespace {

using protocol::Settings;

constexpr const char* kUsage =
    "Usage: mpirun --enable-recovery [-np N] tandem-worker [options]\n"
    "Starts one worker per rank; without mpirun, one worker. Launching again fills only missing "
    "slots.\n\n"
    "  --slot N                    CPU slot on this host [the rank on this host]\n"
    "  --config FILE               settings file\n"
    "  --version, --help\n\nSettings (also TANDEM_NAME, or a line of the settings file):\n";

/// An integer that a launcher left in the environment.
std::int64_t environment_int(std::initializer_list<const char*> names, std::int64_t otherwise) {
  for (const char* name : names)
    if (const char* value = std::getenv(name)) return std::strtoll(value, nullptr, 10);
  return otherwise;
}

struct Identity {
  int slot = 0, local_workers = 1;
  std::string device = "cpu";
};

/// "auto" is the GPU where the driver shows one and this build can open it: a slot is then a GPU,
/// and one too many is an error rather than a slow worker.
Result<std::string> resolve_device(const std::string& asked, int slot) {
  if (asked != "auto" && asked != "cpu" && asked != "cuda")
    return invalid_error(str("device must be auto, cpu or cuda, not \"", asked, "\""));
  if (asked == "cpu" || (asked == "auto" && !kernels::probe_cuda_device(0).ok()))
    return std::string("cpu");
  if (const Status module = kernels::check_cuda_module(); asked == "auto" && !module.ok()) {
    log_warn("a GPU is here, but this worker runs on the CPU: ", module.message());
    return std::string("cpu");
  }
  TANDEM_RETURN_IF_ERROR(kernels::probe_cuda_device(slot).status());
  return std::string("cuda");
}

Result<Identity> identity(const protocol::CommandLine& line, const Settings& settings) {
  Identity id;
  id.slot = static_cast<int>(
      environment_int({"TANDEM_WORKER_SLOT", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"}, 0));
  id.local_workers = static_cast<int>(environment_int(
      {"TANDEM_WORKER_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"}, 1));
  for (std::size_t i = 0; i < line.rest.size(); ++i) {
    const std::string& word = line.rest[i];
    if (word == "--slot" && i + 1 < line.rest.size())
      id.slot = std::atoi(line.rest[++i].c_str());
    else if (word != "--agent" && word != "--engine")
      return invalid_error(str("unknown argument \"", word, "\"; see tandem-worker --help"));
  }
  TANDEM_ASSIGN_OR_RETURN(id.device, resolve_device(settings.get("device"), id.slot));
  return id;
}

Result<kernels::CpuOptions> cpu_options(const Settings& settings, const Identity& id) {
  kernels::CpuOptions options;
  TANDEM_ASSIGN_OR_RETURN(const std::int64_t threads, settings.get_int("threads"));
  const auto cores = static_cast<std::int64_t>(std::max(1u, std::thread::hardware_concurrency()));
  options.threads =
      static_cast<int>(threads > 0 ? threads : std::max<std::int64_t>(1, cores / id.local_workers));
  return options;
}

/// Of a GPU's memory: the driver's context, the libraries' code and their own workspaces.
constexpr std::int64_t kCudaReservedBytes = std::int64_t{3} << 29;

Result<runtime::ModelHostOptions> model_options(const Settings& settings,
                                                const kernels::DeviceProfile& profile,
                                                const Identity& id) {
  runtime::ModelHostOptions options;
  const bool cuda = profile.type == kernels::DeviceType::kCuda;
  const bool has_bf16 = cuda || profile.has_amx_bf16 || profile.has_avx512_bf16;
  const std::string& dtype = settings.get("dtype");
  if (dtype != "auto" && dtype != "f32" && dtype != "bf16")
    return invalid_error(str("dtype must be auto, f32 or bf16, not \"", dtype, "\""));
  options.dtype = dtype == "f32" || (dtype == "auto" && !has_bf16) ? DType::kF32 : DType::kBF16;
  const std::string& numerics = settings.get("numerics");
  if (numerics == "invariant" && options.dtype != DType::kF32 && !cuda)
    return refused_error("numerics invariant needs dtype f32 on CPU");
  const bool invariant =
      numerics == "invariant" || (!cuda && options.dtype == DType::kF32 && numerics != "replay");
  options.numerics = invariant ? kernels::Numerics::kInvariant : kernels::Numerics::kReplay;
  TANDEM_ASSIGN_OR_RETURN(options.memory_bytes_max, settings.get_bytes("memory_bytes_max"));
  if (options.memory_bytes_max == 0)
    options.memory_bytes_max =
        cuda ? profile.memory_bytes - std::max(profile.memory_bytes / 16, kCudaReservedBytes)
             : profile.memory_bytes / 4 * 3 / id.local_workers;
  TANDEM_ASSIGN_OR_RETURN(options.kv_bytes_max, settings.get_bytes("kv_bytes_max"));
  if (options.kv_bytes_max == 0)
    options.kv_bytes_max = cuda ? options.memory_bytes_max / 8
                                : std::min<std::int64_t>(options.memory_bytes_max / 8, kGiB);
  TANDEM_ASSIGN_OR_RETURN(options.adapter_slots, settings.get_int("adapter_slots"));
  TANDEM_ASSIGN_OR_RETURN(options.batch_tokens_max, settings.get_int("batch_tokens_max"));
  TANDEM_ASSIGN_OR_RETURN(options.running_max, settings.get_int("running_requests_max"));
  return options;
}

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
    if (role == "supervisor")
      return runtime::run_supervisor(
          {executable_, child_arguments("--agent"), paths_.supervisor_lock});
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

  Result<kernels::Backend> open_device() const {
    if (id_.device == "cuda") return kernels::make_cuda_backend({.device = id_.slot});
    TANDEM_ASSIGN_OR_RETURN(const auto options, cpu_options(settings_, id_));
    return kernels::make_cpu_backend(options);
  }

  Result<int> run_agent() {
    TANDEM_ASSIGN_OR_RETURN(const std::int64_t drain_s, settings_.get_int("drain_timeout_s"));
    TANDEM_ASSIGN_OR_RETURN(const auto device, describe_device());
    TANDEM_ASSIGN_OR_RETURN(auto endpoint, connect("workers", "agent"));
    runtime::AgentOptions options{executable_,   child_arguments("--engine"),
                                  worker_,       runtime::host_name(),
                                  id_.device,    device.name,
                                  id_.slot,      device.memory_bytes,
                                  drain_s * 1000};
    return runtime::run_agent(options, paths_, std::move(endpoint), clock_);
  }

  Result<int> run_engine() {
    TANDEM_ASSIGN_OR_RETURN(const std::int64_t drain_s, settings_.get_int("drain_timeout_s"));
    TANDEM_ASSIGN_OR_RETURN(kernels::Backend backend, open_device());
    const auto& profile = backend.ops->profile();
    runtime::EngineOptions options;
    options.worker = worker_;
    options.host = runtime::host_name();
    options.device = id_.device;
    options.device_name = profile.name;
    options.slot = id_.slot;
    TANDEM_ASSIGN_OR_RETURN(options.model, model_options(settings_, profile, id_));
    options.train_share_min = std::atof(settings_.get("train_share_min").c_str());
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
    try {
      return runtime::run_engine(options, paths_, backend, std::move(endpoints), clock_);
    } catch (const kernels::DeviceError& error) {
      log_error("device failure, the engine ends: ", error.what());
      std::_Exit(1);  // threads may hold the device; the agent starts another engine
    }
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
  TANDEM_ASSIGN_OR_RETURN(auto id, identity(line, settings));
  TANDEM_ASSIGN_OR_RETURN(auto paths,
                          runtime::SlotPaths::create(settings.run_dir(), id.device, id.slot));
  return Program(std::move(line), std::move(settings), std::move(id), std::move(paths)).run();
}

}  // namespace
}  // namespace tandem::worker

int main(int argc, char** argv) {
  tandem::start_with_environment({tandem::kMallocHugePages, tandem::kernels::cpu::kOpenmpSpin},
                                 argv);
  const auto code = tandem::worker::start(argc, argv);
  if (code.ok()) return *code;
  tandem::log_error(code.status().to_string());
  std::cerr << "tandem-worker: " << code.status().message() << "\n";
  return tandem::exit_code(code.status().code());
}
