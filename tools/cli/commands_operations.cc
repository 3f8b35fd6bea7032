#include "protocol/base/clock.h"
#include "storage/registry.h"
#include "tools/cli/commands.h"
#include "tools/cli/output.h"

#include <unistd.h>

#include <algorithm>
#include <climits>
#include <filesystem>
#include <iostream>

namespace tandem::tools {
namespace {

void print(Session& session, const Json& result) {
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << describe(result);
}

}  // namespace

Status run_worker_action(Session& session, const std::string& action, const std::string& worker) {
  TANDEM_ASSIGN_OR_RETURN(const Json result,
                          session.call("worker." + action, {{"worker", worker}}));
  print(session, result);
  return {};
}

Status run_cache(Session& session, const std::string& action) {
  TANDEM_ASSIGN_OR_RETURN(const Json result, session.call("cache." + action, Json::object()));
  print(session, result);
  return {};
}

Status run_registry_check(Session& session, bool offline) {
  Json result;
  if (offline) {
    SystemClock clock;
    storage::RegistryOptions options;
    options.directory = session.settings().data_dir();
    if (!std::filesystem::exists(options.directory + "/registry"))
      return not_found_error(str("no registry in ", options.directory));
    TANDEM_ASSIGN_OR_RETURN(const auto registry, storage::Registry::open(options, clock));
    TANDEM_ASSIGN_OR_RETURN(const auto findings, registry->check(true));
    result = {{"ok", findings.empty()}, {"problems", Json::array()}};
    for (const auto& finding : findings)
      result["problems"].push_back(finding.where + ": " + finding.message);
  } else {
    TANDEM_ASSIGN_OR_RETURN(result, session.call("registry.check", {{"verify_blobs", true}}));
  }
  if (session.json())
    session.print_json(result);
  else if (result.value("ok", false))
    std::cout << "the registry is clean\n";
  for (const auto& problem : result.value("problems", Json::array()))
    if (!session.json()) std::cout << problem.get<std::string>() << "\n";
  if (result.value("ok", false)) return {};
  return corrupt_error(
      str(result.value("problems", Json::array()).size(), " problems in the registry"));
}

Status run_registry(Session& session, const std::string& action, const std::string& path) {
  std::error_code error;
  if (action == "restore") {
    TANDEM_RETURN_IF_ERROR(storage::Registry::restore(path, session.settings().data_dir()));
    print(session, {{"restored", session.settings().data_dir()}, {"from", path}});
    return {};
  }
  Json params = Json::object();
  if (action == "backup") params["path"] = std::filesystem::absolute(path, error).string();
  TANDEM_ASSIGN_OR_RETURN(const Json result, session.call("registry." + action, params));
  print(session, result);
  return {};
}

Status run_key(Session& session, const std::string& action, const std::string& name,
               const std::string& role) {
  Json params{{"name", name}};
  if (action == "create") params["role"] = role;
  TANDEM_ASSIGN_OR_RETURN(const Json result, session.call("key." + action, params));
  print(session, result);
  return {};
}

Status run_bench(Session& session, const std::string& name,
                 const std::vector<std::string>& arguments) {
  static const std::vector<std::string> known{"serve", "train", "ops", "registry", "collectives"};
  if (std::find(known.begin(), known.end(), name) == known.end())
    return invalid_error(
        str("no bench \"", name, "\"; there are serve, train, ops, registry and collectives"));
  char self[PATH_MAX] = {};
  if (::readlink("/proc/self/exe", self, sizeof self - 1) < 0)
    return internal_error("cannot find this program's folder");
  const std::string program =
      (std::filesystem::path(self).parent_path() / ("bench_" + name)).string();
  if (!std::filesystem::exists(program))
    return not_found_error(
        str("no bench program ", program, "; tools/dev build bench_", name, " makes it"));
  std::vector<std::string> words{program};
  if (name == "serve")  // it measures this platform
    for (const auto& [flag, setting] : {std::pair{"--data-dir", "data_dir"},
                                        {"--coordinator", "coordinator"},
                                        {"--key-file", "key_file"}})
      if (const std::string& value = session.settings().get(setting); !value.empty())
        words.insert(words.end(), {flag, value});
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::cout.flush();
  ::execv(program.c_str(), argv.data());
  return internal_error(str("cannot start ", program));
}

}  // namespace tandem::tools
