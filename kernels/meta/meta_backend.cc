#include "kernels/meta/meta_backend.h"

#include "kernels/workspace.h"
#include "protocol/base/units.h"

#include <algorithm>

namespace tandem::kernels {
namespace {

/// Ranges never overlap and never come back, so a stale address is never reused.
class MetaAllocator final : public Allocator {
 public:
  Result<void*> reserve(std::int64_t bytes) override {
    if (bytes > kEnd - next_)
      return refused_error(
          str("meta device: ", bytes, " B of address space asked, ", kEnd - next_, " B left"));
    void* base = reinterpret_cast<void*>(static_cast<std::uintptr_t>(next_));
    next_ += round_up(bytes, kMapGranularity) + kMapGranularity;
    return base;
  }
  Status map(void*, std::int64_t, std::int64_t) override { return {}; }
  void unmap(void*, std::int64_t, std::int64_t) override {}
  void release(void*, std::int64_t) override {}

 private:
  // Non-canonical on x86-64 and arm64: an accidental access faults.
  static constexpr std::int64_t kBegin = std::int64_t{1} << 57;
  static constexpr std::int64_t kEnd = std::int64_t{1} << 62;
  std::int64_t next_ = kBegin;
};

class MetaOps final : public Ops {
 public:
  explicit MetaOps(const DeviceProfile& profile) : profile_(profile) {}

  const DeviceProfile& profile() const override { return profile_; }
  void synchronize(Exec&) override {}
  std::int64_t packed_weight_bytes(DType dtype, std::int64_t n, std::int64_t i) const override {
    return kernels::packed_weight_bytes(dtype, n, i, profile_);
  }

 private:
  static void take(Exec& exec, std::int64_t bytes) {
    if (bytes == 0) return;
    const ArenaScope scope(exec.workspace);
    exec.workspace.alloc_bytes(bytes);
  }

  void do_upload(Exec&, std::span<const std::byte>, Tensor) override {}
  void do_download(Exec&, Tensor, std::span<std::byte> host) override {
    std::fill(host.begin(), host.end(), std::byte{0});
  }
  void do_copy(Exec&, Tensor, Tensor) override {}
  void do_fill_zero(Exec&, Tensor) override {}
  void do_pack_weight(Exec& exec, PackedWeight& w, const FillRows&) override {
    take(exec, pack_weight_workspace(w.n, w.i).bytes);
  }
  void do_embedding_forward(Exec&, const EmbeddingArgs&) override {}
  void do_embedding_backward(Exec&, const EmbeddingBackwardArgs&) override {}
  void do_add_rms_norm_forward(Exec&, const AddRmsNormArgs&) override {}
  void do_rms_norm_backward(Exec&, const RmsNormBackwardArgs&) override {}
  void do_rms_norm_weight_grad(Exec&, const RmsNormWeightGradArgs&) override {}
  void do_linear_forward(Exec& exec, const LinearArgs& a) override {
    take(exec, workspace_bytes(a, profile_));
  }
  void do_linear_backward(Exec& exec, const LinearBackwardArgs& a) override {
    take(exec, workspace_bytes(a, profile_));
  }
  void do_linear_weight_grad(Exec& exec, const LinearWeightGradArgs& a) override {
    take(exec, workspace_bytes(a, profile_));
  }
  void do_repack_weight(Exec&, const RepackWeightArgs&) override {}
  void do_rope_forward(Exec&, const RopeArgs&) override {}
  void do_rope_backward(Exec&, const RopeBackwardArgs&) override {}
  void do_attention_forward(Exec& exec, const AttentionArgs& a) override {
    take(exec, workspace_bytes(a, profile_));
  }
  void do_attention_backward(Exec& exec, const AttentionBackwardArgs& a) override {
    take(exec, workspace_bytes(a, profile_));
  }
  void do_paged_attention_forward(Exec& exec, const PagedAttentionArgs& a) override {
    take(exec, workspace_bytes(a, profile_));
  }
  void do_silu_mul_forward(Exec&, const SiluMulArgs&) override {}
  void do_silu_mul_backward(Exec&, const SiluMulBackwardArgs&) override {}
  void do_gather_rows(Exec&, const GatherRowsArgs&) override {}
  void do_place_columns(Exec&, const PlaceColumnsArgs&) override {}
  void do_linear_cross_entropy(Exec& exec, const LinearCrossEntropyArgs& a) override {
    take(exec, workspace_bytes(a, profile_));
  }
  void do_cross_entropy_stats(Exec&, const CrossEntropyStatsArgs&) override {}
  void do_cross_entropy(Exec&, const CrossEntropyArgs&) override {}
  void do_logprob(Exec&, const LogprobArgs&) override {}
  void do_sample(Exec& exec, const SampleArgs& a) override {
    take(exec, workspace_bytes(a, profile_));
  }
  void do_squared_norm(Exec& exec, const SquaredNormArgs& a) override {
    take(exec, workspace_bytes(a, profile_));
  }
  void do_adamw(Exec&, const AdamWArgs&) override {}

  const DeviceProfile profile_;
};

}  // namespace

Backend make_meta_backend(const DeviceProfile& profile) {
  return {[] { return std::int64_t{0}; }, std::make_unique<MetaAllocator>(),
          std::make_unique<MemoryLedger>(), std::make_unique<MetaOps>(profile)};
}

}  // namespace tandem::kernels
