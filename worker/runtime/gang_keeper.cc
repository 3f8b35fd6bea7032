#include "worker/runtime/gang_keeper.h"

#include "protocol/base/log.h"
#include "protocol/base/units.h"
#include "protocol/codec.h"
#include "storage/file_io.h"
#include "worker/runtime/gang_hosts.h"

#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string_view>

extern char** environ;

namespace tandem::worker::runtime {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kWordBytesMax = 1000;
constexpr TimeMs kLookMs = 500;                    ///< between two looks at a gang's ranks
constexpr std::uintmax_t kLogBytesMax = 16 << 20;  ///< then it begins anew, one old one is kept

/// Variables that a rank may see. Nothing of an outer mpirun, Slurm or PMIx: a nested mpirun would
/// take it for its own.
bool allowed(std::string_view variable) {
  const std::string_view name = variable.substr(0, variable.find('='));
  for (const char* exact : {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR",
                            "LD_LIBRARY_PATH", "GLIBC_TUNABLES", "OPAL_PREFIX"})
    if (name == exact) return true;
  for (const char* prefix : {"TANDEM_", "LC_", "XDG_", "OMP_", "GOMP_", "CUDA_", "NVIDIA_", "NCCL_",
                             "ASAN_", "UBSAN_", "TSAN_", "LSAN_", "GCOV_", "LLVM_"})
    if (name.starts_with(prefix)) return true;
  return false;
}

std::string find_program(const std::string& name) {
  const char* path = std::getenv("PATH");
  std::string_view rest = path != nullptr ? path : "/usr/bin:/bin";
  while (!rest.empty()) {
    const auto colon = std::min(rest.find(':'), rest.size());
    const std::string candidate = str(rest.substr(0, colon), "/", name);
    if (colon > 0 && ::access(candidate.c_str(), X_OK) == 0) return candidate;
    rest.remove_prefix(std::min(colon + 1, rest.size()));
  }
  return "";
}

Status write_file(const std::string& path, std::string_view bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!out.flush()) return internal_error(str("cannot write ", path));
  return {};
}

/// Open MPI maps files in a gang's folder, 4 MiB for each rank of this host and twice as much for
/// all of them: on a full disk its ranks cannot begin, and say nothing of it to whoever waits.
Status require_room(const std::string& folder, const protocol::StartJob& start) {
  const auto here = std::count_if(start.members.begin(), start.members.end(),
                                  [](const auto& m) { return host_of(m) == host_name(); });
  const Status room = storage::require_free_space(folder, (here + 2) * 4 * kMiB);
  return room.ok() ? room : unavailable_error(room.message());
}

/// This program's folder first on PATH, and where its ranks' arguments lie.
std::vector<std::string> far_environment(const GangPaths& paths, const std::string& program) {
  std::vector<std::string> environment = gang_environment(paths.directory);
  const std::string folder = fs::path(program).parent_path().string();
  std::string path = str("PATH=", folder, ":/usr/bin:/bin");
  for (const std::string& variable : environment)
    if (variable.starts_with("PATH=")) path = str("PATH=", folder, ":", variable.substr(5));
  std::erase_if(environment, [](const std::string& v) {
    return v.starts_with("PATH=") || v.starts_with(str(kRankArgumentsVariable, "="));
  });
  environment.push_back(path);
  environment.push_back(str(kRankArgumentsVariable, "=", paths.arguments));
  return environment;
}

}  // namespace

std::vector<std::string> gang_environment(const std::string& directory) {
  std::vector<std::string> environment;
  for (char** variable = environ; *variable != nullptr; ++variable)
    if (allowed(*variable)) environment.emplace_back(*variable);
  environment.push_back("OMPI_MCA_orte_tmpdir_base=" + directory);
  if (::geteuid() == 0) {
    environment.emplace_back("OMPI_ALLOW_RUN_AS_ROOT=1");
    environment.emplace_back("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1");
  }
  return environment;
}

