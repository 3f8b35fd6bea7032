// Which engine holds which base: what waits first, then what was added last. It is loaded by an
// engine without one, else by one whose base most others have too.
#include "coordinator/core.h"
#include "coordinator/placement.h"
#include "coordinator/resolve.h"

#include <algorithm>
#include <climits>
#include <functional>
#include <map>

namespace tandem::coordinator {

void Coordinator::model_loaded(Worker& worker, const protocol::ModelLoaded& message) {
  Engine& engine = worker.engine;
  if (engine.loading == message.model) engine.loading = {};
  engine.load_status = message.status;
  if (message.status.ok()) {
    engine.model = message.model;
    engine.base_bytes = message.base_bytes;
    engine.failed_loads.erase(message.model);
    context_.log(LogLevel::kInfo, "engine ", worker.id, " holds base ", message.model, " after ",
                 message.seconds, " s");
    return;
  }
  context_.log(LogLevel::kWarn, "engine ", worker.id, " could not load base ", message.model, ": ",
               message.status.message());
  if (engine.model == message.model) {  // it gave up the one it held to make room
    engine.model = {};
    engine.base_bytes = 0;
    return;
  }
  if (engine.failed_loads.size() >= kFailedLoadsMax && !engine.failed_loads.contains(message.model))
    engine.failed_loads.erase(std::min_element(
        engine.failed_loads.begin(), engine.failed_loads.end(),
        [](const auto& a, const auto& b) { return a.second.at_ms < b.second.at_ms; }));
  const Limits& limits = context_.limits();
  FailedLoad& failed = engine.failed_loads[message.model];
  const int doublings = std::min(failed.failures++, 16);
  failed.status = message.status;
  failed.at_ms = context_.now().ms;
  failed.not_before_ms =
      failed.at_ms + std::min(limits.load_backoff_ms << doublings, limits.load_backoff_max_ms);
}

void Coordinator::load_model(Worker& worker, const ModelRecord& model) {
  worker.engine.loading = model.digest;
  worker.engine.load_sent_ms = context_.now().ms;
  context_.send_worker(
      worker.engine.peer,
      protocol::LoadModel{model_ref(model), gang_bytes(context_.tables(), worker.id)});
}

/// The base this engine should load now, or none. `demand` is what waits, the most urgent first.
Digest Coordinator::wanted_model(const Worker& worker,
                                 const std::vector<BaseDemand>& demand) const {
  const Tables& tables = context_.tables();
  const auto waits_out_a_failure = [&](const Digest& model) {
    const FailedLoad* failed = worker.engine.failed_load(model);
    return failed != nullptr && context_.now().ms < failed->not_before_ms;
  };
  for (const BaseDemand& wanted : demand) {
    const Digest& model = wanted.model;
    if (!wanted.helps(worker.id) || waits_out_a_failure(model)) continue;
    if (worker.engine.model == model) return {};
    // An engine with another base is only taken when no engine that helps has, or gets, the wanted
    // one: a job cannot start on one that trains, drains or serves a replica.
    const bool provided =
        std::any_of(workers_.all().begin(), workers_.all().end(), [&](const auto& other) {
          const Engine& engine = other.second.engine;
          return (engine.alive && wanted.helps(other.first) &&
                  (engine.model == model || engine.loading == model)) ||
                 (wanted.on.empty() && other.second.gang.model == model &&
                  workers_.serves(other.second));
        });
    if (tables.model_by_digest(model) != nullptr && (!provided || worker.engine.model.empty()))
      return model;
  }
  if (!worker.engine.model.empty()) return {};
  const ModelRecord* newest = nullptr;
  for (const auto& [name, model] : tables.models)
    if ((newest == nullptr || model.created_unix_ms > newest->created_unix_ms) &&
        !waits_out_a_failure(model.digest))
      newest = &model;
  return newest == nullptr ? Digest{} : newest->digest;
}

void Coordinator::assign_models() {
  const TimeMs now = context_.now().ms;
  std::vector<Worker*> idle;
  for (auto& [id, worker] : workers_.all()) {
    Engine& engine = worker.engine;
    if (!workers_.usable(worker)) continue;
    if (!engine.loading.empty()) {
      const ModelRecord* model = context_.tables().model_by_digest(engine.loading);
      if (model == nullptr)
        engine.loading = {};
      else if (now - engine.load_sent_ms >= context_.limits().load_resend_ms)
        load_model(worker, *model);
      continue;
    }
    const bool busy = !engine.jobs.empty() || !engine.requests.empty() ||
                      job_on(context_.tables(), id) != nullptr;
    if (engine.model.empty() || !busy) idle.push_back(&worker);
  }
  if (idle.empty()) return;
  std::vector<BaseDemand> demand = replicas_.demand();
  for (BaseDemand& wanted : jobs_.demand()) demand.push_back(std::move(wanted));
  std::vector<std::pair<std::size_t, Digest>> asked;
  for (const auto& [model, count] : requests_.demand()) asked.emplace_back(count, model);
  std::sort(asked.rbegin(), asked.rend());
  for (const auto& [count, model] : asked) demand.push_back({model, {}});
  if (!demand.empty()) {
    // The only one with its base goes last.
    std::map<Digest, int> holders;
    for (const auto& [id, worker] : workers_.all())
      if (worker.engine.alive) ++holders[worker.engine.model];
    holders[{}] = INT_MAX;
    std::ranges::stable_sort(idle, std::greater<>(), [&](const Worker* worker) {
      return holders.at(worker->engine.model);
    });
  }
  for (Worker* worker : idle) {
    const Digest wanted = wanted_model(*worker, demand);
    if (wanted.empty()) continue;
    if (const ModelRecord* model = context_.tables().model_by_digest(wanted))
      load_model(*worker, *model);
  }
}

}  // namespace tandem::coordinator
