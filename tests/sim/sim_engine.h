// An engine as a state machine, faithful to control.capnp and to nothing else: trains jobs in
// virtual steps, answers requests with tokens that follow from the request, dies and comes back as
// another incarnation. What it computes is a function of its input, so any engine, any attempt and
// any restart must give the same. The first rank of a replica is one too: it loads, then answers.
#pragma once

#include "tests/sim/sim_coordinator.h"

#include <map>
#include <optional>
#include <string>

namespace tandem::sim {

/// Token `index` of the answer, and how many there are.
std::int32_t token_of(const Digest& adapter, const std::string& prompt, std::int64_t index);
std::int64_t length_of(const std::string& prompt);
/// The text of the manifest a job publishes; its chunk is put into the registry.
std::string make_manifest(storage::Registry& registry, protocol::ManifestKind kind,
                          const Digest& base, const JobId& job, std::int64_t step, Epoch epoch = 0);

class SimEngine {
 public:
  SimEngine(Network& network, SimCoordinator& coordinator, int slot);
  /// The first rank of a gang, which lives once and for one job.
  SimEngine(Network& network, SimCoordinator& coordinator, int slot,
            const protocol::StartJob& start);

  /// kill -9; the agent starts another one after `down_ms` (of a gang: none).
  void crash(TimeMs down_ms);
  /// SIGSTOP or a partition: neither hears nor says anything, and then goes on as if nothing had
  /// been.
  void freeze(TimeMs ms) { frozen_until_ms_ = network_.now() + ms; }
  [[nodiscard]] bool alive() const { return alive_; }
  [[nodiscard]] std::uint64_t deaths() const { return deaths_; }

 private:
  struct JobRun {
    protocol::StartJob start;
    std::int64_t step = 0, total = 12;
    std::uint64_t seq = 0;
    bool publishing = false, pausing = false, ending = false;
  };
  struct Request {
    protocol::Infer infer;
    std::int64_t next = 0;
  };
  struct Reliable {
    protocol::WorkerMessage message;
    TimeMs sent_ms = -1;
  };

  [[nodiscard]] bool gang() const { return gang_start_.gang != 0; }
  [[nodiscard]] bool replica() const { return !gang_start_.serve_json.empty(); }
  void start();
  void tick();
  void hear(const protocol::ControlMessage& message);
  void send(protocol::WorkerMessage message);
  void send_reliably(const std::string& of, protocol::WorkerMessage message);
  void say_hello();
  void heartbeat();
  void begin_job(const protocol::StartJob& start_job);
  void train();
  void load_and_drain();
  void answer();
  void on_ack(const protocol::JobAck& ack);
  void end_job(const Status& status);
  void checkpoint();
  void publish();

  Network& network_;
  SimCoordinator& coordinator_;
  const int slot_;
  const WorkerId worker_;
  const protocol::StartJob gang_start_;  ///< of a gang
  Incarnation incarnation_ = 0;
  std::string peer_;
  bool alive_ = false, greeted_ = false;
  TimeMs frozen_until_ms_ = 0, heard_ms_ = 0, hello_ms_ = -1000, beat_ms_ = -1000, step_ms_ = 0;
  std::uint64_t seq_ = 0, deaths_ = 0;
  Digest model_;
  std::optional<JobRun> job_;
  std::map<std::string, Request> requests_;
  std::map<std::string, Reliable> reliable_;
};

}  // namespace tandem::sim