std::vector<std::string> mpirun_arguments(int ranks, const std::string& directory) {
  std::vector<std::string> arguments{"-np", str(ranks), "--oversubscribe", "--bind-to", "none"};
  // One host: shared memory alone, no ports of the ranks, no copies through another's memory (which
  // containers forbid), no launcher but fork. A killed gang is gone at once. Waiting ranks yield.
  const std::pair<const char*, std::string> switches[] = {
      {"btl", "vader,self"},
      {"btl_vader_backing_directory", directory},
      {"btl_vader_single_copy_mechanism", "none"},
      {"orte_tmpdir_base", directory},
      {"plm", "isolated"},
      {"odls_base_sigkill_timeout", "0"},
      {"mpi_yield_when_idle", "1"}};
  for (const auto& [name, value] : switches)
    arguments.insert(arguments.end(), {"--mca", name, value});
  return arguments;
}

GangPaths::GangPaths(const SlotPaths& slot)
    : directory(slot.directory + "/gang"),
      start(directory + "/start.bin"),
      lock(directory + "/gang.lock"),
      json(directory + "/gang.json"),
      last_word(directory + "/why"),
      arguments(directory + "/arguments") {}

std::string GangPaths::rank_lock(int rank) const {
  return str(directory, "/rank-", rank, ".lock");
}

