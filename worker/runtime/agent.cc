#include "worker/runtime/agent.h"

#include "protocol/base/log.h"
#include "worker/runtime/coordinator_link.h"
#include "worker/runtime/process.h"
#include "worker/runtime/supervisor.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <utility>
#include <vector>

namespace tandem::worker::runtime {
namespace {

constexpr TimeMs kPollMs = 50;
constexpr TimeMs kTakeOverWaitMs = 10000;
constexpr TimeMs kReportMs = 1000;
constexpr TimeMs kAskMs = 1000;        ///< for a daemon on another host, again
constexpr TimeMs kLastWordMs = 1000;   ///< of a gang whose worker has been given another one
constexpr TimeMs kKillAfterMs = 2000;  ///< beyond the drain time-out
constexpr TimeMs kLongDelayMs = 1000;  ///< before an engine's start: worth a line in the log

StopSignals g_stop_signals;
std::atomic<bool> g_hand_over{false};

void on_signal(int signal) {
  if (signal == SIGUSR1)
    g_hand_over = true;
  else
    g_stop_signals.note();
}

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  for (int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1}) sigaction(signal, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  take_stop_signals();
}

/// Takes the agent's lock; an orphaned agent that holds it is asked to hand over first, whichever
/// it is by then: another one may have waited for the same. One that is an orphan itself asks
/// nobody.
Result<FileLock> take_over(const SlotPaths& paths, const Clock& clock) {
  const TimeMs end = clock.now_ms() + scaled_ms(kTakeOverWaitMs);
  while (true) {
    auto lock = FileLock::acquire(paths.agent_lock);
    const bool looked_after = FileLock::holder(paths.supervisor_lock) == ::getppid();
    if (lock.ok() || !looked_after || clock.now_ms() >= end) return lock;
    if (const pid_t holder = FileLock::holder(paths.agent_lock); holder > 0)
      ::kill(holder, SIGUSR1);
  }
}

class Agent {
 public:
  Agent(const AgentOptions& options, const SlotPaths& paths,
        std::unique_ptr<protocol::ClientEndpoint> endpoint, const Clock& clock)
      : options_(options),
        paths_(paths),
        clock_(clock),
        incarnation_(entropy64() | 1),
        link_(std::move(endpoint), clock,
              {[this] { return hello(); }, [this](auto seq) { return heartbeat(seq); }}),
        gang_(options.gang, paths, clock) {
    gang_.adopt();
    (void)adopt_engine();  // one that is asked to stop before its first look at it ends it too
  }

  int run() {
    while (true) {
      if (auto message = link_.poll(kPollMs)) handle(*message);
      if (g_hand_over) {
        log_info("handing the slot to a new agent; engine ", engine_, " stays");
        return kExitAsked;
      }
      if (g_stop_signals.count() > stops_seen_) {
        if (stopping_) {
          kill_engine(SIGKILL);
          gang_.kill();
        }
        stops_seen_ = g_stop_signals.count();
        begin_stop();
      }
      if (exit_code_ >= 0) return exit_code_;
      watch_engine();
      watch_gang();
      if (stopping_ && engine_ == 0 && !gang_.led()) {
        (void)link_.send(
            protocol::WorkerBye{options_.worker, protocol::WorkerRole::kAgent, incarnation_});
        return kExitAsked;
      }
    }
  }

 private:
  protocol::WorkerHello hello() const {
    protocol::WorkerHello hello;
    hello.role = protocol::WorkerRole::kAgent;
    hello.worker = options_.worker;
    hello.host = options_.host;
    hello.slot = options_.slot;
    hello.device = options_.device;
    hello.device_name = options_.device_name;
    hello.program = options_.program;
    hello.memory_bytes = options_.memory_bytes;
    hello.pid = ::getpid();
    hello.incarnation = incarnation_;
    if (const auto led = gang_.led()) hello.jobs = {*led};
    return hello;
  }

  protocol::Heartbeat heartbeat(std::uint64_t seq) const {
    protocol::Heartbeat beat;
    beat.worker = options_.worker;
    beat.role = protocol::WorkerRole::kAgent;
    beat.incarnation = incarnation_;
    beat.seq = seq;
    if (const auto led = gang_.led()) beat.jobs = {*led};
    return beat;
  }

  void handle(const protocol::ControlMessage& message) {
    if (const auto* reply = std::get_if<protocol::WorkerHelloReply>(&message)) {
      if (!reply->status.ok())
        log_warn("the coordinator refuses this worker: ", reply->status.message());
      for (const JobId& job : reply->stop_jobs) end_gang(job);
      return;
    }
    if (const auto* start = std::get_if<protocol::StartJob>(&message)) return start_gang(*start);
    if (const auto* stop = std::get_if<protocol::StopJob>(&message)) return stop_gang(*stop);
    if (const auto* ack = std::get_if<protocol::JobAck>(&message)) {
      if (ended_ && ended_->job == ack->job && ended_->epoch == ack->epoch) ended_.reset();
      return;
    }
    if (const auto* launch = std::get_if<protocol::LaunchDaemon>(&message))
      return launch_daemon(*launch);
    if (const auto* launched = std::get_if<protocol::DaemonLaunched>(&message))
      return gang_.answer(*launched);
    const auto* command = std::get_if<protocol::AgentCommand>(&message);
    if (!command || command->action != protocol::AgentAction::kRestartEngine) return;
    // Repeated: a second signal would end it without a checkpoint, or end the one that came after.
    if (engine_ == 0 || kill_at_ms_ != 0) return;
    if (command->engine != 0 && !runs_as(paths_, engine_, command->engine)) return;
    log_info("asked to restart the engine");
    restarting_ = true;
    kill_engine(SIGTERM);
  }

