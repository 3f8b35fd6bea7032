// Submission, scheduling, and what users ask of jobs.
#include "coordinator/jobs.h"

#include "coordinator/placement.h"
#include "coordinator/resolve.h"
#include "protocol/base/units.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace tandem::coordinator {
namespace {

const std::string kJobPrefix = "job:";  // of estimate ids

TimeMs backoff(const Limits& limits, int attempts) {
  if (attempts <= 1) return 0;
  const int doublings = std::min(attempts - 2, 16);
  return std::min(limits.retry_backoff_ms << doublings, limits.retry_backoff_max_ms);
}

}  // namespace

void Jobs::load(const std::vector<JobEventRecord>& events) {
  loaded_ms_ = context_.now().ms;
  for (const JobEventRecord& event : events) events_[JobId(event.job)].push_back(event);
  for (const auto& [id, job] : context_.tables().jobs)
    if (job.state == JobState::kSubmitted || job.state == JobState::kEstimating) {
      Job copy = job;
      ask_estimate(copy);
    }
}

void Jobs::reset() {
  new_events_.clear();
  pending_.clear();
  for (auto& [id, kept] : events_) {
    const auto job = context_.tables().jobs.find(id);
    const std::uint64_t last = job == context_.tables().jobs.end() ? 0 : job->second.events;
    while (!kept.empty() && kept.back().seq > last) kept.pop_back();
  }
}

void Jobs::save(Job job) {
  job.updated_unix_ms = context_.now().unix_ms;
  context_.put(std::move(job));
}

void Jobs::event(Job& job, const std::string& level, const std::string& kind,
                 const std::string& message, const std::string& metrics_json, bool lazy) {
  JobEventRecord record{job.id.value, ++job.events, context_.now().unix_ms, level, kind,
                        message,      metrics_json};
  auto& kept = events_[job.id];
  kept.push_back(record);
  if (kept.size() > context_.limits().events_kept) kept.pop_front();
  new_events_.push_back(record);
  const auto put = [&](Write write) {
    lazy ? context_.put_lazy(std::move(write)) : context_.put(std::move(write));
  };
  if (job.events > context_.limits().events_kept)
    put(EraseJobEvent{job.id.value, job.events - context_.limits().events_kept});
  put(std::move(record));
}

void Jobs::set_state(Job& job, JobState state, const std::string& why) {
  context_.log(LogLevel::kInfo, job.id, " ", job.events == 0 ? "new" : job_state_name(job.state),
               " -> ", job_state_name(state), why.empty() ? "" : ": ", why);
  job.state = state;
  if (state == JobState::kRunning) job.error.clear();  // of the attempt before; its event stays
  const nlohmann::ordered_json details{
      {"state", job_state_name(state)}, {"step", job.step}, {"epoch", job.epoch}};
  event(job, state == JobState::kFailed ? "error" : "info", "state",
        why.empty() ? job_state_name(state) : str(job_state_name(state), ": ", why), details.dump(),
        false);
}

void Jobs::finish(Job& job, JobState state, const Status& status) {
  job.ended_unix_ms = context_.now().unix_ms;
  if (state == JobState::kFailed) {
    job.error_code = status_code_name(status.code());
    job.error = status.message();
  } else if (state == JobState::kSucceeded) {
    job.error_code.clear();
    job.error.clear();
  }
  history_changed_ = true;
  timers_.erase(job.id);
  estimates_.forget(kJobPrefix + job.id.value);
  set_state(job, state, state == JobState::kFailed ? status.message() : "");
}

