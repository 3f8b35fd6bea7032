#include "kernels/cpu/openmp_spin.h"

#include <unistd.h>

#include <cstdlib>

namespace tandem::kernels::cpu {

bool limit_openmp_spin_of_children() {
  if (std::getenv("GOMP_SPINCOUNT") != nullptr || std::getenv("OMP_WAIT_POLICY") != nullptr)
    return false;
  return ::setenv("GOMP_SPINCOUNT", kOpenmpSpinCount, 1) == 0;
}

void limit_openmp_spin(char** argv) {
  // Set for good after the first time, so this cannot loop.
  if (limit_openmp_spin_of_children()) (void)::execv("/proc/self/exe", argv);
}

}  // namespace tandem::kernels::cpu
