// How a rank holds a model, and the door through which its blocks come: one decision for engines,
// ranks of gangs, dry runs and benches. Device thread.
#pragma once

#include "worker/model/gathered_weights.h"

#include <functional>
#include <memory>

namespace tandem::worker::model {

enum class Holding {
  kWhole,     ///< all of the shard, resident
  kParts,     ///< a frozen base: each data-parallel rank has a part of every block (ZeRO 3)
  kOwnParts,  ///< the same, but whoever trains the blocks sets the parts
  kNothing    ///< sizes alone: full fine-tuning, whose session opens weights of its own
};

/// Of a job's rank: what lies beside its session.
inline Holding holding_beside(bool full, int zero) {
  if (full) return Holding::kNothing;
  return zero == 3 ? Holding::kParts : Holding::kWhole;
}

struct HeldWeights {
  std::shared_ptr<const BaseWeights> base;
  std::unique_ptr<WeightSource> door;
  GatheredWeights* gathered = nullptr;  ///< `door`, where blocks are gathered
};

/// `group`: the data-parallel ranks. Everything lies in `arena`; `source` need not outlive the
/// call. Errors as BaseWeights::load.
Result<HeldWeights> hold_weights(const Context& context, comm::Communicator& group,
                                 kernels::Arena& arena, const ModelConfig& config,
                                 const TensorSource& source, const ModelShard& shard,
                                 Holding holding);

/// `inner`, and `on_block` called before each of its blocks is used; `on_block` outlives it.
std::unique_ptr<WeightSource> make_watched_weights(std::unique_ptr<WeightSource> inner,
                                                   const std::function<void()>& on_block);

}  // namespace tandem::worker::model
