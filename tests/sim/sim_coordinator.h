// The real core over a registry in memory, with a process that dies and comes back: before a
// commit, between commit and sends, or with a registry that refuses commits. Checks the invariants
// that must hold after every single commit.
#pragma once

#include "coordinator/background.h"
#include "coordinator/core.h"
#include "coordinator/registry_store.h"
#include "storage/memory_store.h"
#include "tests/sim/sim_network.h"

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace tandem::sim {

class SimCoordinator {
 public:
  SimCoordinator(Network& network, std::uint64_t seed, coordinator::Limits limits);

  using ToClient = std::function<void(const protocol::ServerMessage&)>;
  using ToWorker = std::function<void(const protocol::ControlMessage&)>;
  /// Who hears what is sent to `peer`.
  void connect_client(const std::string& peer, ToClient hear) { clients_[peer] = std::move(hear); }
  void connect_worker(const std::string& peer, ToWorker hear) { workers_[peer] = std::move(hear); }
  void disconnect_worker(const std::string& peer) { workers_.erase(peer); }

  /// Messages of peers, through the network.
  void from_client(const std::string& peer, protocol::ClientMessage message);
  void from_worker(const std::string& peer, protocol::WorkerMessage message);

  /// kill -9, and a new process after `down_ms`. `at`: 0 now, 1 before the next commit, 2 after it
  /// and before its sends.
  void crash(int at, TimeMs down_ms);
  /// The next `count` commits fail as on a full disk.
  void fail_commits(int count);

  [[nodiscard]] bool up() const { return core_ != nullptr; }
  coordinator::Coordinator& core() { return *core_; }
  storage::Registry& registry() { return *registry_; }
  [[nodiscard]] const std::vector<std::string>& violations() const { return violations_; }
  void violation(const std::string& what);
  [[nodiscard]] std::uint64_t crashes() const { return crashes_; }
  [[nodiscard]] std::uint64_t failed_commits() const { return failed_commits_; }

 private:
  void start();
  void stop(TimeMs down_ms);
  void step(const coordinator::Input& input);
  void carry_out(std::vector<coordinator::Effect> effects);
  void check_tables();
  void check_chunk(const protocol::GenerateChunk& chunk);
  [[nodiscard]] coordinator::Now now() const;

  Network& network_;
  const coordinator::Limits limits_;
  storage::MemoryStore* memory_ = nullptr;
  std::unique_ptr<storage::Registry> registry_;
  std::unique_ptr<coordinator::RegistryStore> store_;
  std::unique_ptr<coordinator::Coordinator> core_;
  std::uint64_t life_ = 0, seed_;
  int crash_at_ = 0;
  TimeMs crash_down_ms_ = 0;
  std::uint64_t crashes_ = 0, failed_commits_ = 0;
  std::map<std::string, ToClient> clients_;
  std::map<std::string, ToWorker> workers_;
  std::map<std::string, std::int64_t> next_index_;  // request -> token that must come next
  std::vector<std::string> violations_;
};

}  // namespace tandem::sim
