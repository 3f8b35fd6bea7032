#include "kernels/op_checks.h"
#include "kernels/ops.h"

namespace tandem::kernels {
namespace {

void check_heads(const OpCheck& check, std::int64_t heads, std::int64_t kv_heads,
                 std::int64_t head_dim) {
  check.that(heads > 0 && kv_heads > 0 && head_dim > 0 && heads % kv_heads == 0,
             str("heads ", heads, ", kv_heads ", kv_heads, ", head_dim ", head_dim,
                 ": all positive and heads a multiple of kv_heads"));
}

void check_spec(const OpCheck& check, const AttentionSpec& spec) {
  check_heads(check, spec.heads, spec.kv_heads, spec.head_dim);
  check.that(spec.window >= 0, str("window: expected >= 0, got ", spec.window));
  check.that(spec.soft_cap >= 0.0f, str("soft_cap: expected >= 0, got ", spec.soft_cap));
}

void check_cache(const OpCheck& check, const KvCache& cache, DType cd, std::int64_t kv_heads,
                 std::int64_t head_dim) {
  check.rank("cache.k", cache.k, 4);
  check.that(cache.block_size > 0, str("block_size: expected > 0, got ", cache.block_size));
  const Shape shape{cache.k.dim(0), kv_heads, cache.block_size, head_dim};
  check.tensor("cache.k", cache.k, cd, shape);
  check.tensor("cache.v", cache.v, cd, shape);
}

/// qkv [T, (H + 2K) * D]; gives its dtype.
DType check_qkv(const OpCheck& check, const char* name, const Tensor& qkv, std::int64_t heads,
                std::int64_t kv_heads, std::int64_t head_dim) {
  check.rank(name, qkv, 2);
  const DType cd = check.compute_dtype(name, qkv);
  check.tensor(name, qkv, cd, Shape{qkv.dim(0), (heads + 2 * kv_heads) * head_dim});
  return cd;
}
DType check_qkv(const OpCheck& check, const AttentionSpec& spec, const Tensor& qkv) {
  check_spec(check, spec);
  return check_qkv(check, "qkv", qkv, spec.heads, spec.kv_heads, spec.head_dim);
}

void check_sequences(const OpCheck& check, const Tensor& seq_offsets, std::int64_t seq_len_max) {
  check.rank("seq_offsets", seq_offsets, 1);
  check.that(seq_offsets.dim(0) >= 1, "seq_offsets: empty, expected [S + 1]");
  check.tensor("seq_offsets", seq_offsets, DType::kI32, seq_offsets.shape);
  check.that(seq_len_max >= 0, str("seq_len_max: expected >= 0, got ", seq_len_max));
}

/// The norm of q and k in a call whose qkv, or its gradient, is `rows`; undefined: none.
void check_qk_norm(const OpCheck& check, const Tensor& qk_norm, const Tensor& raw,
                   const Tensor& rows, std::int64_t head_dim) {
  if (!qk_norm.defined()) return check.that(!raw.defined(), "raw: expected none without qk_norm");
  check.tensor("qk_norm", qk_norm, rows.dtype, Shape{2 * head_dim});
  check.in_range<std::int64_t>("head_dim", head_dim, 2, kQkNormDimMax);
  check.optional("raw", raw, rows.dtype, rows.shape);
  check.disjoint("raw", raw, "qkv", rows);
}

}  // namespace

void check_rope(const RopeArgs& a) {
  const OpCheck check("rope_forward");
  check_heads(check, a.heads, a.kv_heads, a.head_dim);
  check.that(a.head_dim % 2 == 0, str("head_dim: expected even, got ", a.head_dim));
  const DType cd = check_qkv(check, "qkv", a.qkv, a.heads, a.kv_heads, a.head_dim);
  const std::int64_t t = a.qkv.dim(0);
  check.tensor("positions", a.positions, DType::kI32, Shape{t});
  check.tensor("inv_freq", a.inv_freq, DType::kF32, Shape{a.head_dim / 2});
  check_qk_norm(check, a.qk_norm, a.raw, a.qkv, a.head_dim);
  if (a.cache != nullptr) {
    check_cache(check, *a.cache, cd, a.kv_heads, a.head_dim);
    check.tensor("cache_slots", a.cache_slots, DType::kI32, Shape{t});
    check.disjoint("qkv", a.qkv, "cache.k", a.cache->k);
    check.disjoint("qkv", a.qkv, "cache.v", a.cache->v);
  }
}

void Ops::rope_forward(Exec& exec, const RopeArgs& a) {
  check_rope(a);
  if (a.qkv.dim(0) == 0) return;
  do_rope_forward(exec, a);
}

void Ops::rope_backward(Exec& exec, const RopeBackwardArgs& a) {
  const OpCheck check("rope_backward");
  check_heads(check, a.heads, a.kv_heads, a.head_dim);
  check.that(a.head_dim % 2 == 0, str("head_dim: expected even, got ", a.head_dim));
  check_qkv(check, "dqkv", a.dqkv, a.heads, a.kv_heads, a.head_dim);
  const std::int64_t t = a.dqkv.dim(0);
  check.tensor("positions", a.positions, DType::kI32, Shape{t});
  check.tensor("inv_freq", a.inv_freq, DType::kF32, Shape{a.head_dim / 2});
  check_qk_norm(check, a.qk_norm, a.raw, a.dqkv, a.head_dim);
  check.that(!a.qk_norm.defined() || t == 0 || a.raw.defined(), "raw: expected with qk_norm");
  check.that(!a.dqk_norm.defined() || a.qk_norm.defined(), "dqk_norm: expected qk_norm with it");
  check.optional("dqk_norm", a.dqk_norm, sum_dtype(a.dqkv.dtype), Shape{2 * a.head_dim});
  if (a.dqk_norm.defined() && a.overwrite) do_fill_zero(exec, a.dqk_norm);
  if (t == 0) return;
  do_rope_backward(exec, a);
}

void Ops::attention_forward(Exec& exec, const AttentionArgs& a) {
  const OpCheck check("attention_forward");
  const DType cd = check_qkv(check, a.spec, a.qkv);
  const std::int64_t t = a.qkv.dim(0);
  check_sequences(check, a.seq_offsets, a.seq_len_max);
  check.tensor("out", a.out, cd, Shape{t, a.spec.heads * a.spec.head_dim});
  check.optional("lse", a.lse, sum_dtype(a.qkv.dtype), Shape{t, a.spec.heads});
  check.disjoint("out", a.out, "qkv", a.qkv);
  if (t == 0) return;
  do_attention_forward(exec, a);
}

void Ops::attention_backward(Exec& exec, const AttentionBackwardArgs& a) {
  const OpCheck check("attention_backward");
  const DType cd = check_qkv(check, a.spec, a.qkv);
  const std::int64_t t = a.qkv.dim(0);
  const Shape narrow{t, a.spec.heads * a.spec.head_dim};
  check.tensor("dqkv", a.dqkv, cd, a.qkv.shape);
  check.tensor("dout", a.dout, cd, narrow);
  check.tensor("out", a.out, cd, narrow);
  check.tensor("lse", a.lse, sum_dtype(a.qkv.dtype), Shape{t, a.spec.heads});
  check_sequences(check, a.seq_offsets, a.seq_len_max);
  check.disjoint("dqkv", a.dqkv, "qkv", a.qkv);
  check.disjoint("dqkv", a.dqkv, "dout", a.dout);
  check.disjoint("dqkv", a.dqkv, "out", a.out);
  if (t == 0) return;
  do_attention_backward(exec, a);
}

void Ops::paged_attention_forward(Exec& exec, const PagedAttentionArgs& a) {
  const OpCheck check("paged_attention_forward");
  const DType cd = check_qkv(check, a.spec, a.qkv);
  const std::int64_t t = a.qkv.dim(0);
  check.rank("kv_lens", a.kv_lens, 1);
  const std::int64_t s = a.kv_lens.dim(0);
  check.tensor("kv_lens", a.kv_lens, DType::kI32, Shape{s});
  check.tensor("q_offsets", a.q_offsets, DType::kI32, Shape{s + 1});
  check.rank("block_tables", a.block_tables, 2);
  check.tensor("block_tables", a.block_tables, DType::kI32, Shape{s, a.block_tables.dim(1)});
  check.that(a.cache != nullptr, "cache: null");
  check_cache(check, *a.cache, cd, a.spec.kv_heads, a.spec.head_dim);
  check.in_range<std::int64_t>("kv_len_max", a.kv_len_max, 0,
                               a.block_tables.dim(1) * a.cache->block_size);
  check.tensor("out", a.out, cd, Shape{t, a.spec.heads * a.spec.head_dim});
  check.disjoint("out", a.out, "qkv", a.qkv);
  if (t == 0) return;
  do_paged_attention_forward(exec, a);
}

}  // namespace tandem::kernels
