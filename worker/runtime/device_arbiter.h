// Who gets the device next when a job trains and requests wait: serving, unless training would fall
// below its guaranteed share. Pure bookkeeping over a sliding window; the device thread owns it.
#pragma once

#include <cstdint>

namespace tandem::worker::runtime {

class DeviceArbiter {
 public:
  /// `train_share_min` in [0, 1]: the part of device time that training keeps while requests run.
  explicit DeviceArbiter(double train_share_min) : share_min_(train_share_min) {}

  void add_train_ns(std::int64_t ns) { add(train_ns_, ns); }
  void add_serve_ns(std::int64_t ns) { add(serve_ns_, ns); }

  /// True when the next slice is serving's, given that serving has work.
  [[nodiscard]] bool serve_next(bool training) const {
    if (!training) return true;
    return train_ns_ >= share_min_ * (train_ns_ + serve_ns_);
  }

 private:
  static constexpr double kWindowNs = 2e9;
  /// Both sums fade with all device time, so that only about the last two seconds count.
  void add(double& sum, std::int64_t ns) {
    const double keep = 1.0 - static_cast<double>(ns) / (static_cast<double>(ns) + kWindowNs);
    train_ns_ *= keep;
    serve_ns_ *= keep;
    sum += static_cast<double>(ns);
  }
  double share_min_;
  double train_ns_ = 0, serve_ns_ = 0;
};

}  // namespace tandem::worker::runtime
