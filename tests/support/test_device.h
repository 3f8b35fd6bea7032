// The device that whole-engine tests run on: the CPU, or, with TANDEM_TEST_GPU set, the GPU.
#pragma once

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"

#include <cstdlib>
#include <vector>

namespace tandem::test {

inline bool on_gpu() {
  return std::getenv("TANDEM_TEST_GPU") != nullptr;
}

inline kernels::Backend make_test_backend(int threads) {
  if (on_gpu()) return kernels::make_cuda_backend({}).value();
  return kernels::make_cpu_backend({threads, 0});
}

/// What that device computes in.
inline std::vector<DType> test_dtypes() {
  kernels::DeviceProfile profile;
  profile.type = on_gpu() ? kernels::DeviceType::kCuda : kernels::DeviceType::kCpu;
  return kernels::compute_dtypes(profile);
}

}  // namespace tandem::test
