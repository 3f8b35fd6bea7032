#include "kernels/workspace.h"

#include "kernels/allocator.h"
#include "protocol/base/units.h"

#include <algorithm>

namespace tandem::kernels {
namespace {

/// Hands out aligned offsets.
class Layout {
 public:
  std::int64_t add(std::int64_t bytes) {
    const std::int64_t at = bytes_;
    bytes_ += round_up(bytes, kDeviceAlignment);
    return at;
  }
  [[nodiscard]] std::int64_t bytes() const { return bytes_; }

 private:
  std::int64_t bytes_ = 0;
};

bool has_adapters(const std::vector<LoraSite>& sites, const AdapterRows* rows) {
  return rows != nullptr && rows->rank_max > 0 && !sites.empty();
}

/// A chunk of f32 logits is at most this: it stays in the caches of a server processor.
constexpr std::int64_t kLogitsChunkBytes = 32 << 20;
constexpr std::int64_t kLogitsChunkRowsMin = 16;

}  // namespace

std::int64_t packed_weight_bytes(DType dtype, std::int64_t n, std::int64_t i,
                                 const DeviceProfile&) {
  return n * i * dtype_bytes(dtype);
}

PackWeightScratch pack_weight_scratch(std::int64_t n, std::int64_t i) {
  PackWeightScratch s;
  const std::int64_t wanted = std::min(n, std::max<std::int64_t>(1, kPackBlockBytes / (4 * i)));
  s.block_rows = round_up(wanted, kPackBlockRows);
  s.bytes = round_up(s.block_rows * i * 4, kDeviceAlignment);
  return s;
}

LinearForwardScratch linear_forward_scratch(const LinearArgs& a, const DeviceProfile&) {
  LinearForwardScratch s;
  Layout layout;
  if (has_adapters(a.sites, a.adapters)) {
    const std::int64_t t = a.x.dim(0), cd = dtype_bytes(a.x.dtype);
    const std::int64_t columns = static_cast<std::int64_t>(a.sites.size()) * a.adapters->rank_max;
    if (!a.u.defined()) s.u = layout.add(t * columns * cd);
    if (a.adapters->dropout > 0.0f) s.x = layout.add(t * a.x.dim(1) * cd);
  }
  s.bytes = layout.bytes();
  return s;
}

LinearBackwardScratch linear_backward_scratch(const LinearBackwardArgs& a, const DeviceProfile&) {
  LinearBackwardScratch s;
  Layout layout;
  if (has_adapters(a.sites, a.adapters)) {
    const std::int64_t t = a.x.dim(0), cd = dtype_bytes(a.x.dtype);
    const std::int64_t columns = static_cast<std::int64_t>(a.sites.size()) * a.adapters->rank_max;
    if (!a.u.defined()) s.u = layout.add(t * columns * cd);
    s.du = layout.add(t * columns * cd);
    if (a.adapters->dropout > 0.0f) s.x = layout.add(t * a.x.dim(1) * cd);
  }
  s.bytes = layout.bytes();
  return s;
}

LinearCrossEntropyScratch linear_cross_entropy_scratch(const LinearCrossEntropyArgs& a,
                                                       const DeviceProfile&) {
  LinearCrossEntropyScratch s;
  const std::int64_t t = a.x.dim(0), v = a.weight->n;
  s.chunk_rows = std::min(t, std::max(kLogitsChunkRowsMin, kLogitsChunkBytes / (4 * v)));
  Layout layout;
  s.logits = layout.add(s.chunk_rows * v * 4);
  if (a.dx.defined()) s.dlogits = layout.add(s.chunk_rows * v * dtype_bytes(a.x.dtype));
  s.bytes = layout.bytes();
  return s;
}

AttentionScratch attention_forward_scratch(const AttentionArgs& a, const DeviceProfile& profile) {
  return {round_up(profile.threads * a.seq_len_max * 4, kDeviceAlignment)};
}

AttentionScratch attention_backward_scratch(const AttentionBackwardArgs& a,
                                            const DeviceProfile& profile) {
  return {round_up(
      profile.threads * (2 * a.seq_len_max + (2 * a.seq_len_max + 1) * a.spec.head_dim) * 4,
      kDeviceAlignment)};
}

AttentionScratch paged_attention_forward_scratch(const PagedAttentionArgs& a,
                                                 const DeviceProfile& profile) {
  return {round_up(profile.threads * a.kv_len_max * 4, kDeviceAlignment)};
}

SampleScratch sample_scratch(const SampleArgs& a, const DeviceProfile& profile) {
  SampleScratch s;
  Layout layout;
  const std::int64_t v = a.logits.dim(1);
  s.weights = layout.add(profile.threads * v * 4);
  s.candidates = layout.add(profile.threads * v * 8);
  s.bytes = layout.bytes();
  return s;
}

SquaredNormScratch squared_norm_scratch(const SquaredNormArgs& a, const DeviceProfile&) {
  SquaredNormScratch s;
  for (const Tensor& t : a.tensors)
    s.chunks += (t.elements() + kSquaredNormChunk - 1) / kSquaredNormChunk;
  Layout layout;
  s.partial = layout.add(s.chunks * 8);
  s.bytes = layout.bytes();
  return s;
}

}  // namespace tandem::kernels
