// What the coordinator keeps, as plain structs, and the writes that change it. The core works on
// Tables in memory; each step's writes are one transaction of the registry (registry_store.h).
// Records are the registry's own (protocol/records.h) but for jobs, where the core needs more.
#pragma once

#include "protocol/base/ids.h"
#include "protocol/records.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace tandem::coordinator {

using protocol::AdapterVersionRecord;
using protocol::AliasChange;
using protocol::AliasRecord;
using protocol::CheckpointRecord;
using protocol::IdempotencyRecord;
using protocol::JobEventRecord;
using protocol::ManifestKind;
using protocol::ManifestRecord;
using protocol::ModelFile;
using protocol::ModelRecord;
using protocol::ResultRecord;
using protocol::SettingRecord;

/// A data set: a file in chunks. The registry keeps it as a DatasetRecord and a manifest.
struct Dataset {
  Digest root;      ///< content_root of the file: the name that people and engines use
  Digest manifest;  ///< of its manifest, the registry's key
  std::string name;
  std::int64_t rows = 0, bytes = 0;
  std::string format;
  std::vector<Digest> chunks;
  std::int64_t created_unix_ms = 0;
};

/// submitted -> estimating -> queued -> starting -> running -> (pausing -> paused, cancelling) ->
/// succeeded | failed | cancelled. A job whose engine dies goes back to queued. From queued on
/// these are the registry's states, two numbers further; what comes before is queued there.
enum class JobState : std::uint8_t {
  kSubmitted = 0,   ///< no engine was there for the dry run yet
  kEstimating = 1,  ///< an engine does the dry run
  kQueued = 2,
  kStarting = 3,  ///< an engine was chosen, StartJob is repeated until it shows the job
  kRunning = 4,
  kPausing = 5,
  kPaused = 6,
  kCancelling = 7,
  kSucceeded = 8,
  kFailed = 9,
  kCancelled = 10
};
[[nodiscard]] protocol::JobState stored_state(JobState state);
/// `estimated`: whether a queued job's dry run is known.
[[nodiscard]] JobState loaded_state(protocol::JobState state, bool estimated);
/// For people: the registry's name, "estimating" before a job is queued.
const char* job_state_name(JobState state);
[[nodiscard]] bool is_terminal(JobState state);
/// Starting, running, pausing or cancelling: an engine holds it.
[[nodiscard]] bool holds_engine(JobState state);

/// A job. The registry's JobRecord holds it; what that has no field for travels in details_json.
struct Job {
  JobId id;
  std::uint64_t order = 0;  ///< of submission; FIFO within a priority
  std::string tenant, name;
  std::string spec_json;  ///< JobSpec with every default written out
  JobState state = JobState::kSubmitted;
  std::int32_t priority = 0;
  std::int64_t ranks = 1;  ///< of the spec's layout
  /// Gang sizes that it may run with, the largest (`ranks`) first: one, but for an elastic job.
  std::vector<std::int64_t> sizes{1};
  bool full = false;  ///< of method full: runs as a gang, publishes a model
  Digest model;
  Digest dataset, eval_dataset;  ///< roots; eval may be empty
  Digest dataset_manifest;
  std::string adapter;  ///< name to publish under: an adapter's, or a full job's model's
  Epoch epoch = 0;
  WorkerId worker;                  ///< holds or last held it; of a gang: the leader
  std::vector<WorkerId> members;    ///< of a gang: all its workers, the leader first
  Incarnation engine = 0;           ///< the process that was told to start it, or is to be a gang's
  int attempts = 0;                 ///< since the last new step or checkpoint
  int own_failures = 0;             ///< of these, failures that the job itself reported
  bool requeue_after_stop = false;  ///< being stopped to be started again, here or elsewhere
  std::string preempted_by;         ///< for people, until it is started again; "": it is not
  std::int64_t preempted_unix_ms = 0;  ///< when it was last told to give its ranks to another job
  std::int64_t step = 0, total_steps = 0, best_step = 0;
  std::string error_code, error;  ///< of a failed job, or of the last attempt
  std::string metrics_json, summary_json, estimate_json;  ///< "" or a JSON object
  /// estimate_json's, 0 where it does not say: its largest rank and the engine of that rank's slot,
  /// and the engine alone. Set by set_estimate().
  std::int64_t peak_bytes = 0, engine_bytes = 0;
  std::string idempotency_key;
  Digest published;
  std::uint32_t published_version = 0;
  std::int64_t submitted_unix_ms = 0, started_unix_ms = 0, ended_unix_ms = 0, updated_unix_ms = 0;
  std::uint64_t events = 0;        ///< number of the last event
  std::uint64_t progress_seq = 0;  ///< last JobProgress of this epoch

  [[nodiscard]] bool gang() const { return !members.empty(); }
  /// Whether it is to run as a gang: on an engine the base is everybody's and never changes.
  [[nodiscard]] bool needs_gang() const { return ranks > 1 || full; }
  [[nodiscard]] bool holds(const WorkerId& who) const {
    return worker == who || std::find(members.begin(), members.end(), who) != members.end();
  }
};

/// Sets estimate_json and what is read of it.
void set_estimate(Job& job, std::string estimate_json);
/// "peak_bytes" and the "serving_engine" of "by_kind" of an estimate; 0: it does not say.
struct EstimatedBytes {
  std::int64_t peak = 0, engine = 0;
};
EstimatedBytes estimated_bytes(const std::string& estimate_json);

