#include "coordinator/estimates.h"

#include "coordinator/placement.h"
#include "protocol/version.h"

#include <algorithm>

namespace tandem::coordinator {

void Estimates::ask(const std::string& id, const protocol::ModelRef& model,
                    const protocol::TrainSettings& settings, bool evaluates, bool patient) {
  asked_[id] = {model,
                settings,
                settings.dp_choices().back() * settings.tp * settings.pp,
                settings.ranks() > 1 || settings.full() || settings.layout == "auto",
                patient,
                context_.now().ms,
                0,
                {},
                0,
                "",
                evaluates};
}

void Estimates::ask_serving(const std::string& id, const protocol::ModelRef& model,
                            std::int64_t ranks, const std::string& serve_json) {
  asked_[id] = {model, {}, ranks, true, false, context_.now().ms, 0, {}, 0, serve_json, false};
}

std::vector<EstimateOutcome> Estimates::reply(const protocol::EstimateReply& reply) {
  const auto found = asked_.find(reply.call_id);
  if (found == asked_.end()) return {};
  if (reply.status.code() == StatusCode::kUnavailable || reply.status.code() == StatusCode::kBusy) {
    found->second.worker = {};  // another engine, or this one later
    found->second.sent_ms = context_.now().ms;
    return {};
  }
  asked_.erase(found);
  return {{reply.call_id, reply.status, reply.result_json}};
}

std::string Estimates::train_json(const Asked& asked, const std::string& device) const {
  if (!asked.serve_json.empty()) return "";
  if (asked.settings.layout != "auto") return asked.settings.to_json();
  protocol::TrainSettings settings = asked.settings;
  const HostSlots largest = largest_host(workers_, device);
  const auto slots = std::max<std::int64_t>(
      1,
      std::min<std::int64_t>(static_cast<std::int64_t>(largest.count), protocol::kGangMembersMax));
  if (settings.ranks_max == 0 || settings.ranks_max > slots) settings.ranks_max = slots;
  return settings.to_json();
}

Worker* Estimates::choose(const Asked& asked) {
  Worker* best = nullptr;
  int best_score = -1;
  const std::string device = asked.gang ? gang_device(workers_, asked.ranks) : "";
  for (auto& [id, worker] : workers_.all()) {
    if (!worker.engine.alive) continue;
    if (!asked.serve_json.empty() && !protocol::has_replicas(worker.engine.version)) continue;
    // An engine that trains answers between steps only, so it comes last.
    const int score =
        (worker.device == device ? 8 : 0) + (worker.engine.model == asked.model.digest ? 2 : 0) +
        (worker.engine.jobs.empty() ? 4 : 0) + (worker.engine.requests.empty() ? 1 : 0);
    if (score > best_score) {
      best = &worker;
      best_score = score;
    }
  }
  return best;
}

std::vector<EstimateOutcome> Estimates::tick() {
  std::vector<EstimateOutcome> outcomes;
  const TimeMs now = context_.now().ms;
  for (auto entry = asked_.begin(); entry != asked_.end();) {
    auto& [id, asked] = *entry;
    if (!asked.patient && now - asked.asked_ms > context_.limits().estimate_timeout_ms) {
      outcomes.push_back(
          {id,
           unavailable_error(asked.sends == 0 ? "no engine is connected to do the dry run; "
                                                "start workers with: tandem up"
                                              : "no engine answered the dry run in time"),
           ""});
      entry = asked_.erase(entry);
      continue;
    }
    const Worker* worker = workers_.find(asked.worker);
    const bool answering = worker != nullptr && worker->engine.alive;
    const bool wait = asked.sent_ms > 0 && now - asked.sent_ms < context_.limits().resend_ms;
    const bool due = answering ? now - asked.sent_ms >= context_.limits().estimate_resend_ms
                               : asked.sends == 0 || !wait;
    if (due) {
      if (Worker* engine = answering ? workers_.find(asked.worker) : choose(asked)) {
        asked.worker = engine->id;
        asked.sent_ms = now;
        ++asked.sends;
        context_.send_worker(
            engine->engine.peer,
            protocol::EstimateRequest{id, asked.model, train_json(asked, engine->device),
                                      asked.serve_json, asked.evaluates});
      }
    }
    ++entry;
  }
  return outcomes;
}

}  // namespace tandem::coordinator
