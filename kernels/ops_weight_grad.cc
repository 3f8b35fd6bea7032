#include "kernels/op_checks.h"
#include "kernels/ops.h"

namespace tandem::kernels {

void Ops::embedding_backward(Exec& exec, const EmbeddingBackwardArgs& a) {
  const OpCheck check("embedding_backward");
  check.rank("dout", a.dout, 2);
  check.rank("dtable", a.dtable, 2);
  const DType cd = check.compute_dtype("dout", a.dout);
  check.tensor("ids", a.ids, DType::kI32, Shape{a.dout.dim(0)});
  check.tensor("dtable", a.dtable, sum_dtype(cd), Shape{a.dtable.dim(0), a.dout.dim(1)});
  check.shard(a.first, a.dtable.dim(0), a.vocab);
  check.disjoint("dtable", a.dtable, "dout", a.dout);
  if (a.dout.elements() == 0) return;
  do_embedding_backward(exec, a);
}

void Ops::linear_weight_grad(Exec& exec, const LinearWeightGradArgs& a) {
  const OpCheck check("linear_weight_grad");
  check.rank("dy", a.dy, 2);
  check.rank("x", a.x, 2);
  const DType cd = check.compute_dtype("dy", a.dy);
  const std::int64_t t = a.dy.dim(0), n = a.dy.dim(1), i = a.x.dim(1);
  check.tensor("x", a.x, cd, Shape{t, i});
  check.tensor("dweight", a.dweight, sum_dtype(cd), Shape{n, i});
  check.optional("dbias", a.dbias, sum_dtype(cd), Shape{n});
  check.disjoint("dweight", a.dweight, "dy", a.dy);
  check.disjoint("dweight", a.dweight, "x", a.x);
  check.disjoint("dweight", a.dweight, "dbias", a.dbias);
  const bool empty = t == 0 || n == 0 || i == 0;
  LinearWeightGradArgs args = a;
  if (a.overwrite && a.dbias.defined()) do_fill_zero(exec, a.dbias);
  if (a.overwrite && (empty || !overwrites_weight_grads())) {
    do_fill_zero(exec, a.dweight);
    args.overwrite = false;
  }
  if (!empty) do_linear_weight_grad(exec, args);
}

void Ops::repack_weight(Exec& exec, const RepackWeightArgs& a) {
  const OpCheck check("repack_weight");
  check.that(a.weight != nullptr && a.weight->storage.defined(), "weight: null");
  check.that(
      a.rows.dtype == a.weight->dtype || a.rows.dtype == DType::kF32,
      str("rows are ", dtype_name(a.rows.dtype), ", the weight ", dtype_name(a.weight->dtype)));
  check.tensor("rows", a.rows, a.rows.dtype, Shape{a.weight->n, a.weight->i});
  check.disjoint("rows", a.rows, "weight", a.weight->storage);
  do_repack_weight(exec, a);
}

void Ops::cross_entropy_stats(Exec& exec, const CrossEntropyStatsArgs& a) {
  const OpCheck check("cross_entropy_stats");
  check.rank("logits", a.logits, 2);
  const DType sums = check.sum_dtype("logits", a.logits);
  const std::int64_t t = a.logits.dim(0);
  check.that(a.logits.dim(1) > 0, str("logits: ", a.logits.shape, ": no vocabulary"));
  check.that(a.first >= 0, str("first: expected >= 0, got ", a.first));
  check.tensor("labels", a.labels, DType::kI32, Shape{t});
  check.tensor("stats", a.stats, sums, Shape{t, 4});
  if (t == 0) return;
  do_cross_entropy_stats(exec, a);
}

void Ops::cross_entropy(Exec& exec, const CrossEntropyArgs& a) {
  const OpCheck check("cross_entropy");
  check.rank("logits", a.logits, 2);
  check.rank("stats", a.stats, 3);
  const DType sums = check.sum_dtype("logits", a.logits);
  const std::int64_t t = a.logits.dim(0);
  check.that(a.logits.dim(1) > 0, str("logits: ", a.logits.shape, ": no vocabulary"));
  check.that(a.first >= 0, str("first: expected >= 0, got ", a.first));
  check.that(a.stats.dim(0) > 0, "stats: of no shard");
  check.tensor("labels", a.labels, DType::kI32, Shape{t});
  check.tensor("stats", a.stats, sums, Shape{a.stats.dim(0), t, 4});
  check.tensor("loss", a.loss, sums, Shape{t});
  check.optional("correct", a.correct, sums, Shape{t});
  if (a.dlogits.defined()) {
    check.compute_dtype("dlogits", a.dlogits);
    check.tensor("dlogits", a.dlogits, a.dlogits.dtype, a.logits.shape);
    check.disjoint("dlogits", a.dlogits, "logits", a.logits);
  }
  if (t == 0) return;
  do_cross_entropy(exec, a);
}

}  // namespace tandem::kernels
