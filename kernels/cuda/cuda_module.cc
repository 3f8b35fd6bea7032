// The module's one exported function, and how a GPU is found and opened.
#include "kernels/cuda/cuda_module.h"

#include "kernels/cuda/cuda_allocator.h"
#include "kernels/cuda/cuda_ops.h"

#include <dlfcn.h>

#include <array>

namespace tandem::kernels::cuda {
namespace {

/// The oldest GPU that the kernels are built for.
constexpr int kComputeCapabilityMin = 80;

/// The few functions of NVML that name a GPU without creating a context on it.
struct Nvml {
  using Device = void*;
  struct Memory {
    unsigned long long total, free, used;
  };
  int (*init)() = nullptr;
  int (*handle)(unsigned, Device*) = nullptr;
  int (*count)(unsigned*) = nullptr;
  int (*name)(Device, char*, unsigned) = nullptr;
  int (*uuid)(Device, char*, unsigned) = nullptr;
  int (*memory)(Device, Memory*) = nullptr;
  int (*capability)(Device, int*, int*) = nullptr;
  int (*shutdown)() = nullptr;
};

template <class F>
bool find(void* library, F& function, const char* name) {
  function = reinterpret_cast<F>(::dlsym(library, name));
  return function != nullptr;
}

Result<Nvml> open_nvml() {
  void* library = ::dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    return unavailable_error("no NVIDIA driver on this machine (libnvidia-ml.so.1 not found)");
  Nvml nvml;
  if (!find(library, nvml.init, "nvmlInit_v2") ||
      !find(library, nvml.count, "nvmlDeviceGetCount_v2") ||
      !find(library, nvml.handle, "nvmlDeviceGetHandleByIndex_v2") ||
      !find(library, nvml.name, "nvmlDeviceGetName") ||
      !find(library, nvml.uuid, "nvmlDeviceGetUUID") ||
      !find(library, nvml.memory, "nvmlDeviceGetMemoryInfo") ||
      !find(library, nvml.capability, "nvmlDeviceGetCudaComputeCapability") ||
      !find(library, nvml.shutdown, "nvmlShutdown"))
    return unavailable_error("this NVIDIA driver is too old: libnvidia-ml.so.1 lacks a function");
  return nvml;
}

Result<CudaDevice> probe(int index) {
  TANDEM_ASSIGN_OR_RETURN(const Nvml nvml, open_nvml());
  if (const int code = nvml.init(); code != 0)
    return unavailable_error(str("the NVIDIA driver does not start (NVML error ", code, ")"));
  unsigned count = 0;
  Nvml::Device device = nullptr;
  std::array<char, 96> name{}, uuid{};
  Nvml::Memory memory{};
  int major = 0, minor = 0;
  int code = nvml.count(&count);
  if (code == 0 && index >= 0 && index < static_cast<int>(count)) {
    code = nvml.handle(static_cast<unsigned>(index), &device);
    if (code == 0) code = nvml.name(device, name.data(), name.size());
    if (code == 0) code = nvml.uuid(device, uuid.data(), uuid.size());
    if (code == 0) code = nvml.memory(device, &memory);
    if (code == 0) code = nvml.capability(device, &major, &minor);
  }
  (void)nvml.shutdown();
  if (code != 0) return unavailable_error(str("GPU ", index, ": NVML error ", code));
  if (device == nullptr)
    return unavailable_error(str("no GPU ", index, ": this machine has ", count));
  return CudaDevice{name.data(), uuid.data(), static_cast<std::int64_t>(memory.total),
                    major * 10 + minor};
}

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
    return Backend{std::make_unique<CudaAllocator>(options.device, options.memory_bytes_max),
                   std::make_unique<MemoryLedger>(), std::make_unique<CudaOps>(options, profile)};
  } catch (const DeviceError& error) {
    return unavailable_error(error.what());
  }
}

}  // namespace
}  // namespace tandem::kernels::cuda

extern "C" __attribute__((visibility("default"))) const tandem::kernels::cuda::Module*
tandem_cuda_module() {
  static const tandem::kernels::cuda::Module module{TANDEM_VERSION, tandem::kernels::cuda::probe,
                                                    tandem::kernels::cuda::make};
  return &module;
}
