#include "worker/model/weight_door.h"

namespace tandem::worker::model {
namespace {

class WatchedWeights final : public WeightSource {
 public:
  WatchedWeights(std::unique_ptr<WeightSource> inner, const std::function<void()>& on_block)
      : inner_(std::move(inner)), on_block_(on_block) {}
  const BlockWeights& acquire(std::int64_t layer, Phase phase) override {
    if (on_block_) on_block_();
    return inner_->acquire(layer, phase);
  }
  void release(std::int64_t layer, Phase phase) override { inner_->release(layer, phase); }
  [[nodiscard]] const BaseWeights& base() const override { return inner_->base(); }

 private:
  const std::unique_ptr<WeightSource> inner_;
  const std::function<void()>& on_block_;
};

}  // namespace

Result<HeldWeights> hold_weights(const Context& context, comm::Communicator& group,
                                 kernels::Arena& arena, const ModelConfig& config,
                                 const TensorSource& source, const ModelShard& shard,
                                 Holding holding) {
  HeldWeights held;
  if (holding == Holding::kNothing) {
    TANDEM_ASSIGN_OR_RETURN(held.base,
                            BaseWeights::sizes_alone(config, context.compute_dtype, source, shard));
  } else {
    TANDEM_ASSIGN_OR_RETURN(held.base, BaseWeights::load(context.ops, context.exec, arena, config,
                                                         context.compute_dtype, source, shard,
                                                         holding == Holding::kWhole));
  }
  if (holding == Holding::kWhole || holding == Holding::kNothing) {
    held.door = make_resident_weights(held.base);
    return held;
  }
  auto gathered =
      std::make_unique<GatheredWeights>(context.ops, context.exec, group, arena, held.base);
  if (holding == Holding::kParts) gathered->load_parts(arena, source);
  held.gathered = gathered.get();
  held.door = std::move(gathered);
  return held;
}

std::unique_ptr<WeightSource> make_watched_weights(std::unique_ptr<WeightSource> inner,
                                                   const std::function<void()>& on_block) {
  return std::make_unique<WatchedWeights>(std::move(inner), on_block);
}

}  // namespace tandem::worker::model
