// Scratch bytes of the raw-pointer kernels in kernels/cpu, as pure functions of shapes, dtypes and
// the thread count (not of the processor). They are declared here, above the backends, because
// kernels/workspace.cc plans with them for a machine that need not be this one; kernels/cpu defines
// each beside the kernel that takes the bytes. Any thread.
#pragma once

#include "protocol/base/dtype.h"

#include <cstdint>

namespace tandem::kernels::cpu {

/// Bytes of W [n, k] packed: n is padded to 32, k (bf16 only) to 32.
std::int64_t packed_bytes(DType format, std::int64_t n, std::int64_t k);

/// The input gradient re-tiles the weight a strip of at most this many bytes at a time.
inline constexpr std::int64_t kRetileBytesMax = 16 << 20;

/// y[T, n] = x[T, k] W^T and dx[T, k] = dy[T, n] W, with `terms` low-rank terms whose ranks sum to
/// `rank_sum` (0: none) and, forward, pieces of at most `piece_rank` (0: none). Fewer rows may take
/// more: each is for exactly T rows.
std::int64_t linear_forward_scratch(DType format, std::int64_t t, std::int64_t n, std::int64_t k,
                                    std::int64_t terms, std::int64_t rank_sum,
                                    std::int64_t piece_rank, int threads);
std::int64_t linear_input_grad_scratch(DType format, std::int64_t t, std::int64_t n, std::int64_t k,
                                       std::int64_t terms, std::int64_t rank_sum, int threads);
/// y[T, out] = x[T, in] times a small matrix.
std::int64_t small_product_scratch(DType dtype, std::int64_t t, std::int64_t in, std::int64_t out,
                                   int threads);
/// c[m, n] += a[T, m]^T b[T, n].
std::int64_t outer_accumulate_scratch(DType dtype, std::int64_t t, std::int64_t m, std::int64_t n,
                                      int threads);

/// Query head h reads key and value head h / (heads / kv_heads). Query at position i sees key j
/// when j <= i and, with window > 0, i - j < window. Score = scale * q.k, then, with soft_cap > 0,
/// soft_cap * tanh(score / soft_cap).
struct AttentionShape {
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1.0f;
  std::int64_t window = 0;
  float soft_cap = 0.0f;
  DType dtype = DType::kF32;  ///< of q, k, v, outputs and gradients: kF32 or kBF16
};

/// seq_len_max and kv_len_max bound the length of every sequence.
std::int64_t attention_forward_scratch(const AttentionShape& shape, std::int64_t t,
                                       std::int64_t seq_len_max, int threads);
std::int64_t attention_backward_scratch(const AttentionShape& shape, std::int64_t t,
                                        std::int64_t seq_len_max, int threads);
std::int64_t paged_attention_scratch(const AttentionShape& shape, std::int64_t t,
                                     std::int64_t sequences, std::int64_t kv_len_max, int threads);

}  // namespace tandem::kernels::cpu
