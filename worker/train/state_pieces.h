// States that ranks save in pieces and any layout loads: a checkpoint is logical tensors, whoever
// held which part. Pure. Any thread.
#pragma once

#include "worker/train/train_session.h"

#include <algorithm>
#include <span>
#include <vector>

namespace tandem::worker::train {

/// One state of all ranks' parts, in the order of the first rank that names a tensor. corrupt_error
/// names a tensor of which an element is missing or comes twice, or whose shape two ranks disagree
/// about; conflict_error: states of different steps or jobs.
Result<TrainState> merge_states(std::span<const TrainState> states);

/// Calls `run(from, at, count)` for stretches of a piece that are contiguous in the whole tensor:
/// `count` values from `from` of the piece are elements `at` on of the tensor.
template <class Run>
void for_each_run(const StateTensor& piece, const Run& run) {
  const std::int64_t width = piece.shape.size() > 1 ? piece.shape[1] : 1;
  const auto size = static_cast<std::int64_t>(piece.values.size());
  const bool rows = piece.slice.rows == 0 || piece.slice.columns == width;
  if (rows) return run(0, piece.slice.row * width + piece.first, size);
  for (std::int64_t from = 0; from < size;) {
    const std::int64_t in = piece.first + from, column = in % piece.slice.columns;
    const std::int64_t count = std::min(size - from, piece.slice.columns - column);
    run(from, (piece.slice.row + in / piece.slice.columns) * width + piece.slice.column + column,
        count);
    from += count;
  }
}

/// A rectangle of a whole state tensor, row-major into `out`. corrupt_error: another shape than the
/// job's, or values that are missing.
Status cut_out(const StateTensor& tensor, const std::vector<std::int64_t>& shape,
               const model::TensorSlice& slice, float* out);

}  // namespace tandem::worker::train
