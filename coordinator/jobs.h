// Jobs from submission to their end: the state machine of records.h, every state on disk before
// anybody is told. Progress, checkpoints and publishes of engines come in here; an old epoch is
// refused with kConflict. Messages may be lost or repeated: what is to happen follows from the
// tables and is sent again until it has happened. Owned by the core, one thread.
#pragma once

#include "coordinator/context.h"
#include "coordinator/estimates.h"
#include "coordinator/placement.h"
#include "coordinator/workers.h"
#include "protocol/job_spec.h"

#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace tandem::coordinator {

class Jobs {
 public:
  Jobs(Context& context, WorkerTable& workers, Estimates& estimates)
      : context_(context), workers_(workers), estimates_(estimates) {}

  /// After a start: running jobs wait adoption_ms for their engines.
  void load(const std::vector<JobEventRecord>& events);

  // -- from clients; the tables already resolved every name
  struct Submission {
    std::string tenant, name, idempotency_key;
    protocol::JobSpec spec;
    Digest model, dataset, eval_dataset;
  };
  Result<JobId> submit(const Submission& submission);
  Status cancel(const JobId& id);
  Status pause(const JobId& id);
  /// `layout_json`: "" or some of the settings dp, dp_min, tp, pp, zero,
  /// virtual_pipeline_size, pipeline_balance, sequence_parallel: go on over other ranks.
  /// `estimate_json`: the dry run of resumable(), where one is needed; without it one is asked for.
  /// A job that is refused stays as it was.
  Status resume(const JobId& id, const std::string& layout_json,
                const std::string& estimate_json = "");
  /// The job as resume would start it, without estimate_json where a dry run is needed.
  [[nodiscard]] Result<Job> resumable(const JobId& id, const std::string& layout_json) const;
  /// More ranks than a gang can have on its device, `estimate_json`'s, will never start: refused.
  /// Right after a start of the coordinator nobody knows how many there are, so the job then waits.
  [[nodiscard]] Status check_pool(const protocol::TrainSettings& train,
                                  const std::string& estimate_json) const;
  /// One that has ended, its events and checkpoints; what it published stays.
  Status remove(const JobId& id);
  /// A checkpoint of a job that another registry backed up: the job stands here paused, if it does
  /// not yet, and has the checkpoint. kConflict: another job, or one that is not paused, has the
  /// id; or the step has another checkpoint.
  Status restore(const JobId& id, const Submission& submission, std::int64_t step,
                 const ManifestVerified& manifest);
  /// The worker is to be empty: its job is checkpointed, stopped and queued again.
  void drain(const WorkerId& worker);

  // -- from engines and gangs
  void estimated(const EstimateOutcome& outcome);
  void progress(const Runner& runner, const protocol::JobProgress& message);
  void checkpoint(const Runner& runner, const protocol::CheckpointReady& message);
  void publish(const Runner& runner, const protocol::Publish& message);
  /// Of a gang that could not say so itself, the leader's agent says it.
  void ended(const Runner& runner, const protocol::JobEnded& message);
  /// The manifest of a checkpoint or publish was looked at. False: not one of ours.
  bool verified(const WorkDone& done);
  /// A hello: returns the jobs the process must end, and takes up those it owns.
  std::vector<JobId> adopt(const Runner& runner, protocol::WorkerRole role);
  /// A heartbeat names what runs.
  void seen(const Runner& runner, protocol::WorkerRole role);
  void engine_lost(const EngineLost& lost);

  /// Starts queued jobs where there is room.
  void schedule();
  /// Repeats and time-outs.
  void tick();
  /// After the tables went back by one step.
  void reset();

  // -- for views
  [[nodiscard]] std::string waiting_reason(const Job& job) const;
  /// 1 is next; 0: not queued.
  [[nodiscard]] std::size_t queue_position(const JobId& id) const;
  /// Kept in memory: of this job since the start, or since it was last running.
  [[nodiscard]] const std::deque<JobEventRecord>* events(const JobId& id) const;
  /// Events that came since the last call, for those who watch.
  std::vector<JobEventRecord> take_new_events() { return std::exchange(new_events_, {}); }
  /// Bases of jobs that wait for one to be loaded, in queue order, and where they could start.
  [[nodiscard]] std::vector<BaseDemand> demand() const;

