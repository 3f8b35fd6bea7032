#include "worker/train/loss_scaler.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>

namespace tandem::worker::train {

void LossScaler::took() {
  if (!active_ || ++good_ < scaling_.growth_interval) return;
  good_ = 0;
  if (scale_ < scaling_.most) scale_ *= 2.0;
}

void LossScaler::skip() {
  scale_ = std::max(1.0, scale_ / 2.0);
  good_ = 0;
  ++skipped_;
}

std::string LossScaler::to_json() const {
  if (!active_) return "";
  return nlohmann::json{{"scale", scale_}, {"good_steps", good_}, {"skipped_steps", skipped_}}
      .dump();
}

Status LossScaler::read(const std::string& json) {
  const auto state = nlohmann::json::parse(json, nullptr, false);
  const auto count = [&](const char* name) {
    return state.is_object() && state.contains(name) && state[name].is_number_integer()
               ? state[name].get<std::int64_t>()
               : -1;
  };
  const double scale = state.is_object() && state.contains("scale") && state["scale"].is_number()
                           ? state["scale"].get<double>()
                           : 0.0;
  const std::int64_t good = count("good_steps"), skipped = count("skipped_steps");
  int exponent = 0;
  if (!std::isfinite(scale) || scale < 1.0 || std::frexp(scale, &exponent) != 0.5 || good < 0 ||
      skipped < 0)
    return corrupt_error(
        str("the checkpoint's loss_scale is ", json, "; expected a power of two and two counts"));
  scale_ = scale;
  good_ = good;
  skipped_ = skipped;
  return {};
}

}  // namespace tandem::worker::train
