#include "worker/train/pipeline_schedule.h"

#include "protocol/base/check.h"

#include <algorithm>

namespace tandem::worker::train {

std::vector<PipelineAction> schedule_1f1b(int stages, int stage, int micro_batches) {
  TANDEM_CHECK(stage >= 0 && stage < stages && micro_batches >= 1, "stage ", stage, " of ", stages,
               ", ", micro_batches, " micro-batches");
  using Kind = PipelineAction::Kind;
  std::vector<PipelineAction> actions;
  const bool first = stage == 0, last = stage == stages - 1;
  const auto forward = [&](int m) { actions.push_back({Kind::kForward, m, -1, -1}); };
  const auto backward = [&](int m) { actions.push_back({Kind::kBackward, m, -1, -1}); };
  const auto next = [&](int send, int receive) {
    if (!last && (send >= 0 || receive >= 0))
      actions.push_back({Kind::kTalkNext, -1, send, receive});
  };
  const auto previous = [&](int send, int receive) {
    if (!first && (send >= 0 || receive >= 0))
      actions.push_back({Kind::kTalkPrevious, -1, send, receive});
  };
  const int warm = std::min(micro_batches, stages - 1 - stage), steady = micro_batches - warm;
  for (int m = 0; m < warm; ++m) {
    previous(-1, m);
    forward(m);
    next(m, -1);
  }
  if (steady > 0) previous(-1, warm);
  for (int i = 0; i < steady; ++i) {
    forward(warm + i);
    next(warm + i, i);
    backward(i);
    previous(i, i + 1 < steady ? warm + i + 1 : -1);
  }
  for (int m = steady; m < micro_batches; ++m) {
    next(-1, m);
    backward(m);
    previous(m, -1);
  }
  return actions;
}

int in_flight_max(int stages, int stage, int micro_batches) {
  return std::min(micro_batches, stages - stage);
}

}  // namespace tandem::worker::train
