// Private to kernels/cuda: what the loader calls in the module (kernels/module.h).
#pragma once

#include "kernels/cuda/cuda_backend.h"

namespace tandem::kernels::cuda {

struct Module {
  const char* version;
  Result<Backend> (*make)(const CudaOptions& options);
  Result<std::string> (*uuid)(int device);
};

inline constexpr const char* kModuleFile = "libtandem_cuda.so";
inline constexpr const char* kModuleEntry = "tandem_cuda_module";

}  // namespace tandem::kernels::cuda
