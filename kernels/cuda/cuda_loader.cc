#include "kernels/cuda/cuda_module.h"
#include "kernels/module.h"

namespace tandem::kernels {
namespace {

Result<const cuda::Module*> module() {
  static const Result<const cuda::Module*> loaded =
      open_module<cuda::Module>(cuda::kModuleFile, cuda::kModuleEntry, "CUDA backend");
  return loaded;
}

}  // namespace

Status check_cuda_module() {
  return module().status();
}

Result<Backend> make_cuda_backend(const CudaOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(const cuda::Module* loaded, module());
  return loaded->make(options);
}

Result<std::string> cuda_uuid(int device) {
  TANDEM_ASSIGN_OR_RETURN(const cuda::Module* loaded, module());
  return loaded->uuid(device);
}

}  // namespace tandem::kernels