  void begin_stop() {
    if (stopping_) return;
    stopping_ = true;
    kill_engine(SIGTERM);
    gang_.drain();
    gang_kill_at_ms_ = clock_.now_ms() + scaled_ms(options_.drain_timeout_ms + kKillAfterMs);
  }

  // -- the gang that this worker leads
  void start_gang(const protocol::StartJob& start) {
    if (start.gang == 0 || start.members.empty() || stopping_) return;
    const protocol::RunningJob wanted{start.job, start.epoch, 0};
    if (const auto& running = gang_.running()) {
      if (*running == wanted) return;  // repeated
      if (running->job == start.job && running->epoch > start.epoch) return;
      // One that has had its last word is about to be gone; any other has a moment to go.
      if (!next_start_) gang_kill_at_ms_ = clock_.now_ms() + scaled_ms(kLastWordMs);
      next_start_ = start;
      return;
    }
    if (ended_ && ended_->job == start.job && ended_->epoch == start.epoch) return;
    if (last_started_ == wanted) return;  // it ended, and that is known
    last_started_ = wanted;
    log_info("starting the gang of ", start.job, " epoch ", start.epoch, ": ", start.members.size(),
             " ranks");
    if (const Status status = gang_.start(start); !status.ok()) report_ended(wanted, status);
  }

  /// The daemon of a gang that another host leads. What else is here has lost its slot.
  void launch_daemon(const protocol::LaunchDaemon& launch) {
    const protocol::RunningJob wanted{launch.start.job, launch.start.epoch, 0};
    Status status;
    if (const auto& running = gang_.running(); !running || *running != wanted) {
      if (running) return gang_.kill();  // the leader's agent asks again
      status = stopping_ ? unavailable_error(str(options_.worker, " is being stopped"))
                         : gang_.join(launch);
      log_info("a daemon for ", wanted.job, " epoch ", wanted.epoch, ": ",
               status.ok() ? "started" : status.message());
    }
    (void)link_.send(protocol::DaemonLaunched{wanted.job, wanted.epoch, options_.worker, status});
  }

  /// What the led gang's mpirun waits for, said until it is answered.
  void ask_for_daemons() {
    if (clock_.now_ms() < next_ask_ms_) return;
    const auto wanted = gang_.wanted_daemons();
    for (const protocol::LaunchDaemon& launch : wanted) (void)link_.send(launch);
    if (!wanted.empty()) next_ask_ms_ = clock_.now_ms() + scaled_ms(kAskMs);
  }

  void stop_gang(const protocol::StopJob& stop) {
    const auto running = gang_.led();
    if (running && running->job == stop.job && running->epoch == stop.epoch)
      return end_gang(stop.job);
    const bool next =
        next_start_ && next_start_->job == stop.job && next_start_->epoch == stop.epoch;
    if (next) next_start_.reset();
    if (!running || next)
      report_ended({stop.job, stop.epoch, 0}, cancelled_error("no gang of it is here"));
  }

  void end_gang(const JobId& job) {
    if (!gang_.led() || gang_.led()->job != job) return;
    gang_asked_ = true;
    gang_.kill();
  }

  void watch_gang() {
    const TimeMs now = clock_.now_ms();
    ask_for_daemons();
    if (const auto running = gang_.running()) {
      const bool led = gang_.led().has_value();
      if (gang_asked_ || ((stopping_ || next_start_) && now >= gang_kill_at_ms_)) gang_.kill();
      if (const auto how = gang_.poll()) {
        const std::string end = str(*how, "; see ", options_.gang.log);
        const std::string what = "the gang is over: " + end;
        log_info(running->job, " epoch ", running->epoch, ": ", what);
        if (led)
          report_ended(*running, gang_asked_ ? cancelled_error(what) : unavailable_error(what));
        else if (gang_.failed())
          (void)link_.send(
              protocol::DaemonLaunched{running->job, running->epoch, options_.worker,
                                       unavailable_error(str(options_.worker, ": ", end))});
        gang_asked_ = false;
        if (const auto next = std::exchange(next_start_, std::nullopt)) start_gang(*next);
      }
    }
    if (!ended_ || now < next_report_ms_) return;
    (void)link_.send(*ended_);
    next_report_ms_ = now + scaled_ms(kReportMs);
  }

