// The ZeRO-3 door: each data-parallel rank keeps one part of every block's flat buffer. While a
// block is in use the next one is gathered, up in forward and down in backward. Two blocks are
// resident at most, so the last block of forward is still there when backward begins. All ranks of
// the group acquire the same blocks in the same order, and set the same parts. A part that is the
// f32 master of whoever trains it is rounded on its way: nothing else of it is kept. Where packed
// weights are plain rows a block is used where it was gathered; elsewhere it is packed into a place
// of its own. One device thread.
#pragma once

#include "worker/model/context.h"
#include "worker/model/flat_layout.h"

#include <array>
#include <map>
#include <memory>

namespace tandem::worker::model {

/// Elements of each of `size` equal parts of a flat buffer, aligned; the buffer is padded to
/// size * part.
std::int64_t flat_part(std::int64_t elements, int size);

class GatheredWeights final : public WeightSource {
 public:
  /// `ends` holds embedding, head and norms and no blocks. Slots and the gather's target come from
  /// `arena`, which outlives this. `exec`'s products leave room for the gathers from now on.
  GatheredWeights(kernels::Ops& ops, kernels::Exec& exec, comm::Communicator& group,
                  kernels::Arena& arena, std::shared_ptr<const BaseWeights> ends);

  /// This rank's part of a block, [flat_part] cd in an arena of Sharing::kPeers, or f32; all ranks
  /// of the group at once. Whoever trains it may change it while no block is gathered; call
  /// forget() then.
  void set_part(std::int64_t layer, kernels::Tensor part);
  /// Reads a frozen base's parts from `source` into `arena`.
  void load_parts(kernels::Arena& arena, const TensorSource& source);
  /// Nothing resident is current any more.
  void forget();

  const BlockWeights& acquire(std::int64_t layer, Phase phase) override;
  void release(std::int64_t, Phase) override {}
  [[nodiscard]] const BaseWeights& base() const override { return *ends_; }
  [[nodiscard]] const FlatLayout& layout(std::int64_t layer) const;

 private:
  struct Slot {
    BlockWeights block;
    kernels::Tensor whole;  ///< plain_: [group * part] cd, what `block` views
    std::int64_t layer = -1;
  };
  kernels::Ops& ops_;
  kernels::Exec& exec_;
  comm::Communicator& group_;
  const std::shared_ptr<const BaseWeights> ends_;
  /// A block that this rank holds.
  struct Part {
    FlatLayout layout;
    kernels::Tensor part;
  };
  std::map<std::int64_t, Part> parts_;  ///< by number
  /// A gather and its target [group * part] cd; plain_: of the slot that is taken next.
  struct Gather {
    kernels::Tensor whole;
    std::int64_t layer = -1;
    std::unique_ptr<comm::Pending> pending;
  };
  void start(std::int64_t layer);
  [[nodiscard]] Slot* resident(std::int64_t layer);
  /// The slot that is not in use.
  [[nodiscard]] Slot& other() { return current_ == slots_.data() ? slots_[1] : slots_[0]; }

  const bool plain_;
  kernels::Arena& arena_;
  Gather gather_;
  /// Rounded parts on their way, in turn: others may still read the one before.
  std::array<kernels::Tensor, 2> rounded_;
  std::size_t turn_ = 0;
  std::array<Slot, 2> slots_;
  Slot* current_ = nullptr;  ///< the one that was acquired last
};

}  // namespace tandem::worker::model
