// What every part of the core shares during a step: the time, the tables, and where effects go.
// Owned by Coordinator; no thread but the one that calls step() touches it.
#pragma once

#include "coordinator/effects.h"
#include "coordinator/limits.h"
#include "protocol/base/random.h"
#include "protocol/base/str.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tandem::coordinator {

struct Options {
  Limits limits;  ///< times already scaled
  Incarnation incarnation = 1;
  std::uint64_t seed = 1;  ///< of ids
  std::string version = "0.1.0";
  std::string config_json = "{}";  ///< answer of config.show
  std::string paths_json = "{}";   ///< endpoints and folders, for status
};

class Context {
 public:
  explicit Context(Options options) : options_(std::move(options)), random_(options_.seed) {}

  [[nodiscard]] const Now& now() const { return now_; }
  [[nodiscard]] const Options& options() const { return options_; }
  [[nodiscard]] const Limits& limits() const { return options_.limits; }
  [[nodiscard]] const Tables& tables() const { return tables_; }
  /// Another one with every step and every change: what was made of the tables under it still
  /// holds.
  [[nodiscard]] std::uint64_t version() const { return version_; }

  /// Changes the tables now and the disk with this step's transaction.
  void put(Write write);
  /// The same, but the transaction may come up to lazy_commit_ms later. For what may be lost.
  void put_lazy(Write write);
  void send_client(const std::string& peer, protocol::ServerMessage message);
  void send_worker(const std::string& peer, protocol::ControlMessage message);
  /// Goes out after the next transaction, lazy writes included.
  void send_worker_after_commit(const std::string& peer, protocol::ControlMessage message);
  /// Returns the id under which WorkDone will come.
  std::uint64_t start_work(WorkRequest request);
  template <class... Args>
  void log(LogLevel level, Args&&... args) {
    logs_.push_back({level, str(std::forward<Args>(args)...)});
  }
  void shutdown() { shutdown_ = true; }
  /// Not 0.
  Incarnation random_incarnation() { return random_.next() | 1; }
  /// `digits` random hex digits.
  std::string random_hex(int digits);

  // -- for Coordinator only
  void begin(const Now& now) {
    now_ = now;
    ++version_;
  }
  /// The last step's transaction is on disk: nothing of it will be taken back.
  void settle() { undo_.clear(); }
  void load(Tables tables) {
    tables_ = std::move(tables);
    tables_.index_jobs();
  }
  /// Takes back everything the last step put, and drops lazy writes and their sends.
  void undo();
  std::vector<Effect> take();

 private:
  const Options options_;
  Now now_;
  Tables tables_;
  Random random_;
  std::uint64_t work_ids_ = 0, version_ = 0;
  std::vector<Write> writes_, lazy_writes_, undo_;
  std::vector<Effect> sends_, work_;
  std::vector<SendWorker> lazy_sends_;
  std::vector<LogLine> logs_;
  TimeMs lazy_since_ = 0;
  bool shutdown_ = false;
};

}  // namespace tandem::coordinator
