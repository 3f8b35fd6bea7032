#include "worker/train/pipeline_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <set>

namespace tandem::worker::train {
namespace {

/// `slots` by formula, for no fewer micro-batches than ranks.
int in_flight_max(int ranks, int chunks, int rank, int micro_batches) {
  if (chunks == 1) return std::min(micro_batches, ranks - rank);
  return std::min(chunks * micro_batches,
                  backward_lag(ranks, chunks, rank, micro_batches) - rank + 1);
}

using Kind = PipelineAction::Kind;
using Unit = std::pair<int, int>;  // chunk, micro-batch

/// All ranks at once. A message moves when both sides stand at their halves, and an exchange ends
/// when all its messages have moved: the strictest reading of "a send may wait for its receive".
class Simulation {
 public:
  Simulation(int ranks, int chunks, int micro_batches, int whole = 0)
      : ranks_(static_cast<std::size_t>(ranks)), chunks_(chunks) {
    for (int r = 0; r < ranks; ++r)
      ranks_[static_cast<std::size_t>(r)].schedule =
          pipeline_schedule(ranks, chunks, r, micro_batches, whole);
  }

  /// Runs until nothing moves; false: somebody waits for ever.
  bool run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t r = 0; r < ranks_.size(); ++r) moved |= step(r);
    }
    return std::all_of(ranks_.begin(), ranks_.end(), [](const Rank& r) {
      return r.next == r.schedule.actions.size() && r.streams.empty() && r.gradients.empty();
    });
  }

  struct Rank {
    PipelineSchedule schedule;
    std::size_t next = 0;
    bool posted = false;
    int open = 0;  ///< messages of the exchange that have not moved
    std::set<Unit> forward, backward;
    std::deque<Unit> streams, gradients;  ///< received and not used
    std::map<int, Unit> slots;
    std::size_t held_max = 0, streams_max = 0, gradients_max = 0;
    double time = 0.0, busy = 0.0;
  };
  [[nodiscard]] const std::vector<Rank>& ranks() const { return ranks_; }

 private:
  struct Half {
    std::size_t rank;
    bool stream;
    Unit unit;  ///< as the receiver calls it
  };
  /// Halves of messages that wait for the other one, by (from, to), in order.
  struct Line {
    std::deque<Half> sends, receives;
  };

  bool step(std::size_t at) {
    Rank& r = ranks_[at];
    if (r.next == r.schedule.actions.size()) return false;
    const PipelineAction& action = r.schedule.actions[r.next];
    if (action.kind == Kind::kExchange) {
      if (!r.posted) {
        r.posted = true;
        post(at, action);
        return true;
      }
      if (r.open > 0) return false;
      r.posted = false;
      ++r.next;
      return true;
    }
    const Unit unit{action.unit.chunk, action.unit.micro_batch};
    const bool first = at == 0 && unit.first == 0;
    const bool last = at + 1 == ranks_.size() && unit.first + 1 == chunks_;
    const auto use = [&](std::deque<Unit>& from, bool wanted) {
      if (!wanted) return;
      ASSERT_FALSE(from.empty()) << "rank " << at << " has nothing for " << name(unit);
      EXPECT_EQ(from.front(), unit) << "rank " << at;
      from.pop_front();
    };
    if (action.kind == Kind::kForward) {
      use(r.streams, !first);
      EXPECT_TRUE(r.forward.insert(unit).second) << name(unit) << " twice";
      EXPECT_TRUE(r.slots.emplace(action.slot, unit).second) << "slot " << action.slot;
      r.held_max = std::max(r.held_max, r.slots.size());
      r.time += 1.0;
      r.busy += 1.0;
    } else {
      use(r.gradients, !last);
      EXPECT_TRUE(r.forward.contains(unit)) << name(unit) << " backward before forward";
      EXPECT_TRUE(r.backward.insert(unit).second) << name(unit) << " twice";
      EXPECT_EQ(r.slots.at(action.slot), unit);
      r.slots.erase(action.slot);
      r.time += 2.0;
      r.busy += 2.0;
    }
    ++r.next;
    return true;
  }

  void post(std::size_t at, const PipelineAction& action) {
    const std::size_t n = ranks_.size(), next = (at + 1) % n, previous = (at + n - 1) % n;
    const auto half = [&](const PipelineUnit& unit, bool send, bool stream) {
      if (!unit.any()) return;
      ++ranks_[at].open;
      Unit name{unit.chunk, unit.micro_batch};
      if (send) {
        EXPECT_TRUE((stream ? ranks_[at].forward : ranks_[at].backward).contains(name));
        // Around the ring the receiver calls it the next chunk's, or the one before.
        if (stream && next == 0) ++name.first;
        if (!stream && at == 0) --name.first;
      }
      const std::size_t peer = stream == send ? next : previous;
      const std::pair<std::size_t, std::size_t> key =
          send ? std::pair{at, peer} : std::pair{peer, at};
      Line& line = lines_[key];
      (send ? line.sends : line.receives).push_back({at, stream, name});
      if (!line.sends.empty() && !line.receives.empty()) move(line);
    };
    if (action.send_stream.any()) {
      EXPECT_EQ(ranks_[at].slots.at(action.slot),
                (Unit{action.send_stream.chunk, action.send_stream.micro_batch}));
    }
    half(action.send_stream, true, true);
    half(action.send_gradient, true, false);
    half(action.receive_stream, false, true);
    half(action.receive_gradient, false, false);
  }

  void move(Line& line) {
    const Half from = line.sends.front(), to = line.receives.front();
    line.sends.pop_front();
    line.receives.pop_front();
    EXPECT_EQ(from.stream, to.stream);
    EXPECT_EQ(from.unit, to.unit) << "rank " << from.rank << " to " << to.rank;
    Rank &a = ranks_[from.rank], &b = ranks_[to.rank];
    auto& waiting = to.stream ? b.streams : b.gradients;
    auto& most = to.stream ? b.streams_max : b.gradients_max;
    waiting.push_back(to.unit);
    most = std::max(most, waiting.size());
    --a.open;
    --b.open;
    a.time = b.time = std::max(a.time, b.time);
  }

  static std::string name(const Unit& u) {
    return "micro-batch " + std::to_string(u.second) + " of chunk " + std::to_string(u.first);
  }

  std::vector<Rank> ranks_;
  std::map<std::pair<std::size_t, std::size_t>, Line> lines_;
  const int chunks_;
};

