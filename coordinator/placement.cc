#include "coordinator/placement.h"

#include "protocol/base/str.h"
#include "protocol/base/units.h"

#include <algorithm>
#include <tuple>

namespace tandem::coordinator {
std::string obstacle(const Job& job, const Worker& worker, const Tables& tables,
                     const WorkerTable& workers, const std::set<WorkerId>& reserved,
                     const Without& without) {
  if (workers.draining(worker.id)) return "is draining";
  if (const Job* other = job_on(tables, worker.id, without)) return str("trains ", other->id);
  if (const Replica* replica = replica_on(tables, worker.id)) return str("serves ", replica->id);
  if (reserved.contains(worker.id)) return "is kept for a job of several ranks or a replica";
  for (const auto* process : {static_cast<const Process*>(&worker.engine), &worker.agent})
    for (const protocol::RunningJob& running : process->jobs)
      if (process->alive && !without.contains(running.job) &&
          (running.job != job.id || running.epoch != job.epoch))
        return str("still ends ", running.job);
  if (worker.memory_bytes > 0 && job.peak_bytes > worker.memory_bytes)
    return str("has ", format_bytes(worker.memory_bytes), ", the job needs ",
               format_bytes(job.peak_bytes));
  return "";
}

std::vector<const Job*> queue_order(const Tables& tables) {
  std::vector<const Job*> queue;
  for (const JobId& id : tables.queued) queue.push_back(&tables.jobs.at(id));
  std::sort(queue.begin(), queue.end(), [](const Job* a, const Job* b) {
    return std::tuple(-a->priority, a->order, a->id) < std::tuple(-b->priority, b->order, b->id);
  });
  return queue;
}

const Job* job_on(const Tables& tables, const WorkerId& worker, const Without& without) {
  for (const JobId& id : tables.held)
    if (const Job& job = tables.jobs.at(id); job.holds(worker) && !without.contains(id))
      return &job;
  return nullptr;
}

const Replica* replica_on(const Tables& tables, const WorkerId& worker) {
  for (const auto& [id, replica] : tables.replicas)
    if (replica.holds(worker)) return &replica;
  return nullptr;
}

std::int64_t gang_bytes(const Tables& tables, const WorkerId& worker) {
  if (const Job* job = job_on(tables, worker))
    return job->needs_gang() ? job->peak_bytes - job->engine_bytes : 0;
  const Replica* replica = replica_on(tables, worker);
  if (replica == nullptr) return 0;
  return replica->peak_bytes - replica->engine_bytes +
         std::max<std::int64_t>(replica->adapter_bytes, 0);
}

std::int64_t bytes_together(const Worker& worker, std::int64_t peak, std::int64_t engine) {
  return peak - engine + std::max(engine, worker.engine.base_bytes);
}

Placement place(const Job& job, const Tables& tables, const WorkerTable& workers,
                const std::set<WorkerId>& reserved, const Without& without) {
  if (job.needs_gang()) return place_gang(job, tables, workers, reserved, without);
  const ModelRecord* model = tables.model_by_digest(job.model);
  if (model == nullptr) return {{}, {}, {}, {}, "its base model is not registered any more"};
  const Worker* best = nullptr;
  std::tuple<int, int, std::int64_t> best_score;
  std::string obstacles;
  std::size_t engines = 0;
  std::set<WorkerId> free;
  for (const auto& [id, worker] : workers.all()) {
    if (!worker.engine.alive) continue;
    ++engines;
    const std::string what = obstacle(job, worker, tables, workers, reserved, without);
    if (!what.empty()) {
      if (obstacles.size() < 400) obstacles += str(obstacles.empty() ? "" : "; ", id, " ", what);
      continue;
    }
    free.insert(id);
    if (worker.engine.model != job.model) continue;
    const std::tuple score{job.worker == id && job.own_failures > 0 ? 0 : 1,
                           job.worker == id ? 1 : 0,
                           -static_cast<std::int64_t>(worker.engine.requests.size())};
    if (best == nullptr || score > best_score) {
      best = &worker;
      best_score = score;
    }
  }
  if (best != nullptr) return {best->id, {}, {}, {}, ""};
  if (engines == 0) return {{}, {}, {}, {}, "no engine is connected"};
  if (free.empty()) return {{}, {}, {}, {}, obstacles};
  std::string waiting = str("base ", model->name, " is not loaded on a free engine yet");
  for (const auto& [id, worker] : workers.all())
    if (const FailedLoad* failed = worker.engine.failed_load(job.model);
        worker.engine.alive && failed != nullptr)
      waiting += str("; ", id, " could not load it: ", failed->status.message());
  return {{}, {}, {}, free, waiting};
}

}  // namespace tandem::coordinator
