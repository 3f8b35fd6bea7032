// Verbs of operation: status, workers, cache, registry, keys, configuration, shutdown.
#include "coordinator/calls.h"
#include "coordinator/views.h"

#include <algorithm>

namespace tandem::coordinator {
namespace {

constexpr TimeMs kEndingMs = 25'000;  // how long a shutdown waits for checkpoints

Json cache_json(const ResultCacheStats& stats) {
  return {{"entries", stats.entries}, {"bytes", stats.bytes},   {"bytes_max", stats.bytes_max},
          {"hits", stats.hits},       {"misses", stats.misses}, {"evictions", stats.evicted},
          {"expired", stats.expired}};
}

}  // namespace

void Calls::status(const Ask& ask, Params& params) {
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  answer(ask, status_json());
}

Json Calls::status_json() const {
  const Tables& tables = context_.tables();
  std::map<std::string, std::size_t> states{{"queued", 0}, {"running", 0}, {"paused", 0},
                                            {"done", 0},   {"failed", 0},  {"cancelled", 0}};
  for (const auto& [id, job] : tables.jobs) ++states[job_state_name(job.state)];
  Json jobs = Json::object();
  for (const auto& [state, count] : states) jobs[state] = count;
  Json workers = Json::array();
  for (const auto& [id, worker] : workers_.all())
    workers.push_back(worker_json(worker, workers_, tables));
  const RequestStats requests = requests_.stats();
  Json json{{"server", str("tandem-coordinator/", context_.options().version)},
            {"version", str(protocol::kVersionMajor, ".", protocol::kVersionMinor)},
            {"incarnation", str(context_.options().incarnation)},
            {"uptime_s", (context_.now().ms - std::max<TimeMs>(started_ms_, 0)) / 1000}};
  json.update(parse_object(context_.options().paths_json));
  json["models"] = tables.models.size();
  json["adapters"] = tables.aliases.size();
  json["datasets"] = tables.datasets.size();
  json["jobs"] = std::move(jobs);
  json["requests"] = {{"running", requests.running},   {"waiting", requests.waiting},
                      {"accepted", requests.accepted}, {"finished", requests.finished},
                      {"failed", requests.failed},     {"cancelled", requests.cancelled},
                      {"busy", requests.refused_busy}, {"rerouted", requests.rerouted},
                      {"shared", requests.shared},     {"tokens", requests.tokens}};
  json["frames"] = {{"refused", refused_frames_}, {"before_hello", before_hello_}};
  json["cache"] = cache_json(requests_.cache_stats());
  json["replicas"] = Json::array();
  for (const auto& [id, replica] : tables.replicas)
    json["replicas"].push_back(replica_json(replica, replicas_, tables));
  json["workers"] = std::move(workers);
  return json;
}

void Calls::worker_list(const Ask& ask, Params& params) {
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  Json list = Json::array();
  for (const auto& [id, worker] : workers_.all())
    list.push_back(worker_json(worker, workers_, context_.tables()));
  answer(ask, {{"workers", std::move(list)}});
}

void Calls::command_worker(const Ask& ask, Params& params, WorkerVerb verb) {
  const std::string name = params.text("worker");
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  Worker* worker = workers_.find(WorkerId(name));
  if (worker == nullptr) {
    std::vector<std::string> known;
    for (const auto& [id, entry] : workers_.all()) known.push_back(id.value);
    const std::string nearest = nearest_name(name, known);
    return reply(ask,
                 not_found_error(str("no worker ", name,
                                     nearest.empty() ? "" : str("; did you mean ", nearest, "?"))));
  }
  const bool restart = verb == WorkerVerb::kRestart;
  if (restart && !worker->agent.alive)
    return reply(ask,
                 unavailable_error(str("worker ", name, " has no agent that could restart it")));
  if (!restart) workers_.set_draining(worker->id, verb == WorkerVerb::kDrain);
  if (verb == WorkerVerb::kDrain) {
    jobs_.drain(worker->id);
    replicas_.drain(worker->id);
  }
  if (restart) workers_.restart(*worker);
  answer(ask, worker_json(*worker, workers_, context_.tables()));
}

void Calls::worker_drain(const Ask& ask, Params& params) {
  command_worker(ask, params, WorkerVerb::kDrain);
}
void Calls::worker_resume(const Ask& ask, Params& params) {
  command_worker(ask, params, WorkerVerb::kResume);
}
void Calls::worker_restart(const Ask& ask, Params& params) {
  command_worker(ask, params, WorkerVerb::kRestart);
}

void Calls::cache_stats(const Ask& ask, Params& params) {
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  answer(ask, cache_json(requests_.cache_stats()));
}

void Calls::cache_clear(const Ask& ask, Params& params) {
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  answer(ask, {{"entries", requests_.clear_cache()}});
}

void Calls::maintain(const Ask& ask, Maintain request) {
  start(ask, std::move(request), [this](const Ask& first, const WorkResult& result) {
    answer(first, parse_object(std::get<JsonDone>(result).json));
  });
}

void Calls::registry_check(const Ask& ask, Params& params) {
  const bool deep = params.boolean("verify_blobs", true);
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  maintain(ask, {Maintenance::kCheck, "", deep});
}

void Calls::registry_gc(const Ask& ask, Params& params) {
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  maintain(ask, {Maintenance::kGc, "", false});
}

void Calls::registry_backup(const Ask& ask, Params& params) {
  const std::string path = params.text("path");
  Status status = params.finish();
  if (status.ok() && path.front() != '/')
    status = invalid_error(str("the backup's path must be absolute, not ", path));
  if (!status.ok()) return reply(ask, status);
  maintain(ask, {Maintenance::kBackup, path, false});
}

void Calls::manage_keys(const Ask& ask, ManageKeys request) {
  start(ask, std::move(request), [this](const Ask& first, const WorkResult& result) {
    const std::string& json = std::get<JsonDone>(result).json;
    if (first.method == "key.create") {
      // The secret goes to the one who asked and nowhere else, not even into the registry.
      remember(first, "{}");
      return send_reply(first, {}, json, false);
    }
    answer(first, parse_object(json));
  });
}

void Calls::key_create(const Ask& ask, Params& params) {
  ManageKeys request{"create", params.text("name"), params.text("role")};
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  manage_keys(ask, std::move(request));
}
void Calls::key_list(const Ask& ask, Params& params) {
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  manage_keys(ask, {"list", "", ""});
}
void Calls::key_revoke(const Ask& ask, Params& params) {
  ManageKeys request{"revoke", params.text("name"), ""};
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  manage_keys(ask, std::move(request));
}

void Calls::config_show(const Ask& ask, Params& params) {
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  answer(ask, parse_object(context_.options().config_json));
}

void Calls::shutdown(const Ask& ask, Params& params) {
  const bool checkpoint = params.boolean("checkpoint", true);
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  ending_ask_ = ask;
  ending_ask_.key.clear();
  ending_deadline_ms_ = context_.now().ms + (checkpoint ? scaled_ms(kEndingMs) : 0);
  if (ending_deadline_ms_ <= 0) ending_deadline_ms_ = 1;
  if (!checkpoint) return;
  for (const auto& [id, worker] : workers_.all()) {
    jobs_.drain(id);
    replicas_.drain(id);
  }
}

}  // namespace tandem::coordinator
