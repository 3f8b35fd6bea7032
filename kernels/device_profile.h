// What a backend's workspace and packing arithmetic depends on, as plain numbers, so that a machine
// without the device can plan for it.
#pragma once

#include "protocol/base/dtype.h"
#include "protocol/base/result.h"

#include <cstdint>
#include <string>
#include <vector>

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

/// What engines on such a device can compute in; which is fastest depends on the processor.
std::vector<DType> compute_dtypes(const DeviceProfile& profile);
bool offers(const DeviceProfile& profile, DType dtype);
/// "f32, bf16 and f16".
std::string dtype_names(const std::vector<DType>& dtypes);
/// A user's word. refused_error names what the device offers; of an unknown word invalid_error
/// names the nearest too.
Result<DType> parse_compute_dtype(const DeviceProfile& profile, const std::string& word);

}  // namespace tandem::kernels
