#include "protocol/base/str.h"
#include "tools/cli/commands.h"
#include "tools/cli/output.h"

#include <chrono>
#include <iostream>
#include <map>
#include <set>
#include <thread>

namespace tandem::tools {
namespace {

constexpr auto kLookEvery = std::chrono::milliseconds(200);

/// Prints what becomes of the replicas until all of them serve. not_found_error: one was removed.
Status follow(Session& session, std::set<std::string> waiting) {
  std::map<std::string, std::string> shown;
  while (!waiting.empty() && !Interruptible::interrupted()) {
    TANDEM_ASSIGN_OR_RETURN(const Json list, session.call("replica.list", Json::object()));
    std::map<std::string, Json> known;
    for (const Json& replica : list.value("replicas", Json::array()))
      known[replica.value("replica", "")] = replica;
    for (auto id = waiting.begin(); id != waiting.end();) {
      if (!known.contains(*id)) return not_found_error(str("replica ", *id, " was removed"));
      const Json& replica = known[*id];
      const std::string state = replica.value("state", "");
      if (std::exchange(shown[*id], str(state, replica.value("epoch", 0))) !=
          str(state, replica.value("epoch", 0))) {
        const std::string reason = replica.value("reason", "");
        if (session.json())
          std::cout << replica.dump() << std::endl;
        else
          std::fprintf(stderr, "%s %s%s%s\n", id->c_str(), state.c_str(),
                       reason.empty() ? "" : ": ", reason.c_str());
      }
      id = state == "serving" ? waiting.erase(id) : std::next(id);
    }
    if (!waiting.empty()) std::this_thread::sleep_for(kLookEvery);
  }
  return {};
}

}  // namespace

Status run_replica_add(Session& session, const ReplicaOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(const Json made, session.call("replica.add", {{"model", options.model},
                                                                        {"tp", options.tp},
                                                                        {"pp", options.pp},
                                                                        {"count", options.count}}));
  if (session.json()) std::cout << made.dump() << std::endl;
  std::set<std::string> ids;
  for (const Json& replica : made.value("replicas", Json::array())) {
    ids.insert(replica.value("replica", ""));
    if (!session.json())
      std::cout << field(replica, "replica") << " " << field(replica, "state") << "\n";
  }
  if (!options.follow) {
    if (!session.json()) std::cout << "see how it stands with: tandem replica list\n";
    return {};
  }
  std::cout.flush();
  const Interruptible interruptible(false);
  const Status status = follow(session, std::move(ids));
  if (!Interruptible::interrupted()) return status;
  if (!session.json()) std::fprintf(stderr, "detached; it goes on: tandem replica list\n");
  return {};
}

Status run_replica_rm(Session& session, const std::string& replica) {
  TANDEM_ASSIGN_OR_RETURN(const Json result, session.call("replica.rm", {{"replica", replica}}));
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << replica << " " << field(result, "state") << "\n";
  return {};
}

}  // namespace tandem::tools
