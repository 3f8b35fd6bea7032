// A client as the client library behaves: hello first, everything with an id, repeated until it is
// answered, answers counted token by token.
#pragma once

#include "tests/sim/sim_engine.h"

#include <map>
#include <string>

namespace tandem::sim {

class SimClient {
 public:
  struct Submission {
    std::string key, params, job;  ///< job: "" until acknowledged
    bool cancel = false;
    TimeMs sent_ms = -100'000;
    int tries = 0;
    std::string refused;
  };
  struct Replica {
    std::string key, id;  ///< id: "" until acknowledged
    bool remove = false, gone = false;
    TimeMs sent_ms = -100'000;
  };
  struct Request {
    protocol::Generate generate;
    Digest adapter;  ///< what it resolved to, from the first chunk
    std::vector<std::int32_t> tokens;
    bool done = false, cached = false;
    Status failed;
    TimeMs moved_ms = -100'000;
  };

  SimClient(Network& network, SimCoordinator& coordinator, int number, std::string model);

  /// `elastic`: data-parallel, with as few ranks as one.
  void submit(std::string adapter, int ranks, bool elastic, int priority);
  /// A replica of two ranks.
  void add_replica();
  /// Removes the oldest acknowledged replica, or all there will be, for as long as that takes.
  void remove_a_replica();
  void remove_replicas();
  void generate(const std::string& name, const std::string& prompt);
  /// Cancels the newest acknowledged job, for as long as that takes.
  void cancel_a_job();
  [[nodiscard]] bool idle() const;
  [[nodiscard]] const std::map<std::string, Submission>& submissions() const {
    return submissions_;
  }
  [[nodiscard]] const std::map<std::string, Replica>& replicas() const { return replicas_; }
  [[nodiscard]] const std::map<std::string, Request>& requests() const { return requests_; }

 private:
  void tick();
  void hear(const protocol::ServerMessage& message);
  void on_reply(const protocol::CallReply& reply);
  void on_replica_reply(Replica& replica, const protocol::CallReply& reply);
  void on_chunk(const protocol::GenerateChunk& chunk);

  Network& network_;
  SimCoordinator& coordinator_;
  const std::string peer_, model_;
  bool greeted_ = false;
  TimeMs heard_ms_ = 0, hello_ms_ = -10'000;
  std::uint64_t counter_ = 0;
  Incarnation server_ = 0;
  std::map<std::string, Submission> submissions_;  // by idempotency key
  std::map<std::string, Replica> replicas_;        // by idempotency key
  std::map<std::string, Request> requests_;
};

}  // namespace tandem::sim
