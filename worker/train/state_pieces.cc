#include "worker/train/state_pieces.h"

#include <algorithm>
#include <map>
#include <numeric>

namespace tandem::worker::train {

namespace {

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (std::int64_t dim : shape) text += (text.empty() ? "" : ", ") + str(dim);
  return "[" + text + "]";
}

std::int64_t elements_of(const std::vector<std::int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

/// A tensor that is being put together.
struct Whole {
  StateTensor tensor;
  std::vector<bool> seen;
};

Status put(const StateTensor& piece, Whole& whole) {
  const auto all = static_cast<std::int64_t>(whole.seen.size());
  const std::int64_t width = piece.shape.size() > 1 ? piece.shape[1] : 1;
  model::TensorSlice slice = piece.slice;
  if (slice.rows == 0) slice = {0, all / std::max<std::int64_t>(1, width), 0, width};
  if (slice.column + slice.columns > width || slice.columns < 1 ||
      piece.first + static_cast<std::int64_t>(piece.values.size()) > slice.elements())
    return corrupt_error(str("a piece of ", piece.name, " lies outside ", shape_text(piece.shape)));
  for (std::size_t e = 0; e < piece.values.size(); ++e) {
    const std::int64_t at = piece.first + static_cast<std::int64_t>(e);
    const std::int64_t to =
        (slice.row + at / slice.columns) * width + slice.column + at % slice.columns;
    if (to < 0 || to >= all)
      return corrupt_error(
          str("a piece of ", piece.name, " lies outside ", shape_text(piece.shape)));
    const auto index = static_cast<std::size_t>(to);
    if (whole.seen[index])
      return corrupt_error(str("element ", to, " of ", piece.name, " comes from two ranks"));
    whole.seen[index] = true;
    whole.tensor.values[index] = piece.values[e];
  }
  return {};
}

}  // namespace

Result<TrainState> merge_states(std::span<const TrainState> states) {
  TrainState merged;
  std::map<std::string, std::size_t> index;
  std::vector<Whole> wholes;
  for (const TrainState& state : states) {
    if (merged.json.empty()) merged.json = state.json;
    if (state.json != merged.json)
      return conflict_error("the parts of a checkpoint belong to different steps or jobs");
    for (const StateTensor& piece : state.tensors) {
      const auto [it, fresh] = index.emplace(piece.name, wholes.size());
      if (fresh) {
        const auto count = static_cast<std::size_t>(elements_of(piece.shape));
        wholes.push_back({{piece.name, piece.shape, std::vector<float>(count, 0.0f)},
                          std::vector<bool>(count, false)});
      }
      Whole& whole = wholes[it->second];
      if (whole.tensor.shape != piece.shape)
        return corrupt_error(str("two ranks disagree about the shape of ", piece.name, ": ",
                                 shape_text(whole.tensor.shape), " and ", shape_text(piece.shape)));
      TANDEM_RETURN_IF_ERROR(put(piece, whole));
    }
  }
  for (Whole& whole : wholes) {
    const auto gap = std::find(whole.seen.begin(), whole.seen.end(), false);
    if (gap != whole.seen.end())
      return corrupt_error(str("no rank saved element ", gap - whole.seen.begin(), " of ",
                               whole.tensor.name, " ", shape_text(whole.tensor.shape)));
    merged.tensors.push_back(std::move(whole.tensor));
  }
  return merged;
}

WholeState::WholeState(const TrainState& state) {
  for (const StateTensor& tensor : state.tensors) by_name_.emplace(tensor.name, &tensor);
}

Status WholeState::read(const std::string& name, const std::vector<std::int64_t>& shape,
                        const StateRange& range, float* out) const {
  const auto found = by_name_.find(name);
  if (found == by_name_.end()) return corrupt_error(str("the checkpoint has no tensor ", name));
  const StateTensor& tensor = *found->second;
  if (tensor.shape != shape ||
      static_cast<std::int64_t>(tensor.values.size()) != elements_of(shape) ||
      tensor.slice.rows != 0)
    return corrupt_error(str("checkpoint tensor ", name, " is ", shape_text(tensor.shape), " with ",
                             tensor.values.size(), " values; the job needs all of ",
                             shape_text(shape)));
  const std::int64_t width = shape.size() > 1 ? shape[1] : 1;
  const model::TensorSlice& slice = range.slice;
  for (std::int64_t done = 0; done < range.count;) {
    const std::int64_t in = range.first + done, column = in % slice.columns;
    const std::int64_t run = std::min(range.count - done, slice.columns - column);
    std::copy_n(
        tensor.values.begin() + (slice.row + in / slice.columns) * width + slice.column + column,
        run, out + done);
    done += run;
  }
  return {};
}

}  // namespace tandem::worker::train