Result<Job> Jobs::make(const JobId& job_id, const Submission& submission) const {
  std::size_t live = 0;
  std::uint64_t order = 0;
  for (const auto& [id, job] : context_.tables().jobs) {
    live += is_terminal(job.state) ? 0 : 1;
    order = std::max(order, job.order);
  }
  if (live >= context_.limits().jobs_live_max)
    return busy_error(str("there are ", live, " unfinished jobs of at most ",
                          context_.limits().jobs_live_max, "; cancel some or wait"));
  Job job;
  job.id = job_id;
  job.order = order + 1;
  job.tenant = submission.tenant;
  job.name = submission.name;
  job.idempotency_key = submission.idempotency_key;
  job.spec_json = submission.spec.to_json();
  job.priority = submission.spec.priority;
  set_sizes(job, submission.spec.train);
  job.model = submission.model;
  job.dataset = submission.dataset;
  if (const auto data = context_.tables().datasets.find(submission.dataset);
      data != context_.tables().datasets.end())
    job.dataset_manifest = data->second.manifest;
  job.eval_dataset = submission.eval_dataset;
  job.full = submission.spec.train.full();
  job.adapter = submission.spec.published_name();
  job.submitted_unix_ms = context_.now().unix_ms;
  return job;
}

Result<JobId> Jobs::submit(const Submission& submission) {
  JobId id;
  do id = JobId("job-" + context_.random_hex(12));
  while (context_.tables().jobs.contains(id));
  TANDEM_ASSIGN_OR_RETURN(Job job, make(id, submission));
  set_state(job, workers_.engines_alive() > 0 ? JobState::kEstimating : JobState::kSubmitted, "");
  ask_estimate(job);
  save(std::move(job));
  return id;
}

void Jobs::ask_estimate(Job& job) {
  const ModelRecord* model = context_.tables().model_by_digest(job.model);
  auto spec = protocol::JobSpec::parse(job.spec_json);
  if (model == nullptr || !spec.ok()) {
    finish(job, JobState::kFailed,
           model == nullptr ? not_found_error("its base model is not registered any more")
                            : spec.status());
    save(job);
    return;
  }
  estimates_.ask(kJobPrefix + job.id.value, model_ref(*model), spec->train, spec->evaluates(),
                 true);
}

std::string Jobs::nearest_layout_text(const protocol::TrainSettings& train, std::size_t ranks) {
  std::vector<std::int64_t> dps;
  for (std::int64_t d = 1; d <= train.dp; ++d)
    if (train.gradient_accumulation_steps % d == 0) dps.push_back(d);
  const NearestLayout nearest = nearest_layout(dps, train.tp, train.pp, ranks);
  if (nearest.dp == 0) return "";
  return str("; the nearest layout with as many workers: dp ", nearest.dp, ", tp ", nearest.tp,
             ", pp ", nearest.pp, train.zero > 0 && nearest.dp == 1 ? ", zero 0" : "",
             train.virtual_pipeline_size > 1 && nearest.pp == 1 ? ", virtual_pipeline_size 1" : "",
             train.dp_min > nearest.dp ? str(", dp_min ", nearest.dp) : std::string());
}

Status Jobs::check_pool(const protocol::TrainSettings& train,
                        const std::string& estimate_json) const {
  const std::int64_t ranks = train.dp_choices().back() * train.tp * train.pp;
  const GangRoom room = gang_room(workers_, estimated_device(estimate_json));
  if ((ranks == 1 && !train.full()) || static_cast<std::int64_t>(room.ranks) >= ranks ||
      context_.now().ms - loaded_ms_ < context_.limits().adoption_ms)
    return {};
  return refused_error(str("the job has ", ranks, " ranks, one worker each, and ", room.description,
                           "; start more (tandem up --workers ", ranks,
                           ") or use fewer ranks (dp, tp, pp)",
                           nearest_layout_text(train, room.ranks)));
}

void Jobs::estimated(const EstimateOutcome& outcome) {
  if (outcome.id.rfind(kJobPrefix, 0) != 0) return;
  const auto found = context_.tables().jobs.find(JobId(outcome.id.substr(kJobPrefix.size())));
  if (found == context_.tables().jobs.end()) return;
  Job job = found->second;
  if (job.state != JobState::kSubmitted && job.state != JobState::kEstimating) return;
  const Status status = outcome.status.ok() ? admit(job, outcome.result_json, "") : outcome.status;
  if (!status.ok()) {
    set_estimate(job, "");  // resumed, it is asked for again
    finish(job, JobState::kFailed, status);
  }
  save(std::move(job));
}