  /// What its first rank may not have been able to say; told until it is acknowledged.
  void report_ended(const protocol::RunningJob& gang, const Status& status) {
    ended_ = protocol::JobEnded{gang.job, gang.epoch, status, 0, "{}"};
    next_report_ms_ = 0;
  }

  void kill_engine(int signal) {
    if (engine_ == 0) return;
    ::kill(engine_, signal);
    if (kill_at_ms_ == 0)
      kill_at_ms_ = clock_.now_ms() + scaled_ms(options_.drain_timeout_ms + kKillAfterMs);
  }

  void watch_engine() {
    if (engine_ != 0) {
      if (kill_at_ms_ && clock_.now_ms() >= kill_at_ms_) {
        log_warn("engine ", engine_, " did not end in time; killing it");
        ::kill(engine_, SIGKILL);
        kill_at_ms_ = clock_.now_ms() + scaled_ms(kKillAfterMs);
      }
      if (!engine_ended()) return;
      engine_ = 0;
      kill_at_ms_ = 0;
      if (std::exchange(restarting_, false) && !stopping_) become_new_agent();
      const std::int64_t delay_ms =
          backoff_.next_delay_ms(clock_.now_ms() - started_ms_, by_itself_);
      if (delay_ms >= kLongDelayMs) log_warn("the next engine starts in ", delay_ms, " ms");
      start_at_ms_ = clock_.now_ms() + delay_ms;
    }
    if (stopping_ || exit_code_ >= 0 || clock_.now_ms() < start_at_ms_) return;
    if (adopt_engine()) return;
    auto pid = start_process(options_.executable, options_.engine_arguments, false);
    started_ms_ = clock_.now_ms();
    if (!pid.ok()) {
      log_error("cannot start the engine: ", pid.status().message());
      start_at_ms_ = clock_.now_ms() + backoff_.next_delay_ms(0);
      return;
    }
    engine_ = *pid;
    child_ = true;
    log_info("started engine ", engine_);
  }

  /// The engine of an agent that was here before.
  bool adopt_engine() {
    const auto running = running_engine(paths_);
    if (!running) return false;
    log_info("adopting engine ", running->pid);
    engine_ = running->pid;
    child_ = false;
    started_ms_ = clock_.now_ms();
    return true;
  }

  /// Whether the engine is gone; its exit code may end the agent too.
  bool engine_ended() {
    if (!child_) {
      const auto running = running_engine(paths_);
      return !running || running->pid != engine_;
    }
    int wait_status = 0;
    by_itself_ = false;
    if (::waitpid(engine_, &wait_status, WNOHANG) != engine_) return false;
    by_itself_ = WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) != kExitAsked
                                        : WTERMSIG(wait_status) != SIGKILL;
    if (WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == kExitUsage) exit_code_ = kExitUsage;
    if (!stopping_) log_warn("engine ", engine_, " ended by ", describe_wait_status(wait_status));
    return true;
  }

  /// Between two engines: the program that is in place now, which may be a newer one, takes over in
  /// this process. A gang that this one watches keeps it.
  void become_new_agent() {
    if (gang_.running()) return;
    std::vector<std::string> arguments = options_.engine_arguments;
    std::replace(arguments.begin(), arguments.end(), std::string("--engine"),
                 std::string("--agent"));
    std::vector<char*> argv{const_cast<char*>(options_.executable.c_str())};
    for (auto& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    hold_stop_signals();
    ::execv(options_.executable.c_str(), argv.data());  // locks are close-on-exec and taken anew
    take_stop_signals();
    log_error("cannot execute ", options_.executable, ": ", std::strerror(errno));
  }

  const AgentOptions& options_;
  const SlotPaths& paths_;
  const Clock& clock_;
  const Incarnation incarnation_;
  CoordinatorLink link_;
  GangKeeper gang_;
  std::optional<protocol::JobEnded> ended_;       ///< of a gang, until it is acknowledged
  std::optional<protocol::StartJob> next_start_;  ///< waits for what runs to be gone
  protocol::RunningJob last_started_;
  bool gang_asked_ = false;
  TimeMs gang_kill_at_ms_ = 0, next_report_ms_ = 0, next_ask_ms_ = 0;
  RestartBackoff backoff_;
  pid_t engine_ = 0;
  bool child_ = false, stopping_ = false, restarting_ = false, by_itself_ = false;
  int stops_seen_ = 0, exit_code_ = -1;
  TimeMs started_ms_ = 0, start_at_ms_ = 0, kill_at_ms_ = 0;
};

}  // namespace

int run_agent(const AgentOptions& options, const SlotPaths& paths,
              std::unique_ptr<protocol::ClientEndpoint> coordinator, const Clock& clock) {
  install_signal_handlers();
  auto lock = take_over(paths, clock);
  if (!lock.ok()) {
    log_error(lock.status().message());
    return kExitUsage;
  }
  return Agent(options, paths, std::move(coordinator), clock).run();
}

}  // namespace tandem::worker::runtime
