#include "tools/prometheus.h"

#include <utility>
#include <vector>

namespace tandem::tools {
namespace {

using Json = nlohmann::json;
using Labels = std::vector<std::pair<std::string, std::string>>;

std::string escaped(const std::string& label) {
  std::string out;
  for (const char c : label) {
    if (c == '\\' || c == '"') out += '\\';
    out += c == '\n' ? "\\n" : std::string(1, c);
  }
  return out;
}

/// Families one behind the other, each with its samples: the format wants them together.
class Exposition {
 public:
  /// The samples that follow are this family's; without any it is not mentioned.
  void family(const std::string& name, const char* type, const std::string& help) {
    name_ = name;
    head_ = "# HELP " + name + " " + help + "\n# TYPE " + name + " " + type + "\n";
  }
  /// Of a number or a truth; anything else is none.
  void sample(const Labels& labels, const Json& value) {
    if (!value.is_number() && !value.is_boolean()) return;
    text_ += std::exchange(head_, "") + name_;
    for (std::size_t i = 0; i < labels.size(); ++i)
      text_ += (i == 0 ? "{" : ",") + labels[i].first + "=\"" + escaped(labels[i].second) + "\"";
    if (!labels.empty()) text_ += "}";
    text_ += " " + (value.is_boolean() ? std::string(value.get<bool>() ? "1" : "0") : value.dump());
    text_ += "\n";
  }
  [[nodiscard]] std::string take() { return std::move(text_); }

