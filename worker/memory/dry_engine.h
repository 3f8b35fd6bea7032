// An engine that runs nothing: what the runtime builds around a base model, on the meta backend.
#pragma once

#include "kernels/meta/meta_backend.h"
#include "worker/model/adapter.h"
#include "worker/model/context.h"
#include "worker/model/weight_door.h"
#include "worker/train/ranks.h"

#include <memory>

namespace tandem::worker::memory {

/// Which rank of which gang is planned for, and how it holds the base model.
struct DryRank {
  comm::Layout layout;
  int rank = 0;
  model::Holding holding = model::Holding::kWhole;
};

/// Who hears of the costs of what a dry run issues; empty: nobody.
struct DryWatchers {
  kernels::OpWatcher ops;
  comm::CommWatcher comm;
};

class DryEngine {
 public:
  /// Errors as BaseWeights::load, and refused: a layout that does not fit the model.
  static Result<std::unique_ptr<DryEngine>> create(const kernels::DeviceProfile& profile,
                                                   const model::ModelConfig& config, DType dtype,
                                                   std::int64_t adapter_slots,
                                                   const DryRank& place = {},
                                                   DryWatchers watchers = {});
  DryEngine(const DryEngine&) = delete;
  DryEngine& operator=(const DryEngine&) = delete;

 private:
  DryEngine(const kernels::DeviceProfile& profile, DType dtype, const DryRank& place,
            DryWatchers watchers);

  // Arenas after the backend, what lies in them after the arenas.
  kernels::Backend backend_;
  kernels::Arena weight_arena_, table_arena_, activation_arena_, workspace_;
  kernels::Exec exec_;
  std::unique_ptr<comm::Communicator> comm_;

 public:
  train::Ranks ranks;
  model::Context context;
  std::unique_ptr<model::TensorSource> source;
  std::shared_ptr<const model::BaseWeights> base;
  std::unique_ptr<model::WeightSource> weights;
  std::unique_ptr<model::AdapterTable> adapters;

  [[nodiscard]] kernels::Allocator& allocator() { return *backend_.allocator; }
  [[nodiscard]] kernels::MemoryLedger& ledger() { return *backend_.ledger; }
  [[nodiscard]] kernels::Exec& exec() { return exec_; }
};

}  // namespace tandem::worker::memory
