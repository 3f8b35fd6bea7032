// The one training job of an engine or a gang, from StartJob to the acknowledged end: fetches and
// reads its data on the task thread, runs slices on the device thread when asked, reports, uploads
// checkpoints, publishes. All methods on the device thread. What the coordinator must know is
// repeated until it is acknowledged; everything is tagged with the job's epoch, so a gang that was
// replaced cannot publish.
#pragma once

#include "worker/runtime/adapter_codec.h"
#include "worker/runtime/bulk_client.h"
#include "worker/runtime/engine_io.h"
#include "worker/runtime/job_model.h"
#include "worker/runtime/task_thread.h"
#include "worker/train/metrics.h"

#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace tandem::worker::runtime {

/// What a job uses of its engine; all outlive it.
struct JobParts {
  EngineIo& io;
  TaskThread& tasks;
  BulkClient& bulk;
  std::function<void(Task)> to_device;  ///< runs a closure on the device thread, soon
  std::string runs_directory;           ///< metrics: <runs>/<job>/{metrics.jsonl, tensorboard}
  /// A gang's own: where the model of a full fine-tune is written, beside the models that this host
  /// has fetched (model_files.h), so that it becomes one of these.
  std::string model_folder{};
};

class JobHost {
 public:
  JobHost(const JobParts& parts, JobModel& model, const protocol::StartJob& start);
  ~JobHost();
  JobHost(const JobHost&) = delete;
  JobHost& operator=(const JobHost&) = delete;

  [[nodiscard]] const JobId& job() const { return start_.job; }
  [[nodiscard]] Epoch epoch() const { return start_.epoch; }
  [[nodiscard]] std::int64_t step() const { return session_ ? session_->step() : resumed_step_; }

  /// True when run_slice() would train.
  [[nodiscard]] bool runnable() const;
  /// One bounded piece of training; see TrainSession::run_slice.
  void run_slice();
  /// Now and then, slices or not: looks after a checkpoint that ranks are storing, and after a
  /// publish that waits for room.
  void poll();

  /// Cancel ends at once; pause takes a checkpoint first. The end is reported either way.
  void stop(protocol::StopMode mode);
  /// The engine is going to end: takes a checkpoint (if there is news) and holds still. drained()
  /// says when the coordinator has it.
  void drain();
  [[nodiscard]] bool drained() const;

  void on_ack(const protocol::JobAck& ack);
  /// Nothing is left to do or to tell; the engine destroys it.
  [[nodiscard]] bool over() const { return phase_ == Phase::kOver; }

 private:
  enum class Phase { kPreparing, kTraining, kPublishing, kFinishing, kEnding, kOver };
  struct Prepared;

  void prepare();
  void begin(Prepared prepared);
  void on_step(const train::StepDone& done);
  void on_eval(const train::EvalDone& done);
  void checkpoint();
  void checkpoint_stored(std::int64_t step, const Result<std::string>& manifest);
  void publish();
  void publish_model();
  /// Of what was published, read back: false, and the job ends, where it computes something else.
  bool probed(double difference, std::int64_t begin_ns);
  void upload_adapter(const std::shared_ptr<const model::FlatAdapter>& adapter);
  void upload_model();
  /// `again`, soon and for a while, where the registry's machine failed (a full disk gets room
  /// again); the job's end else.
  void upload_failed(const Status& status, std::function<void()> again);
  void keep_model(const Digest& model) const;
  void serve_ahead(const Digest& adapter);
  void publish_when_ready();
  void end(Status status);
  void progress(const std::string& kind, const std::string& message,
                const std::string& metrics_json);
  /// Runs `task` on the task thread and then `done` here, unless this job is gone by then.
  void in_background(std::function<void()> task, std::function<void()> done);

  const JobParts parts_;
  JobModel& model_;
  const protocol::StartJob start_;
  protocol::JobSpec spec_;
  DType adapter_dtype_ = DType::kF32;
  Phase phase_ = Phase::kPreparing;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  std::unique_ptr<JobSession> session_;
  std::unique_ptr<train::MetricsWriter> metrics_;
  std::vector<std::int32_t> probe_prompt_;
  std::int64_t resumed_step_ = 0, checkpoint_step_ = -1, checkpoint_acked_step_ = -1;
  std::int64_t storing_step_ = -1, polled_ns_ = 0;  ///< of a checkpoint that ranks are storing
  bool checkpointing_ = false, draining_ = false, pausing_ = false, finished_ = false;
  std::uint64_t progress_seq_ = 0;
  double first_loss_ = 0, last_loss_ = 0;
  std::int64_t trained_tokens_ = 0, tokens_ = 0, last_step_ns_ = 0, finish_from_ns_ = 0;
  double train_seconds_ = 0;
  std::string eval_json_ = "{}";
  // publish
  std::shared_ptr<PackedObject> packed_;
  std::shared_ptr<const model::AdapterWeights> served_;
  bool uploaded_ = false, probed_ = false, published_ = false;
  std::function<void()> upload_again_;                       ///< after a failure; null: none is due
  std::int64_t upload_again_ns_ = 0, upload_failed_ns_ = 0;  ///< when; since when
  int upload_failures_ = 0;
  double probe_difference_ = 0;
  /// Where a publish's time goes; part of the version's metadata.
  struct PublishTimes {
    double copy_ms = 0, pack_ms = 0, upload_ms = 0, build_ms = 0, probe_ms = 0, hand_over_ms = 0;
  };
  PublishTimes publish_times_;
};

}  // namespace tandem::worker::runtime
