#include "worker/comm/layout.h"

#include "protocol/base/str.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <utility>

namespace tandem::worker::comm {

std::string Layout::to_string() const {
  return str("dp", dp, " x tp", tp, " x pp", pp,
             virtual_pp > 1 ? str(" (", virtual_pp, " virtual)") : std::string(),
             zero > 0 ? str(", zero ", zero) : std::string(),
             tp > 1 && !sequence_parallel ? ", whole streams" : "");
}

Result<Layout> Layout::parse(std::string_view text) {
  Layout layout;
  std::pair<std::string_view, int*> fields[] = {{"dp", &layout.dp},
                                                {"tp", &layout.tp},
                                                {"pp", &layout.pp},
                                                {"zero", &layout.zero},
                                                {"virtual", &layout.virtual_pp}};
  const auto wrong = [&] {
    return invalid_error(str("layout \"", text,
                             "\" is not like tp2xpp2 or dp2xzero3: dp, tp, pp, zero and virtual, "
                             "each at most once, with its number"));
  };
  std::string_view rest = text;
  while (!rest.empty()) {
    const auto field = std::find_if(std::begin(fields), std::end(fields),
                                    [&](const auto& f) { return rest.starts_with(f.first); });
    if (field == std::end(fields) || field->second == nullptr) return wrong();
    rest.remove_prefix(field->first.size());
    if (rest.starts_with(' ')) rest.remove_prefix(1);
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(),
                                              *std::exchange(field->second, nullptr));
    if (error != std::errc()) return wrong();
    rest.remove_prefix(static_cast<std::size_t>(end - rest.data()));
    const std::size_t next = rest.find_first_not_of(" ,x");
    if (next == 0) return wrong();
    rest.remove_prefix(std::min(next, rest.size()));
  }
  return layout;
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

int Layout::groups() const {
  if (ranks() == 1) return 0;
  int count = 1;
  for (const int size : {tp, dp, pp, tp * pp}) count += size > 1 && size < ranks();
  return count + (pp > 2);  // first and last stage
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