/// Queues the job after its dry run, or says why it can never run.
Status Jobs::admit(Job& job, const std::string& result_json, std::string reason) {
  const auto json = nlohmann::json::parse(result_json, nullptr, false);
  if (!json.is_object()) return internal_error("the dry run's answer is not a JSON object");
  if (const auto chosen = json.find("layout"); chosen != json.end()) {
    TANDEM_RETURN_IF_ERROR(change_layout(job, chosen->dump()));
    reason = str("layout auto chose ", json.value("layout_name", ""));
  }
  set_estimate(job, result_json);
  TANDEM_ASSIGN_OR_RETURN(const auto spec, protocol::JobSpec::parse(job.spec_json));
  TANDEM_RETURN_IF_ERROR(check_pool(spec.train, result_json));
  const bool fits =
      !json.contains("fits") || !json["fits"].is_boolean() || json["fits"].get<bool>();
  if (!fits) {
    const std::int64_t peak = json.value("peak_bytes", std::int64_t{0});
    const std::int64_t device =
        json.value("device_bytes", json.value("limit_bytes", std::int64_t{0}));
    return refused_error(str(
        job.needs_gang() ? "its largest rank and the engine of its slot need " : "the job needs ",
        format_bytes(peak), " (", peak, " bytes) and the engine has ", format_bytes(device), " (",
        device,
        " bytes); lower max_length or per_device_train_batch_size, or set "
        "recompute"));
  }
  set_state(job, JobState::kQueued, reason);
  return {};
}

Status Jobs::cancel(const JobId& id) {
  const auto found = context_.tables().jobs.find(id);
  if (found == context_.tables().jobs.end()) return not_found_error(str("no job ", id));
  Job job = found->second;
  if (is_terminal(job.state))
    return conflict_error(str(id, " is ", job_state_name(job.state), " already"));
  if (!holds_engine(job.state)) {
    finish(job, JobState::kCancelled, {});
    save(std::move(job));
    return {};
  }
  if (job.state == JobState::kCancelling) return {};
  job.requeue_after_stop = false;
  set_state(job, JobState::kCancelling, "");
  send_stop(job);
  save(std::move(job));
  return {};
}

Status Jobs::pause(const JobId& id) {
  const auto found = context_.tables().jobs.find(id);
  if (found == context_.tables().jobs.end()) return not_found_error(str("no job ", id));
  Job job = found->second;
  if (job.state == JobState::kPaused) return {};
  if (job.state == JobState::kPausing) {
    job.requeue_after_stop = false;
    save(std::move(job));
    return {};
  }
  if (is_terminal(job.state) || job.state == JobState::kCancelling)
    return conflict_error(str(id, " is ", job_state_name(job.state), "; it cannot be paused"));
  if (!holds_engine(job.state)) {
    estimates_.forget(kJobPrefix + id.value);
    set_state(job, JobState::kPaused, "");
  } else {
    job.requeue_after_stop = false;
    set_state(job, JobState::kPausing, "a checkpoint is written first");
    send_stop(job);
  }
  save(std::move(job));
  return {};
}

