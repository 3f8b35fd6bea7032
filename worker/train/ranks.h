// What a session knows about the other ranks of its job. Built once by whoever makes the gang;
// outlives the session.
#pragma once

#include "protocol/job_spec.h"
#include "worker/comm/layout.h"
#include "worker/model/context.h"
#include "worker/model/shard.h"
#include "worker/model/stream_rows.h"

#include <memory>
#include <span>
#include <vector>

namespace tandem::worker::train {

struct Ranks {
  comm::Layout layout;
  int rank = 0;
  comm::Groups groups;
  /// First and last stage, which both hold a tied embedding; of size 1 where there is nobody to
  /// agree with.
  std::unique_ptr<comm::Communicator> ends;
  std::int64_t stream_part_bytes = model::kStreamPartBytes;  ///< see StreamRoom

  [[nodiscard]] int dp_rank() const { return layout.dp_rank(rank); }
  [[nodiscard]] int tp_rank() const { return layout.tp_rank(rank); }
  [[nodiscard]] int pp_rank() const { return layout.pp_rank(rank); }
  /// Rows of the residual stream that this rank has of a micro-batch's.
  [[nodiscard]] std::int64_t stream_rows(std::int64_t rows) const { return rows / row_parts(); }
  /// Of which the rows of a micro-batch are therefore a multiple.
  [[nodiscard]] std::int64_t row_parts() const { return layout.sequence_parallel ? layout.tp : 1; }
  /// The stages pp_rank, pp_rank + pp, ... of all pp * virtual_pp.
  [[nodiscard]] model::ModelShard shard(const model::ModelConfig& config) const;
};

/// Sums of numbers that each copy of the model's last stage counts for itself, over data-parallel
/// ranks and stages: the same on every rank. `ranks` null: nothing to add.
void sum_over_ranks(const Ranks* ranks, model::Context& ctx, std::span<double> values);

/// A job's layout as its settings say it.
comm::Layout layout_of(const protocol::TrainSettings& settings);

/// Called by every rank of the gang at once.
Ranks make_ranks(comm::Communicator& gang, const comm::Layout& layout);

}  // namespace tandem::worker::train
