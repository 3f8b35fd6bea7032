// Jobs that give their ranks to others, and elastic ones that take what is free: always over a
// checkpoint and the queue.
#include "coordinator/jobs.h"

#include "coordinator/preemption.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace tandem::coordinator {

/// The gang sizes that a job's settings allow.
void Jobs::set_sizes(Job& job, const protocol::TrainSettings& train) {
  job.ranks = train.ranks();
  job.sizes.clear();
  for (const std::int64_t dp : train.dp_choices()) job.sizes.push_back(dp * train.tp * train.pp);
}

/// What its ranks are told: dp as it is now. Micro-batches are dealt to whoever is there, so the
/// mathematics is the same.
std::string Jobs::spec_for_size(const Job& job) {
  if (job.sizes.size() == 1) return job.spec_json;
  auto spec = nlohmann::ordered_json::parse(job.spec_json, nullptr, false);
  if (!spec.is_object() || !spec.contains("train")) return job.spec_json;
  auto& train = spec["train"];
  const auto size = static_cast<std::int64_t>(std::max<std::size_t>(1, job.members.size()));
  train["dp"] = train.value("dp", std::int64_t{1}) * size / job.ranks;
  train.erase("dp_min");
  return spec.dump();
}

/// Stops a running job so that it is queued again: a checkpoint first, so it loses no step.
void Jobs::requeue(Job job, const std::string& why) {
  job.requeue_after_stop = true;
  set_state(job, JobState::kPausing, why);
  send_stop(job);
  save(std::move(job));
}

void Jobs::preempt_for(const Job& job, const std::set<WorkerId>& reserved) {
  const auto lower = [&](const auto& entry) {
    const Job& other = entry.second;
    return other.priority < job.priority &&
           (other.state == JobState::kRunning || other.state == JobState::kStarting);
  };
  const auto& jobs = context_.tables().jobs;
  if (std::none_of(jobs.begin(), jobs.end(), lower)) return;
  Timers& timers = timers_[job.id];
  const TimeMs now = context_.now().ms;
  if (timers.victims_sought_ms >= 0 &&
      now - timers.victims_sought_ms < context_.limits().preempt_check_ms)
    return;
  timers.victims_sought_ms = now;
  const std::vector<JobId> victims =
      choose_victims(job, context_.tables(), workers_, reserved,
                     {context_.now().unix_ms, context_.limits().preempt_spare_ms});
  const std::string by = str(job.id, " of priority ", job.priority);
  for (const JobId& id : victims) {
    Job victim = context_.tables().jobs.at(id);
    victim.preempted_by = by;
    victim.preempted_unix_ms = context_.now().unix_ms;
    requeue(std::move(victim), str("gives its workers to ", by));
  }
}

void Jobs::grow_if_possible(const JobId& id) {
  const Job& job = context_.tables().jobs.at(id);
  if (job.state != JobState::kRunning || !queue_order(context_.tables()).empty()) return;
  if (const auto size = could_grow(job, context_.tables(), workers_))
    requeue(job, str("goes on over ", *size, " ranks instead of ", job.members.size()));
}

}  // namespace tandem::coordinator
