#include "kernels/workspace.h"

#include "kernels/cpu_scratch.h"
#include "kernels/cuda_workspace.h"
#include "protocol/base/units.h"

#include <algorithm>

namespace tandem::kernels {
namespace {

bool has_adapters(const std::vector<LoraSite>& sites, const AdapterRows* rows) {
  return rows != nullptr && rows->rank_max > 0 && !sites.empty();
}

std::int64_t site_outputs_max(const std::vector<LoraSite>& sites) {
  std::int64_t n = 0;
  for (const LoraSite& site : sites) n = std::max(n, site.n);
  return n;
}

constexpr std::int64_t kLogitsChunkBytes = 48 << 20;  ///< on a CPU
constexpr std::int64_t kLogitsChunkRowsMin = 16;

/// The largest bytes(rows) over all 1 <= rows <= t: products choose their blocking by the number of
/// rows, in steps of powers of two, and fewer rows may take more scratch.
template <class F>
std::int64_t most_over_rows(std::int64_t t, const F& bytes) {
  std::int64_t most = bytes(t);
  for (std::int64_t rows = 1; rows < t; rows *= 2) most = std::max(most, bytes(rows));
  return most;
}

cpu::AttentionShape attention_shape(const AttentionSpec& spec, DType dtype) {
  return {spec.heads, spec.kv_heads, spec.head_dim, spec.scale, spec.window, spec.soft_cap, dtype};
}

}  // namespace

std::int64_t logits_chunk_bytes(const DeviceProfile& profile) {
  return profile.type == DeviceType::kCuda ? cuda::kLogitsChunkBytes : kLogitsChunkBytes;
}

bool packs_rows(const DeviceProfile& profile) {
  return profile.type == DeviceType::kCuda;
}

std::int64_t packed_weight_bytes(DType dtype, std::int64_t n, std::int64_t i,
                                 const DeviceProfile& profile) {
  if (packs_rows(profile)) return n * i * dtype_bytes(dtype);
  return cpu::packed_bytes(dtype, n, i);
}

PackWeightWorkspace pack_weight_workspace(std::int64_t n, std::int64_t i) {
  PackWeightWorkspace w;
  const std::int64_t wanted = std::min(n, std::max<std::int64_t>(1, kPackBlockBytes / (4 * i)));
  w.block_rows = round_up(wanted, kPackBlockRows);
  w.bytes = round_up(w.block_rows * i * 4, kDeviceAlignment);
  return w;
}

bool fuses_adapters(const std::vector<LoraSite>& sites, const AdapterRows* rows) {
  return has_adapters(sites, rows) && rows->segments_max == 1;
}

LinearForwardWorkspace linear_forward_workspace(const LinearArgs& a, const DeviceProfile& profile) {
  LinearForwardWorkspace w;
  ScratchLayout layout;
  const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.weight->n;
  const DType cd = a.x.dtype;
  const auto add_product = [&](std::int64_t terms, std::int64_t rank_sum, std::int64_t piece_rank) {
    w.gemm_bytes =
        std::max(w.gemm_bytes, cpu::linear_forward_scratch(a.weight->dtype, t, n, i, terms,
                                                           rank_sum, piece_rank, profile.threads));
  };
  if (has_adapters(a.sites, a.adapters)) {
    const std::int64_t rank_max = a.adapters->rank_max;
    const std::int64_t columns = static_cast<std::int64_t>(a.sites.size()) * rank_max;
    if (!a.u.defined()) w.u = layout.add(t * columns * dtype_bytes(cd));
    if (a.adapters->dropout > 0.0f) w.x = layout.add(t * i * dtype_bytes(cd));
    w.gemm_bytes = most_over_rows(t, [&](std::int64_t rows) {  // of a segment
      return cpu::small_product_scratch(cd, rows, i, columns, profile.threads);
    });
    // Who has room for many segments has it for one: a server's batches have either.
    add_product(static_cast<std::int64_t>(a.sites.size()), columns, 0);
    if (!fuses_adapters(a.sites, a.adapters)) add_product(0, 0, rank_max);
  } else {
    add_product(0, 0, 0);
  }
  w.gemm = layout.add(w.gemm_bytes);
  w.bytes = layout.bytes();
  return w;
}

LinearBackwardWorkspace linear_backward_workspace(const LinearBackwardArgs& a,
                                                  const DeviceProfile& profile) {
  LinearBackwardWorkspace w;
  ScratchLayout layout;
  const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.weight->n;
  const DType cd = a.x.dtype;
  const int threads = profile.threads;
  std::int64_t terms = 0, rank_sum = 0;
  if (has_adapters(a.sites, a.adapters)) {
    const std::int64_t rank_max = a.adapters->rank_max, n_max = site_outputs_max(a.sites);
    const std::int64_t columns = static_cast<std::int64_t>(a.sites.size()) * rank_max;
    if (!a.u.defined()) w.u = layout.add(t * columns * dtype_bytes(cd));
    w.du = layout.add(t * columns * dtype_bytes(cd));
    if (a.adapters->dropout > 0.0f) w.x = layout.add(t * i * dtype_bytes(cd));
    if (fuses_adapters(a.sites, a.adapters) && a.adapters->dropout == 0.0f) {
      terms = static_cast<std::int64_t>(a.sites.size());
      rank_sum = columns;
    }
    w.gemm_bytes = most_over_rows(t, [&](std::int64_t rows) {
      return std::max({cpu::small_product_scratch(cd, rows, i, columns, threads),
                       cpu::small_product_scratch(cd, rows, n_max, rank_max, threads),
                       cpu::small_product_scratch(cd, rows, rank_max, i, threads),
                       cpu::outer_accumulate_scratch(cd, rows, rank_max, i, threads),
                       cpu::outer_accumulate_scratch(cd, rows, n_max, rank_max, threads)});
    });
  }
  if (a.dx.defined())
    w.gemm_bytes = std::max(w.gemm_bytes, cpu::linear_input_grad_scratch(a.weight->dtype, t, n, i,
                                                                         terms, rank_sum, threads));
  w.gemm = layout.add(w.gemm_bytes);
  w.bytes = layout.bytes();
  return w;
}

LinearWeightGradWorkspace linear_weight_grad_workspace(const LinearWeightGradArgs& a,
                                                       const DeviceProfile& profile) {
  LinearWeightGradWorkspace w;
  const std::int64_t t = a.dy.dim(0), n = a.dy.dim(1), i = a.x.dim(1);
  for (const std::int64_t rows : {std::min(n, kWeightGradRows), n % kWeightGradRows})
    if (rows > 0)
      w.gemm_bytes = std::max(
          w.gemm_bytes, cpu::outer_accumulate_scratch(a.dy.dtype, t, rows, i, profile.threads));
  w.bytes = round_up(w.gemm_bytes, kDeviceAlignment);
  return w;
}

LinearCrossEntropyWorkspace linear_cross_entropy_workspace(const LinearCrossEntropyArgs& a,
                                                           const DeviceProfile& profile) {
  LinearCrossEntropyWorkspace w;
  const std::int64_t t = a.x.dim(0), c = a.x.dim(1), v = a.weight->n;
  w.chunk_rows = std::min(t, std::max(kLogitsChunkRowsMin, kLogitsChunkBytes / (4 * v)));
  ScratchLayout layout;
  w.index = layout.add(t * 4);
  w.x = layout.add(w.chunk_rows * c * dtype_bytes(a.x.dtype));
  w.logits = layout.add(w.chunk_rows * v * 4);
  if (a.dx.defined()) w.dx = layout.add(w.chunk_rows * c * 4);
  w.gemm_bytes = most_over_rows(w.chunk_rows, [&](std::int64_t rows) {
    const DType format = a.weight->dtype;
    const std::int64_t forward =
        cpu::linear_forward_scratch(format, rows, v, c, 0, 0, 0, profile.threads);
    if (!a.dx.defined()) return forward;
    std::int64_t backward = 0;
    for (const std::int64_t n : {std::min(v, kVocabularyBlock), v % kVocabularyBlock})
      if (n > 0)
        backward = std::max(
            backward, cpu::linear_input_grad_scratch(format, rows, n, c, 0, 0, profile.threads));
    return std::max(forward, backward);
  });
  w.gemm = layout.add(w.gemm_bytes);
  w.bytes = layout.bytes();
  return w;
}

std::int64_t rope_backward_workspace(const RopeBackwardArgs& a) {
  if (!a.dqk_norm.defined()) return 0;
  const std::int64_t blocks = (a.dqkv.dim(0) + kQkNormRows - 1) / kQkNormRows;
  return round_up(blocks * 2 * a.head_dim * 8, kDeviceAlignment);
}

std::int64_t attention_forward_workspace(const AttentionArgs& a, const DeviceProfile& profile) {
  return round_up(cpu::attention_forward_scratch(attention_shape(a.spec, a.qkv.dtype), a.qkv.dim(0),
                                                 a.seq_len_max, profile.threads),
                  kDeviceAlignment);
}

std::int64_t attention_backward_workspace(const AttentionBackwardArgs& a,
                                          const DeviceProfile& profile) {
  return round_up(cpu::attention_backward_scratch(attention_shape(a.spec, a.qkv.dtype),
                                                  a.qkv.dim(0), a.seq_len_max, profile.threads),
                  kDeviceAlignment);
}

std::int64_t paged_attention_forward_workspace(const PagedAttentionArgs& a,
                                               const DeviceProfile& profile) {
  return round_up(cpu::paged_attention_scratch(attention_shape(a.spec, a.qkv.dtype), a.qkv.dim(0),
                                               a.kv_lens.dim(0), a.kv_len_max, profile.threads),
                  kDeviceAlignment);
}

SampleWorkspace sample_workspace(const SampleArgs& a, const DeviceProfile& profile) {
  SampleWorkspace w;
  ScratchLayout layout;
  const std::int64_t v = a.logits.dim(1);
  w.logits = layout.add(profile.threads * v * 4);
  w.weights = layout.add(profile.threads * v * 4);
  w.candidates = layout.add(profile.threads * v * 8);
  w.bytes = layout.bytes();
  return w;
}

SquaredNormWorkspace squared_norm_workspace(const SquaredNormArgs& a, const DeviceProfile&) {
  SquaredNormWorkspace w;
  for (const Tensor& t : a.tensors)
    w.chunks += (t.elements() + kSquaredNormChunk - 1) / kSquaredNormChunk;
  ScratchLayout layout;
  w.partial = layout.add(w.chunks * 8);
  w.bytes = layout.bytes();
  return w;
}

// -- either device
// ---------------------------------------------------------------------------------

namespace {
bool on_cuda(const DeviceProfile& profile) {
  return profile.type == DeviceType::kCuda;
}
}  // namespace

std::int64_t workspace_bytes(const RmsNormBackwardArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) ? cuda::norm_backward_layout(a, profile).bytes : 0;
}

