#include "worker/train/ranks.h"

namespace tandem::worker::train {

model::ModelShard Ranks::shard(const model::ModelConfig& config) const {
  const model::PartCosts costs = layout.balance == comm::StageBalance::kBlocks ? model::PartCosts{}
                                 : layout.balance == comm::StageBalance::kMemory
                                     ? model::parameter_costs(config)
                                     : model::compute_costs(config);
  const auto all = model::cut_stages(config.layers, layout.pp, layout.virtual_pp, costs);
  model::ModelShard shard{tp_rank(), layout.tp};
  for (auto at = static_cast<std::size_t>(pp_rank()); at < all.size();
       at += static_cast<std::size_t>(layout.pp))
    shard.stages.push_back(all[at]);
  return shard;
}

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
  comm::Layout layout{static_cast<int>(s.dp), static_cast<int>(s.tp), static_cast<int>(s.pp),
                      static_cast<int>(s.zero)};
  layout.virtual_pp = static_cast<int>(s.virtual_pipeline_size);
  layout.sequence_parallel = s.sequence_parallel;
  if (s.pipeline_balance == "memory") layout.balance = comm::StageBalance::kMemory;
  return layout;
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
