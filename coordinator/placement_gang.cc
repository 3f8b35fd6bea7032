// Workers for a job of several ranks.
#include "coordinator/placement.h"

#include "protocol/base/units.h"
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
  std::size_t away = 0;  ///< of the busy ones: not connected
  bool held_it = false;  ///< the job ran here last
};

/// What the engine that goes on serving beside a rank of the job leaves too little for it with: the
/// base that it holds, or one that it loads, whose bytes are not known yet. "" when nothing.
std::string base_in_the_way(const Job& job, const Worker& worker) {
  if (!worker.engine.loading.empty()) return "loads a base";
  const std::int64_t together = bytes_together(worker, job.peak_bytes, job.engine_bytes);
  if (worker.memory_bytes == 0 || together <= worker.memory_bytes) return "";
  return str("has ", format_bytes(worker.memory_bytes),
             ", a rank and the base that its engine holds need ", format_bytes(together));
}

/// `any_base`: as if every engine held the job's base.
Host look_at(const std::string& name, const std::vector<const Worker*>& slots, const Job& job,
             const Tables& tables, const WorkerTable& workers, const std::set<WorkerId>& reserved,
             const Without& without, bool any_base) {
  Host host{name, {}, {}, "", 0, false};
  for (const Worker* worker : slots) {
    host.held_it = host.held_it || job.worker == worker->id;
    const bool away = !worker->engine.alive && !worker->agent.alive;
    host.away += away;
    std::string what = worker->engine.alive
                           ? obstacle(job, *worker, tables, workers, reserved, without)
                           : std::string(away ? "is not connected" : "has no engine now");
    if (what.empty() && !any_base) what = base_in_the_way(job, *worker);
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
  return str(count, " ", device == "cpu" ? "CPU" : "GPU", count == 1 ? " worker" : " workers");
}

namespace {

/// Known slots by device name, then host.
using Kinds = std::map<std::string, std::map<std::string, std::vector<const Worker*>>>;
Kinds kinds_of(const WorkerTable& workers, const std::string& device) {
  Kinds kinds;
  for (const auto& [id, worker] : workers.all())
    if (worker.device == device) kinds[worker.device_name][worker.host].push_back(&worker);
  return kinds;
}

std::size_t slots_of(const Kinds::mapped_type& hosts) {
  std::size_t count = 0;
  for (const auto& [host, slots] : hosts) count += slots.size();
  return count;
}

HostSlots largest_of(const Kinds::value_type& kind, const std::string& device) {
  HostSlots best{0, "", device, kind.first};
  for (const auto& [host, slots] : kind.second)
    if (slots.size() > best.count) best = {slots.size(), host, device, kind.first};
  return best;
}

/// "; ranks of a gang have one kind: 2 x A, 1 x B", where there are several.
std::string list_kinds(const Kinds& kinds) {
  if (kinds.size() < 2) return "";
  std::string list;
  for (const auto& [name, hosts] : kinds)
    list += str(list.empty() ? "" : ", ", slots_of(hosts), " x ", name.empty() ? "unnamed" : name);
  return str("; all ranks of a gang are of one kind, and there are ", list);
}

}  // namespace

HostSlots largest_host(const WorkerTable& workers, const std::string& device) {
  HostSlots best{0, "", device};
  for (const auto& kind : kinds_of(workers, device))
    if (HostSlots slots = largest_of(kind, device); slots.count > best.count)
      best = std::move(slots);
  return best;
}

GangRoom gang_room(const WorkerTable& workers, const std::string& device) {
  const Kinds kinds = kinds_of(workers, device);
  if (kinds.empty()) return {0, str("no ", device == "cpu" ? "CPU" : "GPU", " worker is known")};
  const auto most = std::max_element(kinds.begin(), kinds.end(), [](const auto& a, const auto& b) {
    return slots_of(a.second) < slots_of(b.second);
  });
  const HostSlots all{slots_of(most->second), "", device}, largest = largest_of(*most, device);
  return {all.count, str(all.count == 1 ? "there is " : "there are ", all.to_string(),
                         kinds.size() > 1 ? str(" of kind ", most->first) : std::string(), ", ",
                         largest.count, " of them on ", largest.name, list_kinds(kinds))};
}

NearestLayout nearest_layout(const std::vector<std::int64_t>& dps, std::int64_t tp, std::int64_t pp,
                             std::size_t ranks) {
  std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t> best{};  // ranks, tp, pp, dp
  for (const std::int64_t d : dps)
    for (std::int64_t t = 1; t <= tp; ++t)
      for (std::int64_t p = 1; tp % t == 0 && p <= pp; ++p)
        if (d * t * p <= static_cast<std::int64_t>(ranks))
          best = std::max(best, std::tuple(d * t * p, t, p, d));
  return {std::get<3>(best), std::get<1>(best), std::get<2>(best)};
}

std::string gang_device(const WorkerTable& workers, std::int64_t ranks) {
  const std::size_t gpus = gang_room(workers, "cuda").ranks;
  return gpus > 0 && static_cast<std::int64_t>(gpus) >= ranks ? "cuda" : "cpu";
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

/// "0.1.0 (protocol 1.5)"; an agent of before 1.5 says the protocol's alone.
std::string program_of(const Process& agent) {
  return str(agent.program.empty() ? "unknown" : agent.program, " (protocol ", agent.version.major,
             ".", agent.version.minor, ")");
}

/// Whether the host has a worker free whose agent can start ranks for a gang that another leads.
bool can_join(const Host& host) {
  if (host.free.empty()) return false;
  const Process& agent = host.free.front()->agent;
  return agent.alive && protocol::has_far_ranks(agent.version);
}

/// Over several hosts, for none has as many slots: those with most free workers first, whichever
/// have an agent that can start a daemon there, all of one program version.
Placement place_over_hosts(std::size_t wanted, std::vector<Host> hosts) {
  std::stable_sort(hosts.begin(), hosts.end(), [](const Host& a, const Host& b) {
    return std::tuple(!a.held_it, b.free.size()) < std::tuple(!b.held_it, a.free.size());
  });
  Placement placement;
  std::string obstacles, versions;
  std::map<std::string, std::vector<WorkerId>> members;  // by version
  for (const Host& host : hosts) {
    if (can_join(host)) {
      const std::string program = program_of(host.free.front()->agent);
      versions += str(versions.empty() ? "" : ", ", host.name, " has ", program);
      auto& of_version = members[program];
      for (const Worker* worker : host.free)
        if (of_version.size() < wanted) of_version.push_back(worker->id);
      if (of_version.size() > placement.members.size()) placement.members = of_version;
    } else if (!host.free.empty()) {
      obstacles +=
          str("; no agent of ", host.name, " is connected that can start ranks for another host");
    }
    if (!host.obstacles.empty() && obstacles.size() < 400) obstacles += "; " + host.obstacles;
  }
  if (placement.members.size() == wanted) {
    placement.worker = placement.members.front();
    return placement;
  }
  if (members.size() > 1)
    obstacles += str("; hosts of a gang have one version of Tandem: ", versions);
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

/// On slots of one kind, by host.
Placement place_kind(const Job& job, std::size_t wanted, const Kinds::mapped_type& by_host,
                     const std::string& device, const Tables& tables, const WorkerTable& workers,
                     const std::set<WorkerId>& reserved, const Without& without, bool any_base) {
  std::vector<Host> hosts;
  for (const auto& [host, slots] : by_host)
    hosts.push_back(look_at(host, slots, job, tables, workers, reserved, without, any_base));
  const Host* best = nullptr;
  for (const bool connected :
       {true, false}) {  // rather over several hosts than on one that is away
    std::size_t all = 0;
    for (const Host& host : hosts) {
      const std::size_t slots = host.free.size() + host.busy.size() - (connected ? host.away : 0);
      all += slots;
      if (slots < wanted) continue;
      const auto score = [&](const Host& h) {
        return std::tuple(h.free.size() >= wanted, h.held_it, h.free.size());
      };
      if (best == nullptr || score(host) > score(*best)) best = &host;
    }
    if (best != nullptr) break;
    if (all >= wanted) return place_over_hosts(wanted, std::move(hosts));
  }
  Placement placement;
  if (best == nullptr) {
    placement.waiting = str("needs ", HostSlots{wanted, "", device}.to_string(), "; ",
                            gang_room(workers, device).description, "; tandem up --workers ",
                            wanted, " starts as many");
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
  placement.waiting = str("needs ", wanted, " workers of ", best->name, " at once, ",
                          best->free.size(), " are free");
  if (best->free.size() >= wanted)
    placement.waiting +=
        leader->agent.alive
            ? str("; agent ", leader->id, " speaks protocol ", leader->agent.version.major, ".",
                  leader->agent.version.minor, ", which knows no gangs: upgrade it")
            : str("; no agent of theirs is connected");
  if (!best->obstacles.empty()) placement.waiting += "; " + best->obstacles;
  return placement;
}

/// On the kind where it was last, else on the one with most slots that has as many free.
Placement place_size(const Job& job, std::int64_t size, const Tables& tables,
                     const WorkerTable& workers, const std::set<WorkerId>& reserved,
                     const Without& without, bool any_base) {
  const std::string device = estimated_device(job.estimate_json);
  const Kinds kinds = kinds_of(workers, device);
  const Worker* last = workers.find(job.worker);
  std::vector<const Kinds::value_type*> order;
  for (const auto& kind : kinds) order.push_back(&kind);
  std::stable_sort(order.begin(), order.end(), [&](const auto* a, const auto* b) {
    const auto rank = [&](const Kinds::value_type& kind) {
      return std::tuple(last != nullptr && last->device_name == kind.first, slots_of(kind.second));
    };
    return rank(*a) > rank(*b);
  });
  std::optional<Placement> waits;
  for (const auto* kind : order) {
    Placement placement = place_kind(job, static_cast<std::size_t>(size), kind->second, device,
                                     tables, workers, reserved, without, any_base);
    if (!placement.worker.empty()) return placement;
    if (!waits || (waits->wanted.empty() && !placement.wanted.empty())) waits = placement;
  }
  if (waits) {
    if (!waits->wanted.empty()) waits->waiting += list_kinds(kinds);
    return *waits;
  }
  return place_kind(job, static_cast<std::size_t>(size), {}, device, tables, workers, reserved,
                    without, any_base);
}

}  // namespace

Placement place_gang(const Job& job, const Tables& tables, const WorkerTable& workers,
                     const std::set<WorkerId>& reserved, const Without& without) {
  Placement placement;
  for (const std::int64_t size : job.sizes) {  // waiting, it keeps the fewest that it can do with
    placement = place_size(job, size, tables, workers, reserved, without, false);
    if (!placement.worker.empty()) return placement;
  }
  for (WorkerId& id :
       place_size(job, job.sizes.back(), tables, workers, reserved, without, true).members)
    if (!base_in_the_way(job, *workers.find(id)).empty()) placement.load_on.insert(std::move(id));
  return placement;
}

Placement place_replica(const Replica& replica, const Tables& tables, const WorkerTable& workers,
                        const std::set<WorkerId>& reserved) {
  if (tables.model_by_digest(replica.model) == nullptr)
    return {{}, {}, {}, {}, "its base model is not registered any more"};
  Job gang;  // what a job of as many ranks would get
  gang.id = replica.id;
  gang.epoch = replica.epoch;
  gang.worker = replica.worker;
  gang.ranks = replica.ranks();
  gang.sizes = {gang.ranks};
  set_estimate(gang, nlohmann::json{{"peak_bytes", replica.peak_bytes},
                                    {"by_kind", {{"serving_engine", replica.engine_bytes}}},
                                    {"device", replica.device}}
                         .dump());
  Placement placement = place_gang(gang, tables, workers, reserved);
  if (placement.worker.empty()) return placement;
  const protocol::Version& version = workers.find(placement.worker)->agent.version;
  if (protocol::has_replicas(version)) return placement;
  return {{},
          {},
          placement.members,
          {},
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
