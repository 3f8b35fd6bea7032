// Private to kernels/cuda: a weight times one row, the product of a decode step of one sequence. It
// reads every weight once and is bound by that alone.
#pragma once

#include "kernels/cuda/cuda_check.h"
#include "kernels/op_args.h"

#include <cuda_runtime.h>

namespace tandem::kernels::cuda {

inline constexpr std::int64_t kGemvColumnsMax = 32768;  ///< x lies in shared memory

/// One row, bf16 or f16 weights, rows of 16-byte multiples; adapters without dropout and of rank 64
/// at most, with them y not f32.
bool gemv_fits(const LinearArgs& args);
/// y [1, N] of x's dtype or f32 = x [1, I] W^T + bias [N] (or undefined) + u B^T of the row's
/// adapter, or what `then` makes of it. Every output is summed in an order of its own row alone. u
/// as for skinny(), undefined without adapters.
void gemv(cudaStream_t stream, const LinearArgs& args, const Tensor& u);
/// Without adapters, gemv_ordered.cu (Hopper): the inner size is summed in the order of skinny.h
/// under kInvariant.
void ordered_gemv(cudaStream_t stream, const LinearArgs& args);

}  // namespace tandem::kernels::cuda
