// Private to kernels/cuda: packed causal attention has two implementations with one meaning.
//   simple  any head dim, window and soft cap, any dtype; right first, slow
//   own     bf16 and f16, head dim 64 or 128, no soft cap, Hopper: wgmma fed by the copy engine.
//           Nothing is added in an order that timing decides, so it repeats its bits
// Both share `lse`: f32 [T, H], the natural logarithm of each row's sum of exponentials.
#pragma once

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda_workspace.h"
#include "kernels/exec.h"

#include <cuda_runtime.h>

namespace tandem::kernels::cuda {

enum class AttentionPath { kSimple, kOwn };

/// The one place that decides: own where it can compute the shape. TANDEM_CUDA_ATTENTION=simple
/// takes the simple path everywhere, for tests.
AttentionPath choose_path(const AttentionSpec& spec, DType dtype, const DeviceProfile& profile);

void simple_attention_forward(cudaStream_t stream, const AttentionArgs& args);
void simple_attention_backward(cudaStream_t stream, const AttentionBackwardArgs& args,
                               float* delta);

/// A stream, and how many multiprocessors kernels that fill a device may take.
struct Queue {
  cudaStream_t stream;
  int multiprocessors;
  operator cudaStream_t() const { return stream; }
};

/// Scratch as the layouts say; they are `fast`. attention_own_*.cu. Forward under kInvariant gives
/// a row the bits of paged_ordered.cu.
void own_attention_forward(const Queue& queue, Numerics numerics, const AttentionArgs& args,
                           const AttentionForwardLayout& layout, char* scratch);
void own_attention_backward(const Queue& queue, const AttentionBackwardArgs& args,
                            const AttentionBackwardLayout& layout, char* scratch);

/// The forward kernel over the cache, for the sequences with at least `rows_min` new rows; inert
/// rows become zero. `layout` is `fast`.
void own_paged_forward(const Queue& queue, Numerics numerics, const PagedAttentionArgs& args,
                       const PagedAttentionLayout& layout, char* scratch, int rows_min);

/// delta [T, H] f32: the sum over the head of dout * out.
void attention_delta(cudaStream_t stream, const AttentionBackwardArgs& args, float* delta);
/// Zeroes rows [seq_offsets[S], T) of a [T, columns] tensor.
void zero_inert_rows(cudaStream_t stream, const Tensor& seq_offsets, const Tensor& x);

}  // namespace tandem::kernels::cuda
