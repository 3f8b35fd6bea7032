#include "kernels/cpu/attention.h"

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/cpu_features.h"
#include "protocol/base/check.h"

#include <omp.h>

#include <algorithm>

namespace tandem::kernels::cpu {
namespace {

Attention start(const AttentionShape& shape, std::int64_t t, const ConstRows& q,
                std::span<const std::int32_t> offsets) {
  TANDEM_CHECK(shape.dtype == DType::kF32 || shape.dtype == DType::kBF16, "attention in ",
               dtype_name(shape.dtype));
  TANDEM_CHECK(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0, "heads ", shape.heads,
               " over ", shape.kv_heads);
  TANDEM_CHECK_LE(shape.heads / shape.kv_heads, kQueriesMax, "query heads per key head");
  TANDEM_CHECK(shape.head_dim > 0 && shape.head_dim <= kHeadDimMax, "head_dim ", shape.head_dim);
  TANDEM_CHECK(!offsets.empty() && offsets.back() <= t, "offsets end at ", offsets.back(), " of ",
               t, " rows");
  TANDEM_CHECK(q.dtype == shape.dtype, "q is ", dtype_name(q.dtype));
  Attention a;
  a.heads = shape.heads;
  a.kv_heads = shape.kv_heads;
  a.dim = shape.head_dim;
  a.scale = shape.scale;
  a.window = shape.window;
  a.soft_cap = shape.soft_cap;
  a.bf16_rows = shape.dtype == DType::kBF16;
  a.t = t;
  a.sequences = static_cast<std::int64_t>(offsets.size()) - 1;
  a.offsets = offsets.data();
  a.q = q.data;
  a.ldq = q.ld;
  return a;
}

// Enough for any instruction set: a plan made on one machine holds on another.
std::int64_t forward_bytes(const AttentionShape& shape) {
  const std::int64_t plain = attention_thread_bytes(shape.head_dim);
  return round_up(shape.dtype == DType::kBF16
                      ? std::max(plain, attention_amx_thread_bytes(shape.head_dim))
                      : plain,
                  kCacheLine);
}

void give_scratch(Attention& a, std::span<std::byte> scratch, std::int64_t needed) {
  TANDEM_CHECK_GE(static_cast<std::int64_t>(scratch.size()), needed, "scratch of attention");
  a.scratch = reinterpret_cast<char*>(scratch.data());
  a.scratch_per_thread = needed / omp_get_max_threads();
}

void run_forward(const Attention& a) {
  const Isa level = isa();
  if (level == Isa::kAmx && amx_attention_fits(a)) return attention_forward_amx(a);
  level >= Isa::kAvx512 ? attention_forward_avx512(a)
  : level == Isa::kAvx2 ? attention_forward_avx2(a)
                        : attention_forward_generic(a);
}

void run_backward(const Attention& a) {
  const Isa level = isa();
  if (level == Isa::kAmx && amx_attention_fits(a)) return attention_backward_amx(a);
  level >= Isa::kAvx512 ? attention_backward_avx512(a)
  : level == Isa::kAvx2 ? attention_backward_avx2(a)
                        : attention_backward_generic(a);
}

void check_lengths(std::span<const std::int32_t> offsets, std::int64_t length_max) {
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    TANDEM_CHECK(offsets[s] <= offsets[s + 1] && offsets[s + 1] - offsets[s] <= length_max,
                 "sequence ", s, " is rows ", offsets[s], " to ", offsets[s + 1], ", at most ",
                 length_max);
}

}  // namespace

std::int64_t attention_forward_scratch(const AttentionShape& shape, std::int64_t, std::int64_t,
                                       int threads) {
  return threads * forward_bytes(shape);
}

void attention_forward(const AttentionShape& shape, std::int64_t t, ConstRows qkv,
                       std::span<const std::int32_t> seq_offsets, std::int64_t seq_len_max,
                       Rows out, float* lse, std::span<std::byte> scratch) {
  check_lengths(seq_offsets, seq_len_max);
  Attention a = start(shape, t, qkv, seq_offsets);
  a.out = out.data;
  a.ldo = out.ld;
  a.lse = lse;
  give_scratch(a, scratch, attention_forward_scratch(shape, t, seq_len_max, omp_get_max_threads()));
  run_forward(a);
}

std::int64_t attention_backward_scratch(const AttentionShape& shape, std::int64_t,
                                        std::int64_t seq_len_max, int threads) {
  const std::int64_t plain = attention_backward_thread_bytes(shape.head_dim, seq_len_max);
  const std::int64_t amx = attention_backward_amx_thread_bytes(shape.head_dim, seq_len_max);
  return threads * round_up(shape.dtype == DType::kBF16 ? std::max(plain, amx) : plain, kCacheLine);
}

void attention_backward(const AttentionShape& shape, std::int64_t t, ConstRows dout, ConstRows qkv,
                        ConstRows out, const float* lse, std::span<const std::int32_t> seq_offsets,
                        std::int64_t seq_len_max, Rows dqkv, std::span<std::byte> scratch) {
  check_lengths(seq_offsets, seq_len_max);
  Attention a = start(shape, t, qkv, seq_offsets);
  a.dout = dout.data;
  a.lddo = dout.ld;
  a.out_saved = out.data;
  a.ldo = out.ld;
  a.lse_saved = lse;
  a.dqkv = dqkv.data;
  a.lddqkv = dqkv.ld;
  a.length_max = seq_len_max;
  give_scratch(a, scratch,
               attention_backward_scratch(shape, t, seq_len_max, omp_get_max_threads()));
  run_backward(a);
}

std::int64_t paged_attention_scratch(const AttentionShape& shape, std::int64_t, std::int64_t,
                                     std::int64_t, int threads) {
  return threads * forward_bytes(shape);
}

void paged_attention(const AttentionShape& shape, std::int64_t t, ConstRows q,
                     std::span<const std::int32_t> q_offsets, const PagedKeys& keys,
                     std::int64_t kv_len_max, Rows out, std::span<std::byte> scratch) {
  Attention a = start(shape, t, q, q_offsets);
  TANDEM_CHECK_EQ(static_cast<std::int64_t>(keys.kv_lens.size()), a.sequences, "kv_lens");
  TANDEM_CHECK(keys.block_size > 0 && keys.block_size % kKeyBlock == 0, "block_size ",
               keys.block_size, " is not a multiple of ", kKeyBlock);
  for (std::size_t s = 0; s < keys.kv_lens.size(); ++s)
    TANDEM_CHECK(keys.kv_lens[s] <= std::min(kv_len_max, keys.blocks_max * keys.block_size) &&
                     keys.kv_lens[s] >= q_offsets[s + 1] - q_offsets[s],
                 "sequence ", s, " has ", keys.kv_lens[s], " keys");
  a.out = out.data;
  a.ldo = out.ld;
  a.paged = true;
  a.k_cache = keys.k;
  a.v_cache = keys.v;
  a.block_size = keys.block_size;
  a.blocks_max = keys.blocks_max;
  a.block_tables = keys.block_tables;
  a.kv_lens = keys.kv_lens.data();
  give_scratch(a, scratch,
               paged_attention_scratch(shape, t, a.sequences, kv_len_max, omp_get_max_threads()));
  run_forward(a);
}

}  // namespace tandem::kernels::cpu
