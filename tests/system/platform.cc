#include "tests/system/platform.h"

#include "protocol/base/clock.h"
#include "protocol/base/file_lock.h"
#include "protocol/zap.h"

#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace tandem::test {
namespace {

namespace fs = std::filesystem;

constexpr int kWorkersPort = 5556, kBulkPort = 5557;  ///< with listen_at

/// "" also when the file goes away while it is read, as a process's files do.
std::string read_all(const std::string& path) try {
  std::ifstream in(path);
  return {std::istreambuf_iterator<char>(in), {}};
} catch (const std::ios_base::failure&) {
  return {};
}

std::string program(const std::string& name) {
  static const std::string folder = [] {
    if (const char* set = std::getenv("TANDEM_BIN_DIR")) return std::string(set);
    std::error_code error;
    const fs::path here = fs::read_symlink("/proc/self/exe", error).parent_path();
    for (const fs::path& beside : {here, here.parent_path()})
      if (fs::exists(beside / "tandem-coordinator", error)) return beside.string();
    return std::string(TANDEM_BIN_DIR);
  }();
  return folder + "/" + name;
}

/// True until every thread of the process is gone (a leader can be a zombie before its files are
/// closed).
bool alive(pid_t pid) {
  if (pid <= 0) return false;
  const pid_t reaped = ::waitpid(pid, nullptr, WNOHANG);
  if (reaped >= 0) return reaped == 0;  // a child of ours, or adopted
  const std::string stat = read_all("/proc/" + std::to_string(pid) + "/stat");
  const auto end = stat.rfind(')');
  return end != std::string::npos && end + 2 < stat.size() && stat[end + 2] != 'Z' &&
         stat[end + 2] != 'X';
}

/// What a sanitizer said of a process that the test only knows by its log: it may have been started
/// again since, and all else went well. "" in builds without one.
std::string sanitizer_report(const std::string& folder) {
  constexpr std::size_t kShownBytes = 6000;
  std::error_code error;
  for (const auto& file : fs::recursive_directory_iterator(folder, error)) {
    const std::string text = file.is_regular_file(error) ? read_all(file.path()) : "";
    for (const char* mark :
         {"ERROR: AddressSanitizer", "ERROR: LeakSanitizer", "WARNING: ThreadSanitizer",
          "ThreadSanitizer:DEADLYSIGNAL", ": runtime error: "})
      if (const auto at = text.find(mark); at != std::string::npos)
        return file.path().filename().string() + ": " + text.substr(at, kShownBytes);
  }
  return "";
}

}  // namespace

bool eventually(TimeMs timeout_ms, const std::function<bool()>& condition) {
  const std::int64_t end = steady_ns() / 1'000'000 + scaled_ms(timeout_ms);
  while (!condition()) {
    if (steady_ns() / 1'000'000 > end) return false;
    ::usleep(20'000);
  }
  return true;
}

Platform::Platform(std::vector<std::string> flags) : flags_(std::move(flags)) {
  const auto device = std::find(flags_.begin(), flags_.end(), "--device");
  if (device != flags_.end() && device + 1 != flags_.end()) device_ = *(device + 1);
  char name[] = "/tmp/tandem-system-XXXXXX";
  directory_ = ::mkdtemp(name);
  fs::create_directories(data_dir() + "/log");
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);  // so that what a killed supervisor leaves comes to us
}

Platform::~Platform() {
  client_.reset();
  // Agents and engines first by asking, then whatever is left of this platform by id.
  for (pid_t pid : supervisors_)
    if (alive(pid)) ::kill(pid, SIGTERM);
  // Looked for each time: an agent may wait for the slot of the one that ends.
  const auto left = [&] {
    std::vector<pid_t> pids;
    for (pid_t pid : supervisors_)
      if (alive(pid)) pids.push_back(pid);
    for (int slot = 0; slot < 4; ++slot)
      for (pid_t pid : {agent(slot), engine(slot), gang_mpirun(slot)})
        if (pid > 0 && alive(pid)) pids.push_back(pid);
    return pids;
  };
  eventually(3000, [&] { return left().empty(); });
  eventually(3000, [&] {
    const std::vector<pid_t> rest = left();
    for (pid_t pid : rest) ::kill(pid, SIGKILL);
    return rest.empty();
  });
  if (alive(coordinator_)) kill_process(coordinator_);
  while (::waitpid(-1, nullptr, WNOHANG) > 0) {
  }
  const std::string report = sanitizer_report(data_dir() + "/log");
  EXPECT_EQ(report, "");
  if (!testing::Test::HasFailure())
    fs::remove_all(directory_);
  else
    std::fprintf(stderr, "logs are kept in %s\n", directory_.c_str());
}

