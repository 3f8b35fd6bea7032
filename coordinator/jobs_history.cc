// What stays of jobs that have ended: all of it for a while, then the record alone, then nothing.
#include "coordinator/jobs.h"

#include <algorithm>
#include <tuple>

namespace tandem::coordinator {
namespace {

constexpr std::int64_t kEventBytes = 512;  // one in the registry, about
constexpr int kForgottenPerTick = 16;      // jobs; a transaction stays short

}  // namespace

void Jobs::erase_checkpoint(const CheckpointRecord& checkpoint) {
  const Tables& tables = context_.tables();
  context_.put(EraseCheckpoint{checkpoint.job, checkpoint.step});
  const bool shared =
      std::any_of(tables.checkpoints.begin(), tables.checkpoints.end(),
                  [&](const auto& other) { return other.second.manifest == checkpoint.manifest; });
  if (!shared && tables.adapter_by_digest(checkpoint.manifest) == nullptr)
    context_.put(EraseManifest{checkpoint.manifest});
}

std::uint64_t Jobs::events_stored(const Job& job) const {
  return std::min<std::uint64_t>(job.events, context_.limits().events_kept);
}

std::int64_t Jobs::history_bytes(const Job& job) const {
  auto bytes = static_cast<std::int64_t>(events_stored(job)) * kEventBytes;
  for (const CheckpointRecord& checkpoint : context_.tables().checkpoints_of(job.id))
    bytes += static_cast<std::int64_t>(context_.tables().manifest(checkpoint.manifest).size());
  return bytes;
}

void Jobs::forget_history(Job& job) {
  for (const CheckpointRecord& checkpoint : context_.tables().checkpoints_of(job.id))
    erase_checkpoint(checkpoint);
  for (std::uint64_t n = events_stored(job); n > 0; --n)
    context_.put(EraseJobEvent{job.id.value, job.events - n + 1});
  job.events = 0;
  events_.erase(job.id);
}

void Jobs::forget(Job job) {
  forget_history(job);
  context_.put(EraseJob{job.id});
}

Status Jobs::remove(const JobId& id) {
  const auto found = context_.tables().jobs.find(id);
  if (found == context_.tables().jobs.end()) return not_found_error(str("no job ", id));
  if (found->second.state == JobState::kCancelling)
    return conflict_error(str(id, " is cancelling; repeat when it has ended"));
  if (!is_terminal(found->second.state))
    return conflict_error(str(id, " is ", job_state_name(found->second.state),
                              "; cancel it first: tandem job cancel ", id));
  forget(found->second);
  return {};
}

/// The registry has one size, whatever number of jobs a pool has run.
void Jobs::forget_old() {
  if (!history_changed_) return;
  history_changed_ = false;
  std::vector<const Job*> ended;
  for (const auto& [id, job] : context_.tables().jobs)
    if (is_terminal(job.state)) ended.push_back(&job);
  std::sort(ended.begin(), ended.end(), [](const Job* a, const Job* b) {
    return std::tuple(a->ended_unix_ms, a->order) > std::tuple(b->ended_unix_ms, b->order);
  });
  std::vector<Job> without_history, gone;
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < ended.size(); ++i) {
    const std::int64_t own = history_bytes(*ended[i]);
    bytes += own;
    if (i >= context_.limits().jobs_kept)
      gone.push_back(*ended[i]);
    else if (own > 0 && bytes > context_.limits().history_bytes_max)
      without_history.push_back(*ended[i]);
    history_changed_ = without_history.size() + gone.size() >= kForgottenPerTick;
    if (history_changed_) break;
  }
  for (Job& job : without_history) {
    forget_history(job);
    context_.put(std::move(job));
  }
  for (Job& job : gone) forget(std::move(job));
}

}  // namespace tandem::coordinator
