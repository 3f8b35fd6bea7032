#include "worker/program.h"

#include "kernels/cuda/cuda_backend.h"
#include "protocol/base/log.h"
#include "protocol/base/processors.h"
#include "protocol/base/units.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <thread>

namespace tandem::worker {
namespace {

using protocol::Settings;

constexpr int kSlotsMax = 1024;  // of one host

Result<int> parse_number(const std::string& name, std::string_view text, int least, int most) {
  int number = 0;
  const auto read = std::from_chars(text.data(), text.data() + text.size(), number);
  if (read.ec == std::errc() && read.ptr == text.data() + text.size() && number >= least &&
      number <= most)
    return number;
  return invalid_error(
      str(name, " must be a whole number in ", least, "..", most, ", not \"", text, "\""));
}

/// A number that a launcher left in the environment, under the first of these names that it set.
Result<int> environment_number(std::initializer_list<const char*> names, int otherwise, int least,
                               int most) {
  for (const char* name : names)
    if (const char* value = std::getenv(name)) return parse_number(name, value, least, most);
  return otherwise;
}

/// "auto" is the GPU where the driver shows one and this build can open it: a slot is then a GPU,
/// and one too many is an error rather than a slow worker.
Result<std::string> resolve_device(const std::string& asked, int slot) {
  if (asked == "cpu" || (asked == "auto" && !kernels::probe_cuda_device(0).ok()))
    return std::string("cpu");
  if (const Status module = kernels::check_cuda_module(); asked == "auto" && !module.ok()) {
    log_warn("a GPU is here, but this worker runs on the CPU: ", module.message());
    return std::string("cpu");
  }
  TANDEM_RETURN_IF_ERROR(kernels::probe_cuda_device(slot).status());
  return std::string("cuda");
}

/// Of a GPU's memory: the driver's context, the libraries' code and their own workspaces.
constexpr std::int64_t kCudaReservedBytes = std::int64_t{3} << 29;

}  // namespace

Result<Identity> identity(const protocol::CommandLine& line, const Settings& settings,
                          const std::vector<std::string>& roles) {
  Identity id;
  TANDEM_ASSIGN_OR_RETURN(
      id.slot,
      environment_number({"TANDEM_WORKER_SLOT", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"}, 0,
                         0, kSlotsMax - 1));
  TANDEM_ASSIGN_OR_RETURN(
      id.local_workers, environment_number({"TANDEM_WORKER_LOCAL_SIZE",
                                            "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"},
                                           1, 1, kSlotsMax));
  for (std::size_t i = 0; i < line.rest.size(); ++i) {
    const std::string& word = line.rest[i];
    if (word == "--slot" && i + 1 == line.rest.size()) return invalid_error("--slot needs a value");
    if (word == "--slot") {
      TANDEM_ASSIGN_OR_RETURN(id.slot, parse_number(word, line.rest[++i], 0, kSlotsMax - 1));
    } else if (std::find(roles.begin(), roles.end(), word) == roles.end()) {
      return invalid_error(str("unknown argument \"", word, "\"; see --help"));
    }
  }
  TANDEM_ASSIGN_OR_RETURN(id.device, resolve_device(settings.get("device"), id.slot));
  return id;
}

Result<kernels::CpuOptions> cpu_options(const Settings& settings, const Identity& id) {
  kernels::CpuOptions options;
  TANDEM_ASSIGN_OR_RETURN(const std::int64_t threads, settings.get_int("threads"));
  // A share of the machine, and no more than this slot may use: it may be bound to its share
  // already.
  const int share = static_cast<int>(std::thread::hardware_concurrency()) / id.local_workers;
  options.threads =
      threads > 0 ? static_cast<int>(threads) : std::min(std::max(1, share), processors());
  return options;
}

Result<kernels::Backend> open_device(const Settings& settings, const Identity& id) {
  if (id.device == "cuda") return kernels::make_cuda_backend({.device = id.slot, .uuid = id.gpu});
  TANDEM_ASSIGN_OR_RETURN(const auto options, cpu_options(settings, id));
  return kernels::make_cpu_backend(options);
}

Result<runtime::ModelHostOptions> model_options(const Settings& settings,
                                                const kernels::DeviceProfile& profile,
                                                const Identity& id) {
  runtime::ModelHostOptions options;
  const bool cuda = profile.type == kernels::DeviceType::kCuda;
  const bool has_bf16 = cuda || profile.has_amx_bf16 || profile.has_avx512_bf16;
  const std::string& dtype = settings.get("dtype");
  options.dtype = has_bf16 ? DType::kBF16 : DType::kF32;
  if (dtype != "auto") {
    TANDEM_ASSIGN_OR_RETURN(options.dtype, kernels::parse_compute_dtype(profile, dtype));
  }
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

}  // namespace tandem::worker