void GangPaths::leave_word(const std::string& why) const {
  const int fd = ::open(last_word.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return;
  (void)!::write(fd, why.data(), std::min(why.size(), kWordBytesMax));
  ::close(fd);
}

std::string GangPaths::word() const {
  std::ifstream in(last_word, std::ios::binary);
  std::string why(kWordBytesMax, '\0');
  in.read(why.data(), static_cast<std::streamsize>(why.size()));
  why.resize(static_cast<std::size_t>(in.gcount()));
  return why;
}

GangKeeper::GangKeeper(GangOptions options, const SlotPaths& slot, const Clock& clock)
    : options_(std::move(options)), paths_(slot), clock_(clock) {}

void GangKeeper::adopt() {
  if (!fs::exists(paths_.directory)) return;
  std::ifstream in(paths_.json);
  const auto json = nlohmann::json::parse(in, nullptr, false);
  if (json.is_object()) {
    mpirun_ = FileLock::holder(paths_.lock);
    running_ = protocol::RunningJob{JobId(json.value("job", std::string())),
                                    json.value("epoch", Epoch{0}), 0};
    led_ = json.value("led", true);
  }
  child_ = false;
  ended_ = false;
  word_ms_ = 0;
  ranks_ms_ = clock_.now_ms();
  how_ = "it had ended while no agent was here";
  if (running_ && FileLock::is_held(paths_.lock)) {
    log_info("adopting the gang of ", running_->job, ", mpirun ", mpirun_);
    how_ = "its mpirun ended";
  }
  if (!running_) clear();
}

Status GangKeeper::start(const protocol::StartJob& start) {
  TANDEM_CHECK(!running_, "one gang at a time");
  Status status = launch(start);
  if (!status.ok()) clear();
  return status;
}

Status GangKeeper::join(const protocol::LaunchDaemon& launch) {
  TANDEM_CHECK(!running_, "one gang at a time");
  Status status = launch_daemon(launch);
  if (!status.ok()) clear();
  return status;
}

Result<FileLock> GangKeeper::make_folder(const protocol::StartJob& start, bool led) {
  if (::access(options_.rank_program.c_str(), X_OK) != 0)
    return refused_error(str("there is no ", options_.rank_program, " on host ", host_name(),
                             ", the program of a rank; install it beside tandem-worker"));
  clear();
  std::error_code error;
  fs::create_directories(paths_.directory, error);
  if (error) return internal_error(str("cannot create ", paths_.directory));
  fs::permissions(paths_.directory, fs::perms::owner_all, error);
  if (const Status room = require_room(paths_.directory, start); !room.ok()) return room;
  const protocol::Bytes frame = protocol::encode(protocol::ControlMessage{start});
  TANDEM_RETURN_IF_ERROR(
      write_file(paths_.start, {reinterpret_cast<const char*>(frame.data()), frame.size()}));
  std::string lines;
  for (const std::string& argument : options_.rank_arguments) lines += argument + "\n";
  TANDEM_RETURN_IF_ERROR(write_file(paths_.arguments, lines));
  if (fs::exists(options_.log, error) && fs::file_size(options_.log, error) > kLogBytesMax)
    fs::rename(options_.log, options_.log + ".1", error);
  TANDEM_ASSIGN_OR_RETURN(auto lock, FileLock::acquire(paths_.lock));
  // First, so that no gang runs of which a later agent knows nothing.
  const nlohmann::json json{{"job", start.job.value}, {"epoch", start.epoch}, {"led", led}};
  TANDEM_RETURN_IF_ERROR(write_file(paths_.json, json.dump()));
  return lock;
}

Status GangKeeper::run(ProcessSpec spec, const FileLock& lock, const protocol::StartJob& start,
                       bool led) {
  spec.own_session = true;
  spec.without_sigterm = true;  // it would kill its ranks, which are to write a checkpoint
  spec.output = options_.log;
  spec.lock = lock.descriptor();
  TANDEM_ASSIGN_OR_RETURN(mpirun_, start_process(spec));
  running_ = protocol::RunningJob{start.job, start.epoch, 0};
  led_ = led;
  child_ = true;
  ended_ = false;
  word_ms_ = 0;
  ranks_ms_ = clock_.now_ms();
  how_.clear();
  return {};
}

Status GangKeeper::launch(const protocol::StartJob& start) {
  ProcessSpec spec;
  spec.executable = find_program("mpirun");
  if (spec.executable.empty())
    return refused_error(str("host ", host_name(),
                             " has no mpirun on PATH, which starts jobs of "
                             "several ranks; install Open MPI (openmpi-bin)"));
  const auto hosts = hosts_of(start.members);
  if (hosts.size() > 1 &&
      str(options_.rank_program, paths_.directory).find(' ') != std::string::npos)
    return refused_error(str("mpirun cannot start ranks on other hosts through ",
                             options_.rank_program, " with files in ", paths_.directory,
                             ": a space is in these names"));
  TANDEM_ASSIGN_OR_RETURN(const FileLock lock, make_folder(start, true));
  if (hosts.size() > 1) {
    spec.arguments = far_mpirun_arguments(hosts, paths_.directory, options_.rank_program);
    spec.arguments.push_back(fs::path(options_.rank_program).filename().string());
    spec.environment = far_environment(paths_, options_.rank_program);
  } else {
    spec.arguments = mpirun_arguments(static_cast<int>(start.members.size()), paths_.directory);
    spec.arguments.push_back(options_.rank_program);
    spec.arguments.insert(spec.arguments.end(), options_.rank_arguments.begin(),
                          options_.rank_arguments.end());
    spec.environment = gang_environment(paths_.directory);
  }
  return run(std::move(spec), lock, start, true);
}

Status GangKeeper::launch_daemon(const protocol::LaunchDaemon& launch) {
  ProcessSpec spec;
  spec.executable = find_program("orted");
  if (spec.executable.empty())
    return refused_error(str("host ", host_name(),
                             " has no orted on PATH, which starts a gang's ranks; install Open MPI "
                             "(openmpi-bin)"));
  TANDEM_ASSIGN_OR_RETURN(spec.arguments, daemon_arguments(launch.arguments, paths_.directory));
  TANDEM_ASSIGN_OR_RETURN(const FileLock lock, make_folder(launch.start, false));
  spec.environment = far_environment(paths_, options_.rank_program);
  return run(std::move(spec), lock, launch.start, false);
}

std::vector<protocol::LaunchDaemon> GangKeeper::wanted_daemons() {
  std::vector<protocol::LaunchDaemon> wanted;
  if (!running_ || !led_) return wanted;
  const auto requests = open_requests(paths_.directory);
  if (requests.empty()) return wanted;
  const auto start = started();
  for (const LaunchRequest& request : requests) {
    const WorkerId* first = nullptr;
    for (std::size_t i = 0; start && first == nullptr && i < start->members.size(); ++i)
      if (host_of(start->members[i]) == request.host) first = &start->members[i];
    if (first == nullptr)
      reply(request, invalid_error(str("no member of the gang is on ", request.host)));
    else
      wanted.push_back({*first, *start, request.arguments});
  }
  return wanted;
}

void GangKeeper::answer(const protocol::DaemonLaunched& launched) {
  if (!running_ || !led_ || running_->job != launched.job || running_->epoch != launched.epoch)
    return;
  bool open = false;
  for (const LaunchRequest& request : open_requests(paths_.directory))
    if (request.host == host_of(launched.worker)) {
      reply(request, launched.status);
      open = true;
    }
  if (!open && !launched.status.ok()) paths_.leave_word(launched.status.message());
}

std::optional<protocol::StartJob> GangKeeper::started() const {
  std::ifstream in(paths_.start, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  const auto message = protocol::decode_control(std::as_bytes(std::span(bytes)));
  const auto* start = message.ok() ? std::get_if<protocol::StartJob>(&*message) : nullptr;
  return start != nullptr ? std::optional(*start) : std::nullopt;
}

std::vector<pid_t> GangKeeper::live_ranks() const {
  std::vector<pid_t> pids;
  for (int rank = 0; rank < protocol::kGangMembersMax; ++rank)
    if (const pid_t pid = FileLock::holder(paths_.rank_lock(rank)); pid > 0) pids.push_back(pid);
  return pids;
}

void GangKeeper::kill() {
  if (!running_) return;
  // By the lock, so that a pid that somebody else has by now is left alone.
  if (mpirun_ > 1 && FileLock::is_held(paths_.lock)) ::kill(mpirun_, SIGKILL);
  for (const pid_t pid : live_ranks()) ::kill(pid, SIGKILL);
}

void GangKeeper::drain() {
  if (led() && mpirun_ > 1 && FileLock::is_held(paths_.lock)) ::kill(mpirun_, SIGUSR1);
}

/// mpirun and its daemons wait for each other without a limit where a host is silent, and so do
/// ranks that come together or part (MPI_Init, MPI_Finalize): there they hold no lock.
void GangKeeper::end_if_stuck() {
  const TimeMs now = clock_.now_ms();
  if (now < next_look_ms_) return;
  next_look_ms_ = now + kLookMs;
  if (word_ms_ == 0 && !paths_.word().empty()) word_ms_ = now;
  if (!live_ranks().empty()) ranks_ms_ = now;
  const bool rankless = now - ranks_ms_ > scaled_ms(kRanklessMs);
  if (rankless) {
    std::string hosts;
    if (const auto start = started())
      for (const auto& [host, count] : hosts_of(start->members))
        hosts += str(hosts.empty() ? "" : ", ", host);
    paths_.leave_word(str("no rank of it ran for ", kRanklessMs / 1000, " s on ", host_name(),
                          "; its hosts must reach each other over TCP, any port: ", hosts));
  }
  if (rankless || (word_ms_ != 0 && now - word_ms_ > scaled_ms(kWordMs))) kill();
}

std::optional<std::string> GangKeeper::poll() {
  if (!running_) return std::nullopt;
  if (!ended_) {
    int wait_status = 0;
    if (child_ && ::waitpid(mpirun_, &wait_status, WNOHANG) == mpirun_) {
      how_ =
          str(led_ ? "its mpirun" : "its daemon", " ended by ", describe_wait_status(wait_status));
    } else if (child_ || FileLock::is_held(paths_.lock)) {
      end_if_stuck();
      return std::nullopt;
    }
    ended_ = true;
    failed_ = wait_status != 0;
  }
  // mpirun is gone; ranks that outlived it have nobody to talk to.
  const auto ranks = live_ranks();
  for (const pid_t pid : ranks) ::kill(pid, SIGKILL);
  if (!ranks.empty()) return std::nullopt;
  running_.reset();
  mpirun_ = 0;
  if (const std::string why = paths_.word(); !why.empty()) how_ += ": " + why;
  clear();
  return how_;
}

void GangKeeper::clear() {
  std::error_code error;
  fs::remove_all(paths_.directory, error);
}

}  // namespace tandem::worker::runtime
