#include "worker/runtime/gang_hosts.h"

#include "protocol/base/clock.h"
#include "protocol/base/log.h"
#include "protocol/messages.h"
#include "storage/file_io.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <set>
#include <thread>

namespace tandem::worker::runtime {
namespace {

namespace fs = std::filesystem;

constexpr std::uintmax_t kRequestBytesMax = 1 << 20;
constexpr std::size_t kRequestsMax = 256;
constexpr TimeMs kAskForMs = 30'000;  ///< longer than an agent takes to come back
constexpr const char *kRequest = ".request", *kReply = ".reply";

/// What Open MPI 4.1's rsh launcher passes on and a daemon needs. No name here makes a daemon load
/// or run anything of the sender's choice.
const std::set<std::string>& daemon_parameters() {
  static const std::set<std::string> names{"ess",
                                           "ess_base_jobid",
                                           "ess_base_vpid",
                                           "ess_base_num_procs",
                                           "orte_node_regex",
                                           "orte_hnp_uri",
                                           "orte_parent_uri",
                                           "orte_keep_fqdn_hostnames",
                                           "orte_tmpdir_base",
                                           "btl",
                                           "plm",
                                           "plm_rsh_no_tree_spawn",
                                           "pmix",
                                           "odls_base_sigkill_timeout",
                                           "mpi_yield_when_idle",
                                           "rmaps_base_mapping_policy",
                                           "rmaps_base_oversubscribe",
                                           "hwloc_base_binding_policy"};
  return names;
}

/// mpirun quotes for a shell; here there is none.
std::string unquoted(std::string word) {
  if (word.size() >= 2 && word.front() == '"' && word.back() == '"')
    word = word.substr(1, word.size() - 2);
  return word;
}

bool plain(const std::string& word) {
  return std::all_of(word.begin(), word.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
}

std::string read_bounded(const fs::path& path) {
  std::error_code error;
  if (fs::file_size(path, error) > kRequestBytesMax || error) return "";
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string reply_path(const std::string& request) {
  return request.substr(0, request.size() - std::string(kRequest).size()) + kReply;
}

}  // namespace

std::string host_of(const WorkerId& worker) {
  return worker.value.substr(0, worker.value.rfind('/'));
}

std::vector<std::pair<std::string, int>> hosts_of(const std::vector<WorkerId>& members) {
  std::vector<std::pair<std::string, int>> hosts;
  for (const WorkerId& member : members) {
    const std::string host = host_of(member);
    if (hosts.empty() || hosts.back().first != host) hosts.emplace_back(host, 0);
    ++hosts.back().second;
  }
  return hosts;
}

std::vector<std::string> far_mpirun_arguments(const std::vector<std::pair<std::string, int>>& hosts,
                                              const std::string& directory,
                                              const std::string& rank_program) {
  int ranks = 0;
  std::string list;
  for (const auto& [host, count] : hosts) {
    list += str(list.empty() ? "" : ",", host, ":", count);
    ranks += count;
  }
  std::vector<std::string> arguments{"-np",       str(ranks), "--host",   list,   "--oversubscribe",
                                     "--bind-to", "none",     "--map-by", "slot", "--wdir",
                                     "/"};
  // Ranks talk over TCP, those of one host too: its shared memory would need a folder that every
  // host has under the same name.
  const std::pair<const char*, std::string> switches[] = {
      {"btl", "tcp,self"},
      {"orte_tmpdir_base", directory},
      {"orte_keep_fqdn_hostnames", "1"},
      {"plm", "rsh"},
      {"plm_rsh_agent", str(rank_program, " --launch ", directory)},
      {"plm_rsh_no_tree_spawn", "1"},
      {"odls_base_sigkill_timeout", "0"},
      {"mpi_yield_when_idle", "1"}};
  for (const auto& [name, value] : switches)
    arguments.insert(arguments.end(), {"--mca", name, value});
  return arguments;
}

Result<std::vector<std::string>> daemon_arguments(const std::vector<std::string>& asked,
                                                  const std::string& directory) {
  std::vector<std::string> arguments;
  for (std::size_t i = 0; i < asked.size(); ++i) {
    if (asked[i] == "--daemonize") continue;  // its agent is to see it end
    if ((asked[i] != "-mca" && asked[i] != "--mca") || i + 2 >= asked.size())
      return invalid_error(
          str("a gang's daemon takes -mca NAME VALUE alone, not \"", asked[i].substr(0, 80), "\""));
    const std::string name = unquoted(asked[i + 1]), value = unquoted(asked[i + 2]);
    i += 2;
    if (name == "plm_rsh_agent") continue;
    if (!daemon_parameters().contains(name) || !plain(value))
      return invalid_error(
          str("a gang's daemon takes no parameter \"", name.substr(0, 80), "\" of this value"));
    arguments.insert(arguments.end(),
                     {"-mca", name, name == "orte_tmpdir_base" ? directory : value});
  }
  // It starts no further daemons, but looks for what would: ssh, which need not be there.
  arguments.insert(arguments.end(), {"-mca", "plm_rsh_agent", "/bin/false"});
  return arguments;
}

std::vector<LaunchRequest> open_requests(const std::string& directory) {
  std::vector<LaunchRequest> requests;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    const std::string file = it->path().string();
    if (!file.ends_with(kRequest) || fs::exists(reply_path(file)) ||
        requests.size() >= kRequestsMax)
      continue;
    const std::string text = read_bounded(it->path());
    LaunchRequest request{file, "", {}};
    std::vector<std::string> words;
    for (std::size_t at = 0, next; (next = text.find('\0', at)) != std::string::npos; at = next + 1)
      words.push_back(text.substr(at, next - at));
    if (words.size() < 2) continue;
    request.host = words[0];
    request.arguments.assign(words.begin() + 2, words.end());  // words[1] names the program
    requests.push_back(std::move(request));
  }
  return requests;
}

void reply(const LaunchRequest& request, const Status& status) {
  const Status written =
      storage::write_file_durably(reply_path(request.file), status.ok() ? "" : status.message());
  if (!written.ok()) log_warn("a daemon's launcher is not told: ", written.message());
}

int ask_for_daemon(const std::string& directory, const std::vector<std::string>& words) {
  const auto fail = [&](const std::string& why) {
    std::cerr << "tandem-rank: no daemon was started"
              << (words.empty() ? "" : " on " + words.front()) << ": " << why << "\n";
    return 1;
  };
  if (words.size() < 2) return fail("mpirun names a host and a command");
  std::string text;
  for (const std::string& word : words) text.append(word).push_back('\0');
  const std::string file = str(directory, "/launch-", ::getpid(), kRequest);
  if (text.size() > kRequestBytesMax)
    return fail(
        str("its command line has ", text.size(), " bytes, and at most ", kRequestBytesMax));
  if (const Status status = storage::write_file_durably(file, text); !status.ok())
    return fail(status.message());
  const SystemClock clock;
  const TimeMs end = clock.now_ms() + scaled_ms(kAskForMs);
  while (clock.now_ms() < end) {
    if (fs::exists(reply_path(file))) {
      const std::string why = read_bounded(reply_path(file));
      return why.empty() ? 0 : fail(why);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return fail(str("no answer for ", kAskForMs, " ms"));
}

}  // namespace tandem::worker::runtime
