// Where gradients go while a micro-batch is in backward, and what becomes of them.
#include "worker/train/rank_params.h"

#include <algorithm>

namespace tandem::worker::train {

using kernels::Tensor;
using model::FlatTensor;

RankParams::Unit& RankParams::unit_of(std::int64_t layer) {
  const auto at = std::find_if(units_.begin(), units_.end(),
                               [&](const Unit& unit) { return unit.layer == layer; });
  TANDEM_CHECK(at != units_.end(), "block ", layer, " is not of this rank");
  return *at;
}

void RankParams::zero_gradients() {
  model::Context& ctx = parts_.context;
  for (Unit& unit : units_) {
    unit.fresh = true;
    if (!written_first(unit)) ctx.ops.fill_zero(ctx.exec, unit.gradient);
  }
}

RankParams::Unit* RankParams::unit_of(model::End end) {
  const auto at = std::find_if(units_.begin(), units_.end(), [&](const Unit& unit) {
    return unit.layer == (end == model::End::kHead ? kHead : kEmbedding);
  });
  return at == units_.end() ? nullptr : &*at;
}

Tensor RankParams::begin_gradient(Unit& unit, SharedGradient& shared) {
  model::Context& ctx = parts_.context;
  wait_for(shared);
  const Tensor gradient = shared.whole.rows(0, padded(unit));
  // Only a full fine-tune's blocks are written first; elsewhere backward adds.
  if (!full() || unit.layer < 0 || !unit.fresh) ctx.ops.fill_zero(ctx.exec, gradient);
  // What earlier micro-batches left is a part of this rank's addend, so that the sum over ranks is
  // the sum over micro-batches too.
  if (!unit.fresh) ctx.ops.copy(ctx.exec, unit.part_gradient, gradient.rows(unit.begin, unit.part));
  return gradient;
}

void RankParams::begin_reduction(Unit& unit, SharedGradient& shared) {
  shared.reducing = parts_.ranks->groups.dp->start_reduce_scatter_sum(
      parts_.context.exec, shared.whole.rows(0, padded(unit)), unit.part_gradient);
}

const model::BlockGrads* RankParams::acquire(std::int64_t layer) {
  Unit& unit = unit_of(layer);
  const Tensor gradient = at_once(unit) ? begin_gradient(unit, shared_[unit.turn]) : unit.gradient;
  const bool fresh = unit.fresh;
  unit.fresh = false;
  if (!full()) return nullptr;
  block_grads_ = block_views(unit.layout, gradient);
  block_grads_.fresh = fresh;
  return &block_grads_;
}

void RankParams::ready(std::int64_t layer) {
  Unit& unit = unit_of(layer);
  if (at_once(unit)) begin_reduction(unit, shared_[unit.turn]);
}

void RankParams::wait_for(SharedGradient& shared) {
  if (shared.reducing) shared.reducing->wait(parts_.context.exec);
  shared.reducing.reset();
}

const model::EndGrads* RankParams::ends() {
  if (!full()) return nullptr;
  if (!units_.empty() && units_.back().layer == kEnds) {
    const model::EndGrads views = end_views(units_.back().layout, units_.back().gradient);
    end_grads_.final_norm = views.final_norm;
    if (unit_of(model::End::kHead) == nullptr) end_grads_.head = views.head;
    if (unit_of(model::End::kEmbedding) == nullptr) end_grads_.embedding = views.embedding;
  }
  return &end_grads_;
}

void RankParams::acquire_end(model::End end) {
  Unit* unit = unit_of(end);
  if (unit == nullptr) return;
  for (SharedGradient& shared : shared_) wait_for(shared);
  const Tensor gradient = begin_gradient(*unit, shared_by_ends_);
  unit->fresh = false;
  const Tensor view = tensor_view(unit->layout.tensors.front(), gradient);
  (end == model::End::kHead ? end_grads_.head : end_grads_.embedding) = view;
}

void RankParams::ready_end(model::End end) {
  Unit* unit = unit_of(end);
  if (unit == nullptr) return;
  begin_reduction(*unit, shared_by_ends_);
  wait_for(shared_by_ends_);  // the blocks need the room
}

void RankParams::sum_ends(Unit& unit) {
  for (const FlatTensor& tensor : unit.layout.tensors)
    if (tensor.partial)
      parts_.context.comm.all_reduce_sum(parts_.context.exec, tensor_view(tensor, unit.gradient));
  // First and last stage hold the same embedding, each with the gradient of its own use.
  if (parts_.ranks == nullptr || parts_.ranks->ends->size() == 1 || !whole_config_.tied_embedding)
    return;
  const FlatTensor* embedding = unit.layout.find(model::kEmbeddingName);
  parts_.ranks->ends->all_reduce_sum(parts_.context.exec, tensor_view(*embedding, unit.gradient));
}

Tensor RankParams::all_gradients() const {
  for (std::size_t u = 1; u < units_.size(); ++u) {
    const Tensor& before = units_[u - 1].gradient;
    const auto* next = static_cast<const char*>(units_[u].gradient.data);
    TANDEM_CHECK(
        next - static_cast<const char*>(before.data) - before.bytes() < kernels::kDeviceAlignment,
        "gradients of unit ", u, " do not follow those before");
  }
  const Tensor &first = units_.front().gradient, &last = units_.back().gradient;
  const auto bytes =
      static_cast<const char*>(last.data) + last.bytes() - static_cast<const char*>(first.data);
  return {first.data, sums_, {bytes / dtype_bytes(sums_)}};
}

void RankParams::measure_gradients() {
  model::Context& ctx = parts_.context;
  std::vector<Tensor> counted;
  for (SharedGradient& shared : shared_) wait_for(shared);
  for (Unit& unit : units_) {
    if (unit.layer == kEnds) sum_ends(unit);
    if (written_first(unit) && unit.fresh)
      ctx.ops.fill_zero(ctx.exec, at_once(unit) ? unit.part_gradient : unit.gradient);
    if (dp_size() > 1 && zero() > 0 && !at_once(unit))
      parts_.ranks->groups.dp->reduce_scatter_sum(ctx.exec, unit.gradient, unit.part_gradient);
  }
  if (dp_size() > 1 && zero() == 0 && !units_.empty())
    parts_.ranks->groups.dp->all_reduce_sum(ctx.exec, all_gradients());
  for (Unit& unit : units_) {
    for (const Tensor& piece : unit.partial) ctx.comm.all_reduce_sum(ctx.exec, piece);
    counted.insert(counted.end(), unit.counted.begin(), unit.counted.end());
  }
  ctx.ops.squared_norm(ctx.exec, {counted, squared_norm_});
  if (parts_.ranks == nullptr) return;
  if (zero() > 0) parts_.ranks->groups.dp->all_reduce_sum(ctx.exec, squared_norm_);
  parts_.ranks->groups.model->all_reduce_sum(ctx.exec, squared_norm_);
}

void RankParams::update(const protocol::TrainSettings& settings, double learning_rate,
                        std::int64_t step, double grad_factor) {
  const kernels::AdamWArgs args =
      adamw_args(settings, learning_rate, step, grad_factor, squared_norm_);
  for (Unit& unit : units_) publish(unit, &args);
}

}  // namespace tandem::worker::train