std::int64_t workspace_bytes(const RopeBackwardArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) ? cuda::qk_norm_backward_layout(a, profile).bytes
                          : rope_backward_workspace(a);
}

std::int64_t workspace_bytes(const LinearArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) ? cuda::linear_forward_layout(a, profile).bytes
                          : linear_forward_workspace(a, profile).bytes;
}

std::int64_t workspace_bytes(const LinearBackwardArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) ? cuda::linear_backward_layout(a, profile).bytes
                          : linear_backward_workspace(a, profile).bytes;
}

bool makes_input(const LinearArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) && cuda::linear_forward_layout(a, profile).makes_x;
}

bool reads_output(const DeviceProfile& profile) {
  return on_cuda(profile);
}

bool makes_input(const LinearBackwardArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) && cuda::linear_backward_layout(a, profile).makes_x;
}

bool makes_gradient(const LinearBackwardArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) && cuda::linear_backward_layout(a, profile).pair.makes_dy;
}

bool makes_factor_grad(const MlpBackwardArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) && cuda::makes_factor_grad(a, profile);
}

std::int64_t workspace_bytes(const LinearWeightGradArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) ? cuda::linear_weight_grad_bytes(a)
                          : linear_weight_grad_workspace(a, profile).bytes;
}

std::int64_t workspace_bytes(const LinearCrossEntropyArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) ? cuda::linear_cross_entropy_layout(a).bytes
                          : linear_cross_entropy_workspace(a, profile).bytes;
}

std::int64_t workspace_bytes(const AttentionArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) ? cuda::attention_forward_bytes(a, profile)
                          : attention_forward_workspace(a, profile);
}

std::int64_t workspace_bytes(const AttentionBackwardArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) ? cuda::attention_backward_bytes(a, profile)
                          : attention_backward_workspace(a, profile);
}

std::int64_t workspace_bytes(const PagedAttentionArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) ? cuda::paged_attention_forward_bytes(a, profile)
                          : paged_attention_forward_workspace(a, profile);
}

std::int64_t workspace_bytes(const SampleArgs& a, const DeviceProfile& profile) {
  return on_cuda(profile) ? cuda::sample_bytes(a, profile) : sample_workspace(a, profile).bytes;
}

std::int64_t workspace_bytes(const SquaredNormArgs& a, const DeviceProfile& profile) {
  return squared_norm_workspace(a, profile).bytes;
}

}  // namespace tandem::kernels
