#include "kernels/cuda/cuda_backend.h"
#include "protocol/base/clock.h"
#include "protocol/base/file_lock.h"
#include "protocol/base/processors.h"
#include "protocol/base/units.h"
#include "tools/cli/commands.h"
#include "tools/cli/output.h"
#include "tools/prometheus.h"
#include "worker/runtime/process.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <climits>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <optional>
#include <set>
#include <sstream>

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

/// A whole number of a file that a program wrote; 0 where it has none.
std::int64_t read_number(const std::string& path, const char* name) {
  const auto json = read_json(path);
  if (!json.ok() || !json->contains(name) || !(*json)[name].is_number_integer()) return 0;
  return (*json)[name].get<std::int64_t>();
}

/// When a process began, in the kernel's ticks since the machine's start; 0: there is none.
std::int64_t start_ticks(pid_t pid) {
  std::ifstream in(str("/proc/", pid, "/stat"));
  std::string text((std::istreambuf_iterator<char>(in)), {});
  const auto name_end = text.rfind(')');  // the name may hold anything
  if (name_end == std::string::npos) return 0;
  std::istringstream fields(text.substr(name_end + 1));
  std::string field;
  for (int i = 3; i <= 22; ++i) fields >> field;
  return std::atoll(field.c_str());
}

// A file outlives what it tells of, and the number of a process that is gone may be anybody's by
// now (after a restart of the machine it often is): so each is asked for proof before it is
// signalled.

/// The coordinator of this data folder, which holds its registry; 0: there is none.
pid_t coordinator_of(const protocol::Settings& settings) {
  const auto pid = static_cast<pid_t>(read_number(settings.run_dir() + "/coordinator.json", "pid"));
  return pid > 0 && FileLock::holder(settings.data_dir() + "/registry/owner") == pid ? pid : 0;
}

/// The last mpirun that up started here, while it runs; 0: it does not.
pid_t launcher_of(const protocol::Settings& settings) {
  const std::string file = settings.run_dir() + "/workers.json";
  const auto pid = static_cast<pid_t>(read_number(file, "pid"));
  const std::int64_t began = read_number(file, "start_ticks");
  return pid > 0 && began > 0 && start_ticks(pid) == began ? pid : 0;
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

/// " (LINE)": what a daemon that did not start said last; "" when it said nothing.
std::string last_line(const std::string& log) {
  std::ifstream in(log);
  std::string last;
  for (std::string line; std::getline(in, line);)
    if (!line.empty()) last = line;
  return last.empty() ? "" : " (" + last + ")";
}

/// The same of workers: an agent that ends in an error says why in its own log, and mpirun's has
/// only that it ended.
std::string why_no_worker(const std::string& log_dir, const std::string& mpirun_log) {
  std::error_code error;
  for (const auto& file : fs::directory_iterator(log_dir, error))
    if (file.path().filename().string().starts_with("agent-"))
      if (std::string line = last_line(file.path()); line.find(" ERROR ") != std::string::npos)
        return line;
  return last_line(mpirun_log);
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
  // One that was just killed may still be on its way out.
  if (coordinator_of(settings) != 0 &&
      (session.call("status", Json::object()).ok() || coordinator_of(settings) != 0))
    return {};
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
    return ended || (fs::exists(ready, error) && coordinator_of(settings) != 0);
  });
  if (ended || !up)
    return internal_error(
        str("the coordinator did not start (",
            ended ? worker::runtime::describe_wait_status(wait_status) : "time-out", "); see ", log,
            last_line(log)));
  return {};
}

/// Of each of this host's slots that is in use, who is to be told what becomes of it: its
/// supervisor, or, where that was killed, its agent, or the engine alone.
std::vector<pid_t> slot_masters(const protocol::Settings& settings) {
  std::vector<pid_t> pids;
  std::error_code error;
  for (const auto& slot : fs::directory_iterator(settings.run_dir(), error))
    for (const char* lock : {"supervisor.lock", "agent.lock", "engine.lock"})
      if (const pid_t pid = FileLock::holder(slot.path() / lock); pid > 0) {
        pids.push_back(pid);
        break;
      }
  return pids;
}

std::size_t supervisors(const protocol::Settings& settings) {
  std::size_t count = 0;
  std::error_code error;
  for (const auto& slot : fs::directory_iterator(settings.run_dir(), error))
    count += FileLock::is_held(slot.path() / "supervisor.lock");
  return count;
}

/// mpirun starts all workers of this host; slots that are there already are left alone.
Status start_workers(Session& session) {
  const auto& settings = session.settings();
  const std::string pid_file = settings.run_dir() + "/workers.json";
  TANDEM_ASSIGN_OR_RETURN(const std::int64_t count, settings.get_int("workers"));
  if (static_cast<std::int64_t>(supervisors(settings)) >= count) return {};
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
  std::ofstream(pid_file) << Json{{"pid", pid}, {"start_ticks", start_ticks(pid)}}.dump();
  const bool up = wait_until(kStartTimeoutMs, [&] {
    if (static_cast<std::int64_t>(supervisors(settings)) < count) return false;
    auto status = session.call("status", Json::object());
    if (!status.ok()) return false;
    std::int64_t ready = 0;
    for (const auto& worker : status->value("workers", Json::array()))
      ready += field(worker, "state") != "lost";
    return ready >= count;
  });
  if (!up)
    return internal_error(str("not all ", count, " workers came up; see ", log, " and ",
                              settings.log_dir(), why_no_worker(settings.log_dir(), log)));
  return {};
}

