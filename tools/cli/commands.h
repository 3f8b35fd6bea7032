// The verbs of the CLI: each takes its options and a session, prints its result, and returns a
// Status whose code becomes the exit code. Grouped by file as the help groups them.
#pragma once

#include "tools/cli/session.h"

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace tandem::tools {

// -- a local platform (commands_platform.cc)
struct UpOptions {
  bool foreground = false;
};
Status run_up(Session& session, const UpOptions& options);
Status run_down(Session& session);
/// `prometheus`: as prometheus_text() has it, jobs included.
Status run_status(Session& session, bool prometheus = false);
Status run_doctor(Session& session);
/// With --json one {"file", "line"} for each line.
Status run_logs(Session& session, int lines, bool follow);
Status run_config_show(Session& session, bool origin);

// -- models, data, adapters (commands_objects.cc, commands_adapter.cc)
Status run_model_add(Session& session, const std::string& name, const std::string& path,
                     bool shared);
Status run_list(Session& session, const std::string& what);
Status run_show(Session& session, const std::string& what, const std::string& name);
Status run_remove(Session& session, const std::string& what, const std::string& name, bool force);
/// Uploads a file and registers it; data.add's answer. Without a name it gets its file's, or keeps
/// the one that its bytes have already.
Result<Json> add_data(Session& session, const std::string& path, const std::string& name);
Status run_data_add(Session& session, const std::string& path, const std::string& name);
Status run_data_check(Session& session, const std::string& path, const std::string& model,
                      std::int64_t max_length, int samples);
Status run_model_export(Session& session, const std::string& name, const std::string& directory);
Status run_adapter_export(Session& session, const std::string& name, const std::string& directory);
Status run_adapter_import(Session& session, const std::string& name, const std::string& directory,
                          const std::string& model);
/// Writes a Hugging Face folder (commands_merge.cc); `dtype` is "bf16" or "f32".
Status run_adapter_merge(Session& session, const std::string& name, const std::string& directory,
                         const std::string& dtype);
Status run_adapter_alias(Session& session, const std::string& alias, const std::string& target);
/// `version` 0: the one before.
Status run_adapter_rollback(Session& session, const std::string& alias, std::int64_t version);

// -- training (commands_job.cc)
struct TrainOptions {
  std::string model, data, eval_data, adapter, name, file;
  std::map<std::string, std::string>
      settings;  ///< TrainSettings fields as given on the command line
  std::optional<std::int32_t> priority;
  bool follow = false;
};
Status run_train(Session& session, const TrainOptions& options);
Status run_job_watch(Session& session, const std::string& job);
Status run_job_logs(Session& session, const std::string& job);
/// `layout`: of resume alone; "" values are left as they are.
Status run_job_action(Session& session, const std::string& action, const std::string& job,
                      const std::map<std::string, std::string>& layout = {});
Status run_estimate(Session& session, const TrainOptions& options);

// -- inference (commands_generate.cc)
struct GenerateOptions {
  std::string model, prompt, system;
  bool raw = false, no_cache = false, stream = true, ignore_eos = false;
  std::optional<std::int64_t> max_tokens, top_k, seed;
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  std::int64_t logprobs = -1;
  std::vector<std::string> stop;
};
Status run_generate(Session& session, const GenerateOptions& options);
Status run_chat(Session& session, const GenerateOptions& options);

/// Mean loss of a data set's trained tokens (commands_eval.cc), through the same path that answers
/// requests.
Status run_eval(Session& session, const std::string& model, const std::string& path,
                std::int64_t max_length);

// -- replicas (commands_replica.cc)
struct ReplicaOptions {
  std::string model;
  std::int64_t tp = 1, pp = 1, count = 1;
  bool follow = false;
};
Status run_replica_add(Session& session, const ReplicaOptions& options);
Status run_replica_rm(Session& session, const std::string& replica);

// -- operations (commands_operations.cc)
Status run_worker_action(Session& session, const std::string& action, const std::string& worker);
Status run_cache(Session& session, const std::string& action);
Status run_registry_check(Session& session, bool offline);
Status run_registry(Session& session, const std::string& action, const std::string& path);
/// One model, adapter or job into a folder and out of it, through a running coordinator
/// (commands_backup.cc). `name` "": the one it had; a job keeps its id.
Status run_object_backup(Session& session, const std::string& object, const std::string& path);
/// Whichever of the two the folder is a backup of.
Status run_restore(Session& session, const std::string& path, const std::string& name);
Status run_key(Session& session, const std::string& action, const std::string& name,
               const std::string& role);
Status run_bench(Session& session, const std::string& name,
                 const std::vector<std::string>& arguments);

}  // namespace tandem::tools
