#include "protocol/base/clock.h"

#include <chrono>
#include <cstdlib>

namespace tandem {

std::int64_t steady_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

TimeMs SystemClock::now_ms() const {
  return steady_ns() / 1'000'000;
}

std::int64_t SystemClock::unix_ms() const {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

TimeMs scaled_ms(TimeMs ms) {
  static const double scale = [] {
    const char* text = std::getenv("TANDEM_TIME_SCALE");
    const double value = text ? std::strtod(text, nullptr) : 1.0;
    return value > 0 ? value : 1.0;
  }();
  return static_cast<TimeMs>(static_cast<double>(ms) * scale);
}

}  // namespace tandem
