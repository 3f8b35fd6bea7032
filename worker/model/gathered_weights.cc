#include "worker/model/gathered_weights.h"

#include "kernels/workspace.h"

namespace tandem::worker::model {

std::int64_t flat_part(std::int64_t elements, int size) {
  if (size == 1) return elements;
  const std::int64_t part = (elements + size - 1) / size;
  return (part + kFlatAlignment - 1) / kFlatAlignment * kFlatAlignment;
}

GatheredWeights::GatheredWeights(kernels::Ops& ops, kernels::Exec& exec, comm::Communicator& group,
                                 kernels::Arena& arena, std::shared_ptr<const BaseWeights> ends)
    : ops_(ops),
      exec_(exec),
      group_(group),
      ends_(std::move(ends)),
      plain_(kernels::packs_rows(ops.profile())),
      arena_(arena) {
  exec.spare_multiprocessors = group.background_multiprocessors();
  std::int64_t part = 0;
  for (const std::int64_t layer : ends_->shard().blocks(ends_->whole_config())) {
    const FlatLayout& made =
        (parts_[layer].layout = block_layout(ends_->whole_config(), ends_->shard(), layer));
    part = std::max(part, flat_part(made.elements, group_.size()));
  }
  const auto whole = [&] { return arena.alloc({part * group_.size()}, ends_->dtype()); };
  if (!plain_) gather_.whole = whole();
  for (Slot& slot : slots_) {
    if (plain_) slot.whole = whole();
    if (!plain_) slot.block = allocate_block(ops, arena, ends_->config(), ends_->dtype());
  }
}

const FlatLayout& GatheredWeights::layout(std::int64_t layer) const {
  return parts_.at(layer).layout;
}

void GatheredWeights::set_part(std::int64_t layer, kernels::Tensor part) {
  TANDEM_CHECK(part.dtype == ends_->dtype() || part.dtype == DType::kF32);
  TANDEM_CHECK_EQ(part.elements(), flat_part(layout(layer).elements, group_.size()));
  parts_.at(layer).part = part;
  if (part.dtype == ends_->dtype()) {
    group_.share(exec_, part);
    return;
  }
  for (kernels::Tensor& rounded : rounded_) {
    if (rounded.defined() && rounded.elements() >= part.elements()) continue;
    rounded = arena_.alloc(part.shape, ends_->dtype());
    group_.share(exec_, rounded);
  }
}

void GatheredWeights::load_parts(kernels::Arena& arena, const TensorSource& source) {
  for (const auto& [layer, held] : parts_) {
    const std::int64_t part = flat_part(held.layout.elements, group_.size());
    const kernels::Tensor mine = arena.alloc({part}, ends_->dtype());
    set_part(layer, mine);
    if (source.has_values())
      upload_flat(ops_, exec_, source, held.layout, part * group_.rank(), mine);
  }
}

void GatheredWeights::forget() {
  if (gather_.pending) gather_.pending->wait(exec_);
  gather_.pending.reset();
  gather_.layer = -1;
  for (Slot& slot : slots_) slot.layer = -1;
  current_ = nullptr;
}

GatheredWeights::Slot* GatheredWeights::resident(std::int64_t layer) {
  for (Slot& slot : slots_)
    if (slot.layer == layer) return &slot;
  return nullptr;
}

void GatheredWeights::start(std::int64_t layer) {
  const auto held = parts_.find(layer);
  if (held == parts_.end() || resident(layer) != nullptr) return;
  kernels::Tensor part = held->second.part;
  TANDEM_CHECK(part.defined(), "block ", layer, " has no part");
  if (part.dtype != ends_->dtype()) {
    const kernels::Tensor rounded = rounded_[turn_++ % 2].rows(0, part.elements());
    ops_.copy(exec_, part, rounded);
    part = rounded;
  }
  if (plain_) {
    other().layer = -1;  // overwritten
    gather_.whole = other().whole;
  }
  gather_.pending =
      group_.start_all_gather(exec_, part, gather_.whole.rows(0, part.elements() * group_.size()));
  gather_.layer = layer;
}

const BlockWeights& GatheredWeights::acquire(std::int64_t layer, Phase phase) {
  Slot* slot = resident(layer);
  if (slot == nullptr) {
    if (gather_.pending && gather_.layer != layer) {  // another way than expected
      gather_.pending->wait(exec_);
      gather_.pending.reset();
    }
    if (!gather_.pending) start(layer);
    gather_.pending->wait(exec_);
    gather_.pending.reset();
    slot = &other();
    if (plain_)
      slot->block = block_weights(layout(layer), gather_.whole);
    else
      unpack_block(ops_, exec_, layout(layer), gather_.whole, slot->block);
    slot->layer = layer;
  }
  current_ = slot;
  if (!gather_.pending) start(phase == Phase::kForward ? layer + 1 : layer - 1);
  return slot->block;
}

}  // namespace tandem::worker::model