/// The job's settings with another layout; checkpoints do not depend on it.
Status Jobs::change_layout(Job& job, const std::string& layout_json) {
  const auto layout = nlohmann::ordered_json::parse(layout_json, nullptr, false);
  for (const auto& [name, value] : layout.items())
    if (name != "dp" && name != "dp_min" && name != "tp" && name != "pp" && name != "zero" &&
        name != "virtual_pipeline_size" && name != "pipeline_balance" &&
        name != "sequence_parallel" && name != "layout")
      return invalid_error(
          str("a layout has dp, dp_min, tp, pp, zero, virtual_pipeline_size, pipeline_balance and "
              "sequence_parallel, or is auto; not \"",
              name, "\""));
  TANDEM_ASSIGN_OR_RETURN(auto spec, protocol::JobSpec::parse(job.spec_json));
  auto train = nlohmann::ordered_json::parse(spec.train.to_json());
  train["layout"] = "manual";
  if (layout.contains("layout"))
    for (const char* axis : {"dp", "dp_min", "tp", "pp", "zero", "virtual_pipeline_size"})
      train.erase(axis);
  train.update(layout);
  TANDEM_ASSIGN_OR_RETURN(spec.train, protocol::TrainSettings::parse(train.dump()));
  job.spec_json = spec.to_json();
  set_sizes(job, spec.train);
  set_estimate(job, "");  // other ranks need other memory
  return {};
}

Result<Job> Jobs::resumable(const JobId& id, const std::string& layout_json) const {
  const auto found = context_.tables().jobs.find(id);
  if (found == context_.tables().jobs.end()) return not_found_error(str("no job ", id));
  Job job = found->second;
  if (job.state == JobState::kPausing) {
    if (!layout_json.empty())
      return conflict_error(str(id,
                                " still writes its checkpoint; change its layout once it is "
                                "paused"));
    return job;
  }
  if (job.state != JobState::kPaused && job.state != JobState::kFailed)
    return conflict_error(
        str(id, " is ", job_state_name(job.state), "; only a paused or failed job is resumed"));
  const Tables& tables = context_.tables();
  if (tables.model_by_digest(job.model) == nullptr)
    return not_found_error(str(id, " is of base ", job.model.short_hex(),
                               ", which is not registered any more; add it again"));
  for (const Digest& data : {job.dataset, job.eval_dataset})
    if (!data.empty() && !tables.datasets.contains(data))
      return not_found_error(
          str(id, " needs data set ", data.short_hex(), ", which was removed; add the file again"));
  // A failed one has given its name up.
  if (job.state == JobState::kFailed)
    TANDEM_RETURN_IF_ERROR(check_unpromised(tables, job.adapter, job.full, id));
  if (!layout_json.empty()) TANDEM_RETURN_IF_ERROR(change_layout(job, layout_json));
  return job;
}

Status Jobs::resume(const JobId& id, const std::string& layout_json,
                    const std::string& estimate_json) {
  TANDEM_ASSIGN_OR_RETURN(Job job, resumable(id, layout_json));
  if (job.state == JobState::kPausing) {
    job.requeue_after_stop = true;
    save(std::move(job));
    return {};
  }
  job.ended_unix_ms = 0;
  job.error_code.clear();
  job.error.clear();
  job.attempts = job.own_failures = 0;
  if (!estimate_json.empty()) {
    TANDEM_RETURN_IF_ERROR(admit(job, estimate_json, "resumed"));
  } else if (job.estimate_json.empty()) {
    set_state(job, JobState::kSubmitted, "resumed");
    ask_estimate(job);
  } else {
    set_state(job, JobState::kQueued, "resumed");
  }
  save(std::move(job));
  return {};
}

void Jobs::drain(const WorkerId& worker) {
  const Job* held = job_on(context_.tables(), worker);
  if (held == nullptr || (held->state != JobState::kRunning && held->state != JobState::kStarting))
    return;
  requeue(*held, str("worker ", worker, " drains"));
}

void Jobs::schedule() {
  std::vector<JobId> order;
  for (const Job* job : queue_order(context_.tables())) order.push_back(job->id);
  if (order.empty()) return;
  // For replicas, and for gangs earlier in the queue, which need them all at once.
  std::set<WorkerId> reserved = reserved_for_replicas(context_.tables(), workers_);
  for (const JobId& id : order) {
    const Job& job = context_.tables().jobs.at(id);
    if (const auto timers = timers_.find(id);
        timers != timers_.end() && timers->second.not_before_ms > context_.now().ms)
      continue;
    const Placement placement = place(job, context_.tables(), workers_, reserved);
    if (!placement.worker.empty())
      start(job, placement);
    else
      preempt_for(job, reserved);
    reserved.insert(placement.wanted.begin(), placement.wanted.end());
  }
}

