#include "kernels/op_checks.h"
#include "kernels/ops.h"
#include "kernels/workspace.h"

namespace tandem::kernels {
namespace {

/// Sites in ascending, disjoint output ranges; every site as many slots as the first; segments
/// where there are adapters.
void check_adapters(const OpCheck& check, const std::vector<LoraSite>& sites,
                    const AdapterRows* rows, std::int64_t n) {
  std::int64_t end = 0;
  for (const LoraSite& site : sites) {
    check.that(site.n_begin >= end && site.n > 0 && site.n_begin + site.n <= n,
               str("site outputs [", site.n_begin, ", ", site.n_begin + site.n,
                   "): expected ascending and inside [", end, ", ", n, ")"));
    end = site.n_begin + site.n;
    check.rank("site.entries", site.entries, 1);
    check.tensor("site.entries", site.entries, DType::kU8, site.entries.shape);
    check.that(
        site.entries.bytes() % static_cast<std::int64_t>(sizeof(LoraEntry)) == 0,
        str("site.entries: ", site.entries.bytes(), " B is no multiple of ", sizeof(LoraEntry)));
  }
  if (rows == nullptr) return;
  check.that(
      rows->segments_max >= 0 && rows->rank_max >= 0,
      str("segments_max ", rows->segments_max, ", rank_max ", rows->rank_max, ": expected >= 0"));
  check.that(rows->dropout >= 0.0f && rows->dropout < 1.0f,
             str("dropout: expected 0 <= p < 1, got ", rows->dropout));
  if (sites.empty() || rows->rank_max == 0) return;
  check.tensor("segment_offsets", rows->segment_offsets, DType::kI32,
               Shape{rows->segments_max + 1});
  check.tensor("segment_slots", rows->segment_slots, DType::kI32, Shape{rows->segments_max});
}

std::int64_t u_columns(const std::vector<LoraSite>& sites, const AdapterRows* rows) {
  return rows == nullptr ? 0 : static_cast<std::int64_t>(sites.size()) * rows->rank_max;
}

/// x, or shape and dtype of what its recipe makes.
Tensor input_of(const OpCheck& check, const LinearBackwardArgs& a, DType cd) {
  const std::int64_t t = a.dy.dim(0);
  const AddRmsNormArgs& norm = a.make_x.norm;
  const Tensor& gate_up = a.make_x.silu_mul.gate_up;
  if (!a.make_x.defined()) {
    check.rank("x", a.x, 2);
    check.tensor("x", a.x, cd, Shape{t, a.x.dim(1)});
    return a.x;
  }
  check.that(!a.x.defined() && !(norm.residual.defined() && gate_up.defined()),
             "x: expected x itself or one recipe");
  if (gate_up.defined()) {
    check.rank("gate_up", gate_up, 2);
    const std::int64_t i = gate_up.dim(1) / 2;
    check.tensor("gate_up", gate_up, cd, Shape{t, 2 * i});
    return {nullptr, cd, Shape{t, i}};
  }
  check.rank("residual", norm.residual, 2);
  const std::int64_t i = norm.residual.dim(1);
  check.tensor("residual", norm.residual, cd, Shape{t, i});
  check.tensor("weight of the norm", norm.weight, cd, Shape{i});
  check.tensor("rstd", norm.rstd, sum_dtype(cd), Shape{t});
  check.that(!norm.delta.defined(), "delta: expected none, the residual holds the sum");
  return {nullptr, cd, Shape{t, i}};
}

}  // namespace

void Ops::linear_forward(Exec& exec, const LinearArgs& a) {
  const OpCheck check("linear_forward");
  check.rank("x", a.x, 2);
  check.rank("y", a.y, 2);
  const DType cd = check.compute_dtype("x", a.x);
  const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.y.dim(1);
  check.weight("weight", a.weight, cd, n, i);
  check.optional("bias", a.bias, cd, Shape{n});
  const Tensor& gate_up = a.make_x.gate_up;
  check.optional("gate_up", gate_up, cd, Shape{t, 2 * i});
  check.that(!gate_up.defined() || (a.x.defined() && a.make_x.out.data == a.x.data),
             "x: expected to be what make_x writes");
  check.tensor("y", a.y, a.y.dtype == sum_dtype(cd) ? sum_dtype(cd) : cd, Shape{t, n});
  check_adapters(check, a.sites, a.adapters, n);
  check.optional("u", a.u, cd, Shape{t, u_columns(a.sites, a.adapters)});
  check.disjoint("y", a.y, "x", a.x);
  check.disjoint("u", a.u, "x", a.x);
  check.disjoint("u", a.u, "y", a.y);
  check.disjoint("gate_up", gate_up, "x", a.x);
  check.disjoint("gate_up", gate_up, "y", a.y);
  check.disjoint("gate_up", gate_up, "u", a.u);
  const auto& [silu_mul, rope] = a.then;
  if (silu_mul.out.defined()) {
    check.tensor("out of then", silu_mul.out, cd, Shape{t, n / 2});
    check.tensor("gate_up of then", silu_mul.gate_up, cd, Shape{t, n / 2 * 2});
    check.that(silu_mul.gate_up.data == a.y.data && !rope.qkv.defined(),
               "then: expected one op that reads y");
    check.disjoint("out of then", silu_mul.out, "y", a.y);
    check.disjoint("out of then", silu_mul.out, "x", a.x);
  }
  if (rope.qkv.defined()) {
    check_rope(rope);
    check.that(rope.qkv.data == a.y.data && rope.qkv.shape == a.y.shape && !rope.raw.defined(),
               "then: expected an op that reads y");
  }
  if (t == 0) return;
  const bool makes = !gate_up.defined() || makes_input(a, profile());
  const bool reads = !a.then.defined() || reads_output(profile());
  if (makes && reads) return do_linear_forward(exec, a);
  if (!makes) silu_mul_forward(exec, a.make_x);
  LinearArgs alone = a;
  if (!makes) alone.make_x = {};
  if (!reads) alone.then = {};
  do_linear_forward(exec, alone);
  if (reads) return;
  if (silu_mul.out.defined()) silu_mul_forward(exec, silu_mul);
  if (rope.qkv.defined()) rope_forward(exec, rope);
}

void Ops::linear_backward(Exec& exec, const LinearBackwardArgs& a) {
  const OpCheck check("linear_backward");
  check.rank("dy", a.dy, 2);
  const DType cd = check.compute_dtype("dy", a.dy);
  const Tensor x = input_of(check, a, cd);
  const std::int64_t t = a.dy.dim(0), n = a.dy.dim(1), i = x.dim(1);
  check.weight("weight", a.weight, cd, n, i);
  check_adapters(check, a.sites, a.adapters, n);
  check.optional("u", a.u, cd, Shape{t, u_columns(a.sites, a.adapters)});
  check.optional("dx", a.dx, cd, Shape{t, i});
  check.disjoint("dx", a.dx, "dy", a.dy);
  check.disjoint("dx", a.dx, "x", a.x);
  check.disjoint("dx", a.dx, "u", a.u);
  check.disjoint("dx", a.dx, "residual", a.make_x.norm.residual);
  check.disjoint("dx", a.dx, "gate_up", a.make_x.silu_mul.gate_up);
  check.that(!a.make_dy.dout.defined() || a.make_dy.dgate_up.data == a.dy.data,
             "dy: expected to be what make_dy writes");
  check.optional("du", a.du, cd, Shape{t, u_columns(a.sites, a.adapters)});
  check.optional("du of left", a.left.du, cd, Shape{t, u_columns(a.left.sites, a.adapters)});
  if (t == 0) return;
  if (!a.make_x.defined() && !a.make_dy.dout.defined()) return do_linear_backward(exec, a);
  LinearBackwardArgs made = a;
  made.x = x;
  if (a.make_dy.dout.defined() && !makes_gradient(made, profile())) {
    silu_mul_backward(exec, a.make_dy);
    made.make_dy = {};
  }
  const ArenaScope scope(exec.workspace);
  if (a.make_x.defined() && u_columns(a.sites, a.adapters) > 0 && !makes_input(made, profile())) {
    made.x = exec.workspace.alloc(x.shape, cd);
    made.make_x = {};
    AddRmsNormArgs norm = a.make_x.norm;
    norm.y = made.x;
    norm.rstd = {};
    if (norm.residual.defined())
      add_rms_norm_forward(exec, norm);
    else
      silu_mul_forward(exec, {a.make_x.silu_mul.gate_up, made.x});
  }
  do_linear_backward(exec, made);
}

void Ops::mlp_backward(Exec& exec, const MlpBackwardArgs& a) {
  const OpCheck check("mlp_backward");
  check.rank("dy of down", a.down.dy, 2);
  check.rank("dy of gate_up", a.gate_up.dy, 2);
  const SiluMulBackwardArgs& silu_mul = a.gate_up.make_dy;
  check.that(silu_mul.dout.defined() && silu_mul.dout.data == a.down.dx.data,
             "dout: expected dx of down");
  check.that(
      !a.down.make_x.defined() || a.down.make_x.silu_mul.gate_up.data == silu_mul.gate_up.data,
      "x of down: expected to be made of the gate and up whose gradient follows");
  const DType cd = check.compute_dtype("dy of down", a.down.dy);
  MlpBackwardArgs shapes = a;
  shapes.down.x = input_of(check, a.down, cd);
  shapes.gate_up.x = input_of(check, a.gate_up, cd);
  const ArenaScope scope(exec.workspace);
  MlpBackwardArgs made = a;
  if (makes_factor_grad(shapes, profile())) {
    const LinearBackwardArgs& down = a.down;
    const Shape shape{down.dy.dim(0), u_columns(down.sites, down.adapters)};
    made.down.du = exec.workspace.alloc(shape, cd);
    made.gate_up.left = {made.down.du, down.sites};
  }
  linear_backward(exec, made.down);
  linear_backward(exec, made.gate_up);
}

}  // namespace tandem::kernels
