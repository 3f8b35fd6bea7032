// The simulation's time and wires: events in virtual time, and messages that are lost, repeated,
// delayed and thereby reordered. Everything follows from the seed.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/base/random.h"

#include <cstdint>
#include <functional>
#include <map>
#include <utility>

namespace tandem::sim {

struct Faults {
  float drop = 0, repeat = 0;
  TimeMs delay_ms_max = 2;
};

class Network {
 public:
  explicit Network(std::uint64_t seed) : random_(seed, 1) {}

  [[nodiscard]] TimeMs now() const { return clock_.now_ms(); }
  [[nodiscard]] const ManualClock& clock() const { return clock_; }
  Random& random() { return random_; }
  [[nodiscard]] bool chance(float p) { return random_.uniform() < p; }
  [[nodiscard]] TimeMs between(TimeMs low, TimeMs high) {
    return low + static_cast<TimeMs>(random_.below(static_cast<std::uint64_t>(high - low + 1)));
  }

  /// Runs `action` after `delay`, surely.
  void after(TimeMs delay, std::function<void()> action) {
    events_.emplace(std::pair(now() + delay, ++order_), std::move(action));
  }
  /// Runs `arrive` as the network pleases: never, once, twice, late.
  void send(const std::function<void()>& arrive) {
    if (chance(faults.drop)) return;
    after(between(1, faults.delay_ms_max), arrive);
    if (chance(faults.repeat)) after(between(1, faults.delay_ms_max), arrive);
  }
  /// Runs events until virtual time `end`.
  void run_until(TimeMs end) {
    while (!events_.empty() && events_.begin()->first.first <= end) {
      auto next = events_.extract(events_.begin());
      if (next.key().first > now()) clock_.advance(next.key().first - now());
      next.mapped()();
    }
    if (end > now()) clock_.advance(end - now());
  }

  Faults faults;

 private:
  ManualClock clock_;
  Random random_;
  std::uint64_t order_ = 0;
  std::map<std::pair<TimeMs, std::uint64_t>, std::function<void()>> events_;
};

}  // namespace tandem::sim
