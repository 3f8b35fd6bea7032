#include "worker/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tandem::worker::train {

std::int64_t warmup_steps(const protocol::TrainSettings& settings, std::int64_t total_steps) {
  if (settings.warmup_steps > 0) return settings.warmup_steps;
  return static_cast<std::int64_t>(
      std::ceil(static_cast<double>(total_steps) * settings.warmup_ratio));
}

double learning_rate(const protocol::TrainSettings& settings, std::int64_t total_steps,
                     std::int64_t index) {
  const std::int64_t warmup = warmup_steps(settings, total_steps);
  if (index < warmup)
    return settings.learning_rate * static_cast<double>(index) /
           static_cast<double>(std::max<std::int64_t>(1, warmup));
  const auto rest = static_cast<double>(std::max<std::int64_t>(1, total_steps - warmup));
  switch (settings.lr_scheduler_type) {
    case protocol::Schedule::kCosine: {
      const double progress = static_cast<double>(index - warmup) / rest;
      return settings.learning_rate *
             std::max(0.0, 0.5 * (1.0 + std::cos(std::numbers::pi * progress)));
    }
    case protocol::Schedule::kLinear:
      return settings.learning_rate *
             std::max(0.0, static_cast<double>(total_steps - index) / rest);
    case protocol::Schedule::kConstant:
      return settings.learning_rate;
  }
  return settings.learning_rate;
}

}  // namespace tandem::worker::train
