// Who does what when in a pipeline, as data. A rank holds one stage, or several virtual ones
// ("chunks": chunk c of rank r is stage c * ranks + r). Pure. Any thread.
//
// One chunk: 1F1B (Narayanan et al. 2019, PipeDream; as in Narayanan et al. 2021, section 2.2.1).
// A rank warms up with as many forwards as there are ranks behind it, then does one forward and one
// backward in turn, so that it never holds more micro-batches than ranks from it to the end.
//
// Several: interleaved 1F1B (Narayanan et al. 2021, section 2.2.2). Micro-batches go in groups of
// at least as many as there are ranks, as equal as can be: a group passes a rank's first chunk,
// then its second, and so on; backward the other way round. All ranks move in rounds: in each a
// rank does its next forward and its next backward and then hands both on, at once. Forward k is
// done in round k + rank, backward k in round k + backward_lag. Groups as large as that never make
// a rank wait, whether or not micro-batches divide by ranks. A step of fewer micro-batches than
// ranks is the schedule of as many as ranks, without those that are missing.
//
// Bubble, the share of a step in which a rank has nothing to do: (ranks - 1) / (chunks *
// micro_batches + ranks - 1), where all stages cost the same.
#pragma once

#include <cstdint>
#include <vector>

namespace tandem::worker::train {

/// A micro-batch in one of a rank's chunks; micro_batch -1: none.
struct PipelineUnit {
  int micro_batch = -1, chunk = 0;
  [[nodiscard]] bool any() const { return micro_batch >= 0; }
  bool operator==(const PipelineUnit&) const = default;
};

struct PipelineAction {
  enum class Kind {
    kForward,   ///< of `unit`, over what was received for it
    kBackward,  ///< of `unit`, over what was received for it
    kExchange,  ///< all that is named below, at once
  };
  Kind kind = Kind::kForward;
  PipelineUnit unit{};
  /// Of the memory that the unit (of an exchange: send_stream) takes from forward to backward.
  int slot = 0;

  // Units of this rank: whose output goes to the next rank and whose input comes from the previous
  // one, around the ring; whose input's gradient goes back and whose output's comes.
  PipelineUnit send_stream{}, receive_stream{}, send_gradient{}, receive_gradient{};
  bool operator==(const PipelineAction&) const = default;
};

struct PipelineSchedule {
  std::vector<PipelineAction> actions;
  int slots = 0;  ///< units whose forward is done and backward is not, at most
  /// Received and not yet used, at most. They are used in the order in which they came.
  int streams_waiting = 0, gradients_waiting = 0;
  bool sends_gradients = false;
};

/// One rank's step over `micro_batches`, in order. Sends may wait for their receives. Of several
/// chunks, a step of fewer micro-batches than a `whole` one (an epoch's last) is the schedule of
/// the whole one without those that are missing: groups of its own may be larger, and would hold
/// more at once.
PipelineSchedule pipeline_schedule(int ranks, int chunks, int rank, int micro_batches,
                                   int whole = 0);

/// Interleaved: the round of a rank's first backward, 2 * (ranks - 1) - rank + (chunks - 1) * the
/// size of the largest group.
int backward_lag(int ranks, int chunks, int rank, int micro_batches);

/// The formula above.
double pipeline_bubble(int ranks, int chunks, int micro_batches);

}  // namespace tandem::worker::train
