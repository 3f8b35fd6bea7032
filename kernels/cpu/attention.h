// Causal attention of the CPU backend: packed sequences (training, prefill in one piece) and paged
// keys and values (serving). Threads, memory and scratch as in kernels/cpu/gemm.h. Nothing of size
// [length, length] exists: keys are walked in blocks with an online softmax.
//
// Numerics.
//   f32: Invariant. A query row walks its keys in blocks of 16 aligned at absolute position 0, in
//     ascending order; each row's operations are its own, so its bits are the same in the packed
//     and the paged forward, at any chunking and in any batch.
//   bf16: products of bf16 with f32 accumulation; scores, softmax and its statistics in f32;
//     probabilities and their gradients are rounded to bf16 as operands of the next product.
#pragma once

#include "kernels/cpu/gemm.h"

namespace tandem::kernels::cpu {

/// head_dim is at most this.
inline constexpr std::int64_t kHeadDimMax = 256;

/// qkv [T, (H + 2 Hkv) * D] rotated: q heads, k heads, v heads. seq_offsets [S + 1], ascending from
/// 0; rows beyond the last offset are inert: their out is zeroed. out [T, H * D] is overwritten.
/// lse [T, H] (contiguous; natural log of the sum of exp(score)) is overwritten, or null.
void attention_forward(const AttentionShape& shape, std::int64_t t, ConstRows qkv,
                       std::span<const std::int32_t> seq_offsets, std::int64_t seq_len_max,
                       Rows out, float* lse, std::span<std::byte> scratch);

/// dqkv [T, (H + 2 Hkv) * D] is overwritten (inert rows zeroed) from dout, and qkv, out, lse as the
/// forward saw and left them. Probabilities are computed again block by block (Dao 2023,
/// FlashAttention-2, algorithm 2). The same bits for any thread count.
void attention_backward(const AttentionShape& shape, std::int64_t t, ConstRows dout, ConstRows qkv,
                        ConstRows out, const float* lse, std::span<const std::int32_t> seq_offsets,
                        std::int64_t seq_len_max, Rows dqkv, std::span<std::byte> scratch);

/// Caches [blocks, Hkv, block_size, D] in the shape's dtype; key j of sequence s is in block
/// block_tables[s * blocks_max + j / block_size] at j % block_size. Entries past kv_lens are never
/// read. block_size is a multiple of 16.
struct PagedKeys {
  const void* k = nullptr;
  const void* v = nullptr;
  std::int64_t block_size = 0;
  std::int64_t blocks_max = 0;
  const std::int32_t* block_tables = nullptr;
  std::span<const std::int32_t> kv_lens;  ///< [S]: keys of each sequence, its new rows' included
};

/// Sequence s owns query rows [q_offsets[s], q_offsets[s + 1]); the last of them is at position
/// kv_lens[s] - 1. q [T, >= H * D]: only the q heads of each row are read. out [T, H * D] is
/// overwritten; rows beyond the last offset are zeroed.
void paged_attention(const AttentionShape& shape, std::int64_t t, ConstRows q,
                     std::span<const std::int32_t> q_offsets, const PagedKeys& keys,
                     std::int64_t kv_len_max, Rows out, std::span<std::byte> scratch);

}  // namespace tandem::kernels::cpu
