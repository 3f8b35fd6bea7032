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
  [[nodiscard]] bool any() const { return inputs > 0.0; }
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

OpCost moved(double bytes) {
  OpCost cost;
  cost.bytes = bytes;
  return cost;
}
/// A pass over rows of activations.
OpCost rows(double bytes) {
  OpCost cost;
  cost.row_bytes = bytes;
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
  OpCost cost;
  cost.product_flops = product(a.x.dim(0), a.weight->n, a.weight->i);
  cost.low_rank_flops = lora.inputs + lora.outputs;
  cost.low_rank_products = lora.any() ? 1.0 : 0.0;  // A x; B comes with the product
  cost.bytes = bytes_of(a.x, a.weight->storage, a.y, a.u, a.make_x.gate_up);
  return cost;
}

OpCost op_cost(const LinearBackwardArgs& a) {
  const LowRank lora = low_rank(a.sites, a.adapters, a.x.dim(0), a.weight->i);
  OpCost cost;
  cost.bytes = bytes_of(a.dy, a.x, a.u, a.make_x.norm.residual, a.make_x.silu_mul.gate_up,
                        a.make_dy.dout, a.make_dy.gate_up);
  // dB and dy B; dA; and where dx is wanted the two products that give it.
  cost.low_rank_flops = 2.0 * lora.outputs + lora.inputs;
  cost.low_rank_products = lora.any() ? 3.0 : 0.0;
  if (!a.dx.defined()) return cost;
  cost.product_flops = product(a.dy.dim(0), a.weight->n, a.weight->i);
  cost.low_rank_flops += lora.inputs;
  cost.bytes += bytes_of(a.weight->storage, a.dx);
  return cost;
}

OpCost op_cost(const LinearWeightGradArgs& a) {
  OpCost cost;
  cost.weight_grad_flops = product(a.x.dim(0), a.dweight.dim(0), a.dweight.dim(1));
  cost.bytes = bytes_of(a.dy, a.x, a.dweight, a.overwrite ? Tensor{} : a.dweight);
  return cost;
}

OpCost op_cost(const RepackWeightArgs& a) {
  return moved(bytes_of(a.rows, a.weight->storage));
}

OpCost op_cost(const AttentionArgs& a) {
  OpCost cost = moved(bytes_of(a.qkv, a.out, a.lse));
  cost.attention_flops = 2.0 * pair_flops(a.spec) * causal_pairs(a.qkv.dim(0), a.seq_len_max);
  return cost;
}

OpCost op_cost(const AttentionBackwardArgs& a) {
  OpCost cost = moved(bytes_of(a.dout, a.qkv, a.out, a.lse, a.dqkv));
  cost.attention_flops = 5.0 * pair_flops(a.spec) * causal_pairs(a.qkv.dim(0), a.seq_len_max);
  return cost;
}

OpCost op_cost(const PagedAttentionArgs& a) {
  const double sequences = static_cast<double>(a.kv_lens.dim(0));
  const double keys = sequences * static_cast<double>(a.kv_len_max);
  OpCost cost =
      moved(bytes_of(a.qkv, a.out) + 2.0 * keys *
                                         static_cast<double>(a.spec.kv_heads * a.spec.head_dim *
                                                             dtype_bytes(a.cache->k.dtype)));
  cost.attention_flops = 2.0 * pair_flops(a.spec) * static_cast<double>(a.qkv.dim(0)) *
                         static_cast<double>(a.kv_len_max);
  return cost;
}

OpCost op_cost(const LinearCrossEntropyArgs& a) {
  const double one = product(a.x.dim(0), a.weight->n, a.weight->i);
  const bool grad = a.dx.defined();
  OpCost cost =
      moved(bytes_of(a.x, a.weight->storage, a.dx) + (grad ? bytes_of(a.weight->storage) : 0.0));
  cost.product_flops = grad ? 2.0 * one : one;
  cost.logits = static_cast<double>(a.x.dim(0) * a.weight->n);
  // As of the ops that it stands for: logits are written, and read for their sums and for the loss;
  // their gradients are written and read.
  cost.bytes += cost.logits * static_cast<double>(3 * dtype_bytes(a.loss.dtype) +
                                                  (grad ? 2 * dtype_bytes(a.x.dtype) : 0));
  return cost;
}

OpCost op_cost(const CrossEntropyStatsArgs& a) {
  return moved(bytes_of(a.logits, a.stats));
}
OpCost op_cost(const CrossEntropyArgs& a) {
  OpCost cost = moved(bytes_of(a.logits, a.stats, a.dlogits));
  cost.logits = static_cast<double>(a.logits.elements());
  return cost;
}
OpCost op_cost(const AdamWArgs& a) {
  return moved(bytes_of(a.param, a.param, a.grad, a.m, a.m, a.v, a.v, a.param_cd));
}
OpCost op_cost(const SquaredNormArgs& a) {
  OpCost cost;
  for (const Tensor& tensor : a.tensors) cost.bytes += bytes_of(tensor);
  return cost;
}
OpCost op_cost(const EmbeddingArgs& a) {
  return moved(bytes_of(a.ids, a.out, a.out));
}
OpCost op_cost(const EmbeddingBackwardArgs& a) {
  return moved(5.0 * bytes_of(a.dout));  // reads, adds to f32
}
OpCost op_cost(const AddRmsNormArgs& a) {
  return rows(bytes_of(a.residual, a.delta, a.y) +
              (a.delta.defined() ? bytes_of(a.residual) : 0.0));
}
OpCost op_cost(const RmsNormBackwardArgs& a) {
  return rows(bytes_of(a.dy, a.residual, a.dresidual, a.dresidual));
}
OpCost op_cost(const RopeArgs& a) {
  return rows(bytes_of(a.raw.defined() ? a.raw : a.qkv, a.qkv));
}
OpCost op_cost(const RopeBackwardArgs& a) {
  return rows(bytes_of(a.dqkv, a.raw, a.dqkv));
}
OpCost op_cost(const SiluMulArgs& a) {
  return rows(bytes_of(a.gate_up, a.out));
}
OpCost op_cost(const SiluMulBackwardArgs& a) {
  return rows(bytes_of(a.dout, a.gate_up, a.dgate_up));
}
OpCost op_cost(const GatherRowsArgs& a) {
  return moved(bytes_of(a.index, a.out, a.out));
}
OpCost op_cost(const PlaceColumnsArgs& a) {
  return moved(bytes_of(a.from, a.from));
}
OpCost op_cost(const LogprobArgs& a) {
  return moved(bytes_of(a.logits));
}
OpCost op_cost(const SampleArgs& a) {
  return moved(2.0 * bytes_of(a.logits));
}

}  // namespace tandem::kernels
