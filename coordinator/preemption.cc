#include "coordinator/preemption.h"

#include <algorithm>
#include <tuple>

namespace tandem::coordinator {
namespace {

bool is_stopping(const Job& job) {
  return job.state == JobState::kPausing || job.state == JobState::kCancelling;
}

/// Lowest priority first, then the youngest.
std::vector<const Job*> candidates(const Job& job, const Tables& tables,
                                   const PreemptionRules& rules) {
  std::vector<const Job*> found;
  for (const JobId& id : tables.held) {
    const Job& other = tables.jobs.at(id);
    const bool runs = other.state == JobState::kStarting || other.state == JobState::kRunning;
    // A clock that was set back since does not spare it for as long.
    const std::int64_t since = rules.now_unix_ms - other.preempted_unix_ms;
    const bool spared = other.preempted_unix_ms > 0 && since >= 0 && since < rules.spare_ms;
    // What is published only says its last word.
    if (runs && other.priority < job.priority && !spared && other.published.empty())
      found.push_back(&other);
  }
  std::sort(found.begin(), found.end(), [](const Job* a, const Job* b) {
    return std::tuple(a->priority, -static_cast<std::int64_t>(a->order)) <
           std::tuple(b->priority, -static_cast<std::int64_t>(b->order));
  });
  if (found.size() > kPreemptCandidatesMax) found.resize(kPreemptCandidatesMax);
  return found;
}

/// The next choice of as many indices below `count`, in order; false after the last one.
bool next_choice(std::vector<std::size_t>& chosen, std::size_t count) {
  for (std::size_t i = chosen.size(); i-- > 0;) {
    if (chosen[i] + (chosen.size() - i) >= count) continue;
    ++chosen[i];
    for (std::size_t j = i + 1; j < chosen.size(); ++j) chosen[j] = chosen[j - 1] + 1;
    return true;
  }
  return false;
}

}  // namespace

std::vector<JobId> choose_victims(const Job& job, const Tables& tables, const WorkerTable& workers,
                                  const std::set<WorkerId>& reserved,
                                  const PreemptionRules& rules) {
  const std::vector<const Job*> from = candidates(job, tables, rules);
  if (from.empty()) return {};
  Without gone;
  for (const JobId& id : tables.held)
    if (is_stopping(tables.jobs.at(id))) gone.insert(id);
  // An engine that has to load the base first is as good, when none is free as it is.
  const auto fits = [&](const Without& without) {
    const Placement placement = place(job, tables, workers, reserved, without);
    return !placement.worker.empty() || !placement.load_on.empty();
  };
  if (fits(gone)) return {};
  for (std::size_t count = 1; count <= std::min(kPreemptVictimsMax, from.size()); ++count) {
    std::vector<std::size_t> chosen(count);
    for (std::size_t i = 0; i < count; ++i) chosen[i] = i;
    do {
      Without without = gone;
      for (const std::size_t i : chosen) without.insert(from[i]->id);
      if (!fits(without)) continue;
      std::vector<JobId> victims;
      for (const std::size_t i : chosen) victims.push_back(from[i]->id);
      return victims;
    } while (next_choice(chosen, from.size()));
  }
  return {};
}

std::optional<std::int64_t> could_grow(const Job& job, const Tables& tables,
                                       const WorkerTable& workers) {
  const auto now = static_cast<std::int64_t>(job.members.size());
  if (!job.gang() || job.sizes.front() <= now) return std::nullopt;
  const Placement placement = place_gang(job, tables, workers, {}, {job.id});
  const auto size = static_cast<std::int64_t>(placement.members.size());
  return size > now ? std::optional(size) : std::nullopt;
}

}  // namespace tandem::coordinator
