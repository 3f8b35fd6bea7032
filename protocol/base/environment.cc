#include "protocol/base/environment.h"

#include <limits.h>
#include <unistd.h>

#include <array>
#include <cstdlib>

namespace tandem {

void start_with_environment(std::initializer_list<EnvironmentVariable> variables, char** argv) {
  bool changed = false;
  for (const auto& [name, value] : variables)
    changed = (std::getenv(name) == nullptr && ::setenv(name, value, 1) == 0) || changed;
  if (!changed) return;  // always so the second time
  // By its path, so that the process keeps its name.
  std::array<char, PATH_MAX> path{};
  if (::readlink("/proc/self/exe", path.data(), path.size() - 1) > 0)
    (void)::execv(path.data(), argv);
}

}  // namespace tandem
