// Who does what when in a pipeline, as data: 1F1B (Narayanan et al. 2021). A stage warms up with as
// many forwards as there are stages behind it, then does one forward and one backward in turn, so
// that it never holds more micro-batches than stages from it to the end. Pure. Any thread.
#pragma once

#include <vector>

namespace tandem::worker::train {

struct PipelineAction {
  enum class Kind {
    kForward,       ///< of `micro_batch`, over what was received last from the previous stage
    kBackward,      ///< of `micro_batch`, over what was received last from the next stage
    kTalkNext,      ///< send the stream of `send`, receive the gradient of `receive`, at once
    kTalkPrevious,  ///< send the gradient of `send`, receive the stream of `receive`, at once
  };
  Kind kind = Kind::kForward;
  int micro_batch = -1;
  int send = -1, receive = -1;  ///< micro-batches; -1: that half is left out
  bool operator==(const PipelineAction&) const = default;
};

/// One stage's step over `micro_batches`, in order. Sends may wait for their receives (a pair that
/// would wait for each other talks in one action).
std::vector<PipelineAction> schedule_1f1b(int stages, int stage, int micro_batches);

/// Micro-batches whose forward is done and backward is not, at most.
int in_flight_max(int stages, int stage, int micro_batches);

}  // namespace tandem::worker::train
