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
  Replicas::Wanted wanted;
  wanted.tp = params.integer("tp", 1, 1, protocol::kGangMembersMax);
  wanted.pp = params.integer("pp", 1, 1, protocol::kGangMembersMax);
  wanted.count = params.integer("count", 1, 1, kCountMax);
  const std::int64_t ranks = wanted.tp * wanted.pp;
  const auto check = [&]() -> Status {
    TANDEM_RETURN_IF_ERROR(params.finish());
    if (ranks < 2)
      return refused_error(
          "a replica has 2 ranks or more, and tp 1, pp 1 is one: every worker's engine serves a "
          "base on one rank already (tandem up --workers N); give --tp or --pp");
    if (ranks > protocol::kGangMembersMax)
      return refused_error(str("a replica has at most ", protocol::kGangMembersMax,
                               " ranks, and tp ", wanted.tp, " x pp ", wanted.pp, " is ", ranks));
    return {};
  };
  if (const Status status = check(); !status.ok()) return reply(ask, status);
  auto model = find_model(context_.tables(), name);
  if (!model.ok()) return reply(ask, model.status());
  wanted.tenant = ask.user;
  wanted.model = (*model)->digest;
  if (const Status status = replicas_.check_count(wanted); !status.ok()) return reply(ask, status);
  const std::string id =
      start_dry_run(ask, [this, wanted](const std::string& estimate) -> Result<Json> {
        if (context_.tables().model_by_digest(wanted.model) == nullptr)
          return not_found_error("the model was removed while its dry run was made");
        TANDEM_ASSIGN_OR_RETURN(const auto ids, replicas_.add(wanted, estimate));
        Json made = Json::array();
        for (const JobId& one : ids)
          made.push_back(
              replica_json(context_.tables().replicas.at(one), replicas_, context_.tables()));
        return Json{{"replicas", std::move(made)}, {"estimate", parse_object(estimate)}};
      });
  if (!id.empty())
    estimates_.ask_serving(id, model_ref(**model), ranks,
                           Json{{"tp", wanted.tp}, {"pp", wanted.pp}}.dump());
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
