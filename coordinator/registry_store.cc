#include "coordinator/registry_store.h"

#include "coordinator/views.h"
#include "storage/manifest.h"

#include <algorithm>

namespace tandem::coordinator {
namespace {

using storage::RegistryTxn;

std::string hex_or_none(const Digest& digest) {
  return digest.empty() ? "" : digest.hex();
}

Digest digest_at(const Json& json, const char* key) {
  const auto parsed = Digest::parse(json.value(key, std::string()));
  return parsed.ok() ? *parsed : Digest{};
}

protocol::JobRecord to_record(const Job& job) {
  protocol::JobRecord r;
  r.id = job.id.value;
  r.name = job.name;
  r.state = stored_state(job.state);
  r.priority = job.priority;
  r.kind = "train";
  r.spec_json = job.spec_json;
  r.model = job.model;
  r.dataset = job.dataset_manifest;
  r.adapter = job.adapter;
  r.epoch = job.epoch;
  r.attempts = static_cast<std::uint32_t>(job.attempts);
  r.step = job.step;
  r.total_steps = job.total_steps;
  r.error = job.error;
  r.submitted_unix_ms = job.submitted_unix_ms;
  r.started_unix_ms = job.started_unix_ms;
  r.ended_unix_ms = job.ended_unix_ms;
  r.updated_unix_ms = job.updated_unix_ms;
  r.tenant = job.tenant;
  r.idempotency_key = job.idempotency_key;
  r.worker = job.worker.value;
  r.progress_seq = job.progress_seq;
  r.published_version = job.published_version;
  const Json details{{"order", job.order},
                     {"dataset", hex_or_none(job.dataset)},
                     {"eval_dataset", hex_or_none(job.eval_dataset)},
                     {"engine", job.engine},
                     {"ranks", job.ranks},
                     {"full", job.full},
                     {"sizes", job.sizes},
                     {"preempted_by", job.preempted_by},
                     {"preempted", job.preempted_unix_ms},
                     {"members", id_list(job.members)},
                     {"own_failures", job.own_failures},
                     {"requeue_after_stop", job.requeue_after_stop},
                     {"best_step", job.best_step},
                     {"error_code", job.error_code},
                     {"metrics", job.metrics_json},
                     {"summary", job.summary_json},
                     {"estimate", job.estimate_json},
                     {"published", hex_or_none(job.published)},
                     {"events", job.events}};
  r.details_json = details.dump(-1, ' ', false, Json::error_handler_t::replace);
  return r;
}

Result<Job> from_record(const protocol::JobRecord& r) {
  const Json details = Json::parse(r.details_json, nullptr, false);
  if (!details.is_object())
    return corrupt_error(
        str("job ", r.id, ": its details are not a JSON object; restore a backup"));
  Job job;
  try {
    job.order = details.value("order", std::uint64_t{0});
    job.engine = details.value("engine", Incarnation{0});
    job.ranks = details.value("ranks", std::int64_t{1});
    job.full = details.value("full", false);
    job.sizes = details.value("sizes", std::vector<std::int64_t>{job.ranks});
    if (job.sizes.empty()) job.sizes = {job.ranks};
    job.preempted_by = details.value("preempted_by", std::string());
    job.preempted_unix_ms = details.value("preempted", std::int64_t{0});
    for (const auto& member : details.value("members", std::vector<std::string>{}))
      job.members.emplace_back(member);
    job.own_failures = details.value("own_failures", 0);
    job.requeue_after_stop = details.value("requeue_after_stop", false);
    job.best_step = details.value("best_step", std::int64_t{0});
    job.error_code = details.value("error_code", std::string());
    job.metrics_json = details.value("metrics", std::string());
    job.summary_json = details.value("summary", std::string());
    set_estimate(job, details.value("estimate", std::string()));
    job.events = details.value("events", std::uint64_t{0});
    job.dataset = digest_at(details, "dataset");
    job.eval_dataset = digest_at(details, "eval_dataset");
    job.published = digest_at(details, "published");
  } catch (const Json::exception& error) {
    return corrupt_error(str("job ", r.id, ": ", error.what(), "; restore a backup"));
  }
  job.id = JobId(r.id);
  job.name = r.name;
  job.state = loaded_state(r.state, !job.estimate_json.empty());
  job.priority = r.priority;
  job.spec_json = r.spec_json;
  job.model = r.model;
  job.dataset_manifest = r.dataset;
  job.adapter = r.adapter;
  job.epoch = r.epoch;
  job.attempts = static_cast<int>(r.attempts);
  job.step = r.step;
  job.total_steps = r.total_steps;
  job.error = r.error;
  job.submitted_unix_ms = r.submitted_unix_ms;
  job.started_unix_ms = r.started_unix_ms;
  job.ended_unix_ms = r.ended_unix_ms;
  job.updated_unix_ms = r.updated_unix_ms;
  job.tenant = r.tenant;
  job.idempotency_key = r.idempotency_key;
  job.worker = WorkerId(r.worker);
  job.progress_seq = r.progress_seq;
  job.published_version = r.published_version;
  return job;
}

const std::string kReplicaPrefix = "replica/";  // of settings

SettingRecord to_record(const Replica& r) {
  const Json json{{"tenant", r.tenant},
                  {"model", r.model.hex()},
                  {"tp", r.tp},
                  {"pp", r.pp},
                  {"state", static_cast<int>(r.state)},
                  {"epoch", r.epoch},
                  {"worker", r.worker.value},
                  {"members", id_list(r.members)},
                  {"gang", r.gang},
                  {"attempts", r.attempts},
                  {"removing", r.removing},
                  {"error", r.error},
                  {"peak_bytes", r.peak_bytes},
                  {"engine_bytes", r.engine_bytes},
                  {"adapter_bytes", r.adapter_bytes},
                  {"device", r.device},
                  {"created", r.created_unix_ms},
                  {"updated", r.updated_unix_ms}};
  return {kReplicaPrefix + r.id.value, json.dump(-1, ' ', false, Json::error_handler_t::replace)};
}

Result<Replica> replica_of(const SettingRecord& record) {
  Replica r;
  r.id = JobId(record.name.substr(kReplicaPrefix.size()));
  const Json json = Json::parse(record.value, nullptr, false);
  try {
    r.tenant = json.at("tenant").get<std::string>();
    r.model = digest_at(json, "model");
    r.tp = json.at("tp").get<std::int64_t>();
    r.pp = json.at("pp").get<std::int64_t>();
    const int state = json.at("state").get<int>();
    r.state = state >= 0 && state <= static_cast<int>(ReplicaState::kStopping)
                  ? static_cast<ReplicaState>(state)
                  : ReplicaState::kWaiting;
    r.epoch = json.at("epoch").get<Epoch>();
    r.worker = WorkerId(json.at("worker").get<std::string>());
    for (const auto& member : json.at("members").get<std::vector<std::string>>())
      r.members.emplace_back(member);
    r.gang = json.at("gang").get<Incarnation>();
    r.attempts = json.at("attempts").get<int>();
    r.removing = json.at("removing").get<bool>();
    r.error = json.at("error").get<std::string>();
    r.peak_bytes = json.at("peak_bytes").get<std::int64_t>();
    r.engine_bytes = json.value("engine_bytes", std::int64_t{0});
    r.adapter_bytes = json.value("adapter_bytes", std::int64_t{-1});
    r.device = json.value("device", "cpu");
    r.created_unix_ms = json.at("created").get<std::int64_t>();
    r.updated_unix_ms = json.at("updated").get<std::int64_t>();
  } catch (const Json::exception& error) {
    return corrupt_error(str(r.id, ": ", error.what(), "; restore a backup"));
  }
  return r;
}

Result<Dataset> from_record(const protocol::DatasetRecord& r, const std::string& manifest_text) {
  auto manifest = storage::parse_manifest(manifest_text);
  if (!manifest.ok() || manifest->tensors.size() != 1)
    return corrupt_error(str("data set ", r.name, ": its manifest ", r.digest,
                             " is absent or damaged; restore a backup"));
  return Dataset{manifest->tensors[0].root,   r.digest,         r.name, r.rows, r.bytes, r.format,
                 manifest->tensors[0].chunks, r.created_unix_ms};
}

/// One write in a transaction.
struct Apply {
  RegistryTxn& txn;
  Status operator()(const Job& r) const { return txn.put(to_record(r)); }
  Status operator()(const Dataset& r) const {
    return txn.put(
        protocol::DatasetRecord{r.manifest, r.name, r.rows, r.bytes, r.created_unix_ms, r.format});
  }
  Status operator()(const Replica& r) const { return txn.put(to_record(r)); }
  Status operator()(const EraseReplica& e) const {
    return txn.remove<SettingRecord>(kReplicaPrefix + e.replica.value);
  }
  template <class Record>
  Status operator()(const Record& r) const {
    return txn.put(r);
  }
  Status operator()(const EraseModel& e) const { return txn.remove<ModelRecord>(e.name); }
  Status operator()(const EraseDataset& e) const {
    return txn.remove<protocol::DatasetRecord>(storage::digest_key(e.manifest));
  }
  Status operator()(const EraseAdapter& e) const {
    return txn.remove<AdapterVersionRecord>(storage::adapter_key(e.name, e.version));
  }
  Status operator()(const EraseAlias& e) const { return txn.remove<AliasRecord>(e.name); }
  Status operator()(const EraseCheckpoint& e) const {
    return txn.remove<CheckpointRecord>(storage::checkpoint_key(e.job, e.step));
  }
  Status operator()(const EraseManifest& e) const {
    return txn.remove<ManifestRecord>(storage::digest_key(e.digest));
  }
  Status operator()(const EraseResult& e) const {
    return txn.remove<ResultRecord>(storage::digest_key(e.key));
  }
  Status operator()(const EraseIdempotency& e) const {
    return txn.remove<IdempotencyRecord>(storage::idempotency_key(e.tenant, e.key));
  }
  Status operator()(const EraseSetting& e) const { return txn.remove<SettingRecord>(e.name); }
  Status operator()(const EraseJobEvent& e) const {
    return txn.remove<JobEventRecord>(storage::event_key(e.job, e.seq));
  }
  Status operator()(const EraseJob& e) const {
    return txn.remove<protocol::JobRecord>(e.job.value);
  }
};

template <class Record, class Insert>
Status load_table(RegistryTxn& txn, const Insert& insert) {
  TANDEM_ASSIGN_OR_RETURN(auto records, txn.list<Record>());
  for (Record& record : records) insert(std::move(record));
  return {};
}

}  // namespace

Result<Snapshot> RegistryStore::load() {
  TANDEM_ASSIGN_OR_RETURN(auto txn, registry_.begin_read());
  Snapshot snapshot;
  Tables& t = snapshot.tables;
  TANDEM_RETURN_IF_ERROR(
      load_table<ModelRecord>(txn, [&](ModelRecord r) { t.models[r.name] = std::move(r); }));
  TANDEM_RETURN_IF_ERROR(load_table<AdapterVersionRecord>(txn, [&](AdapterVersionRecord r) {
    t.adapters[std::pair(r.name, r.version)] = std::move(r);
  }));
  TANDEM_RETURN_IF_ERROR(
      load_table<AliasRecord>(txn, [&](AliasRecord r) { t.aliases[r.name] = std::move(r); }));
  TANDEM_RETURN_IF_ERROR(load_table<ManifestRecord>(
      txn, [&](ManifestRecord r) { t.manifests[r.digest] = std::move(r); }));
  TANDEM_RETURN_IF_ERROR(load_table<CheckpointRecord>(
      txn, [&](CheckpointRecord r) { t.checkpoints[std::pair(r.job, r.step)] = std::move(r); }));
  TANDEM_ASSIGN_OR_RETURN(const auto settings, txn.list<SettingRecord>());
  for (const SettingRecord& setting : settings) {
    if (!setting.name.starts_with(kReplicaPrefix)) {
      t.settings[setting.name] = setting.value;
      continue;
    }
    TANDEM_ASSIGN_OR_RETURN(Replica replica, replica_of(setting));
    t.replicas[replica.id] = std::move(replica);
  }
  TANDEM_RETURN_IF_ERROR(load_table<IdempotencyRecord>(
      txn, [&](IdempotencyRecord r) { t.idempotency[std::pair(r.tenant, r.key)] = std::move(r); }));
  TANDEM_RETURN_IF_ERROR(load_table<ResultRecord>(
      txn, [&](ResultRecord r) { snapshot.results.push_back(std::move(r)); }));
  TANDEM_ASSIGN_OR_RETURN(const auto datasets, txn.list<protocol::DatasetRecord>());
  for (const auto& record : datasets) {
    TANDEM_ASSIGN_OR_RETURN(Dataset data, from_record(record, t.manifest(record.digest)));
    t.datasets[data.root] = std::move(data);
  }
  TANDEM_ASSIGN_OR_RETURN(const auto jobs, txn.list<protocol::JobRecord>());
  for (const auto& record : jobs) {
    TANDEM_ASSIGN_OR_RETURN(Job job, from_record(record));
    if (!is_terminal(job.state)) {
      TANDEM_ASSIGN_OR_RETURN(auto events,
                              txn.list<JobEventRecord>(storage::name_prefix(record.id)));
      snapshot.events.insert(snapshot.events.end(), events.begin(), events.end());
    }
    t.jobs[job.id] = std::move(job);
  }
  return snapshot;
}

Status RegistryStore::commit(const std::vector<Write>& writes) {
  TANDEM_ASSIGN_OR_RETURN(auto txn, registry_.begin_write());
  for (const Write& write : writes) TANDEM_RETURN_IF_ERROR(std::visit(Apply{txn}, write));
  return txn.commit();
}

Result<std::vector<JobEventRecord>> RegistryStore::events(const JobId& job, std::size_t count) {
  TANDEM_ASSIGN_OR_RETURN(auto txn, registry_.begin_read());
  TANDEM_ASSIGN_OR_RETURN(auto events, txn.list<JobEventRecord>(storage::name_prefix(job.value)));
  if (events.size() > count)
    events.erase(events.begin(), events.end() - static_cast<std::ptrdiff_t>(count));
  return events;
}

}  // namespace tandem::coordinator