struct Size {
  int ranks, chunks, micro_batches;
};

class Schedule : public testing::TestWithParam<Size> {
 protected:
  Schedule() : simulation_(GetParam().ranks, GetParam().chunks, GetParam().micro_batches) {}
  void SetUp() override { ASSERT_TRUE(simulation_.run()) << "somebody waits for ever"; }
  const Size size_ = GetParam();
  Simulation simulation_;
};

TEST_P(Schedule, EveryUnitGoesForwardAndBackOnceAndNobodyWaitsForEver) {
  const auto units = static_cast<std::size_t>(size_.chunks * size_.micro_batches);
  for (const auto& rank : simulation_.ranks()) {
    EXPECT_EQ(rank.forward.size(), units);
    EXPECT_EQ(rank.backward.size(), units);
    EXPECT_TRUE(rank.slots.empty());
  }
}

TEST_P(Schedule, SlotsAndBuffersAreWhatIsHeld) {
  for (int r = 0; r < size_.ranks; ++r) {
    const auto& rank = simulation_.ranks()[static_cast<std::size_t>(r)];
    EXPECT_EQ(rank.held_max, static_cast<std::size_t>(rank.schedule.slots)) << "rank " << r;
    EXPECT_EQ(rank.streams_max, static_cast<std::size_t>(rank.schedule.streams_waiting));
    EXPECT_EQ(rank.gradients_max, static_cast<std::size_t>(rank.schedule.gradients_waiting));
    if (size_.micro_batches < size_.ranks && size_.chunks > 1) continue;
    EXPECT_EQ(rank.schedule.slots, in_flight_max(size_.ranks, size_.chunks, r, size_.micro_batches))
        << "rank " << r;
  }
}

