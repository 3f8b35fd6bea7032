#include "kernels/cuda_workspace.h"
#include "kernels/workspace.h"

#include <algorithm>
#include <bit>

namespace tandem::kernels::cuda {
namespace {

/// What cuDNN's plans may ask beyond the tensors that are counted below.
constexpr std::int64_t kCudnnSlackBytes = std::int64_t{16} << 20;
constexpr std::int64_t kCudnnLengthStep = 256;

void add_ragged(ScratchLayout& layout, CudnnAttentionLayout& l, std::int64_t sequences,
                std::int64_t seq_len_max) {
  l.sequences = static_cast<std::int64_t>(
      std::bit_ceil(static_cast<std::uint64_t>(std::max<std::int64_t>(1, sequences))));
  l.seq_len_max =
      std::max<std::int64_t>(1, (seq_len_max + kCudnnLengthStep - 1) / kCudnnLengthStep) *
      kCudnnLengthStep;
  l.lengths = layout.add(l.sequences * 4);
  for (std::int64_t* offsets : {&l.qkv, &l.out, &l.kv, &l.stats})
    *offsets = layout.add((l.sequences + 1) * 4);
}

std::int64_t tile_list_bytes(const Tensor& qkv, const Tensor& seq_offsets) {
  return (qkv.dim(0) / kAttentionTileRows + seq_offsets.dim(0) - 1) * kAttentionTileBytes;
}

}  // namespace

bool attention_is_fast(const AttentionSpec& spec, DType dtype, const DeviceProfile& profile) {
  return dtype == DType::kBF16 && (spec.head_dim == 64 || spec.head_dim == 128) &&
         spec.soft_cap == 0.0f && profile.compute_capability == 90;
}

AttentionForwardLayout attention_forward_layout(const AttentionArgs& a,
                                                const DeviceProfile& profile) {
  AttentionForwardLayout l;
  ScratchLayout layout;
  l.fast = attention_is_fast(a.spec, a.qkv.dtype, profile);
  if (l.fast) {
    l.count = layout.add(4);
    l.tiles = layout.add(tile_list_bytes(a.qkv, a.seq_offsets));
  }
  l.bytes = layout.bytes();
  return l;
}

AttentionBackwardLayout attention_backward_layout(const AttentionBackwardArgs& a,
                                                  const DeviceProfile& profile) {
  AttentionBackwardLayout l;
  ScratchLayout layout;
  l.fast = attention_is_fast(a.spec, a.qkv.dtype, profile);
  l.delta = layout.add(a.qkv.dim(0) * a.spec.heads * 4);
  if (l.fast) {
    l.count = layout.add(4);
    l.query_tiles = layout.add(tile_list_bytes(a.qkv, a.seq_offsets));
    l.key_tiles = layout.add(tile_list_bytes(a.qkv, a.seq_offsets));
  }
  l.bytes = layout.bytes();
  return l;
}

CudnnAttentionLayout cudnn_attention_layout(const AttentionArgs& a) {
  CudnnAttentionLayout l;
  ScratchLayout layout;
  add_ragged(layout, l, a.seq_offsets.dim(0) - 1, a.seq_len_max);
  l.workspace_bytes = kCudnnSlackBytes;
  l.workspace = layout.add(l.workspace_bytes);
  l.bytes = layout.bytes();
  return l;
}

CudnnAttentionLayout cudnn_attention_layout(const AttentionBackwardArgs& a) {
  CudnnAttentionLayout l;
  ScratchLayout layout;
  add_ragged(layout, l, a.seq_offsets.dim(0) - 1, a.seq_len_max);
  const std::int64_t t = a.qkv.dim(0), size = dtype_bytes(a.qkv.dtype);
  l.dk = layout.add(t * a.spec.kv_heads * a.spec.head_dim * size);
  l.dv = layout.add(t * a.spec.kv_heads * a.spec.head_dim * size);
  // In f32: dq with qkv's row stride, dk and dv of every query head, the sums dout * out.
  l.workspace_bytes = 4 * t * a.qkv.dim(1) + 2 * 4 * t * a.spec.heads * a.spec.head_dim +
                      4 * t * a.spec.heads + kCudnnSlackBytes;
  l.workspace = layout.add(l.workspace_bytes);
  l.bytes = layout.bytes();
  return l;
}

std::int64_t attention_forward_bytes(const AttentionArgs& args, const DeviceProfile& profile) {
  return attention_forward_layout(args, profile).bytes;
}

std::int64_t attention_backward_bytes(const AttentionBackwardArgs& args,
                                      const DeviceProfile& profile) {
  return attention_backward_layout(args, profile).bytes;
}

}  // namespace tandem::kernels::cuda
