// Packed causal attention, forward and backward.
#include "kernels/cuda/cuda_ops.h"

namespace tandem::kernels::cuda {

class AttentionPlans {};

void CudaOps::do_attention_forward(Exec&, const AttentionArgs&) {
  throw DeviceError("attention_forward: not written yet");
}

void CudaOps::do_attention_backward(Exec&, const AttentionBackwardArgs&) {
  throw DeviceError("attention_backward: not written yet");
}

}  // namespace tandem::kernels::cuda
