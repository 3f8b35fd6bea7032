// Low-rank products of rows with any mix of adapters.
#include "kernels/cuda/cuda_ops.h"

namespace tandem::kernels::cuda {

void lora_segments_shrink(cudaStream_t, const std::vector<LoraSite>&, const AdapterRows&, Tensor,
                          Tensor) {
  throw DeviceError("lora_segments_shrink: not written yet");
}

void lora_segments_expand(cudaStream_t, const std::vector<LoraSite>&, const AdapterRows&, Tensor,
                          Tensor) {
  throw DeviceError("lora_segments_expand: not written yet");
}

void lora_segments_backward(cudaStream_t, const LinearBackwardArgs&, Tensor, Tensor) {
  throw DeviceError("lora_segments_backward: not written yet");
}

}  // namespace tandem::kernels::cuda
