// The agent's part of a gang: where its worker leads it, starts one mpirun of tandem-rank, watches
// it, ends it, and leaves nothing behind; where ranks of a gang that another host leads are to run,
// the same with the daemon that this mpirun wants here (gang_hosts.h). Everything lies in one
// folder of the slot:
//
//   <run>/worker-cpuN/gang/start.bin    the StartJob frame, read by every rank
//                          gang.lock    held (flock) by mpirun (or the daemon), which inherits it;
//                                       has its pid
//                          gang.json    {"job", "epoch", "led"} for an agent that comes later
//                          arguments    of this host's ranks, where a gang has several hosts
//                          rank-R.lock  held by rank R, with its pid
//                          why          what the first rank that failed says of it, or this
//                                       keeper of ranks that never came
//                          ...          Open MPI's session and shared-memory files
//
// mpirun is a session of its own and does not die with the agent: the next agent adopts it. Its
// ranks die with it (PR_SET_PDEATHSIG). One thread.
#pragma once

#include "protocol/base/clock.h"
#include "protocol/messages.h"
#include "worker/runtime/process.h"
#include "worker/runtime/slot.h"

#include <optional>
#include <string>
#include <vector>

namespace tandem::worker::runtime {

/// Files of a slot's gang.
struct GangPaths {
  explicit GangPaths(const SlotPaths& slot);
  std::string directory, start, lock, json, last_word, arguments;
  [[nodiscard]] std::string rank_lock(int rank) const;
  /// Why a rank ends; the first one to say so is heard, and poll() tells it.
  void leave_word(const std::string& why) const;
  [[nodiscard]] std::string word() const;  ///< "": none was left
};

struct GangOptions {
  std::string rank_program;                 ///< tandem-rank
  std::vector<std::string> rank_arguments;  ///< what every rank gets
  std::string log;                          ///< what mpirun and its ranks write; kept bounded
};

class GangKeeper {
 public:
  GangKeeper(GangOptions options, const SlotPaths& slot, const Clock& clock);

  /// How long a gang may take to end once a rank has said why it ends: Open MPI waits for a host
  /// that is silent.
  static constexpr TimeMs kWordMs = 2000;
  /// How long a gang may be without any rank here that has met the others.
  static constexpr TimeMs kRanklessMs = 60'000;

  /// Takes up the gang that an earlier agent left running, and clears away what a dead one left.
  void adopt();
  /// refused_error: no mpirun on PATH, or no rank program; internal_error: it could not be started.
  /// Only when none runs.
  Status start(const protocol::StartJob& start);
  /// Starts the daemon of a gang that another host leads. Errors as start(), and invalid_error for
  /// a command line that no mpirun of ours gives. Only when none runs.
  Status join(const protocol::LaunchDaemon& launch);
  /// What runs (or is still dying) now, led or joined.
  [[nodiscard]] const std::optional<protocol::RunningJob>& running() const { return running_; }
  /// The same where this worker leads it, which is what the coordinator knows it by.
  [[nodiscard]] std::optional<protocol::RunningJob> led() const {
    return led_ ? running_ : std::nullopt;
  }
  /// Daemons that the led gang's mpirun waits for, until answered.
  std::vector<protocol::LaunchDaemon> wanted_daemons();
  /// A request's answer; or, later, that a daemon has failed: mpirun may wait for it for ever, and
  /// is killed soon.
  void answer(const protocol::DaemonLaunched& launched);
  /// Whether what poll() said last was an end by a signal, or with an exit code; false where it is
  /// not known, of a gang that an earlier agent started.
  [[nodiscard]] bool failed() const { return failed_; }
  /// SIGKILL to all of it; poll() says when it is gone.
  void kill();
  /// SIGUSR1, where it is led: the first rank takes a checkpoint and ends.
  void drain();
  /// When the gang has gone: how it ended, once. Its folder is empty then. Ends one that cannot
  /// end by itself.
  std::optional<std::string> poll();

 private:
  /// Folder and lock for one that is started now.
  Result<FileLock> make_folder(const protocol::StartJob& start, bool led);
  Status launch(const protocol::StartJob& start);
  Status launch_daemon(const protocol::LaunchDaemon& launch);
  Status run(ProcessSpec spec, const FileLock& lock, const protocol::StartJob& start, bool led);
  [[nodiscard]] std::vector<pid_t> live_ranks() const;
  /// What the running gang was started with; nothing where it cannot be read.
  [[nodiscard]] std::optional<protocol::StartJob> started() const;
  void end_if_stuck();
  void clear();

  const GangOptions options_;
  const GangPaths paths_;
  const Clock& clock_;
  TimeMs next_look_ms_ = 0, word_ms_ = 0, ranks_ms_ = 0;  ///< of end_if_stuck()
  std::optional<protocol::RunningJob> running_;
  pid_t mpirun_ = 0;
  bool child_ = false, ended_ = false, failed_ = false, led_ = true;
  std::string how_;
};

/// The environment of a nested mpirun: only what the allow-list names, and Open MPI's own switches
/// for a gang on one host. `directory` takes its files.
std::vector<std::string> gang_environment(const std::string& directory);
/// mpirun's arguments before the program.
std::vector<std::string> mpirun_arguments(int ranks, const std::string& directory);

}  // namespace tandem::worker::runtime
