#include "worker/memory/step_trace.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

namespace tandem::worker::memory {

namespace {

using Kind = comm::CommCall::Kind;

/// The n-th call of a group: when each member came.
struct Meeting {
  std::size_t came = 0;
  double last = 0.0;
};

/// One direction between two ranks: when its n-th message was offered and asked for.
struct Channel {
  std::vector<double> sent, asked;
  std::vector<double> cost;
};

class Simulation {
 public:
  Simulation(const std::vector<StepTrace>& traces, const CostModel& model,
             const std::vector<int>& trace_of)
      : traces_(traces), model_(model), trace_of_(trace_of), ranks_(traces.size()) {}

  SimulatedStep run() {
    bool moved = true;
    while (moved) {
      moved = false;
      for (std::size_t rank = 0; rank < ranks_.size(); ++rank)
        while (advance(rank)) moved = true;
    }
    SimulatedStep step;
    for (std::size_t rank = 0; rank < ranks_.size(); ++rank) {
      TANDEM_CHECK(ranks_[rank].next == traces_[rank].size(), "rank ", rank, " waits for ever at ",
                   ranks_[rank].next, " of ", traces_[rank].size());
      step.seconds = std::max(step.seconds, ranks_[rank].now);
    }
    const auto count = static_cast<double>(ranks_.size());
    for (const Rank& rank : ranks_) {
      step.compute_seconds += rank.compute / count;
      step.collective_seconds += rank.collective / count;
      step.bubble_seconds += (rank.exchange + step.seconds - rank.now) / count;
    }
    return step;
  }

 private:
  struct Rank {
    std::size_t next = 0;
    double now = 0.0, compute = 0.0, collective = 0.0, exchange = 0.0;
    bool came = false;  ///< to the call at `next`, which is not complete
    std::vector<std::pair<const Channel*, std::size_t>> messages;  ///< of the exchange at `next`
    std::map<std::vector<int>, std::size_t> meetings, background;  ///< calls of each group so far
    std::map<std::int64_t, std::pair<std::vector<int>, std::size_t>> begun;
    double background_until = 0.0;  ///< as far as this rank's own part in it goes
  };

  [[nodiscard]] int trace_of(int rank) const {
    return trace_of_.empty() ? rank : trace_of_[static_cast<std::size_t>(rank)];
  }
  /// How many traces a group's members have.
  [[nodiscard]] std::size_t distinct(const std::vector<int>& members) const {
    std::set<int> traces;
    for (const int member : members) traces.insert(trace_of(member));
    return traces.size();
  }

  /// One event, or arriving at one; false: blocked or finished.
  bool advance(std::size_t at) {
    Rank& rank = ranks_[at];
    if (rank.next == traces_[at].size()) return false;
    const TraceEvent& event = traces_[at][rank.next];
    const bool arrives = !rank.came;
    if (arrives) {
      const double busy = beside_background(rank, event.seconds);
      rank.now += busy;
      rank.compute += busy;
      rank.came = true;
    }
    if (!event.call) return finish(rank);
    switch (event.call->kind) {
      case Kind::kExchange:
        return exchange(static_cast<int>(at), rank, *event.call, arrives);
      case Kind::kStartGather:
      case Kind::kStartReduceScatter:
        return start(rank, *event.call);
      case Kind::kWait:
        return wait(rank, *event.call) || arrives;
      default:
        return meet(rank, *event.call, arrives) || arrives;
    }
  }

  /// How long that work takes: slower while something goes on in the background.
  [[nodiscard]] double beside_background(const Rank& rank, double seconds) const {
    const double shared = std::max(0.0, rank.background_until - rank.now);
    const double slowed = seconds * model_.background_slowdown;
    return slowed <= shared ? slowed : seconds + shared - shared / model_.background_slowdown;
  }

  static bool finish(Rank& rank) {
    rank.came = false;
    ++rank.next;
    return true;
  }
  static bool collective_until(Rank& rank, double time) {
    rank.collective += std::max(0.0, time - rank.now);
    rank.now = std::max(rank.now, time);
    return finish(rank);
  }

  bool meet(Rank& rank, const comm::CommCall& call, bool arrives) {
    auto& list = meetings_[call.members];
    const std::size_t index = rank.meetings[call.members];
    if (list.size() <= index) list.resize(index + 1);
    Meeting& meeting = list[index];
    if (arrives) {
      ++meeting.came;
      meeting.last = std::max(meeting.last, rank.now);
    }
    if (meeting.came < distinct(call.members)) return false;
    ++rank.meetings[call.members];
    return collective_until(rank, meeting.last + model_.seconds(call));
  }

  bool start(Rank& rank, const comm::CommCall& call) {
    auto& list = background_[call.members];
    const std::size_t index = rank.background[call.members]++;
    if (list.size() <= index) list.resize(index + 1);
    ++list[index].came;
    list[index].last = std::max(list[index].last, rank.now);
    background_cost_[call.members].resize(list.size());
    background_cost_[call.members][index] = model_.seconds(call);
    rank.begun[call.begun] = {call.members, index};
    rank.background_until =
        std::max(rank.background_until, rank.now) + background_cost_[call.members][index];
    return finish(rank);
  }

  bool wait(Rank& rank, const comm::CommCall& call) {
    const auto begun = rank.begun.find(call.begun);
    TANDEM_CHECK(begun != rank.begun.end(), "call ", call.begun, " never began");
    const auto& [members, index] = begun->second;
    const auto& list = background_[members];
    const std::size_t needed = distinct(members);
    double done = 0.0;  // one after another in the background
    for (std::size_t i = 0; i <= index; ++i) {
      if (list[i].came < needed) return false;
      done = std::max(done, list[i].last) + background_cost_[members][i];
    }
    rank.begun.erase(begun);
    return collective_until(rank, done);
  }

  bool exchange(int at, Rank& rank, const comm::CommCall& call, bool arrives) {
    if (arrives) {
      rank.messages.clear();
      for (const auto& send : call.sends) {
        Channel& channel = channels_[{at, trace_of(send.rank)}];
        rank.messages.push_back({&channel, channel.sent.size()});
        channel.sent.push_back(rank.now);
        channel.cost.push_back(model_.message_seconds(send.bytes));
      }
      for (const auto& receive : call.receives) {
        Channel& channel = channels_[{trace_of(receive.rank), at}];
        rank.messages.push_back({&channel, channel.asked.size()});
        channel.asked.push_back(rank.now);
      }
    }
    double done = rank.now;
    for (const auto& [channel, index] : rank.messages) {
      if (channel->sent.size() <= index || channel->asked.size() <= index) return arrives;
      done = std::max(done,
                      std::max(channel->sent[index], channel->asked[index]) + channel->cost[index]);
    }
    rank.exchange += done - rank.now;
    rank.now = done;
    return finish(rank);
  }

  const std::vector<StepTrace>& traces_;
  const CostModel& model_;
  const std::vector<int>& trace_of_;
  std::vector<Rank> ranks_;
  std::map<std::vector<int>, std::vector<Meeting>> meetings_, background_;
  std::map<std::vector<int>, std::vector<double>> background_cost_;
  std::map<std::pair<int, int>, Channel> channels_;
};

}  // namespace

SimulatedStep simulate(const std::vector<StepTrace>& traces, const CostModel& model,
                       const std::vector<int>& trace_of) {
  return Simulation(traces, model, trace_of).run();
}

}  // namespace tandem::worker::memory
