#include "kernels/cuda_workspace.h"
#include "kernels/workspace.h"

namespace tandem::kernels::cuda {
namespace {

std::int64_t tile_list_bytes(const Tensor& qkv, const Tensor& seq_offsets) {
  return (qkv.dim(0) / kAttentionTileRows + seq_offsets.dim(0) - 1) * kAttentionTileBytes;
}

}  // namespace

bool attention_is_fast(const AttentionSpec& spec, DType dtype, const DeviceProfile& profile) {
  return is_16_bit(dtype) && (spec.head_dim == 64 || spec.head_dim == 128) &&
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

std::int64_t attention_forward_bytes(const AttentionArgs& args, const DeviceProfile& profile) {
  return attention_forward_layout(args, profile).bytes;
}

std::int64_t attention_backward_bytes(const AttentionBackwardArgs& args,
                                      const DeviceProfile& profile) {
  return attention_backward_layout(args, profile).bytes;
}

}  // namespace tandem::kernels::cuda
