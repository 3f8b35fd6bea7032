// Whether anybody still looks after a slot: an engine or gang whose agent stays away ends. Device
// thread.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/base/log.h"
#include "worker/runtime/slot.h"

#include <string>
#include <utility>

namespace tandem::worker::runtime {

class AgentWatch {
 public:
  AgentWatch(std::string agent_lock, const Clock& clock)
      : agent_lock_(std::move(agent_lock)), clock_(clock) {}

  /// True when no agent has held the slot's lock for kGoneMs (and then again after as long). Looks
  /// once per kCheckMs.
  [[nodiscard]] bool gone() {
    const TimeMs now = clock_.now_ms();
    if (now < next_check_ms_) return false;
    next_check_ms_ = now + kCheckMs;
    if (seen_ms_ == 0 || FileLock::is_held(agent_lock_)) seen_ms_ = now;
    if (now - seen_ms_ <= scaled_ms(kGoneMs)) return false;
    log_error("no agent has held this slot for ", kGoneMs / 1000, " s; ending");
    seen_ms_ = now;
    return true;
  }

  static constexpr TimeMs kGoneMs = 30000, kCheckMs = 1000;

 private:
  const std::string agent_lock_;
  const Clock& clock_;
  TimeMs next_check_ms_ = 0, seen_ms_ = 0;
};

}  // namespace tandem::worker::runtime
