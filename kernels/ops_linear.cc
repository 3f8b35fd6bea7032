#include "kernels/op_checks.h"
#include "kernels/ops.h"

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

}  // namespace

void Ops::linear_forward(Exec& exec, const LinearArgs& a) {
  const OpCheck check("linear_forward");
  check.rank("x", a.x, 2);
  check.rank("y", a.y, 2);
  const DType cd = check.compute_dtype("x", a.x);
  const std::int64_t t = a.x.dim(0), i = a.x.dim(1), n = a.y.dim(1);
  check.weight("weight", a.weight, cd, n, i);
  check.optional("bias", a.bias, cd, Shape{n});
  check.tensor("y", a.y, a.y.dtype == sum_dtype(cd) ? sum_dtype(cd) : cd, Shape{t, n});
  check_adapters(check, a.sites, a.adapters, n);
  check.optional("u", a.u, cd, Shape{t, u_columns(a.sites, a.adapters)});
  check.disjoint("y", a.y, "x", a.x);
  check.disjoint("u", a.u, "x", a.x);
  check.disjoint("u", a.u, "y", a.y);
  if (t == 0) return;
  do_linear_forward(exec, a);
}

void Ops::linear_backward(Exec& exec, const LinearBackwardArgs& a) {
  const OpCheck check("linear_backward");
  check.rank("dy", a.dy, 2);
  check.rank("x", a.x, 2);
  const DType cd = check.compute_dtype("dy", a.dy);
  const std::int64_t t = a.dy.dim(0), n = a.dy.dim(1), i = a.x.dim(1);
  check.tensor("x", a.x, cd, Shape{t, i});
  check.weight("weight", a.weight, cd, n, i);
  check_adapters(check, a.sites, a.adapters, n);
  check.optional("u", a.u, cd, Shape{t, u_columns(a.sites, a.adapters)});
  check.optional("dx", a.dx, cd, Shape{t, i});
  check.disjoint("dx", a.dx, "dy", a.dy);
  check.disjoint("dx", a.dx, "x", a.x);
  check.disjoint("dx", a.dx, "u", a.u);
  if (t == 0) return;
  do_linear_backward(exec, a);
}

}  // namespace tandem::kernels
