// Scratch of the CUDA backend's ops, as pure functions of shapes, dtypes and the device profile.
// They stand above the backend, in plain C++, because the estimator plans for a GPU on machines
// that have none. The backend takes exactly these bytes and cuts them up as the layouts say.
// Offsets are from the scratch's start and multiples of kDeviceAlignment. Any thread.
#pragma once

#include "kernels/device_profile.h"
#include "kernels/op_args.h"

namespace tandem::kernels::cuda {

/// What cuBLASLt may use for one product; on Hopper its fastest algorithms want 32 MiB.
inline constexpr std::int64_t kGemmWorkspaceBytes = 32 << 20;

/// Adapters of a batch in which one adapter at most can appear (one segment): factors are gathered
/// into plain matrices, block-diagonal over the sites, and everything is a product. Where the
/// kernels of lora_thin.h fit, the thin products read the adapters' own memory and only the factor
/// of the product with u or du is gathered. `columns` = sites * rank_max.
struct LinearForwardLayout {
  std::int64_t columns = 0;
  bool single = false;       ///< one segment; else rows of any adapters, by the segmented kernels
  bool thin = false;         ///< single, by lora_thin.h
  bool makes_x = false;      ///< of its recipe, in the pass for u
  std::int64_t u = 0;        ///< [T, columns] cd, where the caller keeps none
  std::int64_t a = 0;        ///< single, not thin: [columns, I] cd: s A
  std::int64_t b = 0;        ///< single: [N, columns] cd
  std::int64_t dropped = 0;  ///< single, not thin: [T, I] cd: dropout(x) of one site
  std::int64_t gemm = 0;     ///< kGemmWorkspaceBytes
  std::int64_t bytes = 0;    ///< of many segments no fewer than of one: a batch may be either
};
LinearForwardLayout linear_forward_layout(const LinearArgs& args, const DeviceProfile& profile);

/// du and dB in one pass over dy (lora_thin_pair.cu): what its blocks leave to be added up. Or, of
/// many ranks, in two passes, which leave nothing.
struct ThinPairLayout {
  std::int64_t columns = 0;  ///< of the kernel, at least rank_max; 0: two passes
  std::int64_t width = 0;    ///< columns of a site a block takes
  std::int64_t blocks = 0;   ///< of columns, over all sites
  std::int64_t parts = 0;    ///< of the rows
  bool makes_dy = false;     ///< of dout and gate_up, on the way, in the first pass of two
  std::int64_t da = 0;       ///< [parts, rank_max, N / 2] f32, of the linear before
  std::int64_t du = 0;       ///< [blocks, T, rank_max] f32
  std::int64_t db = 0;       ///< [parts, N, rank_max] f32
};

struct LinearBackwardLayout {
  std::int64_t columns = 0;
  bool single = false;
  bool thin = false;
  bool makes_x = false;  ///< of its recipe, in the pass for dA
  ThinPairLayout pair;   ///< thin
  std::int64_t u = 0;    ///< [T, columns] cd, where forward kept none
  std::int64_t du = 0;   ///< [T, columns] cd: s dy B, where the caller wants none
  std::int64_t a = 0;    ///< single: [columns, I] cd
  // Single, not thin:
  std::int64_t a_scaled = 0;  ///< without u: [columns, I] cd: s A
  std::int64_t b = 0;         ///< [N, columns] cd: s B
  std::int64_t da = 0;        ///< [columns, I] f32
  std::int64_t db = 0;        ///< [N, columns] f32
  std::int64_t dropped = 0;   ///< [T, I] cd: dropout(x), then du A; only with dropout
  std::int64_t gemm = 0;
  std::int64_t bytes = 0;
};
LinearBackwardLayout linear_backward_layout(const LinearBackwardArgs& args,
                                            const DeviceProfile& profile);
bool makes_factor_grad(const MlpBackwardArgs& args, const DeviceProfile& profile);

/// Of the ops of full fine-tuning: one product into dW; the others take nothing.
std::int64_t linear_weight_grad_bytes(const LinearWeightGradArgs& args);

/// Rows of a norm up to 16 KiB stay in a block's registers: four accesses of 256 threads.
inline constexpr std::int64_t kNormRowBytesMax = 4 * 256 * 16;
/// With dweight: each block goes over rows of its own and keeps its part of the sum.
struct NormBackwardLayout {
  std::int64_t blocks = 0;  ///< 0: dweight is a pass of its own, or not wanted
  std::int64_t parts = 0;   ///< [blocks, C] f32
  std::int64_t bytes = 0;
};
NormBackwardLayout norm_backward_layout(const RmsNormBackwardArgs& args,
                                        const DeviceProfile& profile);

/// With dqk_norm, alike: blocks of the backward of a norm of q and k.
struct QkNormBackwardLayout {
  std::int64_t blocks = 0;  ///< 0: dqk_norm is not wanted
  std::int64_t parts = 0;   ///< [blocks, 2 * D] f32
  std::int64_t bytes = 0;
};
QkNormBackwardLayout qk_norm_backward_layout(const RopeBackwardArgs& args,
                                             const DeviceProfile& profile);

/// A chunk of logits in f32: enough rows to keep the product at full speed, few enough to be a
/// small part of the memory.
inline constexpr std::int64_t kLogitsChunkBytes = std::int64_t{1} << 30;
struct LinearCrossEntropyLayout {
  std::int64_t chunk_rows = 0;
  std::int64_t logits = 0;  ///< [chunk_rows, V] f32; the gradient, in cd, takes each row's place
  std::int64_t gemm = 0;
  std::int64_t bytes = 0;
};
LinearCrossEntropyLayout linear_cross_entropy_layout(const LinearCrossEntropyArgs& args);

// -- cuda_workspace_attention.cc
/// True when kernels/cuda has a fast kernel of its own for the shape: 16-bit elements, head dim 64
/// or 128, no soft cap, Hopper. The others take the simple kernel, right first.
bool attention_is_fast(const AttentionSpec& spec, DType dtype, const DeviceProfile& profile);

/// Rows of a tile that the fast kernels list on the device, and bytes of a list's entry.
inline constexpr std::int64_t kAttentionTileRows = 128, kAttentionTileBytes = 16;

struct AttentionForwardLayout {
  bool fast = false;
  std::int64_t count = 0;  ///< fast: i32: tiles of the batch
  std::int64_t tiles = 0;  ///< fast: [T / kAttentionTileRows + S] entries
  std::int64_t bytes = 0;
};
AttentionForwardLayout attention_forward_layout(const AttentionArgs& args,
                                                const DeviceProfile& profile);

struct AttentionBackwardLayout {
  bool fast = false;
  std::int64_t delta = 0;                       ///< [T, H] f32: the sum over a head of dout * out
  std::int64_t count = 0;                       ///< fast: as above
  std::int64_t query_tiles = 0, key_tiles = 0;  ///< fast: as above
  std::int64_t bytes = 0;
};
AttentionBackwardLayout attention_backward_layout(const AttentionBackwardArgs& args,
                                                  const DeviceProfile& profile);

std::int64_t attention_forward_bytes(const AttentionArgs& args, const DeviceProfile& profile);
std::int64_t attention_backward_bytes(const AttentionBackwardArgs& args,
                                      const DeviceProfile& profile);
/// cuda_workspace_serve.cc
std::int64_t paged_attention_forward_bytes(const PagedAttentionArgs& args,
                                           const DeviceProfile& profile);
std::int64_t sample_bytes(const SampleArgs& args, const DeviceProfile& profile);

struct PagedAttentionLayout {
  bool trains = false;     ///< training's kernel can read this cache
  bool fast = false;       ///< and takes the sequences with many new rows: attention_own_forward.cu
  std::int64_t count = 0;  ///< fast: i32, the number of entries
  std::int64_t tiles = 0;  ///< fast: [T / kAttentionTileRows + 2 S] entries
  std::int64_t bytes = 0;
};
PagedAttentionLayout paged_attention_layout(const PagedAttentionArgs& args,
                                            const DeviceProfile& profile);

struct SampleLayout {
  std::int64_t originals = 0;   ///< f32 [history entries]: logits before penalties
  std::int64_t candidates = 0;  ///< i32 [S, top_logprobs]
  std::int64_t bytes = 0;
};
SampleLayout sample_layout(const SampleArgs& args);

}  // namespace tandem::kernels::cuda
