// dx = dy W + du A: see lora_gemm.h. A file of its own, because one takes a minute to compile.
#include "kernels/cuda/lora_gemm_kernel.cuh"

namespace tandem::kernels::cuda::lora_gemm {

void run_backward_bf16(cudaStream_t stream, const Product& product, const Tiling& tiling) {
  run_kernel<cutlass::bfloat16_t, true>(stream, product, tiling);
}

}  // namespace tandem::kernels::cuda::lora_gemm
