// Starting and watching child processes: fork, exec, and death signals. Any thread that owns the
// child.
#pragma once

#include "protocol/base/result.h"

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace tandem::worker::runtime {

/// Starts `executable` with `arguments`; signals are unblocked and reset in the child. With
/// `die_with_parent` the child gets SIGKILL when the calling thread's process ends. With
/// `stops_wait` those that ask it to stop (SIGTERM, SIGINT, SIGHUP, SIGUSR1) wait in it until it
/// calls take_stop_signals(): one that comes while it starts is not its end.
Result<pid_t> start_process(const std::string& executable,
                            const std::vector<std::string>& arguments, bool die_with_parent,
                            bool stops_wait = false);
/// Once their handlers are there; and before this process executes itself anew. The calling thread.
void take_stop_signals();
void hold_stop_signals();

/// A program with everything of its own.
struct ProcessSpec {
  std::string executable;
  std::vector<std::string> arguments;
  std::vector<std::string> environment;  ///< "NAME=value", all of it
  bool own_session = false;              ///< no terminal's signals
  /// SIGTERM does not reach it (what it starts may take it): for one that is asked in another way,
  /// where somebody (Slurm) tells all processes at once to stop.
  bool without_sigterm = false;
  std::string output;  ///< file that standard output and error are appended to
  int lock = -1;       ///< a lock's file: stays open in it, and says its pid from its first moment
};
Result<pid_t> start_process(const ProcessSpec& spec);

/// Counts wishes to stop. Signals within a second of the one that counted are the same wish: mpirun
/// signals the whole process group of its rank, and every parent there passes it on. note() is
/// async-signal-safe.
class StopSignals {
 public:
  void note();
  /// As if one had come, unless one has.
  void at_least_one();
  [[nodiscard]] int count() const { return count_; }

 private:
  std::atomic<int> count_{0};
  std::atomic<std::int64_t> last_ns_{0};
};

/// Grows from 20 ms, doubling to 5 s while children die within 5 s of their start; else 0. Of
/// children that end by themselves (a device that fails, a model that finds no memory) to a minute,
/// and within two: a large model loads for longer than 5 s before it fails again.
class RestartBackoff {
 public:
  /// Milliseconds to wait before the next start of a child that lived `lived_ms`.
  std::int64_t next_delay_ms(std::int64_t lived_ms, bool by_itself = false);

 private:
  std::int64_t delay_ms_ = 0;
};

/// "exit code 3" or "signal 9 (Killed)".
std::string describe_wait_status(int wait_status);

}  // namespace tandem::worker::runtime
