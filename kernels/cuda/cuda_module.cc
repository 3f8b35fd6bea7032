// The module's one exported function, and how a GPU is found and opened.
#include "kernels/cuda/cuda_module.h"

#include "kernels/cuda/cuda_allocator.h"
#include "kernels/cuda/cuda_ops.h"

namespace tandem::kernels::cuda {
namespace {

/// The oldest GPU that the kernels are built for.
constexpr int kComputeCapabilityMin = 80;

Result<DeviceProfile> open_device(int index) {
  int count = 0;
  if (const cudaError_t code = cudaGetDeviceCount(&count); code != cudaSuccess)
    return unavailable_error(str("no usable GPU: ", cudaGetErrorString(code)));
  if (index < 0 || index >= count)
    return unavailable_error(str("no GPU ", index, ": this machine has ", count));
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

Result<Backend> make(const CudaOptions& options) {
  try {
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

}  // namespace
}  // namespace tandem::kernels::cuda

extern "C" __attribute__((visibility("default"))) const tandem::kernels::cuda::Module*
tandem_cuda_module() {
  static const tandem::kernels::cuda::Module module{TANDEM_VERSION, tandem::kernels::cuda::make};
  return &module;
}
