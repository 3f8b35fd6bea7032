// Private to kernels/cuda: y = x W^T + bias for the few rows of a decode step, at the speed of
// reading W, with the rows' adapters added on the way.
#pragma once

#include "kernels/op_args.h"

#include <cuda_runtime.h>

namespace tandem::kernels::cuda {

inline constexpr std::int64_t kSmallProductRows = 64;

/// x [T, I] bf16, W [N, I] bf16, y [T, N] bf16 or f32. `sites`: of the linear's adapters, or none.
[[nodiscard]] bool fits_small_product(const Tensor& x, const Tensor& y, std::size_t sites,
                                      int compute_capability);
/// `bias` [N] bf16 or null. With `sites`, y also gets B u of each row's adapter; the kernel before
/// it in the stream must be lora_segments_shrink of the same rows, and only it may write u: this
/// one starts while that still runs.
void small_product(cudaStream_t stream, const Tensor& x, const void* w, const void* bias,
                   const Tensor& y, const std::vector<LoraSite>& sites, const AdapterRows* rows,
                   const Tensor& u);

}  // namespace tandem::kernels::cuda