TEST_P(Schedule, TheBubbleIsThatOfTheFormula) {
  if (size_.micro_batches < size_.ranks && size_.chunks > 1) return;  // not promised
  double end = 0.0, busy = 0.0;
  for (const auto& rank : simulation_.ranks()) {
    end = std::max(end, rank.time);
    busy = rank.busy;
  }
  // A forward takes 1 and a backward 2.
  EXPECT_EQ(busy, 3.0 * size_.chunks * size_.micro_batches);
  EXPECT_EQ(end, 3.0 * (size_.chunks * size_.micro_batches + size_.ranks - 1));
  EXPECT_NEAR(1.0 - busy / end, pipeline_bubble(size_.ranks, size_.chunks, size_.micro_batches),
              1e-12);
}

std::vector<Size> sizes() {
  std::vector<Size> all;
  for (const int ranks : {1, 2, 3, 4, 8})
    for (const int micro_batches : {1, 2, 3, 4, 5, 7, 8, 12, 16, 33})
      all.push_back({ranks, 1, micro_batches});
  for (const int ranks : {2, 3, 4, 8})
    for (const int chunks : {2, 3, 4})
      for (const int micro_batches : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 15, 16, 17, 31, 32})
        all.push_back({ranks, chunks, micro_batches});
  return all;
}
std::string size_name(const testing::TestParamInfo<Size>& info) {
  return "ranks" + std::to_string(info.param.ranks) + "_chunks" +
         std::to_string(info.param.chunks) + "_of" + std::to_string(info.param.micro_batches);
}
INSTANTIATE_TEST_SUITE_P(Sizes, Schedule, testing::ValuesIn(sizes()), size_name);

TEST(Interleaved, HalvesTheBubbleOfTwoChunks) {
  EXPECT_NEAR(pipeline_bubble(4, 1, 16), 3.0 / 19.0, 1e-12);
  EXPECT_NEAR(pipeline_bubble(4, 2, 16), 3.0 / 35.0, 1e-12);
  EXPECT_NEAR(pipeline_bubble(4, 4, 16), 3.0 / 67.0, 1e-12);
}

TEST(Interleaved, AStepOfFewerMicroBatchesHoldsNoMoreThanAWholeOne) {
  for (const int ranks : {2, 3, 4})
    for (const int chunks : {2, 3})
      for (const int whole : {2, 4, 5, 8, 12})
        for (int micro_batches = 1; micro_batches < whole; ++micro_batches) {
          Simulation all(ranks, chunks, whole), fewer(ranks, chunks, micro_batches, whole);
          EXPECT_TRUE(fewer.run()) << ranks << " " << chunks << " " << micro_batches;
          for (std::size_t r = 0; r < all.ranks().size(); ++r) {
            const auto& rank = fewer.ranks()[r];
            EXPECT_EQ(rank.schedule.slots, all.ranks()[r].schedule.slots);
            EXPECT_LE(rank.held_max, static_cast<std::size_t>(rank.schedule.slots));
            EXPECT_EQ(rank.backward.size(), static_cast<std::size_t>(chunks * micro_batches));
            EXPECT_EQ(rank.backward, rank.forward);
          }
        }
}

TEST(Interleaved, HoldsWhatMegatronHoldsWhereMicroBatchesDivide) {
  // 2 * (ranks - rank - 1) + (chunks - 1) * ranks warm-up forwards, and one.
  EXPECT_EQ(in_flight_max(4, 2, 0, 16), 2 * 3 + 4 + 1);
  EXPECT_EQ(in_flight_max(4, 2, 3, 16), 4 + 1);
  EXPECT_EQ(in_flight_max(4, 2, 0, 4), 8);  // no more than there are
}

}  // namespace
}  // namespace tandem::worker::train
