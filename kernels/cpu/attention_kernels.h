// Private to kernels/cpu: attention as the public functions state it and the per-instruction-set
// files run it. Plain data only (see gemm_layout.h about inline functions).
#pragma once

#include "kernels/cpu/gemm_layout.h"

namespace tandem::kernels::cpu {

inline constexpr std::int64_t kKeyBlock = 16;     ///< keys of one online-softmax step (f32)
inline constexpr std::int64_t kQueriesMax = 192;  ///< (row, head) pairs one task carries (f32)

/// One call. Packed: keys of sequence s are the k and v columns of its own rows. Paged: they come
/// from the caches. bf16 operands are widened by the f32 kernels.
struct Attention {
  std::int64_t heads = 0, kv_heads = 0, dim = 0;
  float scale = 1.0f;
  std::int64_t window = 0;
  float soft_cap = 0.0f;
  bool bf16_rows = false;

  std::int64_t t = 0, sequences = 0;
  const std::int32_t* offsets = nullptr;  ///< [sequences + 1] rows of q
  const void* q = nullptr;                ///< rows; packed: k and v columns follow the q columns
  std::int64_t ldq = 0;
  void* out = nullptr;
  std::int64_t ldo = 0;
  float* lse = nullptr;  ///< [t, heads] or null

  bool paged = false;
  const void* k_cache = nullptr;
  const void* v_cache = nullptr;
  std::int64_t block_size = 0, blocks_max = 0;
  const std::int32_t* block_tables = nullptr;
  const std::int32_t* kv_lens = nullptr;

  // backward
  const void* dout = nullptr;
  std::int64_t lddo = 0;
  const void* out_saved = nullptr;
  const float* lse_saved = nullptr;
  void* dqkv = nullptr;
  std::int64_t lddqkv = 0;
  std::int64_t length_max = 0;

  char* scratch = nullptr;
  std::int64_t scratch_per_thread = 0;
};

TANDEM_ALWAYS_INLINE constexpr std::int64_t padded_dim(std::int64_t dim) {
  return round_up(dim, 16);
}
/// Forward, f32 kernels: q and o of each query, its m, l and scores; one block of keys and values.
TANDEM_ALWAYS_INLINE constexpr std::int64_t attention_thread_bytes(std::int64_t dim) {
  const std::int64_t d = padded_dim(dim);
  return (kQueriesMax * (2 * d + 2 + kKeyBlock) + 2 * kKeyBlock * d) * 4;
}
/// Backward, f32 kernels: q, dout and dq of each query, its lse and delta; dk and dv of a sequence;
/// keys and values of a block as rows and transposed.
TANDEM_ALWAYS_INLINE constexpr std::int64_t attention_backward_thread_bytes(
    std::int64_t dim, std::int64_t length_max) {
  const std::int64_t d = padded_dim(dim);
  return (kQueriesMax * (3 * d + 2) + 2 * round_up(length_max, kKeyBlock) * d + 4 * kKeyBlock * d) *
         4;
}

inline constexpr std::int64_t kKeysAmx = 256;     ///< keys of one block (AMX)
inline constexpr std::int64_t kQueriesAmx = 768;  ///< (row, head) pairs one task carries (AMX)

/// Forward, AMX: q, o, m and l of the queries; a block's tiles; scores, weights and product of 32.
TANDEM_ALWAYS_INLINE constexpr std::int64_t attention_amx_thread_bytes(std::int64_t dim) {
  return kQueriesAmx * (6 * dim + 8) + 4 * kKeysAmx * dim + 32 * (kKeysAmx + 16) * 4 +
         32 * (kKeysAmx + 32) * 2 + 32 * dim * 4;
}
inline constexpr std::int64_t kBackwardBlock = 128;  ///< keys and queries of a block (AMX)

/// Backward, AMX: of a sequence k, v, k^T, q and dout twice (bf16), dk, dv, dq (f32), lse and
/// delta; of a block p, ds twice, and two 32 x 32 products; room for the pieces' alignment.
TANDEM_ALWAYS_INLINE constexpr std::int64_t attention_backward_amx_thread_bytes(
    std::int64_t dim, std::int64_t length_max) {
  const std::int64_t length = round_up(length_max, 32), block = kBackwardBlock;
  return length * (dim * (7 * 2 + 3 * 4) + 8) + block * (block + 32) * 4 + block * block * 2 +
         2 * 32 * 32 * 4 + 20 * kCacheLine;
}
/// What the AMX kernels take; others go to the f32 kernels.
TANDEM_ALWAYS_INLINE bool amx_attention_fits(const Attention& a) {
  return a.bf16_rows && a.dim % 32 == 0 && a.scale > 0.0f;
}

void attention_forward_amx(const Attention& a);
void attention_forward_avx512(const Attention& a);
void attention_forward_avx2(const Attention& a);
void attention_forward_generic(const Attention& a);
void attention_backward_amx(const Attention& a);
void attention_backward_avx512(const Attention& a);
void attention_backward_avx2(const Attention& a);
void attention_backward_generic(const Attention& a);

}  // namespace tandem::kernels::cpu
