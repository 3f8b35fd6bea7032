// The core with a clock that tests move, a registry in memory, and everybody it talks to as lists
// of what they were sent. Background work is done at once unless a test holds it.
#pragma once

#include "coordinator/background.h"
#include "coordinator/core.h"
#include "coordinator/registry_store.h"
#include "storage/memory_store.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace tandem::coordinator {

class CoreHarness {
 public:
  explicit CoreHarness(Limits limits = {});

  // -- time and processes
  void advance(TimeMs ms);  ///< in ticks of 50 ms
  void restart();           ///< the process dies and starts again
  void fail_commits(int count) { memory_->fail_commits(count, internal_error("disk full")); }

  // -- peers
  void client(const std::string& peer, const std::string& user = "");
  void engine(int slot, Incarnation incarnation = 0, std::vector<protocol::RunningJob> jobs = {});
  /// Its hello, again at every call; `jobs`: the gang it holds.
  void agent(int slot, std::vector<protocol::RunningJob> jobs = {});
  /// The first rank of a gang that worker `slot` leads says hello; `model`: of a replica that can
  /// serve.
  void gang(int slot, Incarnation incarnation, std::vector<protocol::RunningJob> jobs,
            const Digest& model = {});
  void beat(int slot, std::vector<protocol::RunningJob> jobs = {}, int running = 1,
            std::vector<Digest> adapters = {});
  void from_client(const std::string& peer, protocol::ClientMessage message);
  void step_as(const std::string& peer, const std::string& user, bool admin,
               protocol::ClientMessage message) {
    step(ClientInput{peer, user, std::move(message), 0, admin});
  }
  /// The next message to this client cannot be sent: it is gone.
  void client_gone(const std::string& peer) { step(ClientGone{peer}); }
  void from_engine(int slot, protocol::WorkerMessage message);
  void from_agent(int slot, protocol::WorkerMessage message);
  void from_gang(int slot, protocol::WorkerMessage message);
  /// Slots from 10 on are of another host, those from 20 on of a third.
  static std::string host(int slot) { return slot < 10 ? "host" : slot < 20 ? "far" : "farther"; }
  static WorkerId worker(int slot) { return WorkerId(str(host(slot), "/cpu", slot)); }
  /// Slots from this one on are GPUs.
  int first_gpu = 1 << 20;
  /// What the next hello of a slot's agent and engine says: the device's name, and (the agent) the
  /// version of its programs.
  std::map<int, std::string> device_names, programs;
  std::map<int, std::int64_t> base_bytes;  ///< what the next hello of an engine says
  nlohmann::json dry_run{{"peak_bytes", 10}, {"fits", true}};  ///< of submit(), but for the device
  [[nodiscard]] std::string device(int slot) const { return slot < first_gpu ? "cpu" : "cuda"; }
  static std::string engine_peer(int slot) { return str("engine", slot); }
  static std::string agent_peer(int slot) { return str("agent", slot); }
  static std::string gang_peer(int slot) { return str("gang", slot); }

  // -- what they were sent; takes it
  template <class Message>
  std::vector<Message> to_engine(int slot) {
    return take<Message>(workers_[engine_peer(slot)]);
  }
  template <class Message>
  std::vector<Message> to_agent(int slot) {
    return take<Message>(workers_[agent_peer(slot)]);
  }
  template <class Message>
  std::vector<Message> to_gang(int slot) {
    return take<Message>(workers_[gang_peer(slot)]);
  }
  template <class Message>
  std::vector<Message> to_client(const std::string& peer) {
    return take<Message>(clients_[peer]);
  }
  /// Asks and returns the reply (the last one). Without a key: under one of its own.
  protocol::CallReply call(const std::string& method, const nlohmann::json& params,
                           const std::string& key = "", const std::string& peer = "c");

  // -- furniture
  Digest add_model(const std::string& name);
  void add_model_record(const ModelRecord& model);  ///< of a base that is there under another name
  void add_data(const std::string& name);
  std::string manifest(ManifestKind kind, const Digest& base, const std::string& bytes,
                       bool upload = true);
  /// Submits and answers the dry run; returns the job's id.
  JobId submit(const nlohmann::json& more = {}, const std::string& key = "");
  void generate(const std::string& id, const std::string& model, const std::string& prompt,
                const std::string& peer = "c");
  void answer(int slot, const std::string& id, std::int64_t index, std::int64_t tokens, bool last);

  [[nodiscard]] const Tables& tables() const { return core_->tables(); }
  [[nodiscard]] const Job& job(const JobId& id) const { return tables().jobs.at(id); }
  [[nodiscard]] const std::vector<Persist>& persists() const { return persists_; }
  Coordinator& core() { return *core_; }
  storage::Registry& registry() { return *registry_; }
  /// Effects of the last input, in order.
  [[nodiscard]] const std::vector<Effect>& last() const { return last_; }
  std::vector<StartWork> held;  ///< work that waits, while hold_work is set
  bool hold_work = false;
  void release_work();

 private:
  void start();
  void step(const Input& input);
  template <class Message, class Variant>
  static std::vector<Message> take(std::vector<Variant>& messages) {
    std::vector<Message> taken;
    std::vector<Variant> rest;
    for (Variant& message : messages) {
      if (auto* wanted = std::get_if<Message>(&message))
        taken.push_back(std::move(*wanted));
      else
        rest.push_back(std::move(message));
    }
    messages = std::move(rest);
    return taken;
  }

  const Limits limits_;
  ManualClock clock_;
  storage::MemoryStore* memory_ = nullptr;
  std::unique_ptr<storage::Registry> registry_;
  std::unique_ptr<RegistryStore> store_;
  std::unique_ptr<Coordinator> core_;
  std::uint64_t lives_ = 0, calls_ = 0, seq_ = 0;
  std::map<int, Incarnation> incarnations_;
  std::map<int, std::map<std::string, std::uint32_t>> attempts_;
  std::map<std::string, std::vector<protocol::ServerMessage>> clients_;
  std::map<std::string, std::vector<protocol::ControlMessage>> workers_;
  std::vector<Persist> persists_;
  std::vector<Effect> last_;
};

}  // namespace tandem::coordinator