/// Who starts or stops this platform; another up or down waits for its turn.
Result<FileLock> one_at_a_time(const protocol::Settings& settings) {
  return FileLock::acquire(settings.run_dir() + "/up.lock",
                           scaled_ms(2 * kStartTimeoutMs + 2 * kStopTimeoutMs));
}

}  // namespace

Status run_up(Session& session, const UpOptions& options) {
  const auto& settings = session.settings();
  std::error_code error;
  for (const auto& directory : {settings.data_dir(), settings.run_dir(), settings.log_dir()}) {
    fs::create_directories(directory, error);
    if (error) return internal_error(str("cannot create ", directory, ": ", error.message()));
  }
  {
    TANDEM_ASSIGN_OR_RETURN(const FileLock lock, one_at_a_time(settings));
    TANDEM_RETURN_IF_ERROR(start_coordinator(session));
    TANDEM_RETURN_IF_ERROR(start_workers(session));
  }
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
  std::optional<FileLock> lock;
  if (std::error_code error; fs::exists(settings.run_dir(), error)) {
    TANDEM_ASSIGN_OR_RETURN(lock, one_at_a_time(settings));
  }
  const pid_t coordinator = coordinator_of(settings);
  const auto running = [&] {
    return launcher_of(settings) != 0 || !slot_masters(settings).empty();
  };
  const Json result{{"coordinator", coordinator != 0}, {"workers", running()}};
  // Engines write a checkpoint and say goodbye before the coordinator goes. Not to mpirun, which
  // would kill them after a second: each mpirun ends when the workers that it started have.
  // One that up launched may come to its slot only when that is free again: it is told then.
  std::set<pid_t> told;
  const auto all_ended = [&] {
    for (const pid_t master : slot_masters(settings))
      if (told.insert(master).second) ::kill(master, SIGTERM);
    return !running();
  };
  if (!wait_until(kStopTimeoutMs, all_ended)) {
    if (const pid_t launcher = launcher_of(settings)) ::kill(launcher, SIGKILL);
    // Supervisors first, which would start others; then what each of them leaves.
    wait_until(kStopTimeoutMs, [&] {
      for (const pid_t master : slot_masters(settings)) ::kill(master, SIGKILL);
      return !running();
    });
  }
  if (coordinator != 0) {
    ::kill(coordinator, SIGTERM);
    if (!wait_until(kStopTimeoutMs, [&] { return !alive(coordinator); }))
      return timeout_error(
          str("coordinator ", coordinator, " did not end within ", kStopTimeoutMs / 1000, " s"));
  }
  std::error_code error;
  fs::remove(settings.run_dir() + "/coordinator.json", error);
  fs::remove(settings.run_dir() + "/workers.json", error);
  const bool any = result["coordinator"].get<bool>() || result["workers"].get<bool>();
  if (session.json())
    std::cout << result.dump() << "\n";
  else
    std::cout << (any ? "stopped\n" : "nothing was running\n");
  return {};
}

Status run_status(Session& session, bool prometheus) {
  if (prometheus && session.json())
    return invalid_error("--json and --prometheus are two formats of one answer; give one");
  TANDEM_ASSIGN_OR_RETURN(const Json status, session.call("status", Json::object()));
  if (prometheus) {
    TANDEM_ASSIGN_OR_RETURN(const Json jobs, session.call("job.list", Json::object()));
    std::cout << prometheus_text(status, jobs.value("jobs", Json::array()));
    return {};
  }
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

namespace {

/// tail's lines as {"file", "line"} each, empty ones left out; its headers say of which file.
Status print_json_lines(std::vector<std::string> tail) {
  int ends[2] = {};
  const int out = ::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 0);
  if (out < 0 || ::pipe2(ends, O_CLOEXEC) != 0) return internal_error("cannot make a pipe");
  tail.insert(tail.begin() + 1, "-v");
  ::dup2(ends[1], STDOUT_FILENO);  // the child's
  const auto child = worker::runtime::start_process("/usr/bin/env", tail, true);
  ::dup2(out, STDOUT_FILENO);
  ::close(out);
  ::close(ends[1]);
  if (!child.ok()) return child.status();
  std::FILE* const lines = ::fdopen(ends[0], "r");
  char* line = nullptr;
  std::size_t room = 0;
  std::string file;
  for (ssize_t size; (size = ::getline(&line, &room, lines)) > 0;) {
    const std::string text(line, line[size - 1] == '\n' ? size - 1 : size);
    if (text.starts_with("==> ") && text.ends_with(" <=="))
      file = text.substr(4, text.size() - 8);
    else if (!text.empty())
      std::cout << Json{{"file", file}, {"line", text}}.dump(-1, ' ', false,
                                                             Json::error_handler_t::replace)
                << std::endl;
  }
  std::free(line);
  std::fclose(lines);
  int status = 0;
  ::waitpid(*child, &status, 0);
  return status == 0 ? Status()
                     : internal_error("tail: " + worker::runtime::describe_wait_status(status));
}

}  // namespace

Status run_logs(Session& session, int lines, bool follow) {
  const std::string directory = session.settings().log_dir();
  if (!fs::exists(directory)) return not_found_error(str("no logs in ", directory));
  std::vector<std::string> command{"tail", str("-n", lines)};
  if (follow) command.push_back("-F");
  for (const auto& file : fs::directory_iterator(directory))
    if (file.path().extension() == ".log" || file.path().extension() == ".out")
      command.push_back(file.path().string());
  if (session.json()) return print_json_lines(std::move(command));
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
  findings.push_back({"cores", "ok", str(processors())});
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
    session.print_json({{"ok", !failed}, {"checks", list}});
  else
    std::cout << table.to_string();
  return failed ? internal_error("the doctor found a problem") : Status();
}

}  // namespace tandem::tools