void Jobs::start(Job job, const Placement& placement) {
  const Worker& worker = *workers_.find(placement.worker);
  const CheckpointRecord* checkpoint = context_.tables().latest_checkpoint(job.id);
  ++job.epoch;
  ++job.attempts;
  job.worker = worker.id;
  job.members = placement.members;
  job.engine = job.gang() ? context_.random_incarnation() : worker.engine.incarnation;
  job.step = checkpoint == nullptr ? 0 : checkpoint->step;
  job.progress_seq = 0;
  job.requeue_after_stop = false;
  job.preempted_by.clear();
  if (job.started_unix_ms == 0) job.started_unix_ms = context_.now().unix_ms;
  timers_[job.id] = {context_.now().ms, context_.now().ms, -1, 0};
  set_state(job, JobState::kStarting,
            str("on ", worker.id,
                job.members.size() > 1 ? str(" and ", job.members.size() - 1, " more") : "",
                job.step > 0 ? str(" from step ", job.step) : "",
                job.epoch > 1 ? str(", epoch ", job.epoch) : ""));
  send_start(job, worker);
  save(std::move(job));
}

void Jobs::send_start(const Job& job, const Worker& worker) {
  const Tables& tables = context_.tables();
  protocol::StartJob message;
  message.job = job.id;
  message.epoch = job.epoch;
  message.spec_json = spec_for_size(job);
  if (const ModelRecord* model = tables.model_by_digest(job.model))
    message.model = model_ref(*model);
  // Engines fetch by manifest, which names the chunks.
  if (const auto data = tables.datasets.find(job.dataset); data != tables.datasets.end()) {
    message.dataset = data->second.manifest;
    message.dataset_bytes = data->second.bytes;
  }
  if (const auto data = tables.datasets.find(job.eval_dataset); data != tables.datasets.end()) {
    message.eval_dataset = data->second.manifest;
    message.eval_dataset_bytes = data->second.bytes;
  }
  if (const CheckpointRecord* checkpoint = tables.latest_checkpoint(job.id))
    message.checkpoint_manifest = tables.manifest(checkpoint->manifest);
  if (job.gang()) {
    message.gang = job.engine;
    message.members = job.members;
  }
  context_.send_worker(job.gang() ? worker.agent.peer : worker.engine.peer, std::move(message));
}

void Jobs::send_stop(const Job& job) {
  timers_[job.id].sent_ms = context_.now().ms;
  const Worker* worker = workers_.find(job.worker);
  if (worker == nullptr) return;
  const Process* process = runner_of(job);
  // A gang that has not said hello has nothing to lose: its agent ends it.
  if (process == nullptr && job.gang()) process = &worker->agent;
  if (process == nullptr || !process->alive) return;
  context_.send_worker(process->peer, protocol::StopJob{job.id, job.epoch,
                                                        job.state == JobState::kPausing
                                                            ? protocol::StopMode::kPause
                                                            : protocol::StopMode::kCancel});
}

/// The attempt is over without the job's end: back to the queue, or failed when there were too
/// many.
void Jobs::interrupted(Job job, const std::string& why, bool own_failure) {
  timers_[job.id] = {};
  job.error = why;
  if (!job.published.empty()) {
    finish(job, JobState::kSucceeded, {});
  } else if (job.state == JobState::kCancelling) {
    finish(job, JobState::kCancelled, {});
  } else if (job.state == JobState::kPausing && !job.requeue_after_stop) {
    set_state(job, JobState::kPaused, why);
  } else {
    job.own_failures += own_failure ? 1 : 0;
    const bool hopeless = job.attempts >= context_.limits().attempts_max ||
                          job.own_failures >= context_.limits().own_failures_max;
    if (hopeless) {
      finish(job, JobState::kFailed,
             internal_error(str("given up after ", job.attempts,
                                " attempts in a row without a new step; the last: ", why)));
    } else {
      const TimeMs wait = backoff(context_.limits(), job.attempts);
      timers_[job.id].not_before_ms = context_.now().ms + wait;
      job.requeue_after_stop = false;
      set_state(job, JobState::kQueued,
                str(why, wait > 0 ? str("; next try in ", wait, " ms") : ""));
    }
  }
  save(std::move(job));
}

