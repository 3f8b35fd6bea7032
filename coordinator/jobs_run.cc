// What engines say of the jobs they run.
#include "coordinator/jobs.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace tandem::coordinator {

std::string event_metrics(const protocol::JobProgress& message) {
  nlohmann::ordered_json metrics{{"step", message.step}, {"total_steps", message.total_steps}};
  const auto own = nlohmann::ordered_json::parse(
      message.metrics_json.empty() ? "{}" : message.metrics_json, nullptr, false);
  if (own.is_object())
    for (const auto& [key, value] : own.items()) metrics[key] = value;
  return metrics.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

void Jobs::ack(const Process& process, const JobId& job, Epoch epoch, const std::string& of,
               const Status& status, bool lazy) {
  protocol::JobAck message{job, epoch, of, status, {}, ""};
  if (lazy)
    context_.send_worker_after_commit(process.peer, std::move(message));
  else
    context_.send_worker(process.peer, std::move(message));
}

bool Jobs::accept(const Runner& runner, const JobId& id, Epoch epoch, const std::string& of,
                  Job& job) {
  const auto& [worker, process] = runner;
  const auto found = context_.tables().jobs.find(id);
  if (found == context_.tables().jobs.end()) {
    ack(process, id, epoch, of, conflict_error(str("no job ", id, " is known here; stop it")));
    return false;
  }
  job = found->second;
  const bool same = job.epoch == epoch && job.worker == worker.id;
  if (!same) {
    ack(process, id, epoch, of,
        conflict_error(str(id, " is at epoch ", job.epoch, " on ", job.worker, "; epoch ", epoch,
                           " on ", worker.id, " must stop")));
    return false;
  }
  if (holds_engine(job.state)) return true;
  if (job.state == JobState::kQueued && job.engine == process.incarnation && may_go_on(job)) {
    // Only its lease ran out: nobody else was started, so it goes on where it is.
    timers_[id] = {context_.now().ms, context_.now().ms, -1, 0};
    set_state(job, JobState::kRunning, str(runner_name(job), " is back"));
    save(job);
    return true;
  }
  const bool over = job.state == JobState::kSucceeded || of == "ended";
  ack(process, id, epoch, of,
      over ? Status() : conflict_error(str(id, " is ", job_state_name(job.state), "; stop it")));
  return false;
}

/// Whether a job that only lost its lease can be taken back: of a gang's workers, whose engines and
/// agents were there all the time, one may have been given another job.
bool Jobs::may_go_on(const Job& job) const {
  return std::none_of(job.members.begin(), job.members.end(), [&](const WorkerId& member) {
    return job_on(context_.tables(), member) != nullptr ||
           replica_on(context_.tables(), member) != nullptr;
  });
}

void Jobs::progress(const Runner& runner, const protocol::JobProgress& message) {
  const std::string of = str("progress:", message.seq);
  Job job;
  if (!accept(runner, message.job, message.epoch, of, job)) return;
  if (message.seq <= job.progress_seq) return ack(runner.process, job.id, job.epoch, of, {}, true);
  job.progress_seq = message.seq;
  job.step = std::max(job.step, message.step);
  if (message.total_steps > 0) job.total_steps = message.total_steps;
  if (message.step > job.best_step) {
    job.best_step = message.step;
    job.attempts = 1;
    job.own_failures = 0;
  }
  const std::string metrics = event_metrics(message);
  if (message.kind == "step" || message.kind == "eval") {
    auto latest = nlohmann::ordered_json::parse(job.metrics_json.empty() ? "{}" : job.metrics_json,
                                                nullptr, false);
    if (!latest.is_object()) latest = nlohmann::ordered_json::object();
    latest.update(nlohmann::ordered_json::parse(metrics));
    job.metrics_json = latest.dump();
  }
  job.updated_unix_ms = context_.now().unix_ms;
  if (job.state == JobState::kStarting) {
    set_state(job, JobState::kRunning, str("on ", runner.worker.id));
    event(job, "info", message.kind, message.message, metrics, false);
    save(job);
    return ack(runner.process, job.id, job.epoch, of, {});
  }
  event(job, "info", message.kind, message.message, metrics, true);
  context_.put_lazy(job);
  ack(runner.process, job.id, job.epoch, of, {}, true);
}

void Jobs::ended(const Runner& runner, const protocol::JobEnded& message) {
  Job job;
  if (!accept(runner, message.job, message.epoch, "ended", job)) return;
  std::erase_if(runner.process.jobs,
                [&](const protocol::RunningJob& r) { return r.job == job.id; });
  job.step = std::max(job.step, message.step);
  if (!message.summary_json.empty()) job.summary_json = message.summary_json;
  job.engine = 0;  // over for this process: it is not taken back
  const JobId id = job.id;
  const Epoch epoch = job.epoch;
  settle(std::move(job), message);
  ack(runner.process, id, epoch, "ended", {});
}

void Jobs::settle(Job job, const protocol::JobEnded& message) {
  const StatusCode code = message.status.code();
  if (!job.published.empty()) {
    finish(job, JobState::kSucceeded, {});
    return save(std::move(job));
  }
  if (job.state == JobState::kCancelling) {
    finish(job, JobState::kCancelled, {});
    return save(std::move(job));
  }
  if (code == StatusCode::kOk) {
    finish(job, JobState::kFailed,
           internal_error(
               str("the job ended without publishing its ", job.full ? "model" : "adapter")));
    return save(std::move(job));
  }
  if (code == StatusCode::kCancelled) {
    // As asked (paused, drained), or the engine itself had to let go: neither is a failed attempt.
    job.attempts = std::max(job.attempts - 1, 0);
    return interrupted(std::move(job), "stopped by its engine at a checkpoint", false);
  }
  const bool retry = code == StatusCode::kUnavailable || code == StatusCode::kInternal ||
                     code == StatusCode::kTimeout || code == StatusCode::kBusy;
  const bool own_failure = code == StatusCode::kInternal || code == StatusCode::kTimeout;
  if (retry) return interrupted(std::move(job), message.status.message(), own_failure);
  finish(job, JobState::kFailed, message.status);
  save(std::move(job));
}

std::vector<JobId> Jobs::adopt(const Runner& runner, protocol::WorkerRole role) {
  const auto& [worker, process] = runner;
  const bool agent = role == protocol::WorkerRole::kAgent;  // holds gangs, runs none
  std::vector<JobId> stop;
  for (const protocol::RunningJob& claim : process.jobs) {
    if (is_replica(claim.job)) continue;
    const auto found = context_.tables().jobs.find(claim.job);
    const bool owned = found != context_.tables().jobs.end() &&
                       found->second.epoch == claim.epoch && found->second.worker == worker.id &&
                       (agent || found->second.engine == process.incarnation);
    if (!owned || (!holds_engine(found->second.state) &&
                   (found->second.state != JobState::kQueued || !may_go_on(found->second)))) {
      stop.push_back(claim.job);
      continue;
    }
    if (agent) continue;
    Job job = found->second;
    timers_[job.id] = {context_.now().ms, context_.now().ms, -1, 0};
    if (job.state == JobState::kStarting || job.state == JobState::kQueued) {
      set_state(job, JobState::kRunning,
                str(runner_name(job), claim.step > 0 ? str(" goes on at step ", claim.step)
                                                     : std::string(" has it")));
      save(std::move(job));
    }
  }
  return stop;
}

void Jobs::seen(const Runner& runner, protocol::WorkerRole role) {
  const auto& [worker, process] = runner;
  const bool agent = role == protocol::WorkerRole::kAgent;
  for (const protocol::RunningJob& claim : process.jobs) {
    if (is_replica(claim.job)) continue;
    const auto found = context_.tables().jobs.find(claim.job);
    // A gang whose lease alone ran out may come back; its agent need not end it.
    const bool current =
        found != context_.tables().jobs.end() && found->second.epoch == claim.epoch &&
        found->second.worker == worker.id &&
        (holds_engine(found->second.state) ||
         (agent && found->second.state == JobState::kQueued && may_go_on(found->second)));
    if (!current) {
      context_.send_worker(process.peer,
                           protocol::StopJob{claim.job, claim.epoch, protocol::StopMode::kCancel});
      continue;
    }
    if (!agent && found->second.state == JobState::kStarting) {
      Job job = found->second;
      set_state(job, JobState::kRunning, str("on ", worker.id));
      save(std::move(job));
    }
  }
}

}  // namespace tandem::coordinator
