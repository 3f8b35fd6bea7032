#include "kernels/cuda_workspace.h"
#include "kernels/workspace.h"

namespace tandem::kernels::cuda {

std::int64_t paged_attention_forward_bytes(const PagedAttentionArgs&, const DeviceProfile&) {
  return 0;
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
