// Private to kernels/cpu: the class whose bodies are spread over ops_*.cc.
#pragma once

#include "kernels/ops.h"
#include "kernels/workspace.h"

#include <cstddef>
#include <span>

namespace tandem::kernels::cpu {

class CpuOps final : public Ops {
 public:
  explicit CpuOps(const DeviceProfile& profile) : profile_(profile) {}

  const DeviceProfile& profile() const override { return profile_; }
  void synchronize(Exec&) override {}
  std::int64_t packed_weight_bytes(DType dtype, std::int64_t n, std::int64_t i) const override {
    return kernels::packed_weight_bytes(dtype, n, i, profile_);
  }

 private:
  void do_upload(Exec&, std::span<const std::byte>, Tensor) override;
  void do_download(Exec&, Tensor, std::span<std::byte>) override;
  void do_copy(Exec&, Tensor, Tensor) override;
  void do_fill_zero(Exec&, Tensor) override;
  void do_pack_weight(Exec&, PackedWeight&, const FillRows&) override;
  void do_embedding_forward(Exec&, const EmbeddingArgs&) override;
  void do_embedding_backward(Exec&, const EmbeddingBackwardArgs&) override;
  void do_add_rms_norm_forward(Exec&, const AddRmsNormArgs&) override;
  void do_rms_norm_backward(Exec&, const RmsNormBackwardArgs&) override;
  void rms_norm_weight_grad(const RmsNormBackwardArgs&);
  void do_linear_forward(Exec&, const LinearArgs&) override;
  void do_linear_backward(Exec&, const LinearBackwardArgs&) override;
  void do_linear_weight_grad(Exec&, const LinearWeightGradArgs&) override;
  void do_repack_weight(Exec&, const RepackWeightArgs&) override;
  void do_rope_forward(Exec&, const RopeArgs&) override;
  void do_rope_backward(Exec&, const RopeBackwardArgs&) override;
  void do_attention_forward(Exec&, const AttentionArgs&) override;
  void do_attention_backward(Exec&, const AttentionBackwardArgs&) override;
  void do_paged_attention_forward(Exec&, const PagedAttentionArgs&) override;
  void do_silu_mul_forward(Exec&, const SiluMulArgs&) override;
  void do_silu_mul_backward(Exec&, const SiluMulBackwardArgs&) override;
  void do_gather_rows(Exec&, const GatherRowsArgs&) override;
  void do_place_columns(Exec&, const PlaceColumnsArgs&) override;
  void do_linear_cross_entropy(Exec&, const LinearCrossEntropyArgs&) override;
  void do_cross_entropy_stats(Exec&, const CrossEntropyStatsArgs&) override;
  void do_cross_entropy(Exec&, const CrossEntropyArgs&) override;
  void do_logprob(Exec&, const LogprobArgs&) override;
  void do_sample(Exec&, const SampleArgs&) override;
  void do_squared_norm(Exec&, const SquaredNormArgs&) override;
  void do_adamw(Exec&, const AdamWArgs&) override;

  /// The products of kernels/cpu/gemm.h run on the calling thread's OpenMP setting.
  void use_threads(const Exec& exec) const;

  const DeviceProfile profile_;
};

/// An op's scratch: exactly `bytes` from the workspace for as long as this lives.
class Scratch {
 public:
  Scratch(Exec& exec, std::int64_t bytes)
      : scope_(exec.workspace),
        base_(bytes > 0 ? static_cast<char*>(exec.workspace.alloc_bytes(bytes)) : nullptr) {}
  template <class T>
  [[nodiscard]] T* at(std::int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }
  [[nodiscard]] std::span<std::byte> span(std::int64_t offset, std::int64_t bytes) const {
    return {at<std::byte>(offset), static_cast<std::size_t>(bytes)};
  }
  /// Meaningful only where the layout has a place for it.
  [[nodiscard]] Tensor tensor(std::int64_t offset, DType dtype, const Shape& shape) const {
    return {base_ == nullptr ? nullptr : base_ + offset, dtype, shape};
  }

 private:
  ArenaScope scope_;
  char* base_;
};

}  // namespace tandem::kernels::cpu
