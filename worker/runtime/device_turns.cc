#include "worker/runtime/device_turns.h"

#include <utility>

namespace tandem::worker::runtime {
namespace {

/// Weight of the latest step in what steps are expected to take.
constexpr double kLatestWeight = 0.2;

}  // namespace

DeviceTurns::DeviceTurns(const DeviceTurnsOptions& options, StepServer& server,
                         std::function<void()> messages, std::function<std::int64_t()> now_ns)
    : options_(options),
      server_(server),
      messages_(std::move(messages)),
      now_ns_(std::move(now_ns)),
      arbiter_(options.train_share_min) {}

void DeviceTurns::serve() {
  if (!under_way_) start();
  finish();
}

void DeviceTurns::train(const std::function<void()>& slice) {
  training_ = true;
  train_mark_ns_ = now_ns_();
  slice();
  count_training();
  training_ = false;
}

/// A step begins so early that it ends, if it takes what steps take, an interval after the last.
bool DeviceTurns::due(std::int64_t at) const {
  const auto interval = static_cast<double>(options_.step_interval_ns);
  return static_cast<double>(at - step_end_ns_) + step_ns_ >= interval;
}

bool DeviceTurns::soon() const {
  return options_.step_interval_ns > 0 && !under_way_ && server_.has_work() &&
         due(now_ns_() + options_.soon_ns);
}

void DeviceTurns::count_training() {
  if (!training_ || under_way_) return;
  const std::int64_t now = now_ns_();
  arbiter_.add_train_ns(now - train_mark_ns_);
  train_mark_ns_ = now;
}

void DeviceTurns::start() {
  count_training();
  step_begin_ns_ = now_ns_();
  under_way_ = true;
  rows_ = server_.start_step();
}

void DeviceTurns::finish() {
  if (!under_way_) return;
  server_.finish_step();
  under_way_ = false;
  step_end_ns_ = train_mark_ns_ = now_ns_();
  const auto took = static_cast<double>(step_end_ns_ - step_begin_ns_);
  step_ns_ = step_ns_ == 0 ? took : (1 - kLatestWeight) * step_ns_ + kLatestWeight * took;
  arbiter_.add_serve_ns(step_end_ns_ - step_begin_ns_);
}

void DeviceTurns::between() {
  if (under_way_) {
    if (rows_ <= options_.beside_rows_max && !server_.step_ready()) return;
    finish();
  }
  messages_();
  count_training();
  while (server_.has_work() && due(now_ns_()) && arbiter_.serve_next(true)) {
    start();
    if (rows_ <= options_.beside_rows_max && !server_.step_ready()) return;
    finish();
    messages_();
  }
}

}  // namespace tandem::worker::runtime
