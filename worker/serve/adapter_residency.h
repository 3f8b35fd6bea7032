// Which adapters are on the device and which of them sit in a slot that rows can name. Two tiers:
// installed (weights held by shared_ptr, bounded in number; who installs bounds their bytes) and
// bound (an entry of the adapter table points at them). Binding is a few small writes, so having
// fewer slots than adapters in use costs little: a step binds what its rows need. One device
// thread.
#pragma once

#include "protocol/base/digest.h"
#include "protocol/base/result.h"
#include "worker/model/adapter.h"

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

namespace tandem::worker::serve {

class AdapterResidency {
 public:
  using Weights = std::shared_ptr<const model::AdapterWeights>;
  /// Points slot `slot` at `weights`; null clears it. AdapterTable::set and clear in the engine.
  using SetSlot = std::function<void(std::int64_t slot, const Weights& weights)>;

  AdapterResidency(std::int64_t slot_begin, std::int64_t slot_count, std::int64_t installed_max,
                   SetSlot set_slot);

  /// Holds `weights` under `digest`, which count as `bytes`; the least recently used idle adapter
  /// goes when there are too many. busy_error: all are in use. Installed already: nothing
  /// happens.
  Status install(const Digest& digest, Weights weights, std::int64_t bytes);
  [[nodiscard]] bool installed(const Digest& digest) const { return adapters_.contains(digest); }

  /// A live request uses it from now on / no longer: adapters in use are not evicted.
  void acquire(const Digest& digest);
  void release(const Digest& digest);
  /// Forgets it as soon as it is idle.
  void drop(const Digest& digest);

  /// Starts a step that will bind `adapters` (distinct, at most slot_count, installed): their slots
  /// stay theirs until the next step.
  void begin_step(std::span<const Digest> adapters);
  /// The slot of one of this step's adapters; takes over the one that was used longest ago when it
  /// has none.
  std::int32_t bind(const Digest& digest);
  [[nodiscard]] std::int64_t rank_max(const Digest& digest) const;

  /// Device memory of all that are installed, in the pages that the ledger counts.
  [[nodiscard]] std::int64_t bytes() const;
  /// The one that no live request uses and that was used longest ago.
  [[nodiscard]] std::optional<Digest> oldest_idle() const;

  [[nodiscard]] std::vector<Digest> resident() const;  ///< most recently used first
  [[nodiscard]] std::int64_t slot_count() const { return static_cast<std::int64_t>(slots_.size()); }
  [[nodiscard]] std::int64_t binds() const { return binds_; }  ///< slot writes since the start

 private:
  struct Adapter {
    Weights weights;
    std::int64_t bytes = 0;  ///< in whole pages
    std::int64_t users = 0, used_at = 0;
    std::int32_t slot = -1;  ///< index into slots_
    bool dropped = false;
  };
  struct Slot {
    Digest adapter;  ///< empty: free
    std::int64_t step = -1;
  };
  void erase(const Digest& digest);

  const std::int64_t slot_begin_, installed_max_;
  const SetSlot set_slot_;
  std::unordered_map<Digest, Adapter> adapters_;
  std::vector<Slot> slots_;
  std::int64_t step_ = 0, clock_ = 0, binds_ = 0;
};

}  // namespace tandem::worker::serve
