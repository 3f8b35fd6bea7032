#include "kernels/module.h"

#include "protocol/base/str.h"

#include <dlfcn.h>
#include <unistd.h>

#include <climits>
#include <cstring>

namespace tandem::kernels {
namespace {

std::string module_path(const char* file) {
  char path[PATH_MAX] = {};
  if (::readlink("/proc/self/exe", path, sizeof path - 1) <= 0) return file;
  const std::string program(path);
  const std::string folder = program.substr(0, program.rfind('/') + 1);
  for (const char* where : {"", "../", "../lib/", "../lib/tandem/"}) {
    const std::string candidate = folder + where + file;
    if (::access(candidate.c_str(), R_OK) == 0) return candidate;
  }
  return "";
}

}  // namespace

Result<const void*> open_module(const char* file, const char* entry, const char* what) {
  const std::string path = module_path(file);
  if (path.empty())
    return unavailable_error(str("no ", file, " beside the program: this build has no ", what));
  // Never closed: it holds the driver.
  void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return unavailable_error(str(what, " does not load: ", ::dlerror()));
  using Entry = const void* (*)();
  const auto function = reinterpret_cast<Entry>(::dlsym(handle, entry));
  if (function == nullptr) return internal_error(str(path, " has no ", entry));
  const void* table = function();
  const char* version = *static_cast<const char* const*>(table);
  if (std::strcmp(version, TANDEM_VERSION) != 0)
    return refused_error(
        str(path, " is of version ", version, ", this program of ", TANDEM_VERSION));
  return table;
}

}  // namespace tandem::kernels
