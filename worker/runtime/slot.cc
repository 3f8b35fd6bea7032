#include "worker/runtime/slot.h"

#include "storage/file_io.h"

#include <nlohmann/json.hpp>

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace tandem::worker::runtime {
Result<SlotPaths> SlotPaths::create(const std::string& run_dir, const std::string& device,
                                    int slot) {
  SlotPaths paths;
  paths.directory = str(run_dir, "/worker-", device, slot);
  std::error_code error;
  std::filesystem::create_directories(paths.directory, error);
  if (error) return internal_error(str("cannot create ", paths.directory, ": ", error.message()));
  // The run directory too: ipc sockets lie in it, and a worker may be here before its coordinator.
  for (const std::string& directory : {run_dir, paths.directory})
    if (::chmod(directory.c_str(), 0700) != 0)
      return internal_error(str("cannot close ", directory, " to others: ", std::strerror(errno)));
  paths.supervisor_lock = paths.directory + "/supervisor.lock";
  paths.agent_lock = paths.directory + "/agent.lock";
  paths.engine_lock = paths.directory + "/engine.lock";
  paths.engine_json = paths.directory + "/engine.json";
  return paths;
}

Status write_engine_info(const SlotPaths& paths, const EngineInfo& info) {
  return storage::write_file_durably(
      paths.engine_json,
      nlohmann::json{{"pid", info.pid}, {"incarnation", info.incarnation}, {"gpu", info.gpu}}
          .dump());
}

namespace {

std::optional<EngineInfo> read_engine_info(const SlotPaths& paths) {
  std::ifstream in(paths.engine_json);
  const auto json = nlohmann::json::parse(in, nullptr, false);
  if (!json.is_object() || !json.contains("pid") || !json["pid"].is_number_integer())
    return std::nullopt;
  return EngineInfo{json["pid"].get<pid_t>(), json.value("incarnation", Incarnation{0}),
                    json.value("gpu", "")};
}

}  // namespace

std::optional<EngineInfo> running_engine(const SlotPaths& paths) {
  return FileLock::is_held(paths.engine_lock) ? read_engine_info(paths) : std::nullopt;
}

bool runs_as(const SlotPaths& paths, pid_t pid, Incarnation incarnation) {
  const auto engine = running_engine(paths);
  return engine && engine->pid == pid && engine->incarnation == incarnation;
}

std::string gpu_of(const SlotPaths& paths) {
  const auto info = read_engine_info(paths);
  return info ? info->gpu : "";
}

void forget_engine(const SlotPaths& paths) {
  if (!FileLock::is_held(paths.engine_lock)) (void)::unlink(paths.engine_json.c_str());
}

Result<int> slot_of(const WorkerId& worker) {
  const std::size_t begin = worker.value.find_last_not_of("0123456789") + 1;
  const std::string digits = worker.value.substr(begin);
  if (digits.empty() || digits.size() > 6)
    return invalid_error(str("worker ", worker, " has no slot at its end"));
  return std::stoi(digits);
}

std::string host_name() {
  char name[256] = {};
  if (::gethostname(name, sizeof name - 1) != 0 || !name[0]) return "localhost";
  return name;
}

}  // namespace tandem::worker::runtime
