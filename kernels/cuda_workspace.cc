#include "kernels/cuda_workspace.h"

#include "kernels/workspace.h"
#include "protocol/base/units.h"

#include <algorithm>

namespace tandem::kernels::cuda {
namespace {

/// A chunk of logits has at least so many rows.
constexpr std::int64_t kLogitsChunkRowsMin = 128;

bool has_adapters(const std::vector<LoraSite>& sites, const AdapterRows* rows) {
  return rows != nullptr && rows->rank_max > 0 && !sites.empty();
}

/// Widest u of one pass over a matrix, whole 16-byte rows everywhere, clusters.
constexpr std::int64_t kThinRankMax = 128, kThinAlignment = 8, kThinSitesMax = 4;
constexpr std::int64_t kThinRowsMax = std::int64_t{128} * 65535;

bool is_thin(const std::vector<LoraSite>& sites, const AdapterRows& rows, const Tensor& x,
             std::int64_t outputs, const DeviceProfile& profile) {
  const auto aligned = [](std::int64_t size) { return size % kThinAlignment == 0; };
  if (!is_16_bit(x.dtype) || profile.compute_capability != 90) return false;
  if (rows.segments_max != 1 || !aligned(rows.rank_max) || rows.rank_max > kThinRankMax)
    return false;
  if (!aligned(x.dim(1)) || !aligned(outputs) || x.dim(0) > kThinRowsMax) return false;
  return sites.size() <= kThinSitesMax &&
         std::all_of(sites.begin(), sites.end(),
                     [&](const LoraSite& s) { return aligned(s.n_begin) && aligned(s.n); });
}

/// Blocks that fill a Hopper GPU once, or twice where two fit a multiprocessor.
constexpr std::int64_t kPairBlocks = 132;
constexpr std::int64_t kPairRowsMin = 64;  ///< of a part
/// What blocks leave of du grows with the ranks: from here on a second pass over dy is fewer bytes.
constexpr std::int64_t kPairRankMax = 32;

/// Gate and up of one product, both with an adapter: the pass can make their gradient.
bool makes_dy(const LinearBackwardArgs& a) {
  if (!a.make_dy.dout.defined() || a.sites.size() != 2) return false;
  const LoraSite &gate = a.sites[0], &up = a.sites[1];
  return gate.n_begin == 0 && up.n_begin == gate.n && up.n == gate.n && 2 * up.n == a.weight->n;
}

ThinPairLayout thin_pair_layout(const LinearBackwardArgs& a, ScratchLayout& layout) {
  ThinPairLayout l;
  const std::int64_t rank_max = a.adapters->rank_max, t = a.dy.dim(0);
  l.makes_dy = makes_dy(a);
  if (rank_max > kPairRankMax) return l;
  std::int64_t widest = 0;
  for (const LoraSite& s : a.sites) widest = std::max(widest, s.n);
  l.columns = rank_max <= 16 ? 16 : kPairRankMax;
  // Sums of a warp's columns of dB, rank by rank, stay in its registers.
  const std::int64_t width_max = (std::int64_t{1} << 14) / l.columns;
  l.width = std::min(width_max, widest >= 2048 ? 1024 : widest >= 1024 ? 512 : std::int64_t{256});
  const std::int64_t fill = l.width == width_max ? kPairBlocks : 2 * kPairBlocks;
  if (l.makes_dy) l.width /= 2;  // of gate, and as many of up
  for (const LoraSite& s : a.sites) l.blocks += (s.n + l.width - 1) / l.width;
  const std::int64_t started = l.makes_dy ? l.blocks / 2 : l.blocks;
  l.parts = std::clamp<std::int64_t>(fill / std::max<std::int64_t>(started, 1), 1,
                                     std::max<std::int64_t>(1, t / kPairRowsMin));
  l.du = layout.add(l.blocks * t * rank_max * 4);
  l.db = layout.add(l.parts * a.weight->n * rank_max * 4);
  if (a.left.du.defined()) l.da = layout.add(l.parts * rank_max * a.weight->n / 2 * 4);
  return l;
}

}  // namespace

LinearForwardLayout linear_forward_layout(const LinearArgs& a, const DeviceProfile& profile) {
  LinearForwardLayout l;
  ScratchLayout layout;
  if (has_adapters(a.sites, a.adapters)) {
    const std::int64_t t = a.x.dim(0), i = a.x.dim(1), size = dtype_bytes(a.x.dtype);
    l.columns = static_cast<std::int64_t>(a.sites.size()) * a.adapters->rank_max;
    l.single = a.adapters->segments_max == 1;
    l.thin = is_thin(a.sites, *a.adapters, a.x, a.weight->n, profile);
    // In one pass: not where each site has a mask, or a pass, of its own.
    l.makes_x = l.thin && a.make_x.gate_up.defined() && l.columns <= kThinRankMax &&
                (a.adapters->dropout == 0.0f || a.sites.size() == 1) && t <= kThinRowsMax / 2;
    if (!a.u.defined()) l.u = layout.add(t * l.columns * size);
    if (l.single) l.b = layout.add(a.weight->n * l.columns * size);
    if (l.single && !l.thin) {
      l.a = layout.add(l.columns * i * size);
      if (a.adapters->dropout > 0.0f) l.dropped = layout.add(t * i * size);
    }
  }
  l.gemm = layout.add(kGemmWorkspaceBytes);
  l.bytes = layout.bytes();
  if (l.columns > 0 && !l.single) {  // who has room for many segments has it for one
    AdapterRows one = *a.adapters;
    one.segments_max = 1;
    LinearArgs alone = a;
    alone.adapters = &one;
    l.bytes = std::max(l.bytes, linear_forward_layout(alone, profile).bytes);
  }
  return l;
}

LinearBackwardLayout linear_backward_layout(const LinearBackwardArgs& a,
                                            const DeviceProfile& profile) {
  LinearBackwardLayout l;
  ScratchLayout layout;
  if (has_adapters(a.sites, a.adapters)) {
    const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.weight->n;
    const std::int64_t size = dtype_bytes(a.x.dtype);
    l.columns = static_cast<std::int64_t>(a.sites.size()) * a.adapters->rank_max;
    l.single = a.adapters->segments_max == 1;
    l.thin = is_thin(a.sites, *a.adapters, a.x, n, profile);
    l.makes_x = l.thin && a.u.defined();  // it must lie in memory for u
    if (!a.u.defined()) l.u = layout.add(t * l.columns * size);
    if (!a.du.defined()) l.du = layout.add(t * l.columns * size);
    if (l.single) l.a = layout.add(l.columns * i * size);
    if (l.thin) l.pair = thin_pair_layout(a, layout);
    if (l.single && !l.thin) {
      if (!a.u.defined()) l.a_scaled = layout.add(l.columns * i * size);
      l.b = layout.add(n * l.columns * size);
      l.da = layout.add(l.columns * i * 4);
      l.db = layout.add(n * l.columns * 4);
      if (a.adapters->dropout > 0.0f) l.dropped = layout.add(t * i * size);
    }
  }
  l.gemm = layout.add(kGemmWorkspaceBytes);
  l.bytes = layout.bytes();
  return l;
}

bool makes_factor_grad(const MlpBackwardArgs& a, const DeviceProfile& profile) {
  const LinearBackwardArgs& down = a.down;
  if (!has_adapters(down.sites, down.adapters) ||
      !has_adapters(a.gate_up.sites, a.gate_up.adapters))
    return false;
  return down.sites.size() == 1 && down.adapters->dropout == 0.0f &&
         down.adapters->rank_max == a.gate_up.adapters->rank_max &&
         down.adapters->segment_slots.data == a.gate_up.adapters->segment_slots.data &&
         linear_backward_layout(down, profile).thin &&
         linear_backward_layout(a.gate_up, profile).pair.makes_dy;
}

std::int64_t linear_weight_grad_bytes(const LinearWeightGradArgs&) {
  return kGemmWorkspaceBytes;
}

NormBackwardLayout norm_backward_layout(const RmsNormBackwardArgs& a,
                                        const DeviceProfile& profile) {
  NormBackwardLayout l;
  ScratchLayout layout;
  const std::int64_t row_bytes = a.dy.dim(1) * dtype_bytes(a.dy.dtype);
  if (a.dweight.defined() && row_bytes % 16 == 0 && row_bytes <= kNormRowBytesMax) {
    // As many as a multiprocessor holds: rows of one, two or four accesses of each thread.
    const std::int64_t each = row_bytes <= kNormRowBytesMax / 4   ? 4
                              : row_bytes <= kNormRowBytesMax / 2 ? 2
                                                                  : 1;
    l.blocks = std::min<std::int64_t>(a.dy.dim(0), each * profile.sm_count);
    l.parts = layout.add(l.blocks * a.dy.dim(1) * 4);
  }
  l.bytes = layout.bytes();
  return l;
}

QkNormBackwardLayout qk_norm_backward_layout(const RopeBackwardArgs& a,
                                             const DeviceProfile& profile) {
  constexpr std::int64_t kEach = 8;  // of a multiprocessor
  QkNormBackwardLayout l;
  if (!a.dqk_norm.defined()) return l;
  ScratchLayout layout;
  l.blocks = std::min<std::int64_t>(a.dqkv.dim(0), kEach * profile.sm_count);
  l.parts = layout.add(l.blocks * 2 * a.head_dim * 4);
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
