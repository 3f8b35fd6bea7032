#include "kernels/cuda/cuda_ops.h"
namespace tandem::kernels::cuda {
void CudaOps::do_linear_forward(Exec&, const LinearArgs&) {
  throw DeviceError("x");
}
void CudaOps::do_linear_backward(Exec&, const LinearBackwardArgs&) {
  throw DeviceError("x");
}
}  // namespace tandem::kernels::cuda