 private:
  /// What is not on disk: when things were last sent or seen.
  struct Timers {
    TimeMs sent_ms = -1, started_ms = 0, missing_since_ms = -1, not_before_ms = 0;
    TimeMs victims_sought_ms = -1;
  };
  struct Pending {
    bool publish = false;
    JobId job;
    Epoch epoch = 0;
    std::int64_t step = 0;
    WorkerId worker;
    std::string metadata_json;
    std::string of;
  };

  Result<Job> make(const JobId& job_id, const Submission& submission) const;
  void save(Job job);
  void set_state(Job& job, JobState state, const std::string& why);
  void event(Job& job, const std::string& level, const std::string& kind,
             const std::string& message, const std::string& metrics_json, bool lazy);
  void start(Job job, const Placement& placement);
  /// Looks for jobs that give `job` their ranks, and stops them.
  void preempt_for(const Job& job, const std::set<WorkerId>& reserved);
  void requeue(Job job, const std::string& why);
  /// At a checkpoint: an elastic job goes on over more ranks when some are free.
  void grow_if_possible(const JobId& id);
  static void set_sizes(Job& job, const protocol::TrainSettings& train);
  [[nodiscard]] static std::string spec_for_size(const Job& job);
  void send_start(const Job& job, const Worker& worker);
  void send_stop(const Job& job);
  static Status change_layout(Job& job, const std::string& layout_json);
  void ask_estimate(Job& job);
  Status admit(Job& job, const std::string& result_json, std::string reason);
  /// "; the nearest layout ...", or "".
  static std::string nearest_layout_text(const protocol::TrainSettings& train, std::size_t ranks);
  /// Whether the message is of the job's current attempt on this engine; takes a queued job back
  /// that only lost its lease. Answers a stale one with kConflict.
  bool accept(const Runner& runner, const JobId& id, Epoch epoch, const std::string& of, Job& job);
  [[nodiscard]] bool may_go_on(const Job& job) const;
  void ack(const Process& process, const JobId& job, Epoch epoch, const std::string& of,
           const Status& status, bool lazy = false);
  void interrupted(Job job, const std::string& why, bool own_failure);
  void finish(Job& job, JobState state, const Status& status);
  void settle(Job job, const protocol::JobEnded& message);
  void record_checkpoint(Job job, const ManifestVerified& manifest, const Pending& pending);
  void record_publish(Job job, const ManifestVerified& manifest, const Pending& pending);
  void record_model(Job job, const ModelHashed& hashed, const Pending& pending);
  [[nodiscard]] Status check_model_name(const std::string& name, const Digest& digest) const;
  /// Who runs it now: the engine, or the gang's first rank once it has said hello; else null.
  Process* runner_of(const Job& job);
  void tick_held(const JobId& id);
  void tick_unseen_gang(const Job& job, const Worker& worker);
  void look_for_missing(const Job& job, const Process& process);
  bool is_pending(const JobId& job, const std::string& of) const;
  void erase_checkpoint(const CheckpointRecord& checkpoint);
  [[nodiscard]] std::uint64_t events_stored(const Job& job) const;
  /// What its events and its checkpoints' manifests take in the registry, about.
  [[nodiscard]] std::int64_t history_bytes(const Job& job) const;
  void forget_history(Job& job);
  void forget(Job job);
  /// Of jobs that have ended: those beyond the limits.
  void forget_old();
  /// Made once for all jobs of a list.
  [[nodiscard]] const QueueView& queue() const;

  Context& context_;
  WorkerTable& workers_;
  Estimates& estimates_;
  TimeMs loaded_ms_ = 0;
  bool history_changed_ = true;  ///< forget_old() may find something
  std::map<JobId, Timers> timers_;
  std::map<JobId, std::deque<JobEventRecord>> events_;
  std::vector<JobEventRecord> new_events_;
  std::map<std::uint64_t, Pending> pending_;  // work id -> checkpoint or publish
  mutable QueueView queue_view_;
  mutable std::uint64_t viewed_version_ = 0;  // of the tables
};

/// "engine HOST/cpu0", or "the gang on HOST/cpu0" of a job of several ranks.
std::string runner_name(const Job& job);

/// Tells the engines that hold its base of a new version.
void announce(Context& context, const WorkerTable& workers, const AdapterVersionRecord& adapter);

/// {"step":N,"total_steps":N} and the engine's own metrics; a malformed one is left out.
std::string event_metrics(const protocol::JobProgress& message);

}  // namespace tandem::coordinator
