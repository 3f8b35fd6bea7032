#include "worker/comm/layout.h"

#include "protocol/base/str.h"

namespace tandem::worker::comm {

std::string Layout::to_string() const {
  return str("dp", dp, " x tp", tp, " x pp", pp,
             virtual_pp > 1 ? str(" (", virtual_pp, " virtual)") : std::string(),
             zero > 0 ? str(", zero ", zero) : std::string(),
             tp > 1 && !sequence_parallel ? ", whole streams" : "");
}

Status Layout::validate() const {
  if (dp < 1 || tp < 1 || pp < 1 || virtual_pp < 1)
    return invalid_error(str("layout ", to_string(), ": every size is at least 1"));
  if (zero < 0 || zero > 3) return invalid_error(str("zero is ", zero, "; it must be 0 to 3"));
  if (zero > 0 && dp == 1)
    return invalid_error(str("zero ", zero, " shards over data-parallel ranks; dp is 1"));
  if (virtual_pp > 1 && pp == 1)
    return invalid_error(
        str("virtual_pipeline_size ", virtual_pp, " cuts the stages of a pipeline; pp is 1"));
  return {};
}

Groups make_groups(Communicator& gang, const Layout& layout) {
  TANDEM_CHECK_EQ(gang.size(), layout.ranks(), "ranks of ", layout.to_string());
  const int rank = gang.rank();
  const int d = layout.dp_rank(rank), t = layout.tp_rank(rank), p = layout.pp_rank(rank);
  std::vector<int> tp, dp, pp, model;
  for (int i = 0; i < layout.tp; ++i) tp.push_back(layout.rank_of(d, i, p));
  for (int i = 0; i < layout.dp; ++i) dp.push_back(layout.rank_of(i, t, p));
  for (int i = 0; i < layout.pp; ++i) pp.push_back(layout.rank_of(d, t, i));
  for (int i = 0; i < layout.pp; ++i)
    for (int j = 0; j < layout.tp; ++j) model.push_back(layout.rank_of(d, j, i));
  Groups groups;
  groups.tp = gang.sub(tp);
  groups.dp = gang.sub(dp);
  groups.pp = gang.sub(pp);
  groups.model = gang.sub(model);
  return groups;
}

}  // namespace tandem::worker::comm
