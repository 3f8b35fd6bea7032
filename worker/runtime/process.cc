#include "worker/runtime/process.h"

#include "protocol/base/clock.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

namespace tandem::worker::runtime {
namespace {
constexpr std::int64_t kSameWishNs = 1'000'000'000;
constexpr std::int64_t kYoungMs = 5000, kDelayFirstMs = 20, kDelayMaxMs = 5000;
constexpr std::int64_t kYoungByItselfMs = 120'000, kDelayMaxByItselfMs = 60'000;

/// Async-signal-safe.
void write_own_pid(int fd) {
  char digits[16];
  char* at = digits + sizeof digits;
  for (auto rest = static_cast<unsigned>(::getpid()); rest > 0; rest /= 10)
    *--at = static_cast<char>('0' + rest % 10);
  if (::ftruncate(fd, 0) == 0)
    (void)!::pwrite(fd, at, static_cast<std::size_t>(digits + sizeof digits - at), 0);
}

/// No signal arrives while it lives: a child that is not yet another program would take one by its
/// parent's handler, where nobody hears of it.
class SignalsHeld {
 public:
  SignalsHeld() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsHeld() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsHeld(const SignalsHeld&) = delete;
  SignalsHeld& operator=(const SignalsHeld&) = delete;

 private:
  sigset_t before_{};
};

sigset_t no_signals() {
  sigset_t set;
  sigemptyset(&set);
  return set;
}

sigset_t stop_signals() {
  sigset_t set = no_signals();
  for (int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1}) sigaddset(&set, signal);
  return set;
}

/// Of a child that has no program yet; those of `waiting` stay blocked. Async-signal-safe.
void reset_signals(const sigset_t& waiting) {
  for (int signal : {SIGTERM, SIGINT, SIGHUP, SIGPIPE, SIGUSR1, SIGCHLD})
    std::signal(signal, SIG_DFL);
  sigprocmask(SIG_SETMASK, &waiting, nullptr);
}
}  // namespace

void hold_stop_signals() {
  const sigset_t set = stop_signals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

void take_stop_signals() {
  const sigset_t set = stop_signals();
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}

Result<pid_t> start_process(const std::string& executable,
                            const std::vector<std::string>& arguments, bool die_with_parent,
                            bool stops_wait) {
  std::vector<char*> argv;
  argv.push_back(const_cast<char*>(executable.c_str()));
  for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const pid_t parent = ::getpid();
  const sigset_t waiting = stops_wait ? stop_signals() : no_signals();
  const SignalsHeld held;
  const pid_t pid = ::fork();
  if (pid < 0) return internal_error(str("fork failed: ", std::strerror(errno)));
  if (pid > 0) return pid;
  // In the child, between fork and exec: async-signal-safe calls only.
  reset_signals(waiting);
  if (die_with_parent) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);  // the parent died before prctl took effect
  }
  ::execv(executable.c_str(), argv.data());
  ::_exit(127);
}

Result<pid_t> start_process(const ProcessSpec& spec) {
  std::vector<char*> argv{const_cast<char*>(spec.executable.c_str())}, envp;
  for (const auto& argument : spec.arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  for (const auto& variable : spec.environment) envp.push_back(const_cast<char*>(variable.c_str()));
  argv.push_back(nullptr);
  envp.push_back(nullptr);
  const int out = ::open(spec.output.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  const int in = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  sigset_t waiting = no_signals();
  if (spec.without_sigterm) sigaddset(&waiting, SIGTERM);
  const SignalsHeld held;
  const pid_t pid = out < 0 || in < 0 ? -1 : ::fork();
  if (pid == 0) {
    // Between fork and exec: async-signal-safe calls only.
    reset_signals(waiting);
    if (spec.own_session) ::setsid();
    ::dup2(in, STDIN_FILENO);
    ::dup2(out, STDOUT_FILENO);
    ::dup2(out, STDERR_FILENO);
    if (spec.lock >= 0) {
      ::fcntl(spec.lock, F_SETFD, 0);
      write_own_pid(spec.lock);
    }
    ::execve(spec.executable.c_str(), argv.data(), envp.data());
    ::_exit(127);
  }
  const int failed = errno;
  ::close(out);
  ::close(in);
  if (pid < 0)
    return internal_error(str("cannot start ", spec.executable, " with its output in ", spec.output,
                              ": ", std::strerror(failed)));
  return pid;
}

void StopSignals::note() {
  const std::int64_t now = steady_ns();
  if (count_ > 0 && now - last_ns_ < kSameWishNs) return;
  last_ns_ = now;
  ++count_;
}

void StopSignals::at_least_one() {
  if (count_ == 0) note();
}

std::int64_t RestartBackoff::next_delay_ms(std::int64_t lived_ms, bool by_itself) {
  const std::int64_t most = by_itself ? kDelayMaxByItselfMs : kDelayMaxMs;
  if (lived_ms >= (by_itself ? kYoungByItselfMs : kYoungMs))
    delay_ms_ = 0;
  else
    delay_ms_ = std::min(most, std::max(kDelayFirstMs, 2 * delay_ms_));
  return delay_ms_;
}

std::string describe_wait_status(int wait_status) {
  if (WIFEXITED(wait_status)) return str("exit code ", WEXITSTATUS(wait_status));
  if (WIFSIGNALED(wait_status))
    return str("signal ", WTERMSIG(wait_status), " (", strsignal(WTERMSIG(wait_status)), ")");
  return str("wait status ", wait_status);
}

}  // namespace tandem::worker::runtime
