#include "coordinator/records.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <optional>

namespace tandem::coordinator {
namespace {

/// Puts `value` under `key`; the undo is the old value or `erase`.
template <class Map, class Key, class Value>
std::vector<Write> put(Map& map, const Key& key, const Value& value, Write erase) {
  std::vector<Write> undo;
  const auto found = map.find(key);
  if (found == map.end())
    undo.push_back(std::move(erase));
  else
    undo.push_back(found->second);
  map[key] = value;
  return undo;
}

template <class Map, class Key>
std::vector<Write> erase(Map& map, const Key& key) {
  const auto found = map.find(key);
  if (found == map.end()) return {};
  std::vector<Write> undo{found->second};
  map.erase(found);
  return undo;
}

struct Apply {
  Tables& t;
  std::vector<Write> operator()(const ModelRecord& r) const {
    return put(t.models, r.name, r, EraseModel{r.name});
  }
  std::vector<Write> operator()(const Dataset& r) const {
    return put(t.datasets, r.root, r, EraseDataset{r.root, r.manifest});
  }
  std::vector<Write> operator()(const AdapterVersionRecord& r) const {
    return put(t.adapters, std::pair(r.name, r.version), r, EraseAdapter{r.name, r.version});
  }
  std::vector<Write> operator()(const AliasRecord& r) const {
    return put(t.aliases, r.name, r, EraseAlias{r.name});
  }
  std::vector<Write> operator()(const Job& r) const {
    std::vector<Write> undo = put(t.jobs, r.id, r, EraseJob{r.id});
    t.index_job(r.id);
    return undo;
  }
  std::vector<Write> operator()(const Replica& r) const {
    return put(t.replicas, r.id, r, EraseReplica{r.id});
  }
  std::vector<Write> operator()(const EraseReplica& e) const {
    return erase(t.replicas, e.replica);
  }
  std::vector<Write> operator()(const CheckpointRecord& r) const {
    return put(t.checkpoints, std::pair(r.job, r.step), r, EraseCheckpoint{r.job, r.step});
  }
  std::vector<Write> operator()(const ManifestRecord& r) const {
    if (!t.manifests.emplace(r.digest, r).second) return {};
    return {EraseManifest{r.digest}};
  }
  std::vector<Write> operator()(const IdempotencyRecord& r) const {
    return put(t.idempotency, std::pair(r.tenant, r.key), r, EraseIdempotency{r.tenant, r.key});
  }
  std::vector<Write> operator()(const SettingRecord& r) const {
    std::vector<Write> undo{EraseSetting{r.name}};
    if (const auto found = t.settings.find(r.name); found != t.settings.end())
      undo = {SettingRecord{r.name, found->second}};
    t.settings[r.name] = r.value;
    return undo;
  }
  std::vector<Write> operator()(const EraseModel& e) const { return erase(t.models, e.name); }
  std::vector<Write> operator()(const EraseDataset& e) const { return erase(t.datasets, e.root); }
  std::vector<Write> operator()(const EraseAdapter& e) const {
    return erase(t.adapters, std::pair(e.name, e.version));
  }
  std::vector<Write> operator()(const EraseAlias& e) const { return erase(t.aliases, e.name); }
  std::vector<Write> operator()(const EraseCheckpoint& e) const {
    return erase(t.checkpoints, std::pair(e.job, e.step));
  }
  std::vector<Write> operator()(const EraseManifest& e) const {
    return erase(t.manifests, e.digest);
  }
  std::vector<Write> operator()(const EraseIdempotency& e) const {
    return erase(t.idempotency, std::pair(e.tenant, e.key));
  }
  std::vector<Write> operator()(const EraseSetting& e) const {
    const auto found = t.settings.find(e.name);
    if (found == t.settings.end()) return {};
    std::vector<Write> undo{SettingRecord{e.name, found->second}};
    t.settings.erase(found);
    return undo;
  }
  std::vector<Write> operator()(const EraseJob& e) const {
    std::vector<Write> undo = erase(t.jobs, e.job);
    t.index_job(e.job);
    return undo;
  }
  std::vector<Write> operator()(const JobEventRecord&) const { return {}; }
  std::vector<Write> operator()(const EraseJobEvent&) const { return {}; }
  std::vector<Write> operator()(const ResultRecord&) const { return {}; }
  std::vector<Write> operator()(const EraseResult&) const { return {}; }
};

}  // namespace

protocol::JobState stored_state(JobState state) {
  constexpr int kFirst = static_cast<int>(JobState::kQueued);
  static_assert(static_cast<int>(protocol::JobState::kQueued) == 0 &&
                static_cast<int>(protocol::JobState::kCancelled) + kFirst ==
                    static_cast<int>(JobState::kCancelled));
  return protocol::JobState(std::max(0, static_cast<int>(state) - kFirst));
}

JobState loaded_state(protocol::JobState state, bool estimated) {
  if (state > protocol::JobState::kCancelled) return JobState::kFailed;
  if (state == protocol::JobState::kQueued && !estimated) return JobState::kSubmitted;
  return JobState(static_cast<int>(state) + static_cast<int>(JobState::kQueued));
}

const char* job_state_name(JobState state) {
  // For a user the wait before the queue is one.
  return state < JobState::kQueued ? "estimating" : protocol::job_state_name(stored_state(state));
}

EstimatedBytes estimated_bytes(const std::string& estimate_json) {
  const auto json = nlohmann::json::parse(estimate_json, nullptr, false);
  const auto number = [](const nlohmann::json& object, const char* name) {
    const auto found = object.find(name);
    return found != object.end() && found->is_number_integer() ? found->get<std::int64_t>() : 0;
  };
  if (!json.is_object()) return {};
  const auto kinds = json.find("by_kind");
  return {number(json, "peak_bytes"), kinds != json.end() && kinds->is_object()
                                          ? number(*kinds, "serving_engine")
                                          : std::int64_t{0}};
}

void set_estimate(Job& job, std::string estimate_json) {
  const EstimatedBytes bytes = estimated_bytes(estimate_json);
  job.peak_bytes = bytes.peak;
  job.engine_bytes = bytes.engine;
  job.estimate_json = std::move(estimate_json);
}

bool is_terminal(JobState state) {
  return state == JobState::kSucceeded || state == JobState::kFailed ||
         state == JobState::kCancelled;
}

bool holds_engine(JobState state) {
  return state == JobState::kStarting || state == JobState::kRunning ||
         state == JobState::kPausing || state == JobState::kCancelling;
}

const char* replica_state_name(ReplicaState state) {
  static constexpr const char* kNames[] = {"waiting", "starting", "serving", "stopping"};
  return kNames[static_cast<int>(state)];
}

bool is_replica(const JobId& id) {
  return id.value.starts_with("replica-");
}

void Tables::index_jobs() {
  queued.clear();
  held.clear();
  for (const auto& [id, job] : jobs) index_job(id);
}

void Tables::index_job(const JobId& id) {
  const auto job = jobs.find(id);
  const auto keep = [&](std::set<JobId>& set, bool in) {
    if (in)
      set.insert(id);
    else
      set.erase(id);
  };
  keep(queued, job != jobs.end() && job->second.state == JobState::kQueued);
  keep(held, job != jobs.end() && holds_engine(job->second.state));
}

std::vector<Write> Tables::apply(const Write& write) {
  return std::visit(Apply{*this}, write);
}

const ModelRecord* Tables::model_by_digest(const Digest& digest) const {
  for (const auto& [name, model] : models)
    if (model.digest == digest) return &model;
  return nullptr;
}

const Dataset* Tables::dataset_by_name(const std::string& name) const {
  const Dataset* newest = nullptr;
  for (const auto& [digest, dataset] : datasets)
    if (dataset.name == name &&
        (newest == nullptr || newest->created_unix_ms < dataset.created_unix_ms))
      newest = &dataset;
  return newest;
}

const CheckpointRecord* Tables::latest_checkpoint(const JobId& job) const {
  auto next = checkpoints.lower_bound(std::pair(job.value + '\0', std::int64_t{0}));
  if (next == checkpoints.begin()) return nullptr;
  --next;
  return next->first.first == job.value ? &next->second : nullptr;
}

std::vector<CheckpointRecord> Tables::checkpoints_of(const JobId& job) const {
  std::vector<CheckpointRecord> all;
  for (auto at = checkpoints.lower_bound(std::pair(job.value, std::int64_t{0}));
       at != checkpoints.end() && at->first.first == job.value; ++at)
    all.push_back(at->second);
  return all;
}

const AdapterVersionRecord* Tables::adapter_by_digest(const Digest& digest) const {
  for (const auto& [key, adapter] : adapters)
    if (adapter.digest == digest) return &adapter;
  return nullptr;
}

const AdapterVersionRecord* Tables::current_adapter(const std::string& name) const {
  const auto alias = aliases.find(name);
  if (alias == aliases.end()) return nullptr;
  const auto version = adapters.find(std::pair(alias->second.adapter, alias->second.version));
  return version == adapters.end() ? nullptr : &version->second;
}

const std::string& Tables::manifest(const Digest& digest) const {
  static const std::string kNone;
  const auto found = manifests.find(digest);
  return found == manifests.end() ? kNone : found->second.text;
}

}  // namespace tandem::coordinator
