// Private to kernels/cuda: the class whose bodies are spread over cuda_ops.cc (memory) and
// ops_*.cu. All work goes to one stream per Exec; nothing here allocates or waits on a step but
// download() and synchronize().
#pragma once

#include "kernels/cuda/blas.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/workspace.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

namespace tandem::kernels::cuda {

struct LinearBackwardLayout;  // cuda_workspace.h
class Scratch;
class PinnedRing;  // cuda_ops.cc
class Graphs;      // cuda_ops.cc

/// A second queue, for a small kernel that an op's large one does not depend on.
class SideStream {
 public:
  SideStream() {
    TANDEM_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (cudaEvent_t* event : {&forked_, &joined_})
      TANDEM_CUDA(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
  }
  ~SideStream() {
    (void)cudaEventDestroy(forked_);
    (void)cudaEventDestroy(joined_);
    (void)cudaStreamDestroy(stream_);
  }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  /// The queue, behind all that `main` holds now.
  cudaStream_t fork(cudaStream_t main) {
    TANDEM_CUDA(cudaEventRecord(forked_, main));
    TANDEM_CUDA(cudaStreamWaitEvent(stream_, forked_));
    return stream_;
  }
  /// What comes next on `main` waits for what was put on the queue.
  void join(cudaStream_t main) {
    TANDEM_CUDA(cudaEventRecord(joined_, stream_));
    TANDEM_CUDA(cudaStreamWaitEvent(main, joined_));
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t forked_ = nullptr, joined_ = nullptr;
};

class CudaOps final : public Ops {
 public:
  CudaOps(const CudaOptions& options, const DeviceProfile& profile);
  ~CudaOps() override;
  CudaOps(const CudaOps&) = delete;
  CudaOps& operator=(const CudaOps&) = delete;

  const DeviceProfile& profile() const override { return profile_; }
  void synchronize(Exec&) override;
  Stream make_stream(bool urgent) override;
  std::uint64_t mark(Exec& exec) override;
  bool passed(std::uint64_t mark) override;
  void replay(Exec& exec, std::uint64_t key, const std::function<void()>& body) override;
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
  /// Adds dweight; true: and dresidual in the same pass.
  bool add_norm_weight_grad(Exec&, const RmsNormBackwardArgs&);
  void do_linear_forward(Exec&, const LinearArgs&) override;
  void do_linear_backward(Exec&, const LinearBackwardArgs&) override;
  void do_linear_weight_grad(Exec&, const LinearWeightGradArgs&) override;
  [[nodiscard]] bool overwrites_weight_grads() const override { return true; }
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

  // -- ops_full.cu
  /// sums[c] += the sum of parts' column c, rows in a fixed order.
  void add_column_sums(const Exec& exec, const Tensor& parts, const Tensor& sums);

  // -- ops_qk_norm.cu: ropes with qk_norm
  void qk_norm_rope_forward(Exec& exec, const RopeArgs& a);
  /// `view`: positions and angles.
  void qk_norm_rope_backward(Exec& exec, const RopeBackwardArgs& a, const RopeArgs& view);

  // -- ops_linear.cu
  /// out = a b + u c + bias of each column: one product where lora_gemm.h has it, else two.
  void extended_product(const Exec& exec, const Matrix& a, const Matrix& b, const Matrix& u,
                        const Matrix& c, const Matrix& out, const void* bias, void* gemm);
  /// Whether the product itself does what `then` says.
  [[nodiscard]] bool joins_reader(const Exec& exec, const LinearArgs& a) const;
  /// Whether there are kernels that sum every element of y in one order, whatever the number of
  /// rows; it does not depend on that number.
  [[nodiscard]] bool has_invariant_product(const Exec& exec, const LinearArgs& a) const;
  /// y = x W^T + bias by those; false where there are none.
  bool invariant_product(const Exec& exec, const LinearArgs& a,
                         const std::function<void(const LinearArgs&, const Tensor&)>& run_skinny);
  void linear_backward_thin(Exec& exec, const LinearBackwardArgs& a,
                            const LinearBackwardLayout& layout, const Scratch& scratch,
                            const Tensor& u, const Tensor& du);

  /// Multiprocessors that the exec's large kernels may take.
  [[nodiscard]] int multiprocessors(const Exec& exec) const {
    return std::max(1, profile_.sm_count - exec.spare_multiprocessors);
  }
  [[nodiscard]] cudaStream_t stream(const Exec& exec) const {
    return exec.stream.handle != nullptr ? static_cast<cudaStream_t>(exec.stream.handle) : stream_;
  }

  const CudaOptions options_;
  const DeviceProfile profile_;
  cudaStream_t stream_ = nullptr;  ///< of every Exec that names none
  std::vector<cudaStream_t> made_streams_;
  SideStream side_;
  std::array<cudaEvent_t, kMarksMax> marks_{};  ///< of mark m at m % kMarksMax
  std::uint64_t next_mark_ = 0;
  mutable Profiler profiler_;
  Blas blas_{profiler_};
  std::unique_ptr<PinnedRing> ring_;
  std::unique_ptr<Graphs> graphs_;
};

/// An op's scratch: exactly `bytes` from the workspace for as long as this lives. Work on the
/// stream may still use it afterwards: the next op of the same Exec is ordered behind it.
class Scratch {
 public:
  Scratch(Exec& exec, std::int64_t bytes)
      : scope_(exec.workspace),
        base_(bytes > 0 ? static_cast<char*>(exec.workspace.alloc_bytes(bytes)) : nullptr) {}
  template <class T>
  [[nodiscard]] T* at(std::int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }
  [[nodiscard]] Tensor tensor(std::int64_t offset, DType dtype, const Shape& shape) const {
    return {base_ == nullptr ? nullptr : base_ + offset, dtype, shape};
  }

 private:
  ArenaScope scope_;
  char* base_;
};

/// Rows up to which a batch counts as a decode step: its kernels are bound by bytes and launches.
inline constexpr std::int64_t kFewRows = 256;

/// What the segmented LoRA kernels (ops_lora_segments.cu) do: rows of any mix of adapters, slots
/// and ranks read on the device. `column` of a site in u and du is site * rank_max.
/// u[t, column + r] = s A x[t], zeros beyond the rank and in rows without an adapter. `early`: may
/// start while the kernel before it on `stream` still runs, and lets its successor start once it
/// has waited for that (device.cuh).
void lora_segments_shrink(cudaStream_t stream, const std::vector<LoraSite>& sites,
                          const AdapterRows& rows, Tensor x, Tensor u, bool early = false);
/// y[t, n_begin + n] += B u[t] of each site; `writes`, for more than kFewRows rows of u's dtype:
/// the sites' outputs are written, zeros in rows without an adapter.
void lora_segments_expand(cudaStream_t stream, const std::vector<LoraSite>& sites,
                          const AdapterRows& rows, Tensor u, Tensor y, bool writes = false);
/// du[t] = s (dy[t] B), dA += du^T dropout(x), dB += dy^T u, and dx += dropout'(du A) when dx is
/// defined.
void lora_segments_backward(cudaStream_t stream, const LinearBackwardArgs& args, Tensor u,
                            Tensor du);
/// dx += dropout'(du A) of each site.
void lora_segments_dx(cudaStream_t stream, const std::vector<LoraSite>& sites,
                      const AdapterRows& rows, Tensor du, Tensor dx);

}  // namespace tandem::kernels::cuda
