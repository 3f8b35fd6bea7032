#include "kernels/cuda/cuda_module.h"

#include <dlfcn.h>
#include <unistd.h>

#include <climits>
#include <cstring>

namespace tandem::kernels {
namespace {

/// Beside the program, or beside it in lib/: where the build and `install` put it.
std::string module_path() {
  char path[PATH_MAX] = {};
  if (::readlink("/proc/self/exe", path, sizeof path - 1) <= 0) return cuda::kModuleFile;
  const std::string program(path);
  const std::string folder = program.substr(0, program.rfind('/') + 1);
  for (const char* where : {"", "../", "../lib/", "../lib/tandem/"}) {
    const std::string candidate = folder + where + cuda::kModuleFile;
    if (::access(candidate.c_str(), R_OK) == 0) return candidate;
  }
  return "";
}

Result<const cuda::Module*> load_module() {
  const std::string path = module_path();
  if (path.empty())
    return unavailable_error(
        str("no ", cuda::kModuleFile, " beside the program: this build has no CUDA backend"));
  // Never closed: it holds the driver.
  void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr)
    return unavailable_error(str("the CUDA backend does not load: ", ::dlerror()));
  using Entry = const cuda::Module* (*)();
  const auto entry = reinterpret_cast<Entry>(::dlsym(handle, cuda::kModuleEntry));
  if (entry == nullptr) return internal_error(str(path, " has no ", cuda::kModuleEntry));
  const cuda::Module* module = entry();
  if (std::strcmp(module->version, TANDEM_VERSION) != 0)
    return refused_error(
        str(path, " is of version ", module->version, ", this program of ", TANDEM_VERSION));
  return module;
}

Result<const cuda::Module*> module() {
  static const Result<const cuda::Module*> loaded = load_module();
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

}  // namespace tandem::kernels
