// One rank of a replica that serves over several workers: its part of the base model and its
// ServeEngine over it (worker/serve/replica.h). The first rank leads (replica_lead.h), the others
// follow() it. One device thread.
#pragma once

#include "kernels/ops.h"
#include "protocol/base/clock.h"
#include "worker/data/dataset.h"
#include "worker/runtime/gang_rank.h"
#include "worker/runtime/replica_plan.h"
#include "worker/serve/serve_engine.h"

#include <memory>
#include <optional>

namespace tandem::worker::runtime {

class ReplicaRank {
 public:
  /// `device` (of which memory_bytes_max and numerics are those of `options`) and `gang`: as
  /// GangRank has them.
  ReplicaRank(kernels::Backend& backend, const GangRank::Options& device,
              const ModelHostOptions& options, comm::Communicator& gang, GangPatience& patience,
              const Clock& clock);
  ~ReplicaRank();
  ReplicaRank(const ReplicaRank&) = delete;
  ReplicaRank& operator=(const ReplicaRank&) = delete;

  GangWire& wire() { return wire_; }
  GangPatience& patience() { return patience_; }
  [[nodiscard]] const ModelHostOptions& options() const { return options_; }
  [[nodiscard]] const kernels::MemoryLedger& ledger() const { return *backend_.ledger; }

  /// All ranks at once, and the same error on all of them when any rank has one: those of the
  /// loader, and refused_error when weights and KV cache of a rank do not fit its memory. Once.
  Status open(const ReplicaPlan& plan);

  // -- once it is open
  serve::ServeEngine& serve() { return *serve_; }
  [[nodiscard]] const model::LoadedModel& loaded() const { return loaded_; }
  [[nodiscard]] const data::Encoder& encoder() const { return *encoder_; }

 private:
  struct Memory;
  Status load(const ReplicaPlan& plan);
  Status build(const ReplicaPlan& plan);

  kernels::Backend& backend_;
  const GangRank::Options device_;
  const ModelHostOptions options_;
  comm::Communicator& gang_;
  GangPatience& patience_;
  const Clock& clock_;
  std::unique_ptr<Memory> memory_;
  std::unique_ptr<comm::Communicator> devices_;  ///< null: `gang_` moves what ops work on, too
  GangWire wire_;
  comm::Groups groups_;
  model::LoadedModel loaded_;
  std::optional<data::Encoder> encoder_;
  std::unique_ptr<model::WeightSource> weights_;
  std::unique_ptr<model::AdapterTable> adapters_;
  std::optional<model::Context> context_;
  std::unique_ptr<serve::CallLink> link_;
  std::optional<serve::ReplicaRanks> ranks_;
  std::unique_ptr<serve::ServeEngine> serve_;
};

/// A rank that is not the first: does what it hears until the end.
void follow(ReplicaRank& rank);

}  // namespace tandem::worker::runtime
