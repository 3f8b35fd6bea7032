// A real platform for tests: coordinator and workers as processes in a temporary folder, with ipc
// sockets, that the test may kill and start again. Only processes started here are signalled, by
// id. One thread.
#pragma once

#include "protocol/client/client.h"

#include <nlohmann/json.hpp>

#include <sys/types.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace tandem::test {

using Json = nlohmann::ordered_json;

class Platform {
 public:
  /// `flags`: further settings for every process ("--dtype", "f32", ...). Programs are those in
  /// the folder that the environment's TANDEM_BIN_DIR names, else those beside the test or in the
  /// folder above it, else those that were built with it.
  explicit Platform(std::vector<std::string> flags = {});
  ~Platform();
  Platform(const Platform&) = delete;
  Platform& operator=(const Platform&) = delete;

  /// Before anything is started: workers and blobs come over TCP to this address, with keys, not
  /// through sockets' files. Clients of the test go on without, but for their blobs.
  void listen_at(const std::string& address);
  void start_coordinator();
  /// `through`: a command that starts it, such as one that enters a namespace first.
  void start_worker(int slot = 0, const std::vector<std::string>& through = {});
  /// SIGKILL, and waits until it is gone.
  void kill_coordinator();
  void kill_process(pid_t pid);
  /// Current processes of a slot, found through the files that they lock; 0 when there is none.
  [[nodiscard]] pid_t supervisor(int slot = 0) const;
  [[nodiscard]] pid_t agent(int slot = 0) const;
  [[nodiscard]] pid_t engine(int slot = 0) const;
  /// Of the gang that a slot's worker leads: mpirun, and a rank; 0 when there is none.
  [[nodiscard]] pid_t gang_mpirun(int slot = 0) const;
  [[nodiscard]] pid_t gang_rank(int rank, int slot = 0) const;
  /// The folder of that gang; it is there while the gang is.
  [[nodiscard]] std::string gang_directory(int slot = 0) const;
  [[nodiscard]] pid_t coordinator() const { return coordinator_; }

  /// A connected client; made again after the coordinator was started anew.
  protocol::client::Client& client();
  /// The result of a call that must succeed (the test fails and gets {} otherwise).
  Json call(const std::string& method, const Json& params);
  Result<Json> try_call(const std::string& method, const Json& params,
                        const std::string& idempotency_key = "");
  /// Uploads a file and registers it; its digest.
  std::string add_data(const std::string& path);
  /// Submits a job of `settings` and returns its id.
  std::string submit(const std::string& model, const std::string& data, const std::string& adapter,
                     const Json& settings);
  /// Loss of every step that the job's runs reported, by step.
  [[nodiscard]] std::map<std::int64_t, double> losses(const std::string& job) const;
  /// Polls job.show until the job has ended (or `timeout_ms`); its last answer.
  Json wait_job(const std::string& job, TimeMs timeout_ms = 120'000);
  /// A greedy answer's text through the platform.
  Result<protocol::client::Generation> generate(const std::string& model, const std::string& prompt,
                                                std::int64_t max_tokens, bool no_cache = true);
  /// Runs the CLI against this platform; its exit code and what it wrote.
  struct Output {
    int code = 0;
    std::string out, err;
  };
  Output cli(const std::vector<std::string>& arguments) const;
  /// Starts it, writing to and reading from these files; the caller waits for the process.
  [[nodiscard]] pid_t start_cli(const std::vector<std::string>& arguments, const std::string& out,
                                const std::string& err, const std::string& in = "/dev/null") const;

  [[nodiscard]] const std::string& directory() const { return directory_; }
  /// "cpu" or "cuda": of all workers, from the flags.
  [[nodiscard]] const std::string& device() const { return device_; }
  [[nodiscard]] std::string data_dir() const { return directory_ + "/data"; }

 private:
  pid_t spawn(const std::string& program, std::vector<std::string> arguments,
              const std::vector<std::string>& through = {});
  [[nodiscard]] std::string slot_directory(int slot) const;
  [[nodiscard]] pid_t lock_holder(int slot, const std::string& lock) const;

  [[nodiscard]] std::string key_file(const std::string& name) const {
    return directory_ + "/keys/" + name + ".key";
  }

  std::string directory_, device_ = "cpu";
  std::string address_;  ///< of workers' and blobs' sockets; "": sockets' files
  std::vector<std::string> flags_;
  pid_t coordinator_ = 0;
  std::vector<pid_t> supervisors_;
  std::unique_ptr<protocol::client::Client> client_;
};

/// True once `condition` holds; false after `timeout_ms` (scaled).
bool eventually(TimeMs timeout_ms, const std::function<bool()>& condition);

}  // namespace tandem::test
