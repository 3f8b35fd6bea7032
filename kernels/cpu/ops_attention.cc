// Attention of packed batches and of paged caches.
#include "kernels/cpu/attention.h"
#include "kernels/cpu/cpu_ops.h"

#include <algorithm>

namespace tandem::kernels::cpu {
namespace {

AttentionShape shape_of(const AttentionSpec& spec, DType dtype) {
  TANDEM_CHECK_LE(spec.head_dim, kHeadDimMax, "attention: head_dim");
  return {spec.heads, spec.kv_heads, spec.head_dim, spec.scale, spec.window, spec.soft_cap, dtype};
}

std::span<const std::int32_t> numbers(const Tensor& t) {
  return {t.as<const std::int32_t>(), static_cast<std::size_t>(t.elements())};
}
ConstRows rows(const Tensor& t) {
  return {t.data, t.dim(1), t.dtype};
}
Rows output(const Tensor& t) {
  return {t.data, t.dim(1), t.dtype};
}

/// Offsets from 0 on, ascending, inside the batch, none longer than the host's bound.
void check_offsets(const char* name, const Tensor& offsets, std::int64_t t,
                   std::int64_t length_max) {
  const auto at = numbers(offsets);
  TANDEM_CHECK_EQ(at[0], 0, name);
  for (std::size_t s = 0; s + 1 < at.size(); ++s)
    TANDEM_CHECK(at[s] <= at[s + 1] && at[s + 1] <= t && at[s + 1] - at[s] <= length_max, name, "[",
                 s, "] = ", at[s], ", next ", at[s + 1], ", rows ", t, ", longest ", length_max);
}

void check_tables(const PagedAttentionArgs& a) {
  const auto offsets = numbers(a.q_offsets), lens = numbers(a.kv_lens);
  const auto tables = numbers(a.block_tables);
  const std::int64_t blocks = a.cache->k.dim(0), size = a.cache->block_size;
  for (std::size_t s = 0; s < lens.size(); ++s) {
    const std::int64_t new_rows = offsets[s + 1] - offsets[s];
    if (new_rows == 0) continue;
    TANDEM_CHECK(lens[s] >= new_rows && lens[s] <= a.kv_len_max,
                 "paged_attention_forward: kv_lens[", s, "] = ", lens[s], ": new rows ", new_rows,
                 ", kv_len_max ", a.kv_len_max);
    const auto* table = tables.data() + static_cast<std::int64_t>(s) * a.block_tables.dim(1);
    for (std::int64_t b = 0; b * size < lens[s]; ++b)
      TANDEM_CHECK(table[b] >= 0 && table[b] < blocks, "paged_attention_forward: block_tables[", s,
                   ", ", b, "] = ", table[b], ": the cache has ", blocks);
  }
}

}  // namespace

void CpuOps::do_attention_forward(Exec& exec, const AttentionArgs& a) {
  use_threads(exec);
  const std::int64_t t = a.qkv.dim(0), bytes = attention_forward_workspace(a, profile_);
  check_offsets("attention_forward: seq_offsets", a.seq_offsets, t, a.seq_len_max);
  const Scratch scratch(exec, bytes);
  cpu::attention_forward(shape_of(a.spec, a.qkv.dtype), t, rows(a.qkv), numbers(a.seq_offsets),
                         a.seq_len_max, output(a.out),
                         a.lse.defined() ? a.lse.as<float>() : nullptr, scratch.span(0, bytes));
  if (!a.lse.defined()) return;
  const std::int64_t live = numbers(a.seq_offsets).back();
  std::fill_n(a.lse.as<float>() + live * a.spec.heads, (t - live) * a.spec.heads, 0.0f);
}

void CpuOps::do_attention_backward(Exec& exec, const AttentionBackwardArgs& a) {
  use_threads(exec);
  const std::int64_t t = a.qkv.dim(0), bytes = attention_backward_workspace(a, profile_);
  check_offsets("attention_backward: seq_offsets", a.seq_offsets, t, a.seq_len_max);
  const Scratch scratch(exec, bytes);
  cpu::attention_backward(shape_of(a.spec, a.qkv.dtype), t, rows(a.dout), rows(a.qkv), rows(a.out),
                          a.lse.as<float>(), numbers(a.seq_offsets), a.seq_len_max, output(a.dqkv),
                          scratch.span(0, bytes));
}

void CpuOps::do_paged_attention_forward(Exec& exec, const PagedAttentionArgs& a) {
  use_threads(exec);
  const std::int64_t t = a.qkv.dim(0), bytes = paged_attention_forward_workspace(a, profile_);
  check_offsets("paged_attention_forward: q_offsets", a.q_offsets, t, t);
  check_tables(a);
  const Scratch scratch(exec, bytes);
  const PagedKeys keys{a.cache->k.data,
                       a.cache->v.data,
                       a.cache->block_size,
                       a.block_tables.dim(1),
                       a.block_tables.as<std::int32_t>(),
                       numbers(a.kv_lens)};
  paged_attention(shape_of(a.spec, a.qkv.dtype), t, rows(a.qkv), numbers(a.q_offsets), keys,
                  a.kv_len_max, output(a.out), scratch.span(0, bytes));
}

}  // namespace tandem::kernels::cpu
