// What a backend's workspace and packing arithmetic depends on, as plain numbers, so that a machine
// without the device can plan for it.
#pragma once

#include <cstdint>
#include <string>

namespace tandem::kernels {

enum class DeviceType : int { kCpu = 0, kCuda = 1 };

struct DeviceProfile {
  DeviceType type = DeviceType::kCpu;
  std::string name;  ///< "Intel(R) Xeon(R) ...", for people
  int threads = 1;   ///< CPU: OpenMP threads the ops use (per-thread scratch)
  bool has_avx2 = false, has_avx512 = false, has_avx512_bf16 = false, has_amx_bf16 = false;
  int sm_count = 0;               ///< CUDA
  int compute_capability = 0;     ///< CUDA: 90 for sm_90
  bool records_graphs = false;    ///< see Ops::replay: few distinct shapes pay
  std::int64_t memory_bytes = 0;  ///< device memory (CPU: physical memory)
};

}  // namespace tandem::kernels
