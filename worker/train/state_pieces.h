// States that ranks save in pieces and any layout loads: a checkpoint is logical tensors, whoever
// held which part. Pure. Any thread.
#pragma once

#include "worker/train/train_session.h"

#include <algorithm>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace tandem::worker::train {

/// Of a logical tensor's rectangle the row-major elements [first, first + count).
struct StateRange {
  model::TensorSlice slice;
  std::int64_t first = 0, count = 0;
};

/// Where a checkpoint's values come from; each rank asks for what it holds.
class StateSource {
 public:
  virtual ~StateSource() = default;
  /// Logical tensors of the whole state.
  [[nodiscard]] virtual std::size_t tensors() const = 0;
  /// Into `out`. corrupt_error: no such tensor, another shape than the job's, or values that are
  /// missing; and whatever fetching them may meet.
  virtual Status read(const std::string& name, const std::vector<std::int64_t>& shape,
                      const StateRange& range, float* out) const = 0;
};

/// Whole tensors that are at hand; `state` outlives it.
class WholeState final : public StateSource {
 public:
  explicit WholeState(const TrainState& state);
  [[nodiscard]] std::size_t tensors() const override { return by_name_.size(); }
  Status read(const std::string& name, const std::vector<std::int64_t>& shape,
              const StateRange& range, float* out) const override;

 private:
  std::map<std::string, const StateTensor*> by_name_;
};

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

}  // namespace tandem::worker::train
