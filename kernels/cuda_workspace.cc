#include "kernels/cuda_workspace.h"

#include "kernels/workspace.h"
#include "protocol/base/units.h"

#include <algorithm>

namespace tandem::kernels::cuda {
namespace {

/// Logits of one chunk of rows are at most this many bytes of f32, or kLogitsChunkRowsMin rows:
/// enough rows to keep the product at full speed, few enough to be a small part of the memory.
constexpr std::int64_t kLogitsChunkBytes = std::int64_t{512} << 20;
constexpr std::int64_t kLogitsChunkRowsMin = 128;

bool has_adapters(const std::vector<LoraSite>& sites, const AdapterRows* rows) {
  return rows != nullptr && rows->rank_max > 0 && !sites.empty();
}

}  // namespace

LinearForwardLayout linear_forward_layout(const LinearArgs& a) {
  LinearForwardLayout l;
  ScratchLayout layout;
  if (has_adapters(a.sites, a.adapters)) {
    const std::int64_t t = a.x.dim(0), i = a.x.dim(1), size = dtype_bytes(a.x.dtype);
    l.columns = static_cast<std::int64_t>(a.sites.size()) * a.adapters->rank_max;
    l.single = a.adapters->segments_max == 1;
    if (!a.u.defined()) l.u = layout.add(t * l.columns * size);
    if (l.single) {
      l.a = layout.add(l.columns * i * size);
      l.b = layout.add(a.weight->n * l.columns * size);
    }
    if (a.adapters->dropout > 0.0f) l.dropped = layout.add(t * i * size);
  }
  l.gemm = layout.add(kGemmWorkspaceBytes);
  l.bytes = layout.bytes();
  return l;
}

LinearBackwardLayout linear_backward_layout(const LinearBackwardArgs& a) {
  LinearBackwardLayout l;
  ScratchLayout layout;
  if (has_adapters(a.sites, a.adapters)) {
    const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.weight->n;
    const std::int64_t size = dtype_bytes(a.x.dtype);
    l.columns = static_cast<std::int64_t>(a.sites.size()) * a.adapters->rank_max;
    l.single = a.adapters->segments_max == 1;
    if (!a.u.defined()) l.u = layout.add(t * l.columns * size);
    l.du = layout.add(t * l.columns * size);
    if (l.single) {
      l.a = layout.add(l.columns * i * size);
      if (!a.u.defined()) l.a_scaled = layout.add(l.columns * i * size);
      l.b = layout.add(n * l.columns * size);
      l.da = layout.add(l.columns * i * 4);
      l.db = layout.add(n * l.columns * 4);
    }
    if (a.adapters->dropout > 0.0f) l.dropped = layout.add(t * i * size);
  }
  l.gemm = layout.add(kGemmWorkspaceBytes);
  l.bytes = layout.bytes();
  return l;
}

LinearCrossEntropyLayout linear_cross_entropy_layout(const LinearCrossEntropyArgs& a) {
  LinearCrossEntropyLayout l;
  const std::int64_t t = a.x.dim(0), v = a.weight->n;
  l.chunk_rows =
      std::min(t, std::max(kLogitsChunkRowsMin, kLogitsChunkBytes / (4 * v) / 128 * 128));
  ScratchLayout layout;
  l.logits = layout.add(l.chunk_rows * v * 4);
  l.gemm = layout.add(kGemmWorkspaceBytes);
  l.bytes = layout.bytes();
  return l;
}

}  // namespace tandem::kernels::cuda
