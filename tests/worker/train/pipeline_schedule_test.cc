#include "worker/train/pipeline_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

namespace tandem::worker::train {
namespace {

using Kind = PipelineAction::Kind;

/// All stages at once. An exchange takes place when both sides stand at it: the strictest reading
/// of "a send may wait for its receive".
class Simulation {
 public:
  Simulation(int stages, int micro_batches) : count_(micro_batches) {
    for (int s = 0; s < stages; ++s) {
      stages_.emplace_back();
      stages_.back().actions = schedule_1f1b(stages, s, micro_batches);
    }
  }

  /// Runs until nothing moves; false: somebody waits for ever.
  bool run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t s = 0; s < stages_.size(); ++s) moved |= step(s);
    }
    return std::all_of(stages_.begin(), stages_.end(),
                       [](const Stage& s) { return s.next == s.actions.size(); });
  }

  struct Stage {
    std::vector<PipelineAction> actions;
    std::size_t next = 0;
    std::set<int> forward, backward;  ///< micro-batches done
    int stream = -1, gradient = -1;   ///< received last
    int held = 0, held_max = 0;
    double time = 0.0;
  };
  const std::vector<Stage>& stages() const { return stages_; }

 private:
  bool step(std::size_t at) {
    Stage& s = stages_[at];
    if (s.next == s.actions.size()) return false;
    const PipelineAction& action = s.actions[s.next];
    const bool first = at == 0, last = at + 1 == stages_.size();
    const int m = action.micro_batch;
    switch (action.kind) {
      case Kind::kForward:
        EXPECT_TRUE(first || s.stream == m) << "stage " << at << ": stream of " << s.stream;
        EXPECT_TRUE(s.forward.insert(m).second) << m << " twice";
        s.held_max = std::max(s.held_max, ++s.held);
        s.time += 1.0;
        break;
      case Kind::kBackward:
        EXPECT_TRUE(last || s.gradient == m) << "stage " << at << ": gradient of " << s.gradient;
        EXPECT_TRUE(s.forward.contains(m));
        EXPECT_TRUE(s.backward.insert(m).second) << m << " twice";
        --s.held;
        s.time += 2.0;
        break;
      case Kind::kTalkPrevious:
        return false;  // the stage before moves the pair
      case Kind::kTalkNext: {
        Stage& peer = stages_[at + 1];
        if (peer.next == peer.actions.size()) return false;
        const PipelineAction& answer = peer.actions[peer.next];
        if (answer.kind != Kind::kTalkPrevious) return false;
        EXPECT_EQ(answer.receive, action.send) << "stage " << at;
        EXPECT_EQ(answer.send, action.receive) << "stage " << at;
        EXPECT_TRUE(action.send < 0 || s.forward.contains(action.send));
        EXPECT_TRUE(answer.send < 0 || peer.backward.contains(answer.send));
        if (action.send >= 0) peer.stream = action.send;
        if (action.receive >= 0) s.gradient = action.receive;
        s.time = peer.time = std::max(s.time, peer.time);
        ++peer.next;
        break;
      }
    }
    ++s.next;
    return true;
  }

  std::vector<Stage> stages_;
  const int count_;
};

class Schedule : public testing::TestWithParam<std::pair<int, int>> {};

TEST_P(Schedule, EveryMicroBatchGoesForwardAndBackOnceAndNobodyWaitsForEver) {
  const auto [stages, count] = GetParam();
  Simulation simulation(stages, count);
  ASSERT_TRUE(simulation.run());
  for (const auto& stage : simulation.stages()) {
    EXPECT_EQ(stage.forward.size(), static_cast<std::size_t>(count));
    EXPECT_EQ(stage.backward.size(), static_cast<std::size_t>(count));
  }
}

TEST_P(Schedule, AStageHoldsNoMoreMicroBatchesThanStagesFromItToTheEnd) {
  const auto [stages, count] = GetParam();
  Simulation simulation(stages, count);
  ASSERT_TRUE(simulation.run());
  for (int s = 0; s < stages; ++s) {
    EXPECT_EQ(simulation.stages()[static_cast<std::size_t>(s)].held_max,
              in_flight_max(stages, s, count));
    EXPECT_LE(in_flight_max(stages, s, count), stages - s);
  }
}

TEST_P(Schedule, TheBubbleIsThatOf1F1B) {
  const auto [stages, count] = GetParam();
  Simulation simulation(stages, count);
  ASSERT_TRUE(simulation.run());
  double end = 0.0;
  for (const auto& stage : simulation.stages()) end = std::max(end, stage.time);
  // A forward takes 1 and a backward 2: (micro-batches + stages - 1) of both.
  EXPECT_EQ(end, 3.0 * (count + stages - 1));
}

INSTANTIATE_TEST_SUITE_P(Sizes, Schedule,
                         testing::Values(std::pair{1, 1}, std::pair{1, 5}, std::pair{2, 1},
                                         std::pair{2, 2}, std::pair{2, 7}, std::pair{3, 2},
                                         std::pair{4, 1}, std::pair{4, 3}, std::pair{4, 4},
                                         std::pair{4, 16}, std::pair{8, 5}, std::pair{8, 32}));

}  // namespace
}  // namespace tandem::worker::train
