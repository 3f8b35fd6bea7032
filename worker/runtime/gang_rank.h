// One rank of a gang: its shard of the base model and its part of the session, on a device of its
// own. Every rank makes the same calls in the same order, because most of them meet in collectives;
// the first rank leads (gang_model.h), the others follow() it. One device thread.
#pragma once

#include "kernels/ops.h"
#include "protocol/base/clock.h"
#include "worker/model/model_loader.h"
#include "worker/runtime/bulk_client.h"
#include "worker/runtime/checkpoint_pieces.h"
#include "worker/runtime/gang_state.h"
#include "worker/runtime/job_model.h"
#include "worker/runtime/task_thread.h"
#include "worker/train/ranks.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace tandem::worker::runtime {

/// How long a rank waits for the others: at least `least_ms`, and five times its longest recent
/// slice, in which no rank may have anything to say.
class GangPatience {
 public:
  explicit GangPatience(TimeMs least_ms)
      : least_ms_(least_ms), now_ms_(std::make_shared<std::atomic<TimeMs>>(least_ms)) {}
  [[nodiscard]] const std::shared_ptr<std::atomic<TimeMs>>& timeout_ms() const { return now_ms_; }
  /// The same once the gang is to end without a checkpoint: nobody waits for a silent rank then.
  /// Any thread.
  [[nodiscard]] TimeMs stop_ms() const {
    return std::min(now_ms_->load(), std::max(kStopMs, 5 * longest_ms_.load()));
  }
  void add_slice(double seconds);

 private:
  static constexpr std::size_t kSlicesKept = 128;
  static constexpr TimeMs kStopMs = 5000;
  const TimeMs least_ms_;
  std::atomic<TimeMs> longest_ms_{0};
  std::shared_ptr<std::atomic<TimeMs>> now_ms_;
  std::deque<TimeMs> slices_;
};

class GangRank {
 public:
  struct Options {
    DType dtype = DType::kF32;
    kernels::Numerics numerics = kernels::Numerics::kReplay;
    std::int64_t memory_bytes_max = 0;
    int device = 0;  ///< of its kind on this host: a GPU's number
    /// As comm::NcclOptions::on_failure.
    std::function<void(const std::string&)> device_failed{};
  };
  /// `gang`: all ranks, over host memory. Their devices are joined by open().
  GangRank(kernels::Backend& backend, const Options& options, comm::Communicator& gang,
           GangPatience& patience);
  ~GangRank();
  GangRank(const GangRank&) = delete;
  GangRank& operator=(const GangRank&) = delete;

  /// Where this rank stores its pieces of checkpoints, and reads them: on `tasks`, which alone uses
  /// `bulk`. Both outlive it; before open().
  void store_with(BulkClient& bulk, TaskThread& tasks, std::string pin);

  GangWire& wire() { return wire_; }
  /// Called between blocks of a pass: a long slice is no hung one.
  void on_block(std::function<void()> beat) { on_block_ = std::move(beat); }
  [[nodiscard]] DType dtype() const { return options_.dtype; }
  [[nodiscard]] train::TrainSession& session() { return *session_; }
  [[nodiscard]] const model::ModelConfig& config() const { return config_; }

  // -- all ranks at once
  /// The same error on all ranks when any rank has one.
  Status open(const GangPlan& plan);
  Result<train::SliceEvent> run_slice();
  /// The whole state at the first rank; nothing elsewhere.
  Result<train::TrainState> export_state();
  /// Copies this rank's pieces of the state, which are then stored in the background.
  void begin_checkpoint();
  /// What all ranks stored of the last one, at the first rank (elsewhere an empty list): nothing
  /// while some rank is at it. The same error on all ranks when any has one.
  std::optional<Result<std::vector<StoredPieces>>> stored_checkpoint();
  /// The largest difference between a value that some rank trained and the published one.
  double compare(const model::FlatAdapter& published);
  /// Full fine-tuning; see JobSession.
  Status write_model(const ModelPlace& place);
  Result<double> probe_model(const ModelPlace& place);

 private:
  struct Memory;
  struct Storing;
  Status read_checkpoint(const GangPlan& plan);
  Status load(const GangPlan& plan);
  Status begin(const GangPlan& plan);

  kernels::Backend& backend_;
  const Options options_;
  comm::Communicator& gang_;
  GangPatience& patience_;
  std::function<void()> on_block_;
  std::unique_ptr<Memory> memory_;
  std::unique_ptr<comm::Communicator> devices_;  ///< null: `gang_` moves what ops work on, too
  GangWire wire_;
  std::optional<train::Ranks> ranks_;
  std::string model_path_;
  model::ModelConfig config_;
  std::unique_ptr<model::TensorSource> source_;
  std::unique_ptr<model::WeightSource> weights_;
  std::unique_ptr<model::AdapterTable> adapters_;
  std::optional<model::Context> context_;
  std::unique_ptr<train::TrainSession> session_;
  BulkClient* bulk_ = nullptr;
  TaskThread* tasks_ = nullptr;
  std::string pin_;
  std::shared_ptr<Storing> storing_;  ///< shared with the task
};

/// comm::join_devices for a rank of a job or a replica; `gathers`: weights are gathered in the
/// background (ZeRO-3).
Result<std::unique_ptr<comm::Communicator>> join_devices(comm::Communicator& gang,
                                                         kernels::Ops& ops, kernels::Exec& exec,
                                                         const GangRank::Options& rank,
                                                         const GangPatience& patience,
                                                         bool gathers);

/// A rank that is not the first: does what it hears until the end.
void follow(GangRank& rank);

}  // namespace tandem::worker::runtime
