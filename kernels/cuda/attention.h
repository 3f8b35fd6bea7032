// Private to kernels/cuda: packed causal attention has three implementations with one meaning.
//   simple  any head dim, window and soft cap, f32 and bf16; right first, slow
//   own     bf16, head dim 64 or 128, no soft cap, Hopper: wgmma fed by the copy engine. Nothing is
//           added in an order that timing decides, so it repeats its bits
//   cudnn   bf16, head dim 64 or 128, no window or soft cap; its backward does not repeat its bits
// All share `lse`: f32 [T, H], the natural logarithm of each row's sum of exponentials.
#pragma once

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda_workspace.h"
#include "kernels/exec.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

namespace tandem::kernels::cuda {

enum class AttentionPath { kSimple, kOwn, kCudnn };

/// The one place that decides. `deterministic` is CudaOptions'. TANDEM_CUDA_ATTENTION=simple, own
/// or cudnn overrides the choice among those that can compute the shape (for benches and tests).
AttentionPath choose_path(const AttentionSpec& spec, const Tensor& qkv,
                          const DeviceProfile& profile, bool deterministic, Numerics numerics);

void simple_attention_forward(cudaStream_t stream, const AttentionArgs& args);
void simple_attention_backward(cudaStream_t stream, const AttentionBackwardArgs& args,
                               float* delta);

/// Scratch as the layouts say; they are `fast`. attention_own_*.cu.
void own_attention_forward(cudaStream_t stream, const AttentionArgs& args,
                           const AttentionForwardLayout& layout, char* scratch);
void own_attention_backward(cudaStream_t stream, const AttentionBackwardArgs& args,
                            const AttentionBackwardLayout& layout, char* scratch);

/// The forward kernel over the cache, for the sequences with at least `rows_min` new rows; inert
/// rows become zero. `layout` is `fast`.
void own_paged_forward(cudaStream_t stream, const PagedAttentionArgs& args,
                       const PagedAttentionLayout& layout, char* scratch, int rows_min);

/// delta [T, H] f32: the sum over the head of dout * out.
void attention_delta(cudaStream_t stream, const AttentionBackwardArgs& args, float* delta);
/// Zeroes rows [seq_offsets[S], T) of a [T, columns] tensor.
void zero_inert_rows(cudaStream_t stream, const Tensor& seq_offsets, const Tensor& x);

/// cuDNN's graphs, built once per bounds and kept. Not thread-safe.
class CudnnAttention {
 public:
  CudnnAttention();
  ~CudnnAttention();
  CudnnAttention(const CudnnAttention&) = delete;
  CudnnAttention& operator=(const CudnnAttention&) = delete;
  /// False: cuDNN has no plan for the shape within the layout's bytes; nothing was launched and
  /// `refusal()` says why. `scratch`: as cudnn_attention_layout says.
  bool forward(cudaStream_t stream, const AttentionArgs& args, char* scratch);
  bool backward(cudaStream_t stream, const AttentionBackwardArgs& args, char* scratch);
  [[nodiscard]] const std::string& refusal() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// What cuDNN is told of the packed layout, from seq_offsets: lengths [sequences] and element
/// offsets [sequences + 1] of rows of several widths. Sequences beyond S are empty.
struct RaggedOffsets {
  std::int32_t* lengths;
  std::int32_t *qkv, *out, *kv, *stats;
  std::int64_t sequences;
};
void ragged_offsets(cudaStream_t stream, const Tensor& seq_offsets, const AttentionSpec& spec,
                    const RaggedOffsets& to);
/// Copies dk and dv, [T, K * D] each, into their columns of dqkv.
void scatter_kv_gradients(cudaStream_t stream, const AttentionSpec& spec, const void* dk,
                          const void* dv, const Tensor& dqkv);

/// Made on first use.
class AttentionPlans {
 public:
  CudnnAttention& cudnn() {
    if (!cudnn_) cudnn_ = std::make_unique<CudnnAttention>();
    return *cudnn_;
  }

 private:
  std::unique_ptr<CudnnAttention> cudnn_;
};

}  // namespace tandem::kernels::cuda