/// waiting -> starting -> serving -> (stopping ->) waiting, or gone where it was removed. One whose
/// gang dies waits again.
enum class ReplicaState : std::uint8_t {
  kWaiting = 0,
  kStarting = 1,  ///< workers were chosen, StartJob is repeated until it says that it can serve
  kServing = 2,
  kStopping = 3  ///< finishes what it answers, then ends
};
const char* replica_state_name(ReplicaState state);

/// A base that is to be served by a gang of tp x pp ranks, for as long as it stands here. The
/// registry keeps it as a setting, "replica/ID".
struct Replica {
  JobId id;  ///< "replica-" and 12 hex digits; a gang knows it as its job
  std::string tenant;
  Digest model;
  std::int64_t tp = 1, pp = 1;
  ReplicaState state = ReplicaState::kWaiting;
  Epoch epoch = 0;
  WorkerId worker;                ///< leads it or led it last
  std::vector<WorkerId> members;  ///< all its workers, the leader first
  Incarnation gang = 0;           ///< of its first rank's process; 0: none is to be there
  int attempts = 0;               ///< starts in a row that did not last
  bool removing = false;          ///< ends for good
  std::string error;              ///< why it ended last
  std::int64_t peak_bytes = 0;    ///< largest rank and the engine of its slot, by the dry run
  std::int64_t engine_bytes = 0;  ///< of these, the engine's
  /// What adapters may take of each rank since it was placed: half of what rank and engine leave,
  /// for the engine's own have the other half. Less than 0: not said.
  std::int64_t adapter_bytes = -1;
  std::string device = "cpu";  ///< of all its workers, by the dry run
  std::int64_t created_unix_ms = 0, updated_unix_ms = 0;

  [[nodiscard]] std::int64_t ranks() const { return tp * pp; }
  /// Its workers are taken.
  [[nodiscard]] bool placed() const { return state != ReplicaState::kWaiting; }
  [[nodiscard]] bool holds(const WorkerId& who) const {
    return placed() && std::find(members.begin(), members.end(), who) != members.end();
  }
};
/// Whether this names a replica, not a job.
bool is_replica(const JobId& id);

// -- writes: Erase* of what is not there is no error
struct EraseModel {
  std::string name;
};
struct EraseDataset {
  Digest root, manifest;
};
struct EraseAdapter {
  std::string name;
  std::uint32_t version = 0;
};
struct EraseAlias {
  std::string name;
};
struct EraseCheckpoint {
  std::string job;
  std::int64_t step = 0;
};
struct EraseManifest {
  Digest digest;
};
struct EraseResult {
  Digest key;
};
struct EraseIdempotency {
  std::string tenant, key;
};
struct EraseSetting {
  std::string name;
};
struct EraseJobEvent {
  std::string job;
  std::uint64_t seq = 0;
};
/// A job alone, not its events or checkpoints; undoes a submission.
struct EraseJob {
  JobId job;
};
struct EraseReplica {
  JobId replica;
};
using Write =
    std::variant<ModelRecord, Dataset, AdapterVersionRecord, AliasRecord, Job, JobEventRecord,
                 CheckpointRecord, ManifestRecord, ResultRecord, IdempotencyRecord, SettingRecord,
                 EraseModel, EraseDataset, EraseAdapter, EraseAlias, EraseCheckpoint, EraseManifest,
                 EraseResult, EraseIdempotency, EraseSetting, EraseJobEvent, EraseJob, Replica,
                 EraseReplica>;

/// All but events and results, which are only written here.
struct Tables {
  std::map<std::string, ModelRecord> models;
  std::map<Digest, Dataset> datasets;  ///< by root
  std::map<std::pair<std::string, std::uint32_t>, AdapterVersionRecord> adapters;
  std::map<std::string, AliasRecord> aliases;
  std::map<JobId, Job> jobs;
  std::map<JobId, Replica> replicas;
  std::map<std::pair<std::string, std::int64_t>, CheckpointRecord> checkpoints;
  std::map<Digest, ManifestRecord> manifests;
  std::map<std::pair<std::string, std::string>, IdempotencyRecord> idempotency;
  std::map<std::string, std::string> settings;

  /// Of `jobs`, those that are queued, and those that hold an engine: a long history costs who
  /// looks for these nothing. apply() keeps them; index_jobs() makes them anew.
  std::set<JobId> queued, held;

  void index_jobs();
  void index_job(const JobId& id);
  /// Applies `write` and returns the writes that take it back (none for events and results).
  std::vector<Write> apply(const Write& write);

  [[nodiscard]] const ModelRecord* model_by_digest(const Digest& digest) const;
  [[nodiscard]] const Dataset* dataset_by_name(const std::string& name) const;
  [[nodiscard]] const CheckpointRecord* latest_checkpoint(const JobId& job) const;
  /// In order of steps.
  [[nodiscard]] std::vector<CheckpointRecord> checkpoints_of(const JobId& job) const;
  [[nodiscard]] const AdapterVersionRecord* adapter_by_digest(const Digest& digest) const;
  /// The version that alias `name` points at, or null.
  [[nodiscard]] const AdapterVersionRecord* current_adapter(const std::string& name) const;
  /// The text, or "" when it is not here.
  [[nodiscard]] const std::string& manifest(const Digest& digest) const;
};

/// What a start reads back.
struct Snapshot {
  Tables tables;
  std::vector<JobEventRecord> events;  ///< of jobs that have not ended, the newest, in order
  std::vector<ResultRecord> results;   ///< any order
};

}  // namespace tandem::coordinator