 private:
  std::string name_, head_, text_;
};

/// Null where it is not there.
Json at(const Json& json, const std::string& key) {
  const auto found = json.find(key);
  return found == json.end() ? Json() : *found;
}
std::string text_at(const Json& json, const std::string& key) {
  const Json value = at(json, key);
  return value.is_string() ? value.get<std::string>() : "";
}

struct Metric {
  const char *key, *name, *type, *help;
};

void add_platform(Exposition& to, const Json& status) {
  to.family("tandem_uptime_seconds", "gauge", "Since the coordinator began.");
  to.sample({{"server", text_at(status, "server")}}, at(status, "uptime_s"));
  for (const Metric& m : {Metric{"models", "tandem_models", "gauge", "Base models."},
                          {"adapters", "tandem_adapters", "gauge", "Names of adapters."},
                          {"datasets", "tandem_datasets", "gauge", "Data sets."}}) {
    to.family(m.name, m.type, m.help);
    to.sample({}, at(status, m.key));
  }
  const Json states = at(status, "jobs");
  to.family("tandem_jobs", "gauge", "Fine-tuning jobs by state.");
  for (const auto& [state, count] : states.items()) to.sample({{"state", state}}, count);
  const Json requests = at(status, "requests"), cache = at(status, "cache");
  to.family("tandem_requests", "gauge", "Requests that have no end yet.");
  for (const char* state : {"running", "waiting"})
    to.sample({{"state", state}}, at(requests, state));
  to.family("tandem_requests_total", "counter", "Requests that have ended, by how.");
  for (const char* outcome : {"finished", "failed", "cancelled", "busy"})
    to.sample({{"outcome", outcome}}, at(requests, outcome));
  for (const Metric& m :
       {Metric{"accepted", "tandem_requests_accepted_total", "counter", "Requests taken on."},
        {"rerouted", "tandem_requests_rerouted_total", "counter",
         "Requests that went to another engine because theirs was lost."},
        {"shared", "tandem_requests_shared_total", "counter",
         "Requests answered by an equal one that was running."},
        {"tokens", "tandem_tokens_total", "counter", "Tokens sent to clients."}}) {
    to.family(m.name, m.type, m.help);
    to.sample({}, at(requests, m.key));
  }
  for (const Metric& m :
       {Metric{"entries", "tandem_result_cache_entries", "gauge", "Answers kept."},
        {"bytes", "tandem_result_cache_bytes", "gauge", "Their size."},
        {"hits", "tandem_result_cache_hits_total", "counter", "Requests answered by them."},
        {"misses", "tandem_result_cache_misses_total", "counter",
         "Requests that could have been."}}) {
    to.family(m.name, m.type, m.help);
    to.sample({}, at(cache, m.key));
  }
}

/// Of engines, which workers and replicas show alike.
void add_engines(Exposition& to, const std::string& kind, const Json& engines) {
  const auto labels = [&](const Json& engine) {
    Labels all{{kind, text_at(engine, kind)}, {"model", text_at(engine, "model")}};
    if (kind == "worker") all.insert(all.begin() + 1, {"device", text_at(engine, "device")});
    return all;
  };
  const std::string prefix = "tandem_" + kind + "_";
  const auto family = [&](const Metric& m, bool in_stats) {
    to.family(prefix + m.name, m.type, m.help);
    for (const Json& engine : engines)
      to.sample(labels(engine), at(in_stats ? at(engine, "stats") : engine, m.key));
  };
  to.family(prefix + "ready", "gauge", "1 where requests are taken.");
  for (const Json& engine : engines) to.sample(labels(engine), text_at(engine, "state") == "ready");
  family({"requests", "requests", "gauge", "Requests being answered."}, false);
  family({"adapters", "adapters", "gauge", "Adapters in memory."}, false);
  family({"kv_free", "kv_blocks_free", "gauge", "Blocks of the KV cache that nobody holds."},
         false);
  family({"kv_total", "kv_blocks", "gauge", "Blocks of the KV cache."}, false);
  family({"tokens_per_second", "tokens_per_second", "gauge", "Tokens decoded lately."}, false);
  family({"steps", "steps_total", "counter", "Batches run."}, true);
  family({"prefill_tokens", "prefill_tokens_total", "counter", "Tokens of prompts computed."},
         true);
  family({"decode_tokens", "decode_tokens_total", "counter", "Tokens drawn."}, true);
  family({"preemptions", "preemptions_total", "counter",
          "Requests that gave their KV cache to others."},
         true);
  family({"prefix_queries", "prefix_cache_queries_total", "counter",
          "Blocks of prompts looked for in the prefix cache."},
         true);
  family({"prefix_hits", "prefix_cache_hits_total", "counter", "Blocks found there."}, true);
  family({"memory_peak_bytes", "memory_peak_bytes", "gauge", "Most device memory so far."}, true);
  family({"memory_bytes_max", "memory_limit_bytes", "gauge", "Device memory it may use."}, true);
  to.family(prefix + "memory_bytes", "gauge", "Device memory by what it is for.");
  for (const Json& engine : engines) {
    const Json memory = at(at(engine, "stats"), "memory_bytes");
    for (const auto& [use, bytes] : memory.items()) {
      Labels all = labels(engine);
      all.emplace_back("kind", use);
      to.sample(all, bytes);
    }
  }
}

void add_jobs(Exposition& to, const Json& jobs) {
  for (const Metric& m :
       {Metric{"step", "tandem_job_step", "gauge", "Optimizer steps done, of jobs not ended."},
        {"total_steps", "tandem_job_steps", "gauge", "Optimizer steps in all."},
        {"loss", "tandem_job_loss", "gauge", "Mean loss of a trained token at that step."},
        {"attempts", "tandem_job_attempts", "gauge", "Times that the job was begun."}}) {
    to.family(m.name, m.type, m.help);
    for (const Json& job : jobs)
      if (at(job, "ended") == 0)
        to.sample({{"job", text_at(job, "job")},
                   {"name", text_at(job, "name")},
                   {"model", text_at(job, "model")}},
                  at(job, m.key));
  }
}

}  // namespace

std::string prometheus_text(const Json& status, const Json& jobs) {
  Exposition to;
  add_platform(to, status);
  add_engines(to, "worker", at(status, "workers"));
  add_engines(to, "replica", at(status, "replicas"));
  add_jobs(to, jobs);
  return to.take();
}

}  // namespace tandem::tools
