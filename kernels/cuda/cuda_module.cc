// The module's one exported function, and how a GPU is found and opened.
#include "kernels/cuda/cuda_module.h"

#include "kernels/cuda/cuda_allocator.h"
#include "kernels/cuda/cuda_ops.h"

namespace tandem::kernels::cuda {
namespace {

/// The oldest GPU that the kernels are built for.
constexpr int kComputeCapabilityMin = 80;

/// As NVML writes it: GPU-01234567-89ab-cdef-0123-456789abcdef.
std::string uuid_text(const cudaUUID_t& uuid) {
  constexpr const char* kHex = "0123456789abcdef";
  std::string text = "GPU";
  for (int i = 0; i < 16; ++i) {
    if (i == 0 || i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    const auto byte = static_cast<unsigned char>(uuid.bytes[i]);
    text += kHex[byte >> 4];
    text += kHex[byte & 15];
  }
  return text;
}

/// The number that the asked-for GPU has now.
Result<int> find_device(const CudaOptions& options) {
  int count = 0;
  if (const cudaError_t code = cudaGetDeviceCount(&count); code != cudaSuccess)
    return unavailable_error(str("no usable GPU: ", cudaGetErrorString(code)));
  if (options.uuid.empty()) {
    if (options.device < 0 || options.device >= count)
      return unavailable_error(str("no GPU ", options.device, ": this machine has ", count));
    return options.device;
  }
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp prop{};
    TANDEM_CUDA(cudaGetDeviceProperties(&prop, index));
    if (uuid_text(prop.uuid) == options.uuid) return index;
  }
  return unavailable_error(
      str("GPU ", options.uuid, " is not among the ", count, " that are here"));
}

Result<DeviceProfile> open_device(int index) {
  TANDEM_CUDA(cudaSetDevice(index));
  cudaDeviceProp prop{};
  TANDEM_CUDA(cudaGetDeviceProperties(&prop, index));
  DeviceProfile profile;
  profile.type = DeviceType::kCuda;
  profile.name = prop.name;
  profile.records_graphs = true;
  profile.sm_count = prop.multiProcessorCount;
  profile.compute_capability = prop.major * 10 + prop.minor;
  profile.memory_bytes = static_cast<std::int64_t>(prop.totalGlobalMem);
  if (profile.compute_capability < kComputeCapabilityMin)
    return refused_error(str("GPU ", index, " (", profile.name, ") has compute capability ",
                             prop.major, ".", prop.minor, "; this build needs ",
                             kComputeCapabilityMin / 10, ".0 or newer"));
  return profile;
}

Result<Backend> make(const CudaOptions& asked) {
  try {
    CudaOptions options = asked;
    TANDEM_ASSIGN_OR_RETURN(options.device, find_device(asked));
    TANDEM_ASSIGN_OR_RETURN(const DeviceProfile profile, open_device(options.device));
    const auto bytes_in_use = [] {
      std::size_t free = 0, total = 0;
      TANDEM_CUDA(cudaMemGetInfo(&free, &total));
      return static_cast<std::int64_t>(total - free);
    };
    return Backend{bytes_in_use,
                   std::make_unique<CudaAllocator>(options.device, options.memory_bytes_max),
                   std::make_unique<MemoryLedger>(), std::make_unique<CudaOps>(options, profile)};
  } catch (const DeviceError& error) {
    return unavailable_error(error.what());
  }
}

Result<std::string> uuid(int device) {
  try {
    TANDEM_ASSIGN_OR_RETURN(const int index, find_device({.device = device}));
    cudaDeviceProp prop{};
    TANDEM_CUDA(cudaGetDeviceProperties(&prop, index));
    return uuid_text(prop.uuid);
  } catch (const DeviceError& error) {
    return unavailable_error(error.what());
  }
}

}  // namespace
}  // namespace tandem::kernels::cuda

extern "C" __attribute__((visibility("default"))) const tandem::kernels::cuda::Module*
tandem_cuda_module() {
  static const tandem::kernels::cuda::Module module{TANDEM_VERSION, tandem::kernels::cuda::make,
                                                    tandem::kernels::cuda::uuid};
  return &module;
}
