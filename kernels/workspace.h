// Scratch bytes of every op as pure functions of shapes, dtypes and the device profile. A backend
// takes exactly these bytes from Exec::workspace and cuts them up as its layouts say (the CPU's are
// here, CUDA's in cuda_workspace.h); the meta backend takes workspace_bytes() of the same call and
// cuts nothing. That is why the two ledgers agree.
// Offsets are from the scratch's start and multiples of kDeviceAlignment; `bytes` is the whole.
// Any thread.
#pragma once

#include "kernels/allocator.h"
#include "kernels/device_profile.h"
#include "kernels/op_args.h"

namespace tandem::kernels {

/// Hands out aligned offsets of one scratch block.
class ScratchLayout {
 public:
  std::int64_t add(std::int64_t bytes) {
    const std::int64_t at = bytes_;
    bytes_ += (bytes + kDeviceAlignment - 1) / kDeviceAlignment * kDeviceAlignment;
    return at;
  }
  [[nodiscard]] std::int64_t bytes() const { return bytes_; }

 private:
  std::int64_t bytes_ = 0;
};

/// Scratch of one call on the profile's device.
std::int64_t workspace_bytes(const RmsNormBackwardArgs& args, const DeviceProfile& profile);
std::int64_t workspace_bytes(const RopeBackwardArgs& args, const DeviceProfile& profile);
std::int64_t workspace_bytes(const LinearArgs& args, const DeviceProfile& profile);
std::int64_t workspace_bytes(const LinearBackwardArgs& args, const DeviceProfile& profile);
std::int64_t workspace_bytes(const LinearWeightGradArgs& args, const DeviceProfile& profile);
std::int64_t workspace_bytes(const LinearCrossEntropyArgs& args, const DeviceProfile& profile);
std::int64_t workspace_bytes(const AttentionArgs& args, const DeviceProfile& profile);
std::int64_t workspace_bytes(const AttentionBackwardArgs& args, const DeviceProfile& profile);
std::int64_t workspace_bytes(const PagedAttentionArgs& args, const DeviceProfile& profile);
std::int64_t workspace_bytes(const SampleArgs& args, const DeviceProfile& profile);
std::int64_t workspace_bytes(const SquaredNormArgs& args, const DeviceProfile& profile);

/// Whether a linear makes x, or dy, of its recipe where it reads it; else the recipe's op runs
/// before. In backward x is then shape and dtype alone.
bool makes_input(const LinearArgs& args, const DeviceProfile& profile);
bool makes_input(const LinearBackwardArgs& args, const DeviceProfile& profile);
bool makes_gradient(const LinearBackwardArgs& args, const DeviceProfile& profile);
/// Whether the pass of gate_up's backward that makes its dy makes down's dA too. x of both is shape
/// and dtype alone.
bool makes_factor_grad(const MlpBackwardArgs& args, const DeviceProfile& profile);

/// Whether linear_forward runs the op that reads its output, with the product or after it.
bool reads_output(const DeviceProfile& profile);

/// How much of the logits [T, V] a loss holds at a time: a chunk of rows of at most so many bytes.
std::int64_t logits_chunk_bytes(const DeviceProfile& profile);

/// Whether a packed weight is W's rows as they are: then memory that holds rows is one already.
bool packs_rows(const DeviceProfile& profile);
/// Bytes of a packed weight W [n, i].
std::int64_t packed_weight_bytes(DType dtype, std::int64_t n, std::int64_t i,
                                 const DeviceProfile& profile);

/// Rows of f32 that FillRows is asked for at once: at most this many bytes, at least one block.
inline constexpr std::int64_t kPackBlockBytes = 4 << 20;
inline constexpr std::int64_t kPackBlockRows = 32;
struct PackWeightWorkspace {
  std::int64_t block_rows = 0;  ///< a multiple of kPackBlockRows
  std::int64_t bytes = 0;       ///< f32 [block_rows, i]
};
PackWeightWorkspace pack_weight_workspace(std::int64_t n, std::int64_t i);

/// True when the batch is one segment by the host's bounds: its adapter's low-rank product then
/// runs inside the base product over all rows. Depends on bounds alone, never on which rows carry
/// what, so taking rows' adapters away changes no other row's bits.
bool fuses_adapters(const std::vector<LoraSite>& sites, const AdapterRows* rows);

struct LinearForwardWorkspace {
  std::int64_t u = 0;     ///< [T, sites * rank_max] cd, where the caller keeps none
  std::int64_t x = 0;     ///< [T, I] cd: dropout(x), one site at a time; only with dropout
  std::int64_t gemm = 0;  ///< gemm_bytes of the product running
  std::int64_t gemm_bytes = 0;
  std::int64_t bytes = 0;
};
LinearForwardWorkspace linear_forward_workspace(const LinearArgs& args,
                                                const DeviceProfile& profile);

struct LinearBackwardWorkspace {
  std::int64_t u = 0;   ///< [T, sites * rank_max] cd, where forward kept none
  std::int64_t du = 0;  ///< [T, sites * rank_max] cd: s dy B
  std::int64_t x = 0;   ///< [T, I] cd: dropout(x), then du A; only with dropout
  std::int64_t gemm = 0;
  std::int64_t gemm_bytes = 0;
  std::int64_t bytes = 0;
};
LinearBackwardWorkspace linear_backward_workspace(const LinearBackwardArgs& args,
                                                  const DeviceProfile& profile);

/// Rows of dW that one product computes: the sums and the packed side of so many are scratch.
inline constexpr std::int64_t kWeightGradRows = 256;
struct LinearWeightGradWorkspace {
  std::int64_t gemm_bytes = 0;
  std::int64_t bytes = 0;
};
LinearWeightGradWorkspace linear_weight_grad_workspace(const LinearWeightGradArgs& args,
                                                       const DeviceProfile& profile);

/// Entries of the vocabulary whose part of dx is computed at a time. It keeps the re-tiled weights
/// in a core's cache (1.7x faster than all of SmolLM2's 49,152 at once), and in f32 it bounds the
/// chain of a sum: one chain over 300,000 entries loses what is below half an ulp (1e-4 relative).
inline constexpr std::int64_t kVocabularyBlock = 2048;
struct LinearCrossEntropyWorkspace {
  std::int64_t chunk_rows = 0;
  std::int64_t index = 0;   ///< [T] i32: the rows with labels
  std::int64_t x = 0;       ///< [chunk_rows, C] cd: those rows of x, then of dx
  std::int64_t logits = 0;  ///< [chunk_rows, V] f32; the gradient, in cd, takes each row's place
  std::int64_t dx = 0;      ///< [chunk_rows, C] f32: the sum over the blocks; only with dx
  std::int64_t gemm = 0;
  std::int64_t gemm_bytes = 0;
  std::int64_t bytes = 0;
};
LinearCrossEntropyWorkspace linear_cross_entropy_workspace(const LinearCrossEntropyArgs& args,
                                                           const DeviceProfile& profile);

/// Rows whose part of the gradient of a norm of q and k is one sum.
inline constexpr std::int64_t kQkNormRows = 64;
/// With dqk_norm: f64 [ceil(T / kQkNormRows), 2 * D].
std::int64_t rope_backward_workspace(const RopeBackwardArgs& args);

std::int64_t attention_forward_workspace(const AttentionArgs& args, const DeviceProfile& profile);
std::int64_t attention_backward_workspace(const AttentionBackwardArgs& args,
                                          const DeviceProfile& profile);
std::int64_t paged_attention_forward_workspace(const PagedAttentionArgs& args,
                                               const DeviceProfile& profile);

struct SampleWorkspace {
  std::int64_t logits = 0;      ///< f32 [threads, V]: a row as it was before penalties
  std::int64_t weights = 0;     ///< f32 [threads, V]: exp of a row's logits
  std::int64_t candidates = 0;  ///< (f32, i32) [threads, V]
  std::int64_t bytes = 0;
};
SampleWorkspace sample_workspace(const SampleArgs& args, const DeviceProfile& profile);

/// Elements whose squares one partial sum holds.
inline constexpr std::int64_t kSquaredNormChunk = 1 << 16;
struct SquaredNormWorkspace {
  std::int64_t partial = 0;  ///< f64 [chunks over all tensors]
  std::int64_t chunks = 0;
  std::int64_t bytes = 0;
};
SquaredNormWorkspace squared_norm_workspace(const SquaredNormArgs& args,
                                            const DeviceProfile& profile);

}  // namespace tandem::kernels
