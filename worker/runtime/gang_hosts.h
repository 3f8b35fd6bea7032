// A gang over several hosts, without ssh. mpirun starts its daemon (orted) on each further host
// through a launch program (plm_rsh_agent), which is `tandem-rank --launch FOLDER` here: it leaves
// the daemon's command line in the gang's folder and waits for the answer.
//
//   <gang>/launch-PID.request   host and the daemon's words, each ended by a NUL
//   <gang>/launch-PID.reply     "" when it runs there, or why not
//
// The leader's agent reads requests and asks the coordinator (LaunchDaemon), which asks the other
// host's agent. Files, so that an agent that comes later finds what its predecessor left; the
// folder is its user's alone, so nobody else can ask. One thread.
#pragma once

#include "protocol/base/ids.h"
#include "protocol/base/result.h"

#include <string>
#include <utility>
#include <vector>

namespace tandem::worker::runtime {

/// "node7/cpu0" -> "node7".
std::string host_of(const WorkerId& worker);
/// A gang's hosts in the order of their ranks, with how many each has.
std::vector<std::pair<std::string, int>> hosts_of(const std::vector<WorkerId>& members);

/// mpirun's arguments before the program, for a gang over several hosts.
std::vector<std::string> far_mpirun_arguments(const std::vector<std::pair<std::string, int>>& hosts,
                                              const std::string& directory,
                                              const std::string& rank_program);

/// What orted is given on this host for what mpirun asked: `-mca NAME VALUE` and no other words,
/// each name of a list that cannot name a program or a library, unquoted; with `directory` for its
/// files. invalid_error names what is not taken.
Result<std::vector<std::string>> daemon_arguments(const std::vector<std::string>& asked,
                                                  const std::string& directory);

struct LaunchRequest {
  std::string file, host;
  std::vector<std::string> arguments;
};
/// Requests that have no reply yet. Files that are no requests, or too large, are passed over.
std::vector<LaunchRequest> open_requests(const std::string& directory);
void reply(const LaunchRequest& request, const Status& status);

/// The launch program: `words` are the host and the daemon's command line. Its exit code: 0 once
/// the daemon runs, 1 when it does not, for which reason it says on standard error.
int ask_for_daemon(const std::string& directory, const std::vector<std::string>& words);

/// Environment of a rank whose arguments lie in a file, a line each: the other hosts' have others.
inline constexpr const char* kRankArgumentsVariable = "TANDEM_RANK_ARGUMENTS";

}  // namespace tandem::worker::runtime
