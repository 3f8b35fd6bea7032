// States that ranks save in pieces and any layout loads: a checkpoint is logical tensors, whoever
// held which part. Pure. Any thread.
#pragma once

#include "worker/train/train_session.h"

#include <span>
#include <vector>

namespace tandem::worker::train {

/// One state of all ranks' parts, in the order of the first rank that names a tensor. corrupt_error
/// names a tensor of which an element is missing or comes twice, or whose shape two ranks disagree
/// about; conflict_error: states of different steps or jobs.
Result<TrainState> merge_states(std::span<const TrainState> states);

/// A rectangle of a whole state tensor, row-major into `out`. corrupt_error: another shape than the
/// job's, or values that are missing.
Status cut_out(const StateTensor& tensor, const std::vector<std::int64_t>& shape,
               const model::TensorSlice& slice, float* out);

}  // namespace tandem::worker::train