void Jobs::engine_lost(const EngineLost& lost) {
  const Job* held = job_on(context_.tables(), lost.worker);
  // A gang's ranks are processes of their own: the engines on its slots come and go.
  if (held == nullptr || held->gang() != lost.gang || held->worker != lost.worker) return;
  if (lost.gang && lost.incarnation != held->engine) return;  // an earlier one
  interrupted(*held, str(runner_name(*held), ": ", lost.reason), false);
}

std::string runner_name(const Job& job) {
  return str(job.gang() ? "the gang on " : "engine ", job.worker);
}

Process* Jobs::runner_of(const Job& job) {
  Worker* worker = workers_.find(job.worker);
  if (worker == nullptr) return nullptr;
  if (!job.gang()) return &worker->engine;
  return worker->gang.incarnation == job.engine ? &worker->gang : nullptr;
}

void Jobs::look_for_missing(const Job& job, const Process& process) {
  Timers& timers = timers_[job.id];
  const auto names_it = [&](const protocol::RunningJob& running) {
    return running.job == job.id && running.epoch == job.epoch;
  };
  if (std::any_of(process.jobs.begin(), process.jobs.end(), names_it)) {
    timers.missing_since_ms = -1;
    return;
  }
  if (timers.missing_since_ms < 0) timers.missing_since_ms = context_.now().ms;
  if (job.state == JobState::kStarting) return;  // StartJob is repeated
  if (context_.now().ms - timers.missing_since_ms < context_.limits().missing_job_ms) return;
  Job lost = job;
  lost.engine = 0;
  interrupted(std::move(lost), str(runner_name(job), " does not have the job any more"), false);
}

void Jobs::tick() {
  // Who watches one that has ended reads its events from the registry.
  std::erase_if(events_, [&](const auto& kept) {
    const auto job = context_.tables().jobs.find(kept.first);
    return job == context_.tables().jobs.end() || is_terminal(job->second.state);
  });
  forget_old();
  std::vector<JobId> held, unasked;
  for (const auto& [id, job] : context_.tables().jobs) {
    if (holds_engine(job.state)) held.push_back(id);
    const bool waits = job.state == JobState::kSubmitted || job.state == JobState::kEstimating;
    // The answer came, but its transaction failed.
    if (waits && !estimates_.asks(kJobPrefix + id.value)) unasked.push_back(id);
  }
  for (const JobId& id : unasked) {
    Job job = context_.tables().jobs.at(id);
    ask_estimate(job);
  }
  for (const JobId& id : held) tick_held(id);
}

void Jobs::tick_held(const JobId& id) {
  const TimeMs now = context_.now().ms;
  const Limits& limits = context_.limits();
  const Job& job = context_.tables().jobs.at(id);
  const Worker* worker = workers_.find(job.worker);
  const Process* process = runner_of(job);
  if (job.gang() && process == nullptr && worker != nullptr) return tick_unseen_gang(job, *worker);
  if (process == nullptr || !process->alive) {
    if (now - loaded_ms_ > limits.adoption_ms)
      interrupted(job, str(runner_name(job), " did not come back"), false);
    return;
  }
  if (job.engine != process->incarnation)
    return interrupted(job, str(runner_name(job), " was replaced by a new process"), false);
  look_for_missing(job, *process);
  const Job& still = context_.tables().jobs.at(id);
  if (!holds_engine(still.state)) return;
  Timers& timers = timers_[id];
  if (still.state == JobState::kStarting && now - timers.started_ms > limits.start_timeout_ms &&
      timers.missing_since_ms >= 0) {
    interrupted(still, str(runner_name(still), " did not start the job in time"), false);
  } else if (still.state != JobState::kRunning && now - timers.sent_ms >= limits.resend_ms) {
    if (still.state == JobState::kStarting && timers.missing_since_ms >= 0)
      send_start(still, *worker);
    else if (still.state != JobState::kStarting)
      send_stop(still);
    timers.sent_ms = now;
  }
}

