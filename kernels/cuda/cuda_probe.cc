// Names GPUs through NVML, which needs no context and no CUDA library.
#include "kernels/cuda/cuda_backend.h"

#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <cstring>

namespace tandem::kernels {
namespace {

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

/// NVML counts all GPUs, CUDA those that CUDA_VISIBLE_DEVICES names.
Result<int> physical_index(int visible) {
  const char* list = std::getenv("CUDA_VISIBLE_DEVICES");
  if (list == nullptr || *list == '\0') return visible;
  for (int i = 0; i < visible; ++i) {
    list = std::strchr(list, ',');
    if (list == nullptr)
      return unavailable_error(str("no GPU ", visible, ": CUDA_VISIBLE_DEVICES is ",
                                   std::getenv("CUDA_VISIBLE_DEVICES")));
    ++list;
  }
  char* end = nullptr;
  const long index = std::strtol(list, &end, 10);
  // Named by UUID: then the order is CUDA's business, and the name alone may be another GPU's.
  return end == list ? visible : static_cast<int>(index);
}

}  // namespace

Result<CudaDevice> probe_cuda_device(int device) {
  TANDEM_ASSIGN_OR_RETURN(const int index, physical_index(device));
  TANDEM_ASSIGN_OR_RETURN(const Nvml nvml, open_nvml());
  if (const int code = nvml.init(); code != 0)
    return unavailable_error(str("the NVIDIA driver does not start (NVML error ", code, ")"));
  unsigned count = 0;
  Nvml::Device handle = nullptr;
  std::array<char, 96> name{}, uuid{};
  Nvml::Memory memory{};
  int major = 0, minor = 0;
  int code = nvml.count(&count);
  if (code == 0 && index >= 0 && index < static_cast<int>(count)) {
    code = nvml.handle(static_cast<unsigned>(index), &handle);
    if (code == 0) code = nvml.name(handle, name.data(), name.size());
    if (code == 0) code = nvml.uuid(handle, uuid.data(), uuid.size());
    if (code == 0) code = nvml.memory(handle, &memory);
    if (code == 0) code = nvml.capability(handle, &major, &minor);
  }
  (void)nvml.shutdown();
  if (code != 0) return unavailable_error(str("GPU ", index, ": NVML error ", code));
  if (handle == nullptr)
    return unavailable_error(str("no GPU ", index, ": this machine has ", count));
  return CudaDevice{name.data(), uuid.data(), static_cast<std::int64_t>(memory.total),
                    major * 10 + minor};
}

}  // namespace tandem::kernels
