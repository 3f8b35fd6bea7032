#include "kernels/ops.h"

#include "kernels/op_checks.h"

namespace tandem::kernels {

// -- memory traffic -------------------------------------------------------------------------------

void Ops::upload(Exec& exec, std::span<const std::byte> host, Tensor to) {
  const OpCheck check("upload");
  check.that(static_cast<std::int64_t>(host.size()) == to.bytes(),
             str("host has ", host.size(), " B, `to` is ", dtype_name(to.dtype), " ", to.shape,
                 " = ", to.bytes(), " B"));
  if (to.bytes() == 0) return;
  check.that(to.defined(), "`to` is undefined");
  do_upload(exec, host, to);
}

void Ops::download(Exec& exec, Tensor from, std::span<std::byte> host) {
  const OpCheck check("download");
  check.that(static_cast<std::int64_t>(host.size()) == from.bytes(),
             str("host has ", host.size(), " B, `from` is ", dtype_name(from.dtype), " ",
                 from.shape, " = ", from.bytes(), " B"));
  if (from.bytes() == 0) return;
  check.that(from.defined(), "`from` is undefined");
  do_download(exec, from, host);
}

void Ops::copy(Exec& exec, Tensor from, Tensor to) {
  const OpCheck check("copy");
  check.that(from.shape == to.shape,
             str("`from` is ", from.shape, ", `to` is ", to.shape, ": shapes must be equal"));
  if (from.elements() == 0) return;
  check.that(from.defined() && to.defined(), "a tensor is undefined");
  const auto is_float = [](DType d) { return is_stored_float(d) || d == DType::kF64; };
  check.that(from.dtype == to.dtype || (is_float(from.dtype) && is_float(to.dtype)),
             str("no conversion from ", dtype_name(from.dtype), " to ", dtype_name(to.dtype)));
  check.disjoint("from", from, "to", to);
  do_copy(exec, from, to);
}

void Ops::fill_zero(Exec& exec, Tensor x) {
  if (x.elements() == 0) return;
  OpCheck("fill_zero").that(x.defined(), "x is undefined");
  do_fill_zero(exec, x);
}

// -- weights --------------------------------------------------------------------------------------

PackedWeight Ops::pack_weight(Exec& exec, Arena& arena, DType dtype, std::int64_t n, std::int64_t i,
                              const FillRows& fill) {
  const OpCheck check("pack_weight");
  check.that(offers(profile(), dtype) || dtype == DType::kF64,
             str("expected ", dtype_names(compute_dtypes(profile())), ", got ", dtype_name(dtype)));
  check.that(n > 0 && i > 0, str("expected a non-empty matrix, got [", n, ", ", i, "]"));
  PackedWeight weight;
  weight.dtype = dtype;
  weight.n = n;
  weight.i = i;
  weight.storage = arena.alloc(Shape{packed_weight_bytes(dtype, n, i)}, DType::kU8);
  do_pack_weight(exec, weight, fill);
  return weight;
}

// -- rows -----------------------------------------------------------------------------------------

void Ops::embedding_forward(Exec& exec, const EmbeddingArgs& a) {
  const OpCheck check("embedding_forward");
  check.rank("ids", a.ids, 1);
  check.rank("out", a.out, 2);
  const DType cd = check.compute_dtype("out", a.out);
  check.that(a.table != nullptr, "table: null");
  check.weight("table", a.table, cd, a.table->n, a.out.dim(1));
  check.tensor("ids", a.ids, DType::kI32, Shape{a.out.dim(0)});
  check.shard(a.first, a.table->n, a.vocab);
  if (a.out.elements() == 0) return;
  do_embedding_forward(exec, a);
}

void Ops::gather_rows(Exec& exec, const GatherRowsArgs& a) {
  const OpCheck check("gather_rows");
  check.rank("x", a.x, 2);
  check.rank("index", a.index, 1);
  const DType cd = check.compute_dtype("x", a.x);
  check.tensor("index", a.index, DType::kI32, Shape{a.index.dim(0)});
  check.tensor("out", a.out, cd, Shape{a.index.dim(0), a.x.dim(1)});
  check.disjoint("x", a.x, "out", a.out);
  if (a.out.elements() == 0) return;
  do_gather_rows(exec, a);
}

void Ops::place_columns(Exec& exec, const PlaceColumnsArgs& a) {
  const OpCheck check("place_columns");
  check.rank("from", a.from, 2);
  check.rank("to", a.to, 2);
  const std::int64_t n = a.from.dim(1), width = a.to.dim(1);
  check.tensor("to", a.to, a.from.dtype, Shape{a.from.dim(0), width});
  check.that(a.first >= 0 && a.first + n <= width,
             str("first: columns [", a.first, ", ", a.first + n, ") of ", width));
  check.disjoint("from", a.from, "to", a.to);
  if (a.from.elements() == 0) return;
  do_place_columns(exec, a);
}

void Ops::add_rms_norm_forward(Exec& exec, const AddRmsNormArgs& a) {
  const OpCheck check("add_rms_norm_forward");
  check.rank("residual", a.residual, 2);
  const DType cd = check.compute_dtype("residual", a.residual);
  const std::int64_t t = a.residual.dim(0), c = a.residual.dim(1);
  check.that(c > 0, str("residual: ", a.residual.shape, ": the mean of no columns"));
  check.optional("delta", a.delta, cd, a.residual.shape);
  check.tensor("weight", a.weight, cd, Shape{c});
  check.tensor("y", a.y, cd, a.residual.shape);
  check.optional("rstd", a.rstd, sum_dtype(cd), Shape{t});
  check.that(a.eps >= 0.0f, str("eps: expected >= 0, got ", a.eps));
  check.disjoint("y", a.y, "residual", a.residual);
  check.disjoint("y", a.y, "weight", a.weight);
  check.disjoint("residual", a.residual, "delta", a.delta);
  check.disjoint("y", a.y, "delta", a.delta);
  if (t == 0) return;
  do_add_rms_norm_forward(exec, a);
}

void Ops::rms_norm_backward(Exec& exec, const RmsNormBackwardArgs& a) {
  const OpCheck check("rms_norm_backward");
  check.rank("dy", a.dy, 2);
  const DType cd = check.compute_dtype("dy", a.dy);
  const std::int64_t t = a.dy.dim(0), c = a.dy.dim(1);
  check.that(c > 0, str("dy: ", a.dy.shape, ": the mean of no columns"));
  check.tensor("residual", a.residual, cd, a.dy.shape);
  check.tensor("weight", a.weight, cd, Shape{c});
  check.tensor("rstd", a.rstd, sum_dtype(cd), Shape{t});
  check.tensor("dresidual", a.dresidual, cd, a.dy.shape);
  check.disjoint("dresidual", a.dresidual, "dy", a.dy);
  check.disjoint("dresidual", a.dresidual, "residual", a.residual);
  check.optional("dweight", a.dweight, sum_dtype(cd), Shape{c});
  check.disjoint("dweight", a.dweight, "dy", a.dy);
  check.disjoint("dweight", a.dweight, "residual", a.residual);
  if (a.dweight.defined() && a.overwrite) do_fill_zero(exec, a.dweight);
  if (t == 0) return;
  do_rms_norm_backward(exec, a);
}

void Ops::silu_mul_forward(Exec& exec, const SiluMulArgs& a) {
  const OpCheck check("silu_mul_forward");
  check.rank("out", a.out, 2);
  const DType cd = check.compute_dtype("out", a.out);
  check.tensor("gate_up", a.gate_up, cd, Shape{a.out.dim(0), 2 * a.out.dim(1)});
  check.disjoint("out", a.out, "gate_up", a.gate_up);
  if (a.out.elements() == 0) return;
  do_silu_mul_forward(exec, a);
}

void Ops::silu_mul_backward(Exec& exec, const SiluMulBackwardArgs& a) {
  const OpCheck check("silu_mul_backward");
  check.rank("dout", a.dout, 2);
  const DType cd = check.compute_dtype("dout", a.dout);
  const Shape wide{a.dout.dim(0), 2 * a.dout.dim(1)};
  check.tensor("gate_up", a.gate_up, cd, wide);
  check.tensor("dgate_up", a.dgate_up, cd, wide);
  check.disjoint("dgate_up", a.dgate_up, "dout", a.dout);
  if (a.dgate_up.data != a.gate_up.data)
    check.disjoint("dgate_up", a.dgate_up, "gate_up", a.gate_up);
  if (a.dout.elements() == 0) return;
  do_silu_mul_backward(exec, a);
}

// -- optimizer ------------------------------------------------------------------------------------

void Ops::squared_norm(Exec& exec, const SquaredNormArgs& a) {
  const OpCheck check("squared_norm");
  const DType sums = check.sum_dtype("out", a.out);
  for (const Tensor& t : a.tensors) check.tensor("tensors", t, sums, t.shape);
  check.tensor("out", a.out, sums, Shape{1});
  do_squared_norm(exec, a);
}

void Ops::adamw(Exec& exec, const AdamWArgs& a) {
  const OpCheck check("adamw");
  const Shape& shape = a.param.shape;
  const DType sums = check.sum_dtype("param", a.param);
  check.tensor("param", a.param, sums, shape);
  check.tensor("grad", a.grad, sums, shape);
  check.tensor("m", a.m, sums, shape);
  check.tensor("v", a.v, sums, shape);
  if (a.param_cd.defined()) {
    check.compute_dtype("param_cd", a.param_cd);
    check.tensor("param_cd", a.param_cd, a.param_cd.dtype, shape);
    check.disjoint("param_cd", a.param_cd, "param", a.param);
  }
  check.optional("squared_norm", a.squared_norm, sums, Shape{1});
  check.that(a.max_norm <= 0.0f || a.squared_norm.defined(),
             str("max_norm ", a.max_norm, " needs squared_norm"));
  check.in_range("beta1", a.beta1, 0.0f, 1.0f);
  check.in_range("beta2", a.beta2, 0.0f, 1.0f);
  check.that(a.grad_factor > 0.0f, str("grad_factor: expected > 0, got ", a.grad_factor));
  check.that(a.step >= 1, str("step: expected >= 1, got ", a.step));
  check.disjoint("param", a.param, "grad", a.grad);
  check.disjoint("m", a.m, "v", a.v);
  if (shape.elements() == 0) return;
  do_adamw(exec, a);
}

}  // namespace tandem::kernels
