// Starting and watching child processes: fork, exec, and death signals. Any thread that owns the
// child.
#pragma once

#include "protocol/base/result.h"

#include <sys/types.h>

#include <string>
#include <vector>

namespace tandem::worker::runtime {

/// Starts `executable` with `arguments`; signals are unblocked and reset in the child. With
/// `die_with_parent` the child gets SIGKILL when the calling thread's process ends.
Result<pid_t> start_process(const std::string& executable,
                            const std::vector<std::string>& arguments, bool die_with_parent);

/// A program with everything of its own.
struct ProcessSpec {
  std::string executable;
  std::vector<std::string> arguments;
  std::vector<std::string> environment;  ///< "NAME=value", all of it
  bool own_session = false;              ///< no terminal's signals
  std::string output;                    ///< file that standard output and error are appended to
  int inherit = -1;                      ///< this descriptor stays open in it
};
Result<pid_t> start_process(const ProcessSpec& spec);

/// Grows from 20 ms, doubling to 5 s while children die within 5 s of their start; else 0.
class RestartBackoff {
 public:
  /// Milliseconds to wait before the next start of a child that lived `lived_ms`.
  std::int64_t next_delay_ms(std::int64_t lived_ms);

 private:
  std::int64_t delay_ms_ = 0;
};

/// "exit code 3" or "signal 9 (Killed)".
std::string describe_wait_status(int wait_status);

}  // namespace tandem::worker::runtime
