// Attention of new rows against the paged cache.
#include "kernels/cuda/cuda_ops.h"

namespace tandem::kernels::cuda {

void CudaOps::do_paged_attention_forward(Exec&, const PagedAttentionArgs&) {
  throw DeviceError("paged_attention_forward: not written yet");
}

}  // namespace tandem::kernels::cuda
