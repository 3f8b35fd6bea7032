// Verbs of replicas.
#include "coordinator/calls.h"
#include "coordinator/resolve.h"
#include "coordinator/views.h"

namespace tandem::coordinator {
namespace {

constexpr std::int64_t kCountMax = 64;  ///< made by one call

}  // namespace

void Calls::replica_add(const Ask& ask, Params& params) {
  const std::string name = params.text("model");
  ReplicaAsk wanted;
  wanted.asks.push_back(ask);
  wanted.wanted.tp = params.integer("tp", 1, 1, protocol::kGangMembersMax);
  wanted.wanted.pp = params.integer("pp", 1, 1, protocol::kGangMembersMax);
  wanted.wanted.count = params.integer("count", 1, 1, kCountMax);
  const auto check = [&]() -> Status {
    TANDEM_RETURN_IF_ERROR(params.finish());
    const std::int64_t ranks = wanted.wanted.tp * wanted.wanted.pp;
    if (ranks < 2)
      return refused_error(
          "a replica has 2 ranks or more, and tp 1, pp 1 is one: every worker's engine serves a "
          "base on one rank already (tandem up --workers N); give --tp or --pp");
    if (ranks > protocol::kGangMembersMax)
      return refused_error(str("a replica has at most ", protocol::kGangMembersMax,
                               " ranks, and tp ", wanted.wanted.tp, " x pp ", wanted.wanted.pp,
                               " is ", ranks));
    return {};
  };
  if (const Status status = check(); !status.ok()) return reply(ask, status);
  auto model = find_model(context_.tables(), name);
  if (!model.ok()) return reply(ask, model.status());
  wanted.wanted.tenant = ask.user;
  wanted.wanted.model = (*model)->digest;
  if (const Status status = replicas_.check(wanted.wanted); !status.ok()) return reply(ask, status);
  for (auto& [id, waiting] : replica_asks_) {
    const Ask& first = waiting.asks.front();
    if (ask.key.empty() || first.user != ask.user || first.key != ask.key) continue;
    if (first.request != ask.request)
      return send_reply(
          ask, conflict_error(str("idempotency key ", ask.key, " is in use by another call")), "",
          false);
    wait_too(waiting.asks, ask);
    return;
  }
  const std::string id = str("replica:", ++estimate_ids_);
  estimates_.ask_serving(id, model_ref(**model), wanted.wanted.tp * wanted.wanted.pp,
                         Json{{"tp", wanted.wanted.tp}, {"pp", wanted.wanted.pp}}.dump());
  replica_asks_[id] = std::move(wanted);
}

bool Calls::replica_estimated(const EstimateOutcome& outcome) {
  const auto found = replica_asks_.find(outcome.id);
  if (found == replica_asks_.end()) return false;
  const ReplicaAsk asked = std::move(found->second);
  replica_asks_.erase(found);
  const auto refuse = [&](const Status& status) {
    for (const Ask& ask : asked.asks) reply(ask, status);
    return true;
  };
  if (!outcome.status.ok()) return refuse(outcome.status);
  if (ending()) return refuse(unavailable_error("the coordinator is shutting down"));
  const ModelRecord* model = context_.tables().model_by_digest(asked.wanted.model);
  if (model == nullptr)
    return refuse(not_found_error("the model was removed while its dry run was made"));
  const auto ids = replicas_.add(asked.wanted, outcome.result_json);
  if (!ids.ok()) return refuse(ids.status());
  Json made = Json::array();
  for (const JobId& id : *ids)
    made.push_back(replica_json(context_.tables().replicas.at(id), replicas_, context_.tables()));
  const Json result{{"replicas", std::move(made)}, {"estimate", parse_object(outcome.result_json)}};
  for (const Ask& ask : asked.asks) answer(ask, result);
  return true;
}

void Calls::replica_list(const Ask& ask, Params& params) {
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  Json list = Json::array();
  for (const auto& [id, replica] : context_.tables().replicas)
    list.push_back(replica_json(replica, replicas_, context_.tables()));
  answer(ask, {{"replicas", std::move(list)}});
}

void Calls::replica_rm(const Ask& ask, Params& params) {
  const std::string name = params.text("replica");
  if (Status status = params.finish(); !status.ok()) return reply(ask, status);
  const auto& replicas = context_.tables().replicas;
  const auto found = replicas.find(JobId(name));
  if (found == replicas.end()) {
    std::vector<std::string> known;
    for (const auto& [id, replica] : replicas) known.push_back(id.value);
    const std::string nearest = nearest_name(name, known);
    return reply(ask,
                 not_found_error(str("no replica ", name,
                                     nearest.empty() ? "" : str("; did you mean ", nearest, "?"))));
  }
  const JobId id = found->first;
  if (const Status status = replicas_.remove(id); !status.ok()) return reply(ask, status);
  const auto still = replicas.find(id);
  if (still == replicas.end()) return answer(ask, {{"replica", id.value}, {"state", "removed"}});
  answer(ask, replica_json(still->second, replicas_, context_.tables()));
}

}  // namespace tandem::coordinator
