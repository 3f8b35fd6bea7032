// The verbs of protocol/schema/client.capnp ("Methods of Call"): parameters, answers, idempotency,
// streams. What a verb does stands in the part that owns the subject. Owned by the core, one
// thread.
#pragma once

#include "coordinator/jobs.h"
#include "coordinator/params.h"
#include "coordinator/replicas.h"
#include "coordinator/requests.h"

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace tandem::coordinator {

class Calls {
 public:
  struct Parts {
    Context& context;
    WorkerTable& workers;
    Estimates& estimates;
    Jobs& jobs;
    Requests& requests;
    Replicas& replicas;
  };
  explicit Calls(const Parts& parts);

  void handle(const std::string& peer, const std::string& user, const protocol::Call& call,
              bool admin = true);
  void cancel(const std::string& peer, const protocol::CallCancel& cancel);
  void client_gone(const std::string& peer);
  /// False: not work of a call.
  bool work_done(const WorkDone& done);
  void estimated(const EstimateOutcome& outcome);
  /// After each input: events to those who watch, answers that became possible.
  void after_step();
  void tick();
  /// Who watches a job.
  [[nodiscard]] std::set<std::string> watchers() const;
  /// For status: frames that were no message, and messages of those who had not said hello.
  void count_refused(std::uint64_t frames, std::uint64_t before_hello) {
    refused_frames_ = frames;
    before_hello_ = before_hello;
  }
  /// The core ends as soon as jobs have written their checkpoints.
  [[nodiscard]] bool ending() const { return ending_deadline_ms_ > 0; }

 private:
  /// Who asked what.
  struct Ask {
    std::string peer, user, call_id, key, method;
    Digest request;
    [[nodiscard]] bool repeats(const Ask& other) const {
      return peer == other.peer && call_id == other.call_id;
    }
  };
  using Handler = void (Calls::*)(const Ask&, Params&);
  struct Verb {
    Handler handler = nullptr;
    bool changes = false;
    bool admin = false;  ///< for keys of that role alone
  };
  struct Pending {
    std::vector<Ask> asks;  // more than one: repeats
    std::function<void(const Ask&, const WorkResult&)> finish;
  };
  struct Stream {
    Ask ask;
    JobId job;
    bool logs = false, follow = true, loading = false;
    std::uint64_t sent = 0;
  };
  /// What waits for a dry run: `finish` takes its result and gives the answer.
  struct DryRun {
    std::vector<Ask> asks;  // more than one: repeats
    std::function<Result<Json>(const std::string&)> finish;
  };
  using StreamKey = std::pair<std::string, std::string>;  // peer, call id
  static const std::map<std::string, Verb>& verbs();

  void reply(const Ask& ask, const Status& status, const Json& result = {});
  void answer(const Ask& ask, const Json& result) { reply(ask, {}, result); }
  void send_reply(const Ask& ask, const Status& status, const std::string& result, bool more);
  bool replay(const Ask& ask);
  /// Another client, or a new call, that waits for the same answer; repeats of one are dropped.
  void wait_too(std::vector<Ask>& asks, const Ask& ask);
  void remember(const Ask& ask, const std::string& result);
  void start(const Ask& ask, WorkRequest request,
             std::function<void(const Ask&, const WorkResult&)> finish);
  template <class Map, class View>
  void list(const Ask& ask, Params& params, const char* what, const Map& map, View view);

  // -- verbs
  void status(const Ask& ask, Params& params);
  void model_add(const Ask& ask, Params& params);
  void model_list(const Ask& ask, Params& params);
  void model_show(const Ask& ask, Params& params);
  void model_rm(const Ask& ask, Params& params);
  void data_add(const Ask& ask, Params& params);
  void data_list(const Ask& ask, Params& params);
  void data_show(const Ask& ask, Params& params);
  void data_rm(const Ask& ask, Params& params);
  void job_submit(const Ask& ask, Params& params);
  void job_list(const Ask& ask, Params& params);
  void job_show(const Ask& ask, Params& params);
  void job_watch(const Ask& ask, Params& params);
  void job_logs(const Ask& ask, Params& params);
  void job_cancel(const Ask& ask, Params& params);
  void job_pause(const Ask& ask, Params& params);
  void job_resume(const Ask& ask, Params& params);
  void job_rm(const Ask& ask, Params& params);
  void job_restore(const Ask& ask, Params& params);
  void adapter_list(const Ask& ask, Params& params);
  void adapter_show(const Ask& ask, Params& params);
  void adapter_alias(const Ask& ask, Params& params);
  void adapter_rollback(const Ask& ask, Params& params);
  void adapter_rm(const Ask& ask, Params& params);
  void adapter_import(const Ask& ask, Params& params);
  void adapter_manifest(const Ask& ask, Params& params);
  void estimate(const Ask& ask, Params& params);
  void replica_add(const Ask& ask, Params& params);
  void replica_list(const Ask& ask, Params& params);
  void replica_rm(const Ask& ask, Params& params);
  void worker_list(const Ask& ask, Params& params);
  void worker_drain(const Ask& ask, Params& params);
  void worker_resume(const Ask& ask, Params& params);
  void worker_restart(const Ask& ask, Params& params);
  void cache_stats(const Ask& ask, Params& params);
  void cache_clear(const Ask& ask, Params& params);
  void registry_check(const Ask& ask, Params& params);
  void registry_gc(const Ask& ask, Params& params);
  void registry_backup(const Ask& ask, Params& params);
  void key_create(const Ask& ask, Params& params);
  void key_list(const Ask& ask, Params& params);
  void key_revoke(const Ask& ask, Params& params);
  void config_show(const Ask& ask, Params& params);
  void shutdown(const Ask& ask, Params& params);

  void change_job(const Ask& ask, Params& params,
                  const std::function<Status(const JobId&)>& change);
  /// worker.drain, worker.resume and worker.restart.
  enum class WorkerVerb : std::uint8_t { kDrain, kResume, kRestart };
  void command_worker(const Ask& ask, Params& params, WorkerVerb verb);
  void maintain(const Ask& ask, Maintain request);
  void manage_keys(const Ask& ask, ManageKeys request);
  void open_stream(const Ask& ask, Params& params, bool logs);
  bool feed(Stream& stream);
  void stream_event(Stream& stream, const JobEventRecord& event);
  void end_stream(const Stream& stream);
  /// The id to ask for the dry run under; "": `ask` is a repeat and waits too, or was refused.
  std::string start_dry_run(const Ask& ask, std::function<Result<Json>(const std::string&)> finish);
  void answer_submit(const Ask& ask, const Job& job);
  [[nodiscard]] Status check_published_name(const protocol::JobSpec& spec) const;
  Result<protocol::JobSpec> check_spec(const std::string& json, Jobs::Submission& submission);
  Json status_json() const;

  Context& context_;
  WorkerTable& workers_;
  Estimates& estimates_;
  Jobs& jobs_;
  Requests& requests_;
  Replicas& replicas_;
  TimeMs started_ms_ = -1, ending_deadline_ms_ = 0;
  Ask ending_ask_;
  std::uint64_t estimate_ids_ = 0;
  TimeMs gc_ms_ = -1;          // when it was last begun
  std::uint64_t gc_work_ = 0;  // while it goes on
  std::map<std::uint64_t, Pending> pending_;
  std::map<std::pair<std::string, std::string>, std::uint64_t> pending_keys_;  // user, key -> work
  std::map<std::string, DryRun> dry_runs_;                                     // by estimate id
  std::vector<std::pair<JobId, Ask>> submit_asks_;
  std::map<StreamKey, Stream> streams_;
  std::uint64_t refused_frames_ = 0, before_hello_ = 0;
};

}  // namespace tandem::coordinator
