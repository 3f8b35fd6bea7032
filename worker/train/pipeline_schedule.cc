#include "worker/train/pipeline_schedule.h"

#include "protocol/base/check.h"

#include <algorithm>
#include <deque>

namespace tandem::worker::train {

namespace {

using Kind = PipelineAction::Kind;
using Actions = std::vector<PipelineAction>;

void add_unit(Actions& actions, Kind kind, const PipelineUnit& unit) {
  if (!unit.any()) return;
  actions.emplace_back();
  actions.back().kind = kind;
  actions.back().unit = unit;
}

void add_exchange(Actions& actions, PipelineAction exchange) {
  if (!exchange.send_stream.any() && !exchange.receive_stream.any() &&
      !exchange.send_gradient.any() && !exchange.receive_gradient.any())
    return;
  exchange.kind = Kind::kExchange;
  actions.push_back(exchange);
}

Actions one_chunk(int ranks, int rank, int micro_batches) {
  Actions actions;
  const bool first = rank == 0, last = rank == ranks - 1;
  const auto next = [&](int send, int receive) {
    PipelineAction exchange;
    if (!last) exchange.send_stream = {send, 0};
    if (!last) exchange.receive_gradient = {receive, 0};
    add_exchange(actions, exchange);
  };
  const auto previous = [&](int send, int receive) {
    PipelineAction exchange;
    if (!first) exchange.send_gradient = {send, 0};
    if (!first) exchange.receive_stream = {receive, 0};
    add_exchange(actions, exchange);
  };
  const int warm = std::min(micro_batches, ranks - 1 - rank), steady = micro_batches - warm;
  for (int m = 0; m < warm; ++m) {
    previous(-1, m);
    add_unit(actions, Kind::kForward, {m, 0});
    next(m, -1);
  }
  if (steady > 0) previous(-1, warm);
  for (int i = 0; i < steady; ++i) {
    add_unit(actions, Kind::kForward, {warm + i, 0});
    next(warm + i, i);
    add_unit(actions, Kind::kBackward, {i, 0});
    previous(i, i + 1 < steady ? warm + i + 1 : -1);
  }
  for (int m = steady; m < micro_batches; ++m) {
    next(-1, m);
    add_unit(actions, Kind::kBackward, {m, 0});
    previous(m, -1);
  }
  return actions;
}

/// The order of a rank's units: the k-th forward, the k-th backward.
class UnitOrder {
 public:
  UnitOrder(int ranks, int chunks, int micro_batches)
      : chunks_(chunks), micro_batches_(micro_batches), padded_(std::max(ranks, micro_batches)) {
    const int groups = padded_ / ranks;
    for (int g = 0, begin = 0; g < groups; ++g) {
      const int size = padded_ / groups + (g < padded_ % groups ? 1 : 0);
      groups_.push_back({begin, size});
      begin += size;
    }
  }
  [[nodiscard]] int units() const { return chunks_ * padded_; }
  [[nodiscard]] int group_max() const { return groups_.front().size; }
  [[nodiscard]] PipelineUnit forward(int k) const { return unit(k, false); }
  [[nodiscard]] PipelineUnit backward(int k) const { return unit(k, true); }

 private:
  struct Group {
    int begin, size;
  };
  [[nodiscard]] PipelineUnit unit(int k, bool from_last) const {
    if (k < 0 || k >= units()) return {};
    const auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) {
      return k < chunks_ * (g.begin + g.size);
    });
    const int at = k - chunks_ * group->begin, chunk = at / group->size;
    const int m = group->begin + at % group->size;
    if (m >= micro_batches_) return {};
    return {m, from_last ? chunks_ - 1 - chunk : chunk};
  }

  const int chunks_, micro_batches_, padded_;
  std::vector<Group> groups_;
};

int lag_of(const UnitOrder& order, int ranks, int chunks, int rank) {
  return 2 * (ranks - 1) - rank + (chunks - 1) * order.group_max();
}

