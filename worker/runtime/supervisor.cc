#include "worker/runtime/supervisor.h"

#include "protocol/base/clock.h"
#include "protocol/base/log.h"
#include "worker/runtime/process.h"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <utility>

namespace tandem::worker::runtime {
namespace {

/// Signals the loop waits for; blocked, so that sigtimedwait is the only place where they arrive.
sigset_t watched_signals() {
  sigset_t set;
  sigemptyset(&set);
  for (int signal : {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGUSR1}) sigaddset(&set, signal);
  return set;
}

struct Loop {
  const SupervisorOptions& options;
  pid_t agent = 0;
  std::int64_t started_ms = 0, start_at_ms = 0;
  bool ending = false, succeeded = false;
  RestartBackoff backoff{};

  static std::int64_t now_ms() { return steady_ns() / 1'000'000; }

  void start() {
    auto pid = start_process(options.executable, options.arguments, false, true);
    if (!pid.ok()) {
      log_error("cannot start the agent: ", pid.status().message());
      start_at_ms = now_ms() + backoff.next_delay_ms(0);
      return;
    }
    agent = *pid;
    started_ms = now_ms();
  }

  /// Reaps everything that ended; returns an exit code when we must end too, else -1.
  int reap() {
    int wait_status = 0;
    for (pid_t pid; (pid = ::waitpid(-1, &wait_status, WNOHANG)) > 0;) {
      if (pid != agent) continue;  // an orphaned engine that we adopted
      agent = 0;
      const bool asked = WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == kExitAsked;
      const bool usage = WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == kExitUsage;
      if (asked || usage) return WEXITSTATUS(wait_status);
      if (ending) {  // what it left behind, an engine, a gang, is for one more agent to end
        if (std::exchange(succeeded, true)) return 1;
        start();
        pass_on(SIGTERM);
        continue;
      }
      const std::int64_t delay = backoff.next_delay_ms(now_ms() - started_ms);
      log_warn("agent ", pid, " ended by ", describe_wait_status(wait_status),
               "; starting another in ", delay, " ms");
      start_at_ms = now_ms() + delay;
    }
    return -1;
  }

  /// Without an agent too: another one ends what a dead one left running.
  void pass_on(int signal) {
    if (!agent) start();
    if (agent) ::kill(agent, ending && signal != SIGUSR1 ? SIGINT : SIGTERM);
    if (signal != SIGUSR1) ending = true;
  }
};

}  // namespace

int run_supervisor(const SupervisorOptions& options) {
  auto lock = FileLock::acquire(options.paths.supervisor_lock, 0);
  if (!lock.ok()) {
    log_info("this slot already has a supervisor: ", lock.status().message());
    return kExitAsked;  // launching again fills only the missing slots
  }
  forget_engine(options.paths);
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  const sigset_t signals = watched_signals();
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  Loop loop{options};
  loop.start();
  while (true) {
    const std::int64_t wait_ms =
        loop.agent ? 60'000 : std::max<std::int64_t>(0, loop.start_at_ms - Loop::now_ms());
    const timespec timeout{wait_ms / 1000, wait_ms % 1000 * 1'000'000};
    const int signal = sigtimedwait(&signals, nullptr, &timeout);
    if (signal > 0 && signal != SIGCHLD) loop.pass_on(signal);
    if (const int code = loop.reap(); code >= 0) return code;
    if (!loop.agent) {
      if (loop.ending) return kExitAsked;
      if (Loop::now_ms() >= loop.start_at_ms) loop.start();
    }
  }
}

}  // namespace tandem::worker::runtime
