#include "worker/train/ranks.h"

namespace tandem::worker::train {

void sum_over_ranks(const Ranks* ranks, model::Context& ctx, std::span<double> values) {
  if (ranks == nullptr || ranks->layout.dp * ranks->layout.pp == 1) return;
  kernels::ArenaScope scope(ctx.activations);
  const kernels::Tensor sums =
      ctx.activations.alloc({static_cast<std::int64_t>(values.size())}, DType::kF64);
  ctx.ops.upload(ctx.exec, std::as_bytes(values), sums);
  ranks->groups.dp->all_reduce_sum(ctx.exec, sums);
  ranks->groups.pp->all_reduce_sum(ctx.exec, sums);
  ctx.ops.download(ctx.exec, sums, std::as_writable_bytes(values));
}

comm::Layout layout_of(const protocol::TrainSettings& s) {
  return {static_cast<int>(s.dp), static_cast<int>(s.tp), static_cast<int>(s.pp),
          static_cast<int>(s.zero)};
}

Ranks make_ranks(comm::Communicator& gang, const comm::Layout& layout) {
  Ranks ranks{layout, gang.rank(), comm::make_groups(gang, layout), nullptr};
  const int stage = ranks.pp_rank();
  const bool end = layout.pp > 1 && (stage == 0 || stage == layout.pp - 1);
  ranks.ends =
      ranks.groups.pp->sub(end ? std::vector<int>{0, layout.pp - 1} : std::vector<int>{stage});
  return ranks;
}

}  // namespace tandem::worker::train
