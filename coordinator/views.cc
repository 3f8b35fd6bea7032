#include "coordinator/views.h"

#include "coordinator/placement.h"

#include <algorithm>

namespace tandem::coordinator {
namespace {

Json value_or(const Json& object, const char* key, Json fallback) {
  const auto found = object.find(key);
  return found == object.end() ? std::move(fallback) : *found;
}

std::string model_name(const Tables& tables, const Digest& digest) {
  const ModelRecord* model = tables.model_by_digest(digest);
  return model == nullptr ? digest.hex() : model->name;
}

}  // namespace

Json parse_object(const std::string& text) {
  Json json = Json::parse(text.empty() ? "{}" : text, nullptr, false);
  return json.is_object() ? json : Json::object();
}

std::string published_name(const Job& job) {
  if (job.published.empty()) return "";
  return job.full ? job.adapter : str(job.adapter, "@", job.published_version);
}

Json model_json(const ModelRecord& model, const WorkerTable& workers) {
  const auto ready = std::count_if(workers.all().begin(), workers.all().end(),
                                   [&](const auto& w) { return w.second.holds(model.digest); });
  const Json summary = parse_object(model.summary_json);
  return {{"name", model.name},
          {"digest", model.digest.hex()},
          {"family", model.family},
          {"parameters", value_or(summary, "parameters", 0)},
          {"dtype", value_or(summary, "dtype", "")},
          {"bytes", model.bytes},
          {"context", value_or(summary, "context", 0)},
          {"layers", value_or(summary, "layers", 0)},
          {"path", model.path},
          {"shared", model.shared},
          {"created", model.created_unix_ms},
          {"job", model.job},
          {"base_model", model.base_model.empty() ? "" : model.base_model.hex()},
          {"workers", ready}};
}

Json data_json(const Dataset& data) {
  return {{"name", data.name},
          {"digest", data.root.hex()},
          {"bytes", data.bytes},
          {"created", data.created_unix_ms}};
}

Json id_list(const std::vector<WorkerId>& ids) {
  Json list = Json::array();
  for (const WorkerId& id : ids) list.push_back(id.value);
  return list;
}

Json job_json(const Job& job, const Jobs& jobs, const Tables& tables) {
  const Json metrics = parse_object(job.metrics_json);
  return {{"job", job.id.value},
          {"name", job.name},
          {"state", job_state_name(job.state)},
          {"model", model_name(tables, job.model)},
          {"adapter", job.full ? "" : job.adapter},
          {"publishes", job.adapter},
          {"method", job.full ? "full" : "lora"},
          {"step", job.step},
          {"total_steps", job.total_steps},
          {"loss", value_or(metrics, "loss", nullptr)},
          {"priority", job.priority},
          {"position", jobs.queue_position(job.id)},
          {"reason", jobs.waiting_reason(job)},
          {"worker", holds_engine(job.state) ? job.worker.value : ""},
          {"workers", holds_engine(job.state) ? id_list(job.members) : Json::array()},
          {"attempts", job.attempts},
          {"error", job.error},
          {"created", job.submitted_unix_ms},
          {"started", job.started_unix_ms},
          {"ended", job.ended_unix_ms}};
}

Json job_details_json(const Job& job, const Jobs& jobs, const Tables& tables) {
  Json json = job_json(job, jobs, tables);
  json["spec"] = parse_object(job.spec_json);
  json["epoch"] = job.epoch;
  json["dataset"] = job.dataset.hex();
  json["eval_dataset"] = job.eval_dataset.empty() ? "" : job.eval_dataset.hex();
  json["model_digest"] = job.model.hex();
  Json checkpoints = Json::array();
  for (const CheckpointRecord& checkpoint : tables.checkpoints_of(job.id))
    checkpoints.push_back({{"step", checkpoint.step},
                           {"digest", checkpoint.manifest.hex()},
                           {"created", checkpoint.created_unix_ms}});
  json["checkpoints"] = std::move(checkpoints);
  json["metrics"] = parse_object(job.metrics_json);
  json["estimate"] = parse_object(job.estimate_json);
  json["summary"] = parse_object(job.summary_json);
  json["error_code"] = job.error_code;
  json["published"] = job.published.empty() ? "" : job.published.hex();
  json["published_version"] = job.published_version;
  return json;
}

Json adapter_json(const AdapterVersionRecord& adapter, const Tables& tables,
                  const WorkerTable& workers) {
  const auto resident =
      std::count_if(workers.all().begin(), workers.all().end(), [&](const auto& w) {
        return (w.second.engine.alive && w.second.engine.adapters.contains(adapter.digest)) ||
               (w.second.gang.alive && w.second.gang.adapters.contains(adapter.digest));
      });
  std::int64_t bytes = 0;
  const Json manifest = parse_object(tables.manifest(adapter.digest));
  if (const auto tensors = manifest.find("tensors"); tensors != manifest.end())
    for (const Json& tensor : *tensors) bytes += tensor.value("bytes", std::int64_t{0});
  const Json settings = manifest.contains("settings") ? manifest["settings"] : Json::object();
  return {{"name", adapter.name},
          {"version", adapter.version},
          {"digest", adapter.digest.hex()},
          {"model", model_name(tables, adapter.base_model)},
          {"rank", value_or(settings, "r", 0)},
          {"bytes", bytes},
          {"job", adapter.job},
          {"created", adapter.created_unix_ms},
          {"resident", resident}};
}

Json worker_json(const Worker& worker, const WorkerTable& workers, const Tables& tables) {
  const Engine& engine = worker.engine;
  Json jobs = Json::array();
  for (const protocol::RunningJob& job : engine.jobs) jobs.push_back(job.job.value);
  const Job* held = job_on(tables, worker.id);
  if (held != nullptr && held->gang()) jobs.push_back(held->id.value);
  const Replica* replica = replica_on(tables, worker.id);
  const bool idle = jobs.empty() && engine.requests.empty() && replica == nullptr;
  const char* state = !engine.alive                 ? (worker.agent.alive ? "starting" : "lost")
                      : workers.draining(worker.id) ? (idle ? "drained" : "draining")
                      : engine.model.empty()        ? "starting"
                                                    : "ready";
  return {{"worker", worker.id.value},
          {"host", worker.host},
          {"device", worker.device},
          {"device_name", worker.device_name},
          {"version", worker.agent.program},
          {"state", state},
          {"model", engine.model.empty() ? "" : model_name(tables, engine.model)},
          {"loading", engine.loading.empty() ? "" : model_name(tables, engine.loading)},
          {"error", workers.error(worker)},
          {"jobs", std::move(jobs)},
          {"replica", replica == nullptr ? "" : replica->id.value},
          {"requests", engine.requests.size()},
          {"credits", engine.credits},
          {"kv_free", engine.heartbeat.kv_blocks_free},
          {"kv_total", engine.heartbeat.kv_blocks_total},
          {"tokens_per_second", engine.heartbeat.tokens_per_second},
          {"memory_bytes", worker.memory_bytes},
          {"adapters", engine.adapters.size()},
          {"agent", worker.agent.alive},
          {"pid", engine.alive ? engine.pid : 0},
          {"agent_pid", worker.agent.alive ? worker.agent.pid : 0},
          {"stats", parse_object(engine.heartbeat.stats_json)}};
}

Json replica_json(const Replica& replica, const Replicas& replicas, const Tables& tables) {
  const Engine* engine = replicas.engine(replica);
  const protocol::Heartbeat beat = engine == nullptr ? protocol::Heartbeat{} : engine->heartbeat;
  return {{"replica", replica.id.value},
          {"model", model_name(tables, replica.model)},
          {"tp", replica.tp},
          {"pp", replica.pp},
          {"layout", str("tp", replica.tp, " x pp", replica.pp)},
          {"state", replica_state_name(replica.state)},
          {"reason", replicas.reason(replica)},
          {"epoch", replica.epoch},
          {"worker", replica.placed() ? replica.worker.value : ""},
          {"workers", replica.placed() ? id_list(replica.members) : Json::array()},
          {"requests", engine == nullptr ? 0 : engine->requests.size()},
          {"adapters", engine == nullptr ? 0 : engine->adapters.size()},
          {"kv_free", beat.kv_blocks_free},
          {"kv_total", beat.kv_blocks_total},
          {"tokens_per_second", beat.tokens_per_second},
          {"pid", engine == nullptr ? 0 : engine->pid},
          {"attempts", replica.attempts},
          {"rank_bytes", replica.peak_bytes},
          {"created", replica.created_unix_ms},
          {"stats", parse_object(beat.stats_json)}};
}

Json event_json(const JobEventRecord& event) {
  const Json metrics = parse_object(event.metrics_json);
  return {{"seq", event.seq},
          {"time", event.unix_ms},
          {"kind", event.kind},
          {"step", value_or(metrics, "step", 0)},
          {"total_steps", value_or(metrics, "total_steps", 0)},
          {"message", event.message},
          {"metrics", metrics}};
}

Json log_json(const JobEventRecord& event) {
  std::string line = str(event.level, " ", event.kind);
  if (!event.message.empty()) line += ": " + event.message;
  const Json metrics = parse_object(event.metrics_json);
  for (const auto& [key, value] : metrics.items())
    if (value.is_number()) line += str(" ", key, "=", dump(value));
  return {{"seq", event.seq}, {"time", event.unix_ms}, {"line", line}};
}

}  // namespace tandem::coordinator