/// A gang whose first rank has not said hello to this process: it is being started, or was running
/// before this coordinator was.
void Jobs::tick_unseen_gang(const Job& job, const Worker& worker) {
  const TimeMs now = context_.now().ms;
  const Limits& limits = context_.limits();
  Timers& timers = timers_[job.id];
  const TimeMs since = std::max(timers.started_ms, loaded_ms_);
  // It said goodbye or lost its lease; right after a start of ours it may not have been here yet.
  const bool agent_gone =
      !worker.agent.alive && (worker.agent.incarnation != 0 || now - since > limits.adoption_ms);
  if (job.state == JobState::kStarting && !agent_gone && now - since <= limits.start_timeout_ms) {
    if (worker.agent.alive && now - timers.sent_ms >= limits.resend_ms) {
      send_start(job, worker);
      timers.sent_ms = now;
    }
    return;
  }
  const bool stopping = job.state == JobState::kPausing || job.state == JobState::kCancelling;
  if (stopping && !agent_gone && now - since <= limits.adoption_ms) {
    if (now - timers.sent_ms >= limits.resend_ms) send_stop(job);
    return;
  }
  if (now - since > limits.adoption_ms || (agent_gone && job.state == JobState::kStarting))
    interrupted(job,
                str(runner_name(job), job.state == JobState::kStarting ? " did not start in time"
                                                                       : " did not come back"),
                false);
}

std::string Jobs::waiting_reason(const Job& job) const {
  switch (job.state) {
    case JobState::kSubmitted:
    case JobState::kEstimating:
      return workers_.engines_alive() == 0 ? "no engine is connected to do the dry run"
                                           : "the dry run on an engine";
    case JobState::kQueued: {
      if (const auto timers = timers_.find(job.id);
          timers != timers_.end() && timers->second.not_before_ms > context_.now().ms)
        return str("next try in ", timers->second.not_before_ms - context_.now().ms,
                   " ms after: ", job.error);
      return str(
          job.preempted_by.empty() ? "" : str("preempted by ", job.preempted_by, "; "),
          place(job, context_.tables(), workers_, queue().reserved_at(queue_position(job.id)))
              .waiting);
    }
    case JobState::kStarting:
      return str(runner_name(job), " prepares it",
                 job.attempts > 1 && !job.error.empty()
                     ? str("; attempt ", job.attempts, " after: ", job.error)
                     : std::string());
    default:
      return "";
  }
}

std::size_t Jobs::queue_position(const JobId& id) const {
  const auto found = queue().positions.find(id);
  return found == queue().positions.end() ? 0 : found->second;
}

const QueueView& Jobs::queue() const {
  if (viewed_version_ != context_.version()) {
    queue_view_ = view_queue(context_.tables(), workers_);
    viewed_version_ = context_.version();
  }
  return queue_view_;
}

const std::deque<JobEventRecord>* Jobs::events(const JobId& id) const {
  const auto found = events_.find(id);
  return found == events_.end() ? nullptr : &found->second;
}

std::vector<BaseDemand> Jobs::demand() const {
  std::vector<BaseDemand> demand;
  for (const Job* job : queue_order(context_.tables())) {
    const auto& reserved = queue().reserved_at(queue_position(job->id));
    Placement placement = place(*job, context_.tables(), workers_, reserved);
    if (!placement.load_on.empty()) demand.push_back({job->model, std::move(placement.load_on)});
  }
  return demand;
}

}  // namespace tandem::coordinator
