// How requests and a training job take turns on one device. Training runs in pieces (a block of a
// pass); between two of them between() lets serving's next step in when it is due. Two rules: steps
// keep a distance, so that a step answers many requests and training gets what is left (an answer's
// token is seldom wanted earlier); and training keeps its guaranteed share, whatever waits.
//
// On a device that works behind this thread's back a step is begun and finished apart. A step of
// few rows, which is bound by memory, may run beside training's blocks, which leave it some
// multiprocessors; any other has the device to itself but for the blocks that were issued before.
// Device thread only.
#pragma once

#include "protocol/base/clock.h"
#include "worker/runtime/device_arbiter.h"

#include <cstdint>
#include <functional>

namespace tandem::worker::runtime {

/// Serving's side of it.
class StepServer {
 public:
  virtual ~StepServer() = default;
  [[nodiscard]] virtual bool has_work() const = 0;
  /// Begins a step; its rows. The end is finish_step(), which waits unless step_ready().
  virtual std::int64_t start_step() = 0;
  [[nodiscard]] virtual bool step_ready() const = 0;
  virtual void finish_step() = 0;
};

struct DeviceTurnsOptions {
  double train_share_min = 0.25;
  /// From one step's end to the next one's, while a job trains; 0: steps follow each other.
  std::int64_t step_interval_ns = 0;
  /// So long before a step is due training issues nothing ahead: a step that waits for one block
  /// ends when it was expected to, one that waits for two does not.
  std::int64_t soon_ns = 8'000'000;
  /// Training goes on beside a step of at most so many rows; 0: beside none.
  std::int64_t beside_rows_max = 0;
};

class DeviceTurns {
 public:
  /// `messages`: lets requests and cancellations in. It is never called while a step is under way.
  DeviceTurns(const DeviceTurnsOptions& options, StepServer& server, std::function<void()> messages,
              std::function<std::int64_t()> now_ns = steady_ns);

  /// Nothing trains: one step, to its end.
  void serve();
  /// One piece of training, which calls between() wherever it can stop.
  void train(const std::function<void()>& slice);
  /// Ends a step that is done, lets messages in, and runs what is due.
  void between();
  /// A step is due soon: what was issued should be done before more is.
  [[nodiscard]] bool soon() const;
  /// Waits for the step that is under way, if any.
  void finish();
  [[nodiscard]] bool step_under_way() const { return under_way_; }

 private:
  [[nodiscard]] bool due(std::int64_t at) const;
  void start();
  /// Training's time since the last step or count.
  void count_training();

  const DeviceTurnsOptions options_;
  StepServer& server_;
  const std::function<void()> messages_;
  const std::function<std::int64_t()> now_ns_;
  DeviceArbiter arbiter_;
  bool under_way_ = false, training_ = false;
  std::int64_t rows_ = 0;                             ///< of the step under way
  std::int64_t step_begin_ns_ = 0, step_end_ns_ = 0;  ///< of the latest step
  double step_ns_ = 0;                                ///< what steps take lately
  std::int64_t train_mark_ns_ = 0;                    ///< since then training has the device
};

}  // namespace tandem::worker::runtime
