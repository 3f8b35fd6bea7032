// Time as an interface, so that schedules and leases can be tested with a clock that tests move.
#pragma once

#include <cstdint>

namespace tandem {

/// Milliseconds on a monotonic clock with an arbitrary origin; never compared between hosts.
using TimeMs = std::int64_t;

class Clock {
 public:
  virtual ~Clock() = default;
  [[nodiscard]] virtual TimeMs now_ms() const = 0;         ///< monotonic
  [[nodiscard]] virtual std::int64_t unix_ms() const = 0;  ///< wall clock: records and logs only
};

/// The machine's clocks. Any thread.
class SystemClock final : public Clock {
 public:
  [[nodiscard]] TimeMs now_ms() const override;
  [[nodiscard]] std::int64_t unix_ms() const override;
};

/// A clock that only moves when told to. Not thread-safe.
class ManualClock final : public Clock {
 public:
  [[nodiscard]] TimeMs now_ms() const override { return now_; }
  [[nodiscard]] std::int64_t unix_ms() const override { return 1'700'000'000'000 + now_; }
  void advance(TimeMs delta_ms) { now_ += delta_ms; }

 private:
  TimeMs now_ = 0;
};

/// Monotonic nanoseconds, for measuring.
std::int64_t steady_ns();

/// `ms` times TANDEM_TIME_SCALE (default 1): every time-out goes through this, so slow machines and
/// sanitizers can stretch them.
TimeMs scaled_ms(TimeMs ms);

}  // namespace tandem
