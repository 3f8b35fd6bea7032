// Workers for a job of several ranks.
#include "coordinator/placement.h"

#include "protocol/version.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <map>
#include <tuple>

namespace tandem::coordinator {
namespace {

/// The workers of one host that a gang could have: those it can have now, and those that are in the
/// way of nothing but time.
struct Host {
  std::string name;
  std::vector<const Worker*> free, busy;
  std::string obstacles;
  bool held_it = false;  ///< the job ran here last
};

Host look_at(const std::string& name, const std::vector<const Worker*>& slots, const Job& job,
             const Tables& tables, const WorkerTable& workers, const std::set<WorkerId>& reserved,
             const Without& without) {
  Host host{name, {}, {}, "", false};
  for (const Worker* worker : slots) {
    host.held_it = host.held_it || job.worker == worker->id;
    const std::string what = worker->engine.alive
                                 ? obstacle(job, *worker, tables, workers, reserved, without)
                                 : std::string("has no engine now");
    (what.empty() ? host.free : host.busy).push_back(worker);
    if (!what.empty() && host.obstacles.size() < 400)
      host.obstacles += str(host.obstacles.empty() ? "" : "; ", worker->id, " ", what);
  }
  std::stable_sort(host.free.begin(), host.free.end(), [](const Worker* a, const Worker* b) {
    return std::tuple(!a->agent.alive, a->engine.requests.size(), a->slot) <
           std::tuple(!b->agent.alive, b->engine.requests.size(), b->slot);
  });
  return host;
}

}  // namespace

std::string HostSlots::to_string() const {
  return str(count, " ", device == "cpu" ? "CPU" : "GPU", " workers");
}

HostSlots largest_host(const WorkerTable& workers, const std::string& device) {
  std::map<std::string, std::size_t> slots;
  for (const auto& [id, worker] : workers.all())
    if (worker.device == device) ++slots[worker.host];
  HostSlots best{0, "", device};
  for (const auto& [name, count] : slots)
    if (count > best.count) best = {count, name, device};
  return best;
}

GangRoom gang_room(const WorkerTable& workers, const std::string& device) {
  const HostSlots largest = largest_host(workers, device);
  const bool cpu = device == "cpu";
  if (largest.count == 0) return {0, str("no ", cpu ? "CPU" : "GPU", " worker is known")};
  if (!cpu)
    return {largest.count, str("a gang of GPUs stays within one host: ", largest.name, " has ",
                               largest.to_string(), ", no host more")};
  HostSlots all{0, "", device};
  for (const auto& [id, worker] : workers.all()) all.count += worker.device == device;
  return {all.count,
          str("there are ", all.to_string(), ", ", largest.count, " of them on ", largest.name)};
}

std::string gang_device(const WorkerTable& workers, std::int64_t ranks) {
  const HostSlots gpus = largest_host(workers, "cuda");
  return gpus.count > 0 && static_cast<std::int64_t>(gpus.count) >= ranks ? "cuda" : "cpu";
}

std::string estimated_device(const std::string& estimate_json) {
  const auto json = nlohmann::json::parse(estimate_json, nullptr, false);
  if (!json.is_object()) return "cpu";
  const auto device = json.find("device");
  return device != json.end() && device->is_string() ? device->get<std::string>() : "cpu";
}

QueueView view_queue(const Tables& tables, const WorkerTable& workers) {
  QueueView view;
  std::set<WorkerId> reserved = reserved_for_replicas(tables, workers);
  view.reservations.emplace_back(0, reserved);
  std::size_t position = 0;
  for (const Job* job : queue_order(tables)) {
    view.positions[job->id] = ++position;
    if (!job->needs_gang()) continue;
    const std::size_t before = reserved.size();
    const Placement placement = place_gang(*job, tables, workers, reserved);
    reserved.insert(placement.wanted.begin(), placement.wanted.end());
    if (reserved.size() != before) view.reservations.emplace_back(position + 1, reserved);
  }
  return view;
}

const std::set<WorkerId>& QueueView::reserved_at(std::size_t position) const {
  std::size_t last = 0;
  while (last + 1 < reservations.size() && reservations[last + 1].first <= position) ++last;
  return reservations[last].second;
}

namespace {

/// Over several hosts, for none has as many slots: those with most free workers first, whichever
/// have an agent that can start a daemon there.
Placement place_over_hosts(std::size_t wanted, std::vector<Host> hosts) {
  std::stable_sort(hosts.begin(), hosts.end(), [](const Host& a, const Host& b) {
    return std::tuple(!a.held_it, b.free.size()) < std::tuple(!b.held_it, a.free.size());
  });
  Placement placement;
  std::string obstacles;
  for (const Host& host : hosts) {
    const Process* agent = host.free.empty() ? nullptr : &host.free.front()->agent;
    const bool able = agent != nullptr && agent->alive && protocol::has_far_ranks(agent->version);
    if (agent != nullptr && !able)
      obstacles +=
          str("; no agent of ", host.name, " is connected that can start ranks for another host");
    for (const Worker* worker : able ? host.free : std::vector<const Worker*>{})
      if (placement.members.size() < wanted) placement.members.push_back(worker->id);
    if (!host.obstacles.empty() && obstacles.size() < 400) obstacles += "; " + host.obstacles;
  }
  if (placement.members.size() == wanted) {
    placement.worker = placement.members.front();
    return placement;
  }
  placement.waiting = str("needs ", wanted, " workers of ", hosts.size(), " hosts at once, ",
                          placement.members.size(), " are free", obstacles);
  placement.wanted = std::move(placement.members);
  placement.members.clear();
  for (const Host& host : hosts)
    for (const auto* list : {&host.free, &host.busy})
      for (const Worker* worker : *list)
        if (placement.wanted.size() < wanted &&
            std::find(placement.wanted.begin(), placement.wanted.end(), worker->id) ==
                placement.wanted.end())
          placement.wanted.push_back(worker->id);
  return placement;
}

Placement place_size(const Job& job, std::int64_t size, const Tables& tables,
                     const WorkerTable& workers, const std::set<WorkerId>& reserved,
                     const Without& without) {
  const auto wanted = static_cast<std::size_t>(size);
  const std::string device = estimated_device(job.estimate_json);
  std::map<std::string, std::vector<const Worker*>> by_host;
  for (const auto& [id, worker] : workers.all())
    if (worker.device == device) by_host[worker.host].push_back(&worker);
  std::optional<Host> best;
  for (const auto& [name, slots] : by_host) {
    if (slots.size() < wanted) continue;
    Host host = look_at(name, slots, job, tables, workers, reserved, without);
    const auto score = [&](const Host& h) {
      return std::tuple(h.free.size() >= wanted, h.held_it, h.free.size());
    };
    if (!best || score(host) > score(*best)) best = std::move(host);
  }
  Placement placement;
  if (!best) {
    const GangRoom room = gang_room(workers, device);
    if (room.ranks >= wanted) {  // CPU slots: the GPUs that have room for it are of one host
      std::vector<Host> hosts;
      for (const auto& [host, slots] : by_host)
        hosts.push_back(look_at(host, slots, job, tables, workers, reserved, without));
      return place_over_hosts(wanted, std::move(hosts));
    }
    placement.waiting = str("needs ", HostSlots{wanted, "", device}.to_string(), "; ",
                            room.description, "; tandem up --workers ", size, " starts as many");
    return placement;
  }
  const Worker* leader = best->free.empty() ? nullptr : best->free.front();
  const bool led =
      leader != nullptr && leader->agent.alive && protocol::has_gangs(leader->agent.version);
  if (best->free.size() >= wanted && led) {
    placement.worker = leader->id;
    for (std::size_t i = 0; i < wanted; ++i) placement.members.push_back(best->free[i]->id);
    return placement;
  }
  for (const auto* list : {&best->free, &best->busy})
    for (const Worker* worker : *list)
      if (placement.wanted.size() < wanted) placement.wanted.push_back(worker->id);
  placement.waiting =
      str("needs ", size, " workers of ", best->name, " at once, ", best->free.size(), " are free");
  if (best->free.size() >= wanted)
    placement.waiting +=
        leader->agent.alive
            ? str("; agent ", leader->id, " speaks protocol ", leader->agent.version.major, ".",
                  leader->agent.version.minor, ", which knows no gangs: upgrade it")
            : str("; no agent of theirs is connected");
  if (!best->obstacles.empty()) placement.waiting += "; " + best->obstacles;
  return placement;
}

}  // namespace

Placement place_gang(const Job& job, const Tables& tables, const WorkerTable& workers,
                     const std::set<WorkerId>& reserved, const Without& without) {
  Placement placement;
  for (const std::int64_t size : job.sizes) {  // waiting, it keeps the fewest that it can do with
    placement = place_size(job, size, tables, workers, reserved, without);
    if (!placement.worker.empty()) return placement;
  }
  return placement;
}

Placement place_replica(const Replica& replica, const Tables& tables, const WorkerTable& workers,
                        const std::set<WorkerId>& reserved) {
  if (tables.model_by_digest(replica.model) == nullptr)
    return {{}, {}, {}, false, "its base model is not registered any more"};
  Job gang;  // what a job of as many ranks would get
  gang.id = replica.id;
  gang.epoch = replica.epoch;
  gang.worker = replica.worker;
  gang.ranks = replica.ranks();
  gang.sizes = {gang.ranks};
  gang.estimate_json =
      nlohmann::json{{"peak_bytes", replica.peak_bytes}, {"device", replica.device}}.dump();
  Placement placement = place_gang(gang, tables, workers, reserved);
  if (placement.worker.empty()) return placement;
  const protocol::Version& version = workers.find(placement.worker)->agent.version;
  if (protocol::has_replicas(version)) return placement;
  return {{},
          {},
          placement.members,
          false,
          str("agent ", placement.worker, " speaks protocol ", version.major, ".", version.minor,
              ", which knows no replicas: upgrade it")};
}

std::set<WorkerId> reserved_for_replicas(const Tables& tables, const WorkerTable& workers) {
  std::set<WorkerId> reserved;
  for (const auto& [id, replica] : tables.replicas) {
    if (replica.placed()) continue;
    const Placement placement = place_replica(replica, tables, workers, reserved);
    const auto& kept = placement.worker.empty() ? placement.wanted : placement.members;
    reserved.insert(kept.begin(), kept.end());
  }
  return reserved;
}

}  // namespace tandem::coordinator
