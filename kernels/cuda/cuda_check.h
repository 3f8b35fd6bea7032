// Private to kernels/cuda: a failed call of CUDA or one of its libraries is a DeviceError.
#pragma once

#include "kernels/device_error.h"
#include "protocol/base/str.h"

#include <cublasLt.h>
#include <cuda_runtime.h>

namespace tandem::kernels::cuda {

inline void check_cuda(cudaError_t code, const char* what) {
  if (code != cudaSuccess) [[unlikely]]
    throw DeviceError(
        str("CUDA: ", what, ": ", cudaGetErrorName(code), ": ", cudaGetErrorString(code)));
}

inline void check_cublas(cublasStatus_t code, const char* what) {
  if (code != CUBLAS_STATUS_SUCCESS) [[unlikely]]
    throw DeviceError(str("cuBLASLt: ", what, ": ", cublasLtGetStatusName(code)));
}

}  // namespace tandem::kernels::cuda

#define TANDEM_CUDA(call) ::tandem::kernels::cuda::check_cuda((call), #call)
#define TANDEM_CUBLAS(call) ::tandem::kernels::cuda::check_cublas((call), #call)
/// After every kernel launch.
#define TANDEM_LAUNCHED(kernel) ::tandem::kernels::cuda::check_cuda(cudaGetLastError(), kernel)
