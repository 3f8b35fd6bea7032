#include "kernels/cuda_workspace.h"
#include "kernels/workspace.h"

namespace tandem::kernels::cuda {

PagedAttentionLayout paged_attention_layout(const PagedAttentionArgs& a,
                                            const DeviceProfile& profile) {
  PagedAttentionLayout l;
  ScratchLayout layout;
  const std::int64_t t = a.qkv.dim(0), s = a.kv_lens.dim(0), block = a.cache->block_size;
  l.trains = attention_is_fast(a.spec, a.qkv.dtype, profile) && block % 16 == 0 &&
             kAttentionTileRows % block == 0;
  l.fast = l.trains && t > s;
  if (l.fast) {
    l.count = layout.add(4);
    l.tiles = layout.add((t / kAttentionTileRows + 2 * s) * kAttentionTileBytes);
  }
  l.bytes = layout.bytes();
  return l;
}

std::int64_t paged_attention_forward_bytes(const PagedAttentionArgs& a,
                                           const DeviceProfile& profile) {
  return paged_attention_layout(a, profile).bytes;
}

SampleLayout sample_layout(const SampleArgs& a) {
  SampleLayout l;
  ScratchLayout layout;
  if (a.history_offsets.defined()) l.originals = layout.add(a.history_ids.dim(0) * 4);
  if (a.top_logprobs > 0) l.candidates = layout.add(a.logits.dim(0) * a.top_logprobs * 4);
  l.bytes = layout.bytes();
  return l;
}

std::int64_t sample_bytes(const SampleArgs& a, const DeviceProfile&) {
  return sample_layout(a).bytes;
}

}  // namespace tandem::kernels::cuda
