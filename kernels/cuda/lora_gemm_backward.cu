// dx = dy W + du A: see lora_gemm.h. A file of its own, because one takes a minute to compile.
#include "kernels/cuda/lora_gemm_kernel.cuh"

namespace tandem::kernels::cuda::lora_gemm {

void run_backward(cudaStream_t stream, const Product& product, const Tiling& tiling) {
  if (tiling.wide) return Kernel<128, 256, false, true>::launch(stream, product, tiling);
  Kernel<128, 192, true, true>::launch(stream, product, tiling);
}

}  // namespace tandem::kernels::cuda::lora_gemm
