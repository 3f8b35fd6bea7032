// The CUDA backend as the rest of the engine sees it: a shared module beside the program, loaded
// when a GPU is asked for. Nothing else links CUDA, so one program runs with and without a GPU,
// and a missing driver or library is an error message, not a program that does not start.
#pragma once

#include "kernels/ops.h"

#include <cstdint>
#include <string>

namespace tandem::kernels {

struct CudaOptions {
  int device = 0;
  /// map() refuses beyond this many bytes; 0: what the driver gives.
  std::int64_t memory_bytes_max = 0;
  /// Not empty: the GPU of this UUID (cuda_uuid), whatever number it has by now.
  std::string uuid = {};
};

/// A GPU as the driver names it, found through NVML: no context, none of CUDA's libraries.
struct CudaDevice {
  std::string name, uuid;
  std::int64_t memory_bytes = 0;
  int compute_capability = 0;  ///< 90 for 9.0
};

/// `device` counts those that CUDA_VISIBLE_DEVICES leaves. unavailable_error: no driver, or no such
/// device.
Result<CudaDevice> probe_cuda_device(int device);

/// Whether this program could open a GPU at all: the module is there and finds its libraries.
Status check_cuda_module();

/// Creates a context. unavailable_error says what is missing: the module (a build without CUDA),
/// the driver, a library or the device; refused_error for a GPU older than this build knows.
Result<Backend> make_cuda_backend(const CudaOptions& options);

/// UUID of the GPU that make_cuda_backend opens for this number now, as CUDA tells it.
Result<std::string> cuda_uuid(int device);

}  // namespace tandem::kernels
