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
  MetaOps(const DeviceProfile& profile, OpWatcher watcher)
      : profile_(profile), watcher_(std::move(watcher)) {}

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
  template <class Args>
  void note(const Args& args) const {
    if (watcher_) watcher_(op_cost(args));
  }
  void moved(std::int64_t bytes) const {
    OpCost cost;
    cost.bytes = static_cast<double>(bytes);
    if (watcher_) watcher_(cost);
  }
  /// An op that needs scratch.
  template <class Args>
  void run(Exec& exec, const Args& args) const {
    take(exec, workspace_bytes(args, profile_));
    note(args);
  }

  void do_upload(Exec&, std::span<const std::byte>, Tensor) override {}
  void do_download(Exec&, Tensor, std::span<std::byte> host) override {
    std::fill(host.begin(), host.end(), std::byte{0});
  }
  void do_copy(Exec&, Tensor from, Tensor to) override { moved(from.bytes() + to.bytes()); }
  void do_fill_zero(Exec&, Tensor x) override { moved(x.bytes()); }
  void do_pack_weight(Exec& exec, PackedWeight& w, const FillRows&) override {
    if (packs_rows(profile_)) return;  // through pinned memory: a GPU needs no scratch for it
    take(exec, pack_weight_workspace(w.n, w.i).bytes);
  }
  void do_embedding_forward(Exec&, const EmbeddingArgs& a) override { note(a); }
  void do_embedding_backward(Exec&, const EmbeddingBackwardArgs& a) override { note(a); }
  void do_add_rms_norm_forward(Exec&, const AddRmsNormArgs& a) override { note(a); }
  void do_rms_norm_backward(Exec& exec, const RmsNormBackwardArgs& a) override { run(exec, a); }
  void do_linear_forward(Exec& exec, const LinearArgs& a) override {
    run(exec, a);
    if (a.then.silu_mul.out.defined()) note(a.then.silu_mul);
    if (a.then.rope.qkv.defined()) note(a.then.rope);
  }
  void do_linear_backward(Exec& exec, const LinearBackwardArgs& a) override { run(exec, a); }
  void do_linear_weight_grad(Exec& exec, const LinearWeightGradArgs& a) override { run(exec, a); }
  void do_repack_weight(Exec&, const RepackWeightArgs& a) override { note(a); }
  void do_rope_forward(Exec&, const RopeArgs& a) override { note(a); }
  void do_rope_backward(Exec& exec, const RopeBackwardArgs& a) override { run(exec, a); }
  void do_attention_forward(Exec& exec, const AttentionArgs& a) override { run(exec, a); }
  void do_attention_backward(Exec& exec, const AttentionBackwardArgs& a) override { run(exec, a); }
  void do_paged_attention_forward(Exec& exec, const PagedAttentionArgs& a) override {
    run(exec, a);
  }
  void do_silu_mul_forward(Exec&, const SiluMulArgs& a) override { note(a); }
  void do_silu_mul_backward(Exec&, const SiluMulBackwardArgs& a) override { note(a); }
  void do_gather_rows(Exec&, const GatherRowsArgs& a) override { note(a); }
  void do_place_columns(Exec&, const PlaceColumnsArgs& a) override { note(a); }
  void do_linear_cross_entropy(Exec& exec, const LinearCrossEntropyArgs& a) override {
    run(exec, a);
  }
  void do_cross_entropy_stats(Exec&, const CrossEntropyStatsArgs& a) override { note(a); }
  void do_cross_entropy(Exec&, const CrossEntropyArgs& a) override { note(a); }
  void do_logprob(Exec&, const LogprobArgs& a) override { note(a); }
  void do_sample(Exec& exec, const SampleArgs& a) override { run(exec, a); }
  void do_squared_norm(Exec& exec, const SquaredNormArgs& a) override { run(exec, a); }
  void do_adamw(Exec&, const AdamWArgs& a) override { note(a); }

  const DeviceProfile profile_;
  const OpWatcher watcher_;
};

}  // namespace

Backend make_meta_backend(const DeviceProfile& profile, OpWatcher watcher) {
  return {[] { return std::int64_t{0}; }, std::make_unique<MetaAllocator>(),
          std::make_unique<MemoryLedger>(), std::make_unique<MetaOps>(profile, std::move(watcher))};
}

}  // namespace tandem::kernels
