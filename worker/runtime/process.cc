#include "worker/runtime/process.h"

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
constexpr std::int64_t kYoungMs = 5000, kDelayFirstMs = 20, kDelayMaxMs = 5000;
}

Result<pid_t> start_process(const std::string& executable,
                            const std::vector<std::string>& arguments, bool die_with_parent) {
  std::vector<char*> argv;
  argv.push_back(const_cast<char*>(executable.c_str()));
  for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid < 0) return internal_error(str("fork failed: ", std::strerror(errno)));
  if (pid > 0) return pid;
  // In the child, between fork and exec: async-signal-safe calls only.
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  for (int signal : {SIGTERM, SIGINT, SIGHUP, SIGPIPE, SIGUSR1, SIGCHLD})
    std::signal(signal, SIG_DFL);
  if (die_with_parent) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);  // the parent died before prctl took effect
  }
  ::execv(executable.c_str(), argv.data());
  ::_exit(127);
}

std::int64_t RestartBackoff::next_delay_ms(std::int64_t lived_ms) {
  if (lived_ms >= kYoungMs)
    delay_ms_ = 0;
  else
    delay_ms_ = std::min(kDelayMaxMs, std::max(kDelayFirstMs, 2 * delay_ms_));
  return delay_ms_;
}

std::string describe_wait_status(int wait_status) {
  if (WIFEXITED(wait_status)) return str("exit code ", WEXITSTATUS(wait_status));
  if (WIFSIGNALED(wait_status))
    return str("signal ", WTERMSIG(wait_status), " (", strsignal(WTERMSIG(wait_status)), ")");
  return str("wait status ", wait_status);
}

}  // namespace tandem::worker::runtime
