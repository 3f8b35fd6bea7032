#include "kernels/cuda/cuda_backend.h"
#include "protocol/base/clock.h"
#include "protocol/base/units.h"
#include "tools/cli/commands.h"
#include "tools/cli/output.h"
#include "worker/runtime/process.h"
#include "worker/runtime/slot.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <climits>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <thread>

namespace tandem::tools {
namespace {

namespace fs = std::filesystem;

constexpr TimeMs kStartTimeoutMs = 20000, kStopTimeoutMs = 60000, kPollMs = 50;

std::string sibling(const std::string& program) {
  char self[PATH_MAX] = {};
  if (::readlink("/proc/self/exe", self, sizeof self - 1) < 0) return program;
  return (fs::path(self).parent_path() / program).string();
}

Result<Json> read_json(const std::string& path) {
  std::ifstream in(path);
  Json json = Json::parse(in, nullptr, false);
  if (!json.is_object()) return not_found_error(str("no ", path));
  return json;
}

bool alive(pid_t pid) {
  return pid > 0 && ::kill(pid, 0) == 0;
}

pid_t read_pid(const std::string& path) {
  const auto json = read_json(path);
  return json.ok() ? json->value("pid", 0) : 0;
}

template <class Condition>
bool wait_until(TimeMs timeout_ms, Condition condition) {
  const std::int64_t end = steady_ns() / 1'000'000 + scaled_ms(timeout_ms);
  while (!condition()) {
    if (steady_ns() / 1'000'000 > end) return false;
    ::usleep(kPollMs * 1000);
  }
  return true;
}

/// Starts a daemon of its own session with its output in `log`; returns its pid.
Result<pid_t> start_daemon(const std::vector<std::string>& command, const std::string& log) {
  const pid_t pid = ::fork();
  if (pid < 0) return internal_error("fork failed");
  if (pid > 0) return pid;
  ::setsid();
  const int out = ::open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
  const int null = ::open("/dev/null", O_RDONLY);
  ::dup2(null, STDIN_FILENO);
  if (out >= 0) {
    ::dup2(out, STDOUT_FILENO);
    ::dup2(out, STDERR_FILENO);
  }
  std::vector<char*> argv;
  for (const auto& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  ::execvp(argv[0], argv.data());
  ::_exit(127);
}

/// The settings this command was given, for the daemons it starts.
std::vector<std::string> daemon_arguments(const protocol::Settings& settings) {
  std::vector<std::string> arguments{"--data-dir", settings.data_dir()};
  for (const auto& [name, value] : settings.all()) {
    if (name == "data_dir" || (value.origin != "flag" && !fs::exists(value.origin))) continue;
    std::string flag = "--" + name;
    for (char& c : flag)
      if (c == '_') c = '-';
    arguments.push_back(flag);
    arguments.push_back(value.value);
  }
  return arguments;
}

Status start_coordinator(Session& session) {
  const auto& settings = session.settings();
  const std::string ready = settings.run_dir() + "/coordinator.json";
  if (alive(read_pid(ready))) return {};
  std::error_code error;
  fs::remove(ready, error);
  std::vector<std::string> command{sibling("tandem-coordinator")};
  for (auto& argument : daemon_arguments(settings)) command.push_back(argument);
  const std::string log = settings.log_dir() + "/coordinator.out";
  TANDEM_ASSIGN_OR_RETURN(const pid_t pid, start_daemon(command, log));
  int wait_status = 0;
  bool ended = false;
  const bool up = wait_until(kStartTimeoutMs, [&] {
    ended = ::waitpid(pid, &wait_status, WNOHANG) == pid;
    return ended || alive(read_pid(ready));
  });
  if (ended || !up)
    return internal_error(str(
        "the coordinator did not start (",
        ended ? worker::runtime::describe_wait_status(wait_status) : "time-out", "); see ", log));
  return {};
}

/// The supervisors of this host's slots that are there.
std::vector<pid_t> supervisors(const protocol::Settings& settings) {
  std::vector<pid_t> pids;
  std::error_code error;
  for (const auto& slot : fs::directory_iterator(settings.run_dir(), error)) {
    const std::string path = slot.path() / "supervisor.lock";
    std::ifstream lock(path);
    if (pid_t pid = 0; worker::runtime::FileLock::is_held(path) && lock >> pid) pids.push_back(pid);
  }
  return pids;
}

/// mpirun starts all workers of this host; slots that are there already are left alone.
Status start_workers(Session& session) {
  const auto& settings = session.settings();
  const std::string pid_file = settings.run_dir() + "/workers.json";
  TANDEM_ASSIGN_OR_RETURN(const std::int64_t count, settings.get_int("workers"));
  if (count < 1 || count > 1024)
    return invalid_error(str("workers must be in 1..1024, not ", count));
  if (static_cast<std::int64_t>(supervisors(settings).size()) >= count) return {};
  for (const auto& [name, value] : {std::pair{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                                    {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
                                    {"OMPI_MCA_rmaps_base_oversubscribe", "1"},
                                    {"OMPI_MCA_hwloc_base_binding_policy", "none"}})
    ::setenv(name, value, 0);
  std::vector<std::string> command{"mpirun", "--enable-recovery", "-np", str(count),
                                   sibling("tandem-worker")};
  for (auto& argument : daemon_arguments(settings)) command.push_back(argument);
  const std::string log = settings.log_dir() + "/mpirun.out";
  TANDEM_ASSIGN_OR_RETURN(const pid_t pid, start_daemon(command, log));
  std::ofstream(pid_file) << Json{{"pid", pid}}.dump();
  const bool up = wait_until(kStartTimeoutMs, [&] {
    auto status = session.call("status", Json::object());
    if (!status.ok()) return false;
    std::int64_t ready = 0;
    for (const auto& worker : status->value("workers", Json::array()))
      ready += field(worker, "state") != "lost";
    return ready >= count;
  });
  if (!up)
    return internal_error(
        str("not all ", count, " workers came up; see ", log, " and ", settings.log_dir()));
  return {};
}

}  // namespace

Status run_up(Session& session, const UpOptions& options) {
  const auto& settings = session.settings();
  std::error_code error;
  for (const auto& directory : {settings.data_dir(), settings.run_dir(), settings.log_dir()}) {
    fs::create_directories(directory, error);
    if (error) return internal_error(str("cannot create ", directory, ": ", error.message()));
  }
  TANDEM_RETURN_IF_ERROR(start_coordinator(session));
  TANDEM_RETURN_IF_ERROR(start_workers(session));
  TANDEM_RETURN_IF_ERROR(run_status(session));
  if (!options.foreground) return {};
  sigset_t signals;
  sigemptyset(&signals);
  for (int signal : {SIGINT, SIGTERM}) sigaddset(&signals, signal);
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  int signal = 0;
  sigwait(&signals, &signal);
  return run_down(session);
}

Status run_down(Session& session) {
  const auto& settings = session.settings();
  const std::string coordinator_file = settings.run_dir() + "/coordinator.json";
  const std::string workers_file = settings.run_dir() + "/workers.json";
  const pid_t coordinator = read_pid(coordinator_file), launcher = read_pid(workers_file);
  const auto running = [&] { return alive(launcher) || !supervisors(settings).empty(); };
  Json result{{"coordinator", alive(coordinator)}, {"workers", running()}};
  // Engines write a checkpoint and say goodbye before the coordinator goes. Not to mpirun, which
  // would kill them after a second: each mpirun ends when the workers that it started have.
  for (const pid_t supervisor : supervisors(settings)) ::kill(supervisor, SIGTERM);
  if (!wait_until(kStopTimeoutMs, [&] { return !running(); })) {
    if (alive(launcher)) ::kill(launcher, SIGKILL);
    for (const pid_t supervisor : supervisors(settings)) ::kill(supervisor, SIGKILL);
  }
  if (alive(coordinator)) {
    ::kill(coordinator, SIGTERM);
    if (!wait_until(kStopTimeoutMs, [&] { return !alive(coordinator); }))
      return timeout_error(
          str("coordinator ", coordinator, " did not end within ", kStopTimeoutMs / 1000, " s"));
  }
  std::error_code error;
  fs::remove(coordinator_file, error);
  fs::remove(workers_file, error);
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << (result["coordinator"].get<bool>() ? "stopped\n" : "nothing was running\n");
  return {};
}

Status run_status(Session& session) {
  TANDEM_ASSIGN_OR_RETURN(const Json status, session.call("status", Json::object()));
  if (session.json()) {
    std::cout << status.dump() << "\n";
    return {};
  }
  Json top = status;
  top.erase("workers");
  top.erase("replicas");
  std::cout << describe(top);
  const Json replicas = status.value("replicas", Json::array());
  if (!replicas.empty()) {
    Table shown({"REPLICA", "STATE", "MODEL", "LAYOUT", "WORKER", "REQUESTS", "TOKENS/S"});
    for (const auto& replica : replicas)
      shown.add({field(replica, "replica"), field(replica, "state"),
                 field(replica, "model").substr(0, 24), field(replica, "layout"),
                 field(replica, "worker"), field(replica, "requests"),
                 field(replica, "tokens_per_second")});
    std::cout << shown.to_string();
  }
  Table table({"WORKER", "STATE", "MODEL", "JOBS", "REQUESTS", "TOKENS/S"});
  for (const auto& worker : status.value("workers", Json::array()))
    table.add({field(worker, "worker"), field(worker, "state"),
               field(worker, "model").substr(0, 24), field(worker, "jobs"),
               field(worker, "requests"), field(worker, "tokens_per_second")});
  std::cout << table.to_string();
  return {};
}

Status run_logs(Session& session, int lines, bool follow) {
  const std::string directory = session.settings().log_dir();
  if (!fs::exists(directory)) return not_found_error(str("no logs in ", directory));
  std::vector<std::string> command{"tail", str("-n", lines)};
  if (follow) command.push_back("-F");
  for (const auto& file : fs::directory_iterator(directory))
    if (file.path().extension() == ".log" || file.path().extension() == ".out")
      command.push_back(file.path().string());
  std::vector<char*> argv;
  for (auto& word : command) argv.push_back(word.data());
  argv.push_back(nullptr);
  ::execvp(argv[0], argv.data());
  return internal_error("cannot start tail");
}

Status run_config_show(Session& session, bool origin) {
  if (session.json()) {
    Json all = Json::object();
    for (const auto& [name, value] : session.settings().all())
      all[name] =
          origin ? Json{{"value", value.value}, {"origin", value.origin}} : Json(value.value);
    std::cout << all.dump() << "\n";
    return {};
  }
  Table table(origin ? std::vector<std::string>{"SETTING", "VALUE", "ORIGIN"}
                     : std::vector<std::string>{"SETTING", "VALUE"});
  for (const auto& info : protocol::Settings::known()) {
    const auto& value = session.settings().all().at(info.name);
    const std::string shown = value.value.empty() ? "-" : value.value;
    table.add(origin ? std::vector<std::string>{info.name, shown, value.origin}
                     : std::vector<std::string>{info.name, shown});
  }
  std::cout << table.to_string();
  return {};
}

namespace {

/// One line of the doctor's report.
struct Finding {
  std::string check, state, detail;  ///< state: "ok", "warn" or "fail"
};

Finding check_space(const std::string& name, const std::string& path, std::int64_t wanted) {
  struct statvfs info {};
  fs::path probe = path;
  while (!fs::exists(probe) && probe.has_relative_path()) probe = probe.parent_path();
  if (::statvfs(probe.c_str(), &info) != 0) return {name, "fail", "cannot look at " + path};
  const auto free =
      static_cast<std::int64_t>(info.f_bavail) * static_cast<std::int64_t>(info.f_frsize);
  return {name, free >= wanted ? "ok" : "warn",
          str(path, ": ", format_bytes(free), " free",
              free >= wanted ? "" : str(", ", format_bytes(wanted), " is better"))};
}

Finding check_program(const std::string& program) {
  std::string path = std::getenv("PATH") ? std::getenv("PATH") : "";
  for (std::size_t begin = 0; begin <= path.size();) {
    const auto end = std::min(path.find(':', begin), path.size());
    const fs::path candidate = fs::path(path.substr(begin, end - begin)) / program;
    if (::access(candidate.c_str(), X_OK) == 0) return {program, "ok", candidate.string()};
    begin = end + 1;
  }
  return {program, "fail", program + " is not on the PATH (Debian: openmpi-bin)"};
}

Finding check_gpu() {
  const auto gpu = kernels::probe_cuda_device(0);
  if (!gpu.ok()) return {"gpu", "ok", str("none (", gpu.status().message(), ")")};
  if (Status module = kernels::check_cuda_module(); !module.ok())
    return {"gpu", "fail", str(gpu->name, " found, but ", module.message())};
  return {"gpu", "ok", str(gpu->name, ", ", format_bytes(gpu->memory_bytes))};
}

}  // namespace

Status run_doctor(Session& session) {
  const auto& settings = session.settings();
  std::vector<Finding> findings;
  findings.push_back(check_program("mpirun"));
  findings.push_back(check_space("data", settings.data_dir(), 4 * kGiB));
  findings.push_back(check_space("/dev/shm", "/dev/shm", 64 * kMiB));
  rlimit files{};
  ::getrlimit(RLIMIT_NOFILE, &files);
  findings.push_back({"open files", files.rlim_cur >= 1024 ? "ok" : "warn",
                      str("limit ", files.rlim_cur, ", 1024 is enough")});
  findings.push_back({"cores", "ok", str(std::thread::hardware_concurrency())});
  std::ifstream cpu("/proc/cpuinfo");
  const std::string text((std::istreambuf_iterator<char>(cpu)), {});
  const bool amx = text.find("amx_bf16") != std::string::npos,
             bf16 = text.find("avx512_bf16") != std::string::npos;
  findings.push_back({"bf16", amx || bf16 ? "ok" : "warn",
                      amx    ? "AMX"
                      : bf16 ? "AVX512-BF16"
                             : "none: f32 is used"});
  findings.push_back(check_gpu());
  const bool reachable = session.call("status", Json::object()).ok();
  findings.push_back({"coordinator", reachable ? "ok" : "warn",
                      reachable
                          ? settings.endpoint("clients")
                          : "not running at " + settings.endpoint("clients") + "; tandem up"});
  bool failed = false;
  Json list = Json::array();
  Table table({"CHECK", "STATE", "DETAIL"});
  for (const auto& finding : findings) {
    failed = failed || finding.state == "fail";
    list.push_back(
        {{"check", finding.check}, {"state", finding.state}, {"detail", finding.detail}});
    table.add({finding.check, finding.state, finding.detail});
  }
  if (session.json())
    std::cout << Json{{"ok", !failed}, {"checks", list}}.dump() << "\n";
  else
    std::cout << table.to_string();
  return failed ? internal_error("the doctor found a problem") : Status();
}

}  // namespace tandem::tools