void Platform::listen_at(const std::string& address) {
  using protocol::KeyRole;
  address_ = address;
  const std::string accepted = directory_ + "/keys/accepted";
  fs::create_directories(accepted);
  std::string server;
  for (const auto& [name, role] : {std::pair<std::string, KeyRole>{"coordinator", KeyRole::kAdmin},
                                   {"workers", KeyRole::kWorker},
                                   {"test", KeyRole::kClient}}) {
    const auto pair = protocol::generate_curve_keys().value();
    if (server.empty()) server = pair.public_key;
    const Status own = protocol::write_key_file(
        key_file(name), {name, role, pair.public_key, pair.secret_key, server});
    const Status known = protocol::write_key_file(accepted + "/" + name + ".key",
                                                  {name, role, pair.public_key, "", ""});
    ASSERT_TRUE(own.ok() && known.ok()) << own.to_string() << known.to_string();
  }
  flags_.insert(flags_.end(), {"--listen-workers", str("tcp://", address, ":", kWorkersPort),
                               "--listen-bulk", str("tcp://", address, ":", kBulkPort)});
}

pid_t Platform::spawn(const std::string& name, std::vector<std::string> arguments,
                      const std::vector<std::string>& through) {
  arguments.insert(arguments.end(), {"--data-dir", data_dir()});
  if (!address_.empty() && name == "tandem-coordinator")
    arguments.insert(arguments.end(), {"--key-file", key_file("coordinator"), "--keys-dir",
                                       directory_ + "/keys/accepted"});
  if (!address_.empty() && name == "tandem-worker")
    arguments.insert(arguments.end(), {"--key-file", key_file("workers")});
  arguments.insert(arguments.end(), flags_.begin(), flags_.end());
  const std::string path = program(name), log = data_dir() + "/log/" + name + ".out";
  const pid_t pid = ::fork();
  if (pid != 0) return pid;
  const int out = ::open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
  ::dup2(out, STDOUT_FILENO);
  ::dup2(out, STDERR_FILENO);
  std::vector<char*> argv;
  for (const auto& word : through) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(const_cast<char*>(path.c_str()));
  for (auto& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  ::execvp(argv[0], argv.data());
  ::_exit(127);
}

void Platform::start_coordinator() {
  client_.reset();
  const std::string ready = data_dir() + "/run/coordinator.json";
  fs::remove(ready);
  coordinator_ = spawn("tandem-coordinator", {});
  ASSERT_TRUE(eventually(20'000, [&] { return fs::exists(ready) || !alive(coordinator_); }));
  ASSERT_TRUE(alive(coordinator_)) << read_all(data_dir() + "/log/tandem-coordinator.out");
}

void Platform::start_worker(int slot, const std::vector<std::string>& through) {
  supervisors_.push_back(spawn("tandem-worker", {"--slot", std::to_string(slot)}, through));
  ASSERT_TRUE(eventually(20'000, [&] { return engine(slot) > 0; }))
      << read_all(data_dir() + "/log/tandem-worker.out");
}

void Platform::kill_process(pid_t pid) {
  ASSERT_GT(pid, 1);
  ::kill(pid, SIGKILL);
  ASSERT_TRUE(eventually(10'000, [&] { return !alive(pid); }))
      << "process " << pid << " does not die";
}

void Platform::kill_coordinator() {
  kill_process(coordinator_);
}

std::string Platform::slot_directory(int slot) const {
  return data_dir() + "/run/worker-" + device_ + std::to_string(slot);
}

pid_t Platform::lock_holder(int slot, const std::string& lock) const {
  return FileLock::holder(slot_directory(slot) + "/" + lock);
}

pid_t Platform::supervisor(int slot) const {
  return lock_holder(slot, "supervisor.lock");
}
pid_t Platform::agent(int slot) const {
  return lock_holder(slot, "agent.lock");
}
pid_t Platform::engine(int slot) const {
  return lock_holder(slot, "engine.lock");
}

std::string Platform::gang_directory(int slot) const {
  return slot_directory(slot) + "/gang";
}
pid_t Platform::gang_mpirun(int slot) const {
  return lock_holder(slot, "gang/gang.lock");
}
pid_t Platform::gang_rank(int rank, int slot) const {
  return lock_holder(slot, "gang/rank-" + std::to_string(rank) + ".lock");
}

std::map<std::int64_t, double> Platform::losses(const std::string& job) const {
  std::map<std::int64_t, double> losses;
  std::ifstream in(data_dir() + "/runs/" + job + "/metrics.jsonl");
  for (std::string line; std::getline(in, line);) {
    const Json json = Json::parse(line, nullptr, false);
    if (json.is_object() && json.contains("train/loss"))
      losses[json.value("step", std::int64_t{0})] = json["train/loss"].get<double>();
  }
  return losses;
}

protocol::client::Client& Platform::client() {
  if (!client_) {
    protocol::client::ClientOptions options;
    options.endpoint = "ipc://" + data_dir() + "/run/clients.sock";
    options.bulk_endpoint = "ipc://" + data_dir() + "/run/bulk.sock";
    if (!address_.empty()) {
      options.bulk_endpoint = str("tcp://", address_, ":", kBulkPort);
      options.key_file = key_file("test");
    }
    options.connect_ms = 20'000;
    auto connected = protocol::client::Client::connect(options);
    TANDEM_CHECK(connected.ok(), connected.status().to_string());
    client_ = std::move(*connected);
  }
  return *client_;
}

Result<Json> Platform::try_call(const std::string& method, const Json& params,
                                const std::string& idempotency_key) {
  protocol::client::CallOptions options;
  options.idempotency_key = idempotency_key;
  TANDEM_ASSIGN_OR_RETURN(const std::string text, client().call(method, params.dump(), options));
  return Json::parse(text);
}

Json Platform::call(const std::string& method, const Json& params) {
  auto result = try_call(method, params);
  EXPECT_TRUE(result.ok()) << method << ": " << result.status().to_string();
  return result.ok() ? *result : Json::object();
}

std::string Platform::add_data(const std::string& path) {
  auto bulk = client().bulk();
  EXPECT_TRUE(bulk.ok()) << bulk.status().to_string();
  auto upload = (*bulk)->put_file(path);
  EXPECT_TRUE(upload.ok()) << upload.status().to_string();
  Json chunks = Json::array();
  for (const Digest& chunk : upload->chunks) chunks.push_back(chunk.hex());
  return call("data.add", {{"digest", upload->root.hex()},
                           {"name", fs::path(path).filename().string()},
                           {"bytes", upload->bytes},
                           {"chunks", chunks},
                           {"upload", upload->id}})
      .value("digest", "");
}

std::string Platform::submit(const std::string& model, const std::string& data,
                             const std::string& adapter, const Json& settings) {
  const Json spec{{"model", model}, {"dataset", data}, {"adapter", adapter}, {"train", settings}};
  return call("job.submit", {{"spec", spec}}).value("job", "");
}

Json Platform::wait_job(const std::string& job, TimeMs timeout_ms) {
  Json last = Json::object();
  eventually(timeout_ms, [&] {
    auto shown = try_call("job.show", {{"job", job}});
    if (!shown.ok()) return false;
    last = *shown;
    const std::string state = last.value("state", "");
    return state == "done" || state == "failed" || state == "cancelled" || state == "paused";
  });
  return last;
}

Result<protocol::client::Generation> Platform::generate(const std::string& model,
                                                        const std::string& prompt,
                                                        std::int64_t max_tokens, bool no_cache) {
  protocol::Generate request;
  request.model = model;
  request.input.prompt = prompt;
  request.sampling.max_tokens = max_tokens;
  request.sampling.temperature = 0.0f;
  request.sampling.ignore_eos = true;
  request.no_cache = no_cache;
  return client().generate(std::move(request));
}

pid_t Platform::start_cli(const std::vector<std::string>& arguments, const std::string& out,
                          const std::string& err, const std::string& in) const {
  const std::string path = program("tandem"), data = data_dir();
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::dup2(::open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDOUT_FILENO);
    ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDERR_FILENO);
    ::dup2(::open(in.c_str(), O_RDONLY | O_NOCTTY), STDIN_FILENO);
    std::vector<char*> argv{const_cast<char*>(path.c_str()), const_cast<char*>("--data-dir"),
                            const_cast<char*>(data.c_str())};
    for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
    argv.push_back(nullptr);
    ::execv(path.c_str(), argv.data());
    ::_exit(127);
  }
  return pid;
}

Platform::Output Platform::cli(const std::vector<std::string>& arguments) const {
  const std::string out = directory_ + "/cli.out", err = directory_ + "/cli.err";
  const pid_t pid = start_cli(arguments, out, err);
  int status = 0;
  ::waitpid(pid, &status, 0);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), read_all(out),
          read_all(err)};
}

}  // namespace tandem::test
