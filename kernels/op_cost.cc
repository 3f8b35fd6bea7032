#include "kernels/op_cost.h"

#include <algorithm>

namespace tandem::kernels {

namespace {

/// Bytes of tensors that may be undefined.
template <class... Tensors>
double bytes_of(const Tensors&... tensors) {
  return (0.0 + ... + (tensors.defined() ? static_cast<double>(tensors.bytes()) : 0.0));
}

double product(std::int64_t t, std::int64_t n, std::int64_t i) {
  return 2.0 * static_cast<double>(t) * static_cast<double>(n) * static_cast<double>(i);
}

/// One of the products that a low-rank pair takes at all sites: t rows through rank_max columns,
/// inputs `i` wide each site, or outputs of each site's own width.
struct LowRank {
  double inputs = 0.0, outputs = 0.0;
};
LowRank low_rank(const std::vector<LoraSite>& sites, const AdapterRows* adapters, std::int64_t t,
                 std::int64_t i) {
  LowRank cost;
  if (adapters == nullptr) return cost;
  for (const LoraSite& site : sites) {
    cost.inputs += product(t, adapters->rank_max, i);
    cost.outputs += product(t, adapters->rank_max, site.n);
  }
  return cost;
}

/// Query-key pairs of a packed causal batch.
double causal_pairs(std::int64_t rows, std::int64_t seq_len_max) {
  return 0.5 * static_cast<double>(rows) * static_cast<double>(std::min(rows, seq_len_max));
}

double pair_flops(const AttentionSpec& spec) {
  return 2.0 * static_cast<double>(spec.heads * spec.head_dim);
}

}  // namespace

OpCost op_cost(const LinearArgs& a) {
  const LowRank lora = low_rank(a.sites, a.adapters, a.x.dim(0), a.weight->i);
  return {product(a.x.dim(0), a.weight->n, a.weight->i) + lora.inputs + lora.outputs, 0.0,
          bytes_of(a.x, a.weight->storage, a.y, a.u, a.make_x.gate_up)};
}

OpCost op_cost(const LinearBackwardArgs& a) {
  const LowRank lora = low_rank(a.sites, a.adapters, a.x.dim(0), a.weight->i);
  OpCost cost{0.0, 0.0,
              bytes_of(a.dy, a.x, a.u, a.make_x.norm.residual, a.make_x.silu_mul.gate_up,
                       a.make_dy.dout, a.make_dy.gate_up)};
  // dB and dy B; dA; and where dx is wanted the two products that give it.
  cost.product_flops = 2.0 * lora.outputs + lora.inputs;
  if (!a.dx.defined()) return cost;
  cost.product_flops += product(a.dy.dim(0), a.weight->n, a.weight->i) + lora.inputs;
  cost.bytes += bytes_of(a.weight->storage, a.dx);
  return cost;
}

OpCost op_cost(const LinearWeightGradArgs& a) {
  return {product(a.x.dim(0), a.dweight.dim(0), a.dweight.dim(1)), 0.0,
          bytes_of(a.dy, a.x, a.dweight, a.overwrite ? Tensor{} : a.dweight)};
}

OpCost op_cost(const RepackWeightArgs& a) {
  return {0.0, 0.0, bytes_of(a.rows, a.weight->storage)};
}

OpCost op_cost(const AttentionArgs& a) {
  return {0.0, 2.0 * pair_flops(a.spec) * causal_pairs(a.qkv.dim(0), a.seq_len_max),
          bytes_of(a.qkv, a.out, a.lse)};
}

OpCost op_cost(const AttentionBackwardArgs& a) {
  return {0.0, 5.0 * pair_flops(a.spec) * causal_pairs(a.qkv.dim(0), a.seq_len_max),
          bytes_of(a.dout, a.qkv, a.out, a.lse, a.dqkv)};
}

OpCost op_cost(const PagedAttentionArgs& a) {
  const double sequences = static_cast<double>(a.kv_lens.dim(0));
  const double keys = sequences * static_cast<double>(a.kv_len_max);
  return {0.0,
          2.0 * pair_flops(a.spec) * static_cast<double>(a.qkv.dim(0)) *
              static_cast<double>(a.kv_len_max),
          bytes_of(a.qkv, a.out) + 2.0 * keys *
                                       static_cast<double>(a.spec.kv_heads * a.spec.head_dim *
                                                           dtype_bytes(a.cache->k.dtype))};
}

OpCost op_cost(const LinearCrossEntropyArgs& a) {
  const double one = product(a.x.dim(0), a.weight->n, a.weight->i);
  return {a.dx.defined() ? 2.0 * one : one, 0.0,
          bytes_of(a.x, a.weight->storage, a.dx) +
              (a.dx.defined() ? bytes_of(a.weight->storage) : 0.0)};
}

OpCost op_cost(const CrossEntropyStatsArgs& a) {
  return {0.0, 0.0, bytes_of(a.logits, a.stats)};
}
OpCost op_cost(const CrossEntropyArgs& a) {
  return {0.0, 0.0, bytes_of(a.logits, a.stats, a.dlogits)};
}
OpCost op_cost(const AdamWArgs& a) {
  return {0.0, 0.0, bytes_of(a.param, a.param, a.grad, a.m, a.m, a.v, a.v, a.param_cd)};
}
OpCost op_cost(const SquaredNormArgs& a) {
  OpCost cost;
  for (const Tensor& tensor : a.tensors) cost.bytes += bytes_of(tensor);
  return cost;
}
OpCost op_cost(const EmbeddingArgs& a) {
  return {0.0, 0.0, bytes_of(a.ids, a.out, a.out)};
}
OpCost op_cost(const EmbeddingBackwardArgs& a) {
  return {0.0, 0.0, 5.0 * bytes_of(a.dout)};  // reads, adds to f32
}
OpCost op_cost(const AddRmsNormArgs& a) {
  return {0.0, 0.0,
          bytes_of(a.residual, a.delta, a.y) + (a.delta.defined() ? bytes_of(a.residual) : 0.0)};
}
OpCost op_cost(const RmsNormBackwardArgs& a) {
  return {0.0, 0.0, bytes_of(a.dy, a.residual, a.dresidual, a.dresidual)};
}
OpCost op_cost(const RopeArgs& a) {
  return {0.0, 0.0, bytes_of(a.qkv, a.qkv)};
}
OpCost op_cost(const RopeBackwardArgs& a) {
  return {0.0, 0.0, bytes_of(a.dqkv, a.dqkv)};
}
OpCost op_cost(const SiluMulArgs& a) {
  return {0.0, 0.0, bytes_of(a.gate_up, a.out)};
}
OpCost op_cost(const SiluMulBackwardArgs& a) {
  return {0.0, 0.0, bytes_of(a.dout, a.gate_up, a.dgate_up)};
}
OpCost op_cost(const GatherRowsArgs& a) {
  return {0.0, 0.0, bytes_of(a.index, a.out, a.out)};
}
OpCost op_cost(const PlaceColumnsArgs& a) {
  return {0.0, 0.0, bytes_of(a.from, a.from)};
}
OpCost op_cost(const LogprobArgs& a) {
  return {0.0, 0.0, bytes_of(a.logits)};
}
OpCost op_cost(const SampleArgs& a) {
  return {0.0, 0.0, 2.0 * bytes_of(a.logits)};
}

}  // namespace tandem::kernels