Actions interleaved(int ranks, int chunks, int rank, int micro_batches) {
  const UnitOrder order(ranks, chunks, micro_batches);
  const auto lag = [&](int r) { return lag_of(order, ranks, chunks, r); };
  const bool first = rank == 0, last = rank == ranks - 1;
  Actions actions;
  for (int round = 0; round < lag(0) + order.units(); ++round) {
    const PipelineUnit forward = order.forward(round - rank);
    const PipelineUnit backward = order.backward(round - lag(rank));
    add_unit(actions, Kind::kForward, forward);
    add_unit(actions, Kind::kBackward, backward);
    PipelineAction exchange;
    if (!(last && forward.chunk == chunks - 1)) exchange.send_stream = forward;
    if (!(first && backward.chunk == 0)) exchange.send_gradient = backward;
    // What the neighbours have done in this round; around the ring it is another chunk's.
    PipelineUnit stream = order.forward(round - (first ? ranks - 1 : rank - 1));
    if (first) ++stream.chunk;
    if (stream.chunk < chunks) exchange.receive_stream = stream;
    PipelineUnit gradient = order.backward(round - lag(last ? 0 : rank + 1));
    if (last) --gradient.chunk;
    if (gradient.chunk >= 0) exchange.receive_gradient = gradient;
    add_exchange(actions, exchange);
  }
  return actions;
}

/// What arrived and waits to be used, in order.
class Waiting {
 public:
  void receive(const PipelineUnit& unit) {
    if (!unit.any()) return;
    units_.push_back(unit);
    most_ = std::max(most_, static_cast<int>(units_.size()));
  }
  void use(const PipelineUnit& unit) {
    if (!units_.empty() && units_.front() == unit) units_.pop_front();
  }
  [[nodiscard]] int most() const { return most_; }

 private:
  std::deque<PipelineUnit> units_;
  int most_ = 0;
};

/// Gives units their slots and counts what is held and what waits.
PipelineSchedule counted(Actions actions) {
  PipelineSchedule schedule;
  std::vector<PipelineUnit> held;  // by slot
  Waiting streams, gradients;
  const auto slot_of = [&](const PipelineUnit& unit) {
    return static_cast<int>(std::find(held.begin(), held.end(), unit) - held.begin());
  };
  for (PipelineAction& action : actions) {
    if (action.kind == Kind::kExchange) {
      if (action.send_stream.any()) action.slot = slot_of(action.send_stream);
      streams.receive(action.receive_stream);
      gradients.receive(action.receive_gradient);
      schedule.sends_gradients |= action.send_gradient.any();
      continue;
    }
    const bool forward = action.kind == Kind::kForward;
    (forward ? streams : gradients).use(action.unit);
    const PipelineUnit free{};
    action.slot = slot_of(forward ? free : action.unit);
    if (forward && action.slot == static_cast<int>(held.size())) held.push_back(free);
    TANDEM_CHECK(action.slot < static_cast<int>(held.size()), "backward of micro-batch ",
                 action.unit.micro_batch, " without its forward");
    held[static_cast<std::size_t>(action.slot)] = forward ? action.unit : free;
  }
  schedule.slots = static_cast<int>(held.size());
  schedule.streams_waiting = streams.most();
  schedule.gradients_waiting = gradients.most();
  schedule.actions = std::move(actions);
  return schedule;
}

void leave_out_from(Actions& actions, int micro_batches) {
  for (PipelineAction& action : actions)
    for (PipelineUnit* unit : {&action.unit, &action.send_stream, &action.receive_stream,
                               &action.send_gradient, &action.receive_gradient})
      if (unit->micro_batch >= micro_batches) *unit = {};
  std::erase_if(actions, [](const PipelineAction& a) {
    return !a.unit.any() && !a.send_stream.any() && !a.receive_stream.any() &&
           !a.send_gradient.any() && !a.receive_gradient.any();
  });
}

}  // namespace

PipelineSchedule pipeline_schedule(int ranks, int chunks, int rank, int micro_batches, int whole) {
  TANDEM_CHECK(rank >= 0 && rank < ranks && chunks >= 1 && micro_batches >= 1, "rank ", rank,
               " of ", ranks, ", ", chunks, " chunks, ", micro_batches, " micro-batches");
  if (chunks == 1) return counted(one_chunk(ranks, rank, micro_batches));
  PipelineSchedule schedule =
      counted(interleaved(ranks, chunks, rank, std::max(micro_batches, whole)));
  leave_out_from(schedule.actions, micro_batches);
  return schedule;
}

int backward_lag(int ranks, int chunks, int rank, int micro_batches) {
  return lag_of(UnitOrder(ranks, chunks, micro_batches), ranks, chunks, rank);
}

double pipeline_bubble(int ranks, int chunks, int micro_batches) {
  return static_cast<double>(ranks - 1) / (chunks * micro_batches + ranks - 1);
}

}  // namespace tandem::worker::train
